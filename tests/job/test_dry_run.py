"""Dry runs: a world that one process pretends is the one that real ranks report. Tier: gloo processes."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from rich.console import Console
from torch import nn

from megascore.config import DataConfig, JobConfig, ModelConfig, ParallelConfig, RunConfig
from megascore.errors import ConfigError, DataError, LayoutError, MegascoreError, ModelError
from megascore.hooks.method import Method
from megascore.job.dry_run import dry_run
from megascore.job.dry_run_report import format_bytes
from megascore.job.job import run_job
from megascore.job.planned import DryRun, plan_of_rank
from megascore.mcore.models.gpt import build_gpt
from megascore.mcore.world.parallel_world import is_alone
from megascore.sites.plain import PlainModelView
from megascore.sites.requests import ScoreRequest
from megascore.weights.huggingface.config import read_config
from tests.blockwise.tiny_decoder import TinyDecoder
from tests.hooks.test_kept import ListHook
from tests.job.plans import plan_of
from tests.mcore.oracle import all_scores
from tests.mcore.sites.test_communication import ADDITIVE, SEQUENCE_LENGTH, score_and_measure
from tests.models import FAMILIES, SIZES, save_checkpoint
from tests.old_versions import needs_collectives_on_meta
from tests.pool import WorkerPool

pytestmark = needs_collectives_on_meta

EXPERT_SCORES: list[dict[str, Any]] = [
    {"target": "experts"},
    {"target": "expert_ffn"},
    {"target": "hidden_size"},
    {"target": "layers"},
]
LAYOUTS: dict[str, tuple[str, ParallelConfig]] = {
    "dense, TP with sequence parallelism, PP": ("llama", ParallelConfig(tensor=2, sequence=True, pipeline=2)),
    "dense, uneven and virtual PP": (
        "llama",
        ParallelConfig(pipeline=2, virtual_pipeline=2, pipeline_layers=[2, 2], processes=4),
    ),
    "dense, TP, DP": ("mistral", ParallelConfig(tensor=2, processes=4)),
    "dense, TP and CP": ("qwen3", ParallelConfig(tensor=2, sequence=True, context=2)),
    "experts, EP across data-parallel ranks": ("mixtral", ParallelConfig(tensor=2, sequence=True, expert=4)),
    "experts, EP, their TP, PP": ("mixtral", ParallelConfig(pipeline=2, expert=1, expert_tensor=2)),
    "some layers with experts": ("qwen3_moe", ParallelConfig(tensor=2, sequence=True, expert=2, processes=4)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small model of each family in ``LAYOUTS``: the config of each, and no weights."""
    root = tmp_path_factory.mktemp("models")
    for family in {family for family, _ in LAYOUTS.values()}:
        save_checkpoint(root / "whole" / family, family)
        folder = root / family
        folder.mkdir()
        (folder / "config.json").write_bytes((root / "whole" / family / "config.json").read_bytes())
    return root


def job(model: Path, parallel: ParallelConfig, scores: Any = "minitron", **data: Any) -> JobConfig:
    """A job whose data file is nowhere."""
    return JobConfig(
        model=ModelConfig(hf=str(model), dtype="float32"),
        data=DataConfig(**{"text": "nowhere.txt", "sequence_length": SEQUENCE_LENGTH, **data}),
        parallel=parallel,
        scores=scores,
        run=RunConfig(steps=0, device="cpu", global_batch_size=8, timeout_minutes=1, output="nowhere.safetensors"),
    )


def dry_run_on_rank(config: JobConfig) -> DryRun | str | None:
    try:
        return dry_run(config)
    except MegascoreError as error:
        return f"{type(error).__name__}: {error}"


def pretend(config: JobConfig) -> DryRun:
    planned = dry_run(config)
    assert planned is not None
    assert planned.pretended
    assert not dist.is_initialized()
    assert not parallel_state.model_parallel_is_initialized()
    return planned


def show(config: JobConfig) -> str:
    shown = io.StringIO()
    assert run_job(config, Console(file=shown, width=80)) is None
    return shown.getvalue()


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_pretended_world_reports_what_real_ranks_do(case: str, models: Path, world: WorkerPool) -> None:
    family, parallel = LAYOUTS[case]
    scores = EXPERT_SCORES if family in ("mixtral", "qwen3_moe") else all_scores(2)
    config = job(models / family, parallel, scores)
    pretended = pretend(config)
    real, *others = world.run(pretended.num_ranks, dry_run_on_rank, config)
    assert isinstance(real, DryRun), real
    assert others == [None] * (pretended.num_ranks - 1)
    assert not real.pretended
    assert pretended.num_ranks == 4
    for rank in range(4):
        assert plan_of(pretended, rank) == plan_of(real, rank)
    assert pretended.sites == real.sites
    assert pretended.layout == real.layout
    assert pretended.samples_of_step == real.samples_of_step
    assert pretended.finish_bytes == real.finish_bytes
    assert [problem.split()[0] for problem in pretended.problems] == [str(models / family), "text"]


def test_what_it_says_is_sent_is_what_a_run_sends(models: Path, world: WorkerPool) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True)
    planned = pretend(job(models / "llama", parallel, ADDITIVE))
    measured = world.run(2, score_and_measure, str(models / "llama"), parallel, ADDITIVE)[0]
    # Beside what the sites send goes the number that tells whether all is finite. One sample in its only step.
    of_sites = measured["step"][1] - 8
    assert plan_of(planned, 0).sample_bytes == of_sites
    assert plan_of(planned, 0).step_bytes == 8 * of_sites
    assert planned.finish_bytes == measured["finish"][1]
    assert len(planned.sites) == measured["hooks"][0]


def test_weights_and_hooks_are_counted_by_their_types(models: Path) -> None:
    config = job(models / "mixtral", ParallelConfig(expert=2, pipeline=2), EXPERT_SCORES)
    planned = pretend(replace(config, model=ModelConfig(hf=str(models / "mixtral"), dtype="bfloat16")))
    hidden, ffn, experts = SIZES["hidden_size"], SIZES["intermediate_size"], 4
    head_dim = hidden // SIZES["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * SIZES["num_key_value_heads"] * head_dim
    layer = 2 * hidden + attention + experts * hidden + experts // 2 * 3 * hidden * ffn
    embedding = SIZES["vocab_size"] * hidden
    stages = (2 * layer + embedding, 2 * layer + hidden + embedding)
    for rank, numbers in zip((0, 1, 2, 3), (*stages[:1] * 2, *stages[1:] * 2), strict=True):
        assert plan_of(planned, rank).weight_bytes == {"bfloat16": 2 * numbers}
    float64 = 8
    line = next(
        line for line in planned.sites if line.key == "decoder.layers.3.mlp.experts.2.linear_fc2/expert_ffn/l2_norm"
    )
    assert planned.sites[line] == [3]
    # The sums, and the numbers of calls and tokens: of all steps, up to the last one, and of 8 groups of steps.
    assert line.kept_bytes == (1 + 1 + 8) * (ffn + 2) * float64
    # Those of all steps and of the groups, and the scores with all groups and without each.
    assert line.finish_bytes == (1 + 8) * (ffn + 2 + ffn) * float64


class RequestOfLists(ScoreRequest):
    """A score whose hook keeps more than its statistics."""

    @property
    def definition(self) -> Method:
        return replace(super().definition, hook=ListHook)


def test_a_list_of_tensors_that_a_hook_keeps_is_counted() -> None:
    view = PlainModelView(TinyDecoder())
    plain, with_lists = (
        plan_of_rank(view, [kind("ffn", "l2_norm")], 1).sites for kind in (ScoreRequest, RequestOfLists)
    )
    assert len(plain) == 4
    # 5 float64 and 3 float32 numbers.
    assert [line.kept_bytes for line in with_lists] == [line.kept_bytes + 5 * 8 + 3 * 4 for line in plain]


def test_it_shows_every_site_and_what_is_not_ready(models: Path) -> None:
    shown = show(job(models / "llama", ParallelConfig(tensor=2, sequence=True, pipeline=2)))
    for layer in range(SIZES["num_hidden_layers"]):
        ranks = "0-1" if layer < 2 else "2-3"
        assert f"decoder.layers.{layer}.mlp.linear_fc2/ffn/l2_norm" in shown
        row = next(row for row in shown.splitlines() if f"layers.{layer}.input_layernorm/" in row)
        assert row.split()[1:] == ["64", "of", "64", "tp=sum*", "pp=own", ranks, "5.4", "kB", "520", "B"]
    assert "No hook: 4 x attention output projection, by KV head: not in 'scores'" in shown
    assert any(row.startswith("2-3 ") for row in shown.splitlines())
    assert "The 4 ranks were pretended by one process" in shown
    assert "Not ready: text nowhere.txt not found" in shown
    assert "Not ready: " + str(models / "llama") in shown


def test_a_job_that_could_run_is_told_no_problem(models: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words")
    assert "Not ready" not in show(job(models / "whole" / "llama", ParallelConfig(tensor=2), text=str(text)))
    assert sorted(tmp_path.iterdir()) == [text]


def test_a_world_of_one_and_one_without_data_are_pretended_too(models: Path) -> None:
    planned = pretend(job(models / "llama", ParallelConfig(), text=None))
    assert planned.num_ranks == 1
    assert "no data is given" in planned.problems[1]


def test_the_device_that_is_asked_for_need_not_be_there(models: Path) -> None:
    config = job(models / "llama", ParallelConfig(tensor=2))
    assert pretend(replace(config, run=replace(config.run, device="cuda"))).num_ranks == 2


def test_a_world_of_one_that_torchrun_starts_is_a_process_by_itself(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pretend(job(models / "llama", ParallelConfig(tensor=2))).num_ranks == 2
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_alone()


@pytest.mark.parametrize(
    ("parallel", "data", "kind", "words"),
    [
        (ParallelConfig(context=4, processes=6), {}, LayoutError, "6 processes do not fit the layout"),
        (ParallelConfig(tensor=3), {}, LayoutError, "tensor sizes that would do: 1, 2"),
        (ParallelConfig(tensor=2), {"sequence_length": 160}, ModelError, "128 positions"),
        (ParallelConfig(processes=8), {"num_samples": 4}, DataError, "4 samples for 8 data-parallel ranks"),
    ],
)
def test_what_cannot_run_is_refused(
    parallel: ParallelConfig, data: dict[str, Any], kind: type[MegascoreError], words: str, models: Path
) -> None:
    with pytest.raises(kind, match=words):
        dry_run(job(models / "llama", parallel, **data))
    assert not dist.is_initialized()


def test_samples_that_ranks_with_experts_cannot_share_evenly_are_refused(models: Path) -> None:
    config = job(models / "mixtral", ParallelConfig(expert=4), EXPERT_SCORES, num_samples=10)
    with pytest.raises(DataError, match="10 samples in steps of 8 do not split evenly over 4 data-parallel ranks"):
        dry_run(config)


def test_a_target_that_the_model_does_not_have_is_refused(models: Path, world: WorkerPool) -> None:
    config = job(models / "mixtral", ParallelConfig(expert=2), [{"target": "ffn"}])
    with pytest.raises(ModelError, match="target 'ffn' matches no module on any rank"):
        dry_run(config)
    told = world.run(2, dry_run_on_rank, config)
    assert all("target 'ffn' matches no module" in str(text) for text in told)


def test_another_number_of_processes_than_the_job_is_meant_for_is_refused(models: Path, world: WorkerPool) -> None:
    config = job(models / "llama", ParallelConfig(tensor=2, processes=4))
    for told in world.run(2, dry_run_on_rank, config):
        assert "parallel.processes=4, but the world has 2: start 4 processes" in str(told)
    run = replace(config.run, steps=None)
    with pytest.raises(LayoutError, match="parallel.processes=4, but the world has 1"):
        run_job(replace(config, run=run), Console(file=io.StringIO()))


def test_a_megatron_checkpoint_says_by_itself_what_it_is(saved: Path) -> None:
    config = job(saved / "hf", ParallelConfig(tensor=2))
    by_args = replace(config, model=ModelConfig(load=str(saved / "ck"), dtype="float32"))
    assert pretend(by_args).groups == pretend(config).groups


def provider_for_any_device(parallel: ParallelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    config = read_config(provider_for_any_device.model)  # type: ignore[attr-defined]
    return build_gpt(config.architecture, parallel, dtype, device, SEQUENCE_LENGTH)


def test_a_function_of_the_users_builds_on_the_meta_device(models: Path) -> None:
    provider_for_any_device.model = models / "llama"  # type: ignore[attr-defined]
    config = job(models / "llama", ParallelConfig(tensor=2, pipeline=2))
    provided = ModelConfig(provider=f"{__name__}:provider_for_any_device", dtype="float32")
    assert pretend(replace(config, model=provided)).groups == pretend(config).groups


def provider_with_a_tower(parallel: ParallelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    chunks = provider_for_any_device(parallel, device, dtype)
    for layer in chunks[0].decoder.layers[:2]:
        layer.add_module("adapter", nn.Linear(4, 4, device=device))
    chunks[0].tower = nn.Sequential(nn.Linear(4, 4, device=device))
    return chunks


def test_what_is_unknown_is_listed(models: Path) -> None:
    provider_for_any_device.model = models / "llama"  # type: ignore[attr-defined]
    config = job(models / "llama", ParallelConfig())
    shown = show(replace(config, model=ModelConfig(provider=f"{__name__}:provider_with_a_tower", dtype="float32")))
    unknown = [line for line in shown.splitlines() if "not a module that megascore knows" in line]
    assert unknown == [
        "No hook: decoder.layers.*.adapter: Linear (2 layers): not a module that megascore knows",
        "No hook: tower: Sequential: not a module that megascore knows",
    ]


def test_weights_without_a_name_stand_in_the_way_of_checkpoints(models: Path) -> None:
    provider_for_any_device.model = models / "llama"  # type: ignore[attr-defined]
    config = job(models / "llama", ParallelConfig(tensor=2))
    provided = replace(config, model=ModelConfig(provider=f"{__name__}:provider_for_any_device", dtype="float32"))
    saving = replace(provided, run=replace(config.run, checkpoint_dir="nowhere"))
    words = "run.checkpoint_dir is given, but nothing tells which weights"
    assert [words in "".join(pretend(planned).problems) for planned in (provided, saving)] == [False, True]


def provider_that_looks_at_values(parallel: ParallelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    chunks = provider_for_any_device(parallel, device, dtype)
    assert all(float(weight.sum()) < 1e9 for weight in chunks[0].parameters())
    return chunks


def test_a_function_that_needs_values_is_told_to_start_real_ranks(models: Path) -> None:
    provider_for_any_device.model = models / "llama"  # type: ignore[attr-defined]
    config = job(models / "llama", ParallelConfig(tensor=2))
    provided = ModelConfig(provider=f"{__name__}:provider_that_looks_at_values", dtype="float32")
    with pytest.raises(ModelError, match="cannot be built on PyTorch's meta device.*torchrun --nproc-per-node 2"):
        dry_run(replace(config, model=provided))
    assert not dist.is_initialized()


def test_a_pytorch_that_cannot_pretend_is_told(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.testing._internal.distributed.fake_pg", None)
    with pytest.raises(ConfigError, match="cannot pretend 2 processes.*torchrun --nproc-per-node 2"):
        dry_run(job(models / "llama", ParallelConfig(tensor=2)))


BLOCKWISE_LAYOUTS = {
    "dense, TP with sequence parallelism, PP": ("llama", all_scores(2)),
    "dense, uneven and virtual PP": ("llama", "minitron"),
    "dense, TP and CP": ("qwen3", [{"target": "kv_heads"}]),
    "some layers with experts": ("qwen3_moe", "minitron"),
}


@pytest.mark.parametrize("case", BLOCKWISE_LAYOUTS)
def test_one_layer_at_a_time_is_planned_alike_by_one_process_and_by_real_ranks(
    case: str, models: Path, world: WorkerPool
) -> None:
    family, scores = BLOCKWISE_LAYOUTS[case]
    full = job(models / family, LAYOUTS[case][1], scores, num_samples=16)
    config = replace(full, run=replace(full.run, blockwise=True))
    pretended, at_once = pretend(config), pretend(full)
    real, memory = world.run(4, plan_and_see_layers, config)[0]
    assert memory == 0, "layers took memory on the device"
    for rank in range(4):
        assert plan_of(pretended, rank) == plan_of(real, rank)
        # But for what is there at a time, the plan of a full pass.
        assert replace(plan_of(real, rank), one_layer=None) == plan_of(at_once, rank)
    assert pretended.sites == real.sites == at_once.sites


def plan_and_see_layers(config: JobConfig) -> tuple[DryRun | None, int]:
    """Return the dry run, and the bytes that the layers took while hooks were planned."""
    from megascore.job import dry_run as module
    from megascore.mcore.pipeline.layers import layers_of

    seen = []
    plan = module.plan_of_rank

    def look(view: Any, *others: Any) -> Any:
        weights = [w for chunk in view.modules for layer in layers_of(chunk) for w in layer.parameters()]
        planned = plan(view, *others)
        seen.append(sum(weight.nbytes for weight in weights if not weight.is_meta))
        return planned

    module.plan_of_rank = look
    try:
        return dry_run(config), sum(seen)
    finally:
        module.plan_of_rank = plan


def test_what_is_there_at_a_time_is_told_with_one_layer_at_a_time(models: Path) -> None:
    config = job(models / "mistral", ParallelConfig(tensor=2, sequence=True, processes=4), num_samples=20)
    config = replace(config, run=replace(config.run, blockwise=True))
    one = plan_of(pretend(config), 0).one_layer
    assert one is not None
    hidden, ffn, vocabulary = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    head_dim = FAMILIES["mistral"]["head_dim"]
    heads, kv_heads = SIZES["num_attention_heads"], SIZES["num_key_value_heads"]
    # Norms are on both ranks; embedding and output layer are two.
    layer = (2 * heads + 2 * kv_heads) * head_dim * hidden // 2 + 3 * hidden * ffn // 2 + 2 * hidden
    assert one.weight_bytes == 4 * (layer + 2 * vocabulary * hidden // 2 + hidden)
    assert one.hidden_bytes_of_sample == 4 * hidden * SEQUENCE_LENGTH // 2
    # Two steps of 8 samples and one of 4, each on two data-parallel ranks.
    assert one.num_samples == 4 + 4 + 2
    shown = show(config)
    waiting = format_bytes(one.hidden_bytes_of_sample * 10)
    assert f"One layer at a time: {format_bytes(one.weight_bytes)} of weights" in shown
    assert f"{waiting} of hidden states wait in host memory (ranks 0-3)" in shown
    assert "built on the device first" not in shown
    unknown = show(replace(config, data=replace(config.data, num_samples=None)))
    assert f"{format_bytes(one.hidden_bytes_of_sample)} of hidden states for each sample of the rank wait" in unknown
    spooled = replace(config, run=replace(config.run, spool_dir="spool"))
    assert "wait in run.spool_dir, beyond run.spool_memory_gb" in show(spooled)


def provider_with_offloading(parallel: ParallelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    chunks = provider_for_any_device(parallel, device, dtype)
    for chunk in chunks:
        chunk.config.cpu_offloading = True
    return chunks


def provider_with_an_empty_stage(parallel: ParallelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    chunks = provider_for_any_device(parallel, device, dtype)
    if parallel_state.get_pipeline_model_parallel_rank() == 1:
        chunks[0].decoder.layers = torch.nn.ModuleList()
    return chunks


def dry_run_with_an_empty_stage(config: JobConfig) -> DryRun | str | None:
    provider_for_any_device.model = config.model.hf  # type: ignore[attr-defined]
    return dry_run_on_rank(config)


def test_a_model_that_a_function_builds_is_all_there_at_first(models: Path) -> None:
    provider_for_any_device.model = models / "llama"  # type: ignore[attr-defined]
    config = job(models / "llama", ParallelConfig(tensor=2))
    provided = ModelConfig(provider=f"{__name__}:provider_for_any_device", dtype="float32")
    blockwise = replace(config, model=provided, run=replace(config.run, blockwise=True))
    assert "The whole model is built on the device first: the function in model.provider puts" in show(blockwise)


def test_a_megatron_checkpoint_is_there_one_layer_at_a_time(saved: Path, world: WorkerPool) -> None:
    provider_for_any_device.model = saved / "hf"  # type: ignore[attr-defined]
    config = job(saved / "hf", ParallelConfig(tensor=2), num_samples=16)
    config = replace(config, run=replace(config.run, blockwise=True))
    load = str(saved / "ck")
    by_args = replace(config, model=ModelConfig(load=load, dtype="float32"))
    provided = ModelConfig(provider=f"{__name__}:provider_for_any_device", load=load, dtype="float32")
    assert "built on the device first" not in show(by_args)
    expected = pretend(config).groups
    assert pretend(by_args).groups == pretend(replace(config, model=provided)).groups == expected
    real, memory = world.run(2, plan_and_see_layers, by_args)[0]
    assert (real.groups, memory) == (expected, 0)


def test_what_cannot_run_one_layer_at_a_time_is_refused_as_in_the_job(models: Path, world: WorkerPool) -> None:
    provider_for_any_device.model = models / "llama"  # type: ignore[attr-defined]
    config = job(models / "llama", ParallelConfig(tensor=2))
    provided = ModelConfig(provider=f"{__name__}:provider_with_offloading", dtype="float32")
    with pytest.raises(ModelError, match="run.blockwise: the model has cpu_offloading=True"):
        dry_run(replace(config, model=provided, run=replace(config.run, blockwise=True)))
    empty = f"{__name__}:provider_with_an_empty_stage"
    config = replace(
        job(models / "llama", ParallelConfig(pipeline=2)),
        model=ModelConfig(hf=str(models / "llama"), provider=empty, dtype="float32"),
    )
    assert pretend(config).num_ranks == 2
    config = replace(config, run=replace(config.run, blockwise=True))
    with pytest.raises(ModelError, match="at least one in each chunk"):
        dry_run(config)
    assert not dist.is_initialized()
    for told in world.run(2, dry_run_with_an_empty_stage, config):
        assert "at least one in each chunk" in str(told)


def test_llama_405b_on_288_ranks_takes_one_process(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128}
    others = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **sizes, **others}))
    parallel = ParallelConfig(tensor=8, sequence=True, pipeline=18, context=2)
    planned = pretend(job(tmp_path, parallel))
    assert (planned.num_ranks, planned.layout["data"], len(planned.groups)) == (288, 1, 18)
    # One copy of the model: 405.85 billion parameters of 4 bytes.
    copies = 288 // (8 * 18)
    weights = sum(len(group.ranks) * sum(group.plan.weight_bytes.values()) for group in planned.groups)
    # Norms are on every tensor-parallel rank: 7 copies too many of 253 x 16384 numbers.
    assert weights // copies // 4 == 405_853_388_800 + 7 * 253 * 16384


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "-"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB")]
)
def test_sizes_are_told_in_powers_of_1000(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text
    assert format_bytes(17_640_000_000) == "17.6 GB"
