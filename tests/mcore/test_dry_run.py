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

from megascore.errors import ConfigError, DataError, LayoutError, MegascoreError, ModelError
from megascore.mcore.dry_run import dry_run
from megascore.mcore.gpt import build_gpt
from megascore.mcore.huggingface.architecture import architecture_of
from megascore.mcore.huggingface.config import read_config
from megascore.mcore.job import run_job
from megascore.mcore.world import is_alone
from megascore.scoring.config import DataConfig, JobConfig, ModelConfig, ParallelConfig, RunConfig
from megascore.scoring.dry_run import DryRun
from megascore.scoring.dry_run_report import format_bytes
from tests.mcore.oracle import all_scores
from tests.mcore.test_communication import ADDITIVE, SEQUENCE_LENGTH, score_and_measure
from tests.models import SIZES, save_checkpoint
from tests.pool import WorkerPool

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
        assert pretended.plan_of(rank) == real.plan_of(rank)
    assert pretended.sites == real.sites
    assert pretended.layout == real.layout
    assert pretended.samples_of_step == real.samples_of_step
    assert pretended.finish_bytes == real.finish_bytes
    assert [problem.split()[0] for problem in pretended.problems] == [str(models / family), "text"]


def test_what_it_says_is_sent_is_what_a_run_sends(models: Path, world: WorkerPool) -> None:
    parallel = ParallelConfig(tensor=2, sequence=True)
    planned = pretend(job(models / "llama", parallel, ADDITIVE))
    measured = world.run(2, score_and_measure, str(models / "llama"), parallel, ADDITIVE)[0]
    # One sample in its only step.
    assert planned.plan_of(0).sample_bytes == measured["step"][1]
    assert planned.plan_of(0).step_bytes == 8 * measured["step"][1]
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
        assert planned.plan_of(rank).weight_bytes == {"bfloat16": 2 * numbers}
    float64 = 8
    line = next(
        line for line in planned.sites if line.key == "decoder.layers.3.mlp.experts.2.linear_fc2/expert_ffn/l2_norm"
    )
    assert planned.sites[line] == [3]
    # The sums, and the numbers of calls and tokens.
    assert line.kept_bytes == (ffn + 2) * float64
    # These, and the scores.
    assert line.finish_bytes == (ffn + 2 + ffn) * float64


def test_it_shows_every_site_and_what_is_not_ready(models: Path) -> None:
    shown = show(job(models / "llama", ParallelConfig(tensor=2, sequence=True, pipeline=2)))
    for layer in range(SIZES["num_hidden_layers"]):
        ranks = "0-1" if layer < 2 else "2-3"
        assert f"decoder.layers.{layer}.mlp.linear_fc2/ffn/l2_norm" in shown
        row = next(row for row in shown.splitlines() if f"layers.{layer}.input_layernorm/" in row)
        assert row.split()[1:] == ["64", "of", "64", "tp=sum*", "pp=own", ranks, "536", "B", "520", "B"]
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
        assert "LayoutError: parallel.processes=4, but the world has 2: start 4 processes" in str(told)
    run = replace(config.run, steps=None)
    with pytest.raises(LayoutError, match="parallel.processes=4, but the world has 1"):
        run_job(replace(config, run=run), Console(file=io.StringIO()))


def test_a_megatron_checkpoint_says_by_itself_what_it_is(saved: Path) -> None:
    config = job(saved / "hf", ParallelConfig(tensor=2))
    by_args = replace(config, model=ModelConfig(load=str(saved / "ck"), dtype="float32"))
    assert pretend(by_args).groups == pretend(config).groups


def provider_for_any_device(parallel: ParallelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    config = read_config(provider_for_any_device.model)  # type: ignore[attr-defined]
    return build_gpt(architecture_of(config), parallel, dtype, device, SEQUENCE_LENGTH)


def test_a_function_of_the_users_builds_on_the_meta_device(models: Path) -> None:
    provider_for_any_device.model = models / "llama"  # type: ignore[attr-defined]
    config = job(models / "llama", ParallelConfig(tensor=2, pipeline=2))
    provided = ModelConfig(provider=f"{__name__}:provider_for_any_device", dtype="float32")
    assert pretend(replace(config, model=provided)).groups == pretend(config).groups


def test_a_function_that_needs_values_is_told_to_start_real_ranks(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGASCORE_TEST_CHECKPOINT", str(models / "whole" / "llama"))
    config = job(models / "llama", ParallelConfig(tensor=2))
    provided = ModelConfig(provider="tests.mcore.providers:whole", dtype="float32")
    with pytest.raises(ModelError, match="cannot be built on PyTorch's meta device.*torchrun --nproc-per-node 2"):
        dry_run(replace(config, model=provided))
    assert not dist.is_initialized()


def test_a_pytorch_that_cannot_pretend_is_told(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.testing._internal.distributed.fake_pg", None)
    with pytest.raises(ConfigError, match="cannot pretend 2 processes.*torchrun --nproc-per-node 2"):
        dry_run(job(models / "llama", ParallelConfig(tensor=2)))


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
