"""Every example config passes the dry run at its real world size, in one process, with the true model's config.json.

Tier: one process, no weights. The architectures are the published config.json files without what only text needs.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from megascore.config import JobConfig, load_config
from megascore.data import num_steps
from megascore.job.dry_run_report import format_bytes, render_dry_run
from megascore.job.planned import DryRun
from megascore.sites.requests import check_num_steps, resolve_scores
from tests.job.plans import plan_of

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "configs"
ARCHITECTURES = Path(__file__).parent / "architectures"


@dataclass(frozen=True)
class Example:
    """What a config should come to."""

    model: str
    num_ranks: int
    num_sites: int
    num_sites_here: int
    channels: dict[str, tuple[int, int]]
    """This rank's and all channels of some sites, by key."""
    weights_here: int
    """Parameters on each rank: its share, with what every rank of an axis has."""


# Parameters of the whole models, as published.
LLAMA_8B, LLAMA_70B, MIXTRAL, QWEN3 = 8_030_261_248, 70_553_706_496, 46_702_792_704, 30_532_122_624
LLAMA_8B_NORMS, LLAMA_70B_NORMS, MIXTRAL_NORMS = 65 * 4096, 161 * 8192, 65 * 4096
MIXTRAL_EXPERTS, QWEN3_EXPERTS = 32 * 8 * 3 * 4096 * 14336, 48 * 128 * 3 * 2048 * 768
MIXTRAL_ROUTERS = 32 * 8 * 4096
ITERATIVE = "decoder.layers.31.mlp.linear_fc2/ffn/iterative_contribution"

EXAMPLES = {
    "llama-3-8b": Example(
        model="Meta-Llama-3-8B",
        num_ranks=2,
        # In each layer ffn, attention heads, two norms and the layer; the last norm.
        num_sites=32 * 5 + 1,
        num_sites_here=32 * 5 + 1,
        channels={
            "decoder.layers.0.mlp.linear_fc2/ffn/l2_norm": (7168, 14336),
            "decoder.layers.31.self_attention.linear_proj/attention_heads/l2_norm": (2048, 4096),
            "decoder.final_layernorm/hidden_size/l2_norm": (4096, 4096),
        },
        weights_here=(LLAMA_8B + LLAMA_8B_NORMS) // 2,
    ),
    "llama-3-70b": Example(
        model="Meta-Llama-3-70B",
        num_ranks=8,
        num_sites=80 * 5 + 1,
        num_sites_here=80 * 5 + 1,
        channels={
            "decoder.layers.79.mlp.linear_fc2/ffn/l2_norm": (3584, 28672),
            "decoder.layers.79.self_attention.linear_proj/attention_heads/l2_norm": (1024, 8192),
            "decoder.layers.0.input_layernorm/hidden_size/l2_norm": (8192, 8192),
            "decoder.layers.40/layers/block_similarity": (1, 1),
        },
        weights_here=(LLAMA_70B + 7 * LLAMA_70B_NORMS) // 8,
    ),
    "mixtral-8x7b": Example(
        model="Mixtral-8x7B-v0.1",
        num_ranks=8,
        # In each layer attention heads, two norms, the layer, its experts, and the inside of 8 of them (2 here).
        num_sites=32 * (5 + 8) + 1,
        num_sites_here=32 * (5 + 2) + 1,
        channels={
            "decoder.layers.31.mlp.experts/experts/router_weighted_norm": (8, 8),
            "decoder.layers.31.mlp.experts.7.linear_fc2/expert_ffn/l2_norm": (14336, 14336),
            "decoder.layers.0.self_attention.linear_proj/attention_heads/l2_norm": (2048, 4096),
        },
        weights_here=MIXTRAL_EXPERTS // 4 + (MIXTRAL - MIXTRAL_EXPERTS + MIXTRAL_NORMS + MIXTRAL_ROUTERS) // 2,
    ),
    "qwen3-30b-a3b": Example(
        model="Qwen3-30B-A3B",
        num_ranks=8,
        num_sites=48 * (5 + 128) + 1,
        num_sites_here=48 * (5 + 16) + 1,
        channels={
            "decoder.layers.47.mlp.experts.127.linear_fc2/expert_ffn/l2_norm": (768, 768),
            "decoder.layers.0.self_attention.linear_proj/attention_heads/l2_norm": (4096, 4096),
            "decoder.layers.0.pre_mlp_layernorm/hidden_size/l2_norm": (2048, 2048),
        },
        weights_here=QWEN3 - QWEN3_EXPERTS + QWEN3_EXPERTS // 8,
    ),
    "llama-3-8b-iterative": Example(
        model="Meta-Llama-3-8B",
        num_ranks=2,
        num_sites=32,
        num_sites_here=32,
        channels={ITERATIVE: (7168, 14336)},
        weights_here=(LLAMA_8B + LLAMA_8B_NORMS) // 2,
    ),
    "llama-3-8b-blockwise": Example(
        model="Meta-Llama-3-8B",
        num_ranks=1,
        num_sites=32 * 5 + 1,
        num_sites_here=32 * 5 + 1,
        channels={"decoder.layers.31.mlp.linear_fc2/ffn/l2_norm": (14336, 14336)},
        weights_here=LLAMA_8B,
    ),
}

Plans = Callable[[str], tuple[JobConfig, DryRun]]


@pytest.fixture(scope="module")
def plan() -> Plans:
    """Dry runs by the name of the example; each is made once."""
    from megascore.job.dry_run import dry_run

    plans: dict[str, tuple[JobConfig, DryRun]] = {}

    def of(name: str) -> tuple[JobConfig, DryRun]:
        if name not in plans:
            architecture = ARCHITECTURES / EXAMPLES[name].model
            config = load_config(CONFIGS / f"{name}.yaml", [f"model.hf={architecture}", "run.steps=0"])
            planned = dry_run(config)
            assert planned is not None
            plans[name] = config, planned
        return plans[name]

    return of


def test_every_example_config_is_tested() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXAMPLES)


@pytest.mark.filterwarnings("ignore:Using a large number of experts")
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_has_the_right_shapes_at_its_real_size(name: str, plan: Plans) -> None:
    example, (_, planned) = EXAMPLES[name], plan(name)
    assert planned.pretended
    assert planned.num_ranks == example.num_ranks
    lines = {line.key: line for line in planned.sites}
    assert len(lines) == example.num_sites
    for key, (local, whole) in example.channels.items():
        assert (lines[key].num_local_channels, lines[key].num_channels) == (local, whole)
    for rank in range(example.num_ranks):
        rank_plan = plan_of(planned, rank)
        assert len(rank_plan.sites) == example.num_sites_here
        assert rank_plan.weight_bytes == {"bfloat16": 2 * example.weights_here}


@pytest.mark.filterwarnings("ignore:Using a large number of experts")
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_says_how_to_start_it_and_what_it_takes(name: str, plan: Plans) -> None:
    path, (config, planned) = CONFIGS / f"{name}.yaml", plan(name)
    text = path.read_text()
    assert f"weights {format_bytes(2 * EXAMPLES[name].weights_here)} on each GPU" in text
    one_layer = plan_of(planned, 0).one_layer
    assert (one_layer is not None) == config.run.blockwise
    if one_layer is not None:
        assert config.data.num_samples == one_layer.num_samples
        hidden = one_layer.hidden_bytes_of_sample
        assert f"# {format_bytes(one_layer.weight_bytes)} of them at a time" in text
        assert f"{format_bytes(hidden * one_layer.num_samples)} of host memory" in text
        assert f"{format_bytes(hidden)} each" in text
        # As the table of examples says.
        assert f"{format_bytes(one_layer.weight_bytes)} at a time |" in (ROOT / "launch/README.md").read_text()
    for start in (f"megascore score launch/configs/{name}.yaml run.steps=0", f"score.sh launch/configs/{name}.yaml"):
        assert start in text
    if "sent a sample" in text:
        assert f"{format_bytes(plan_of(planned, 0).sample_bytes)} sent a sample" in text
    changed = [line for line in text.splitlines() if "# CHANGE" in line]
    for key in ("hf", "jsonl", "field", "output", "checkpoint_dir"):
        assert any(line.strip().startswith(f"{key}:") for line in changed)
    assert config.run.checkpoint_dir is not None
    # What is missing is weights and data, which are not part of an example.
    assert len(planned.problems) == 2
    assert config.data.num_samples is not None
    assert config.data.num_samples % config.run.global_batch_size == 0
    assert config.run.global_batch_size % int(planned.layout["data"]) == 0
    check_num_steps(resolve_scores(config.scores), num_steps(config.data.num_samples, config.run.global_batch_size))


def test_an_example_is_started_as_it_says(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from megascore.cli import main

    monkeypatch.chdir(ROOT)
    architecture = ARCHITECTURES / "Mixtral-8x7B-v0.1"
    assert main(["score", "launch/configs/mixtral-8x7b.yaml", "run.steps=0", f"model.hf={architecture}"]) == 0
    shown = capsys.readouterr().out
    assert "decoder.layers.31.mlp.experts.7.linear_fc2/expert_ffn/l2_norm" in shown
    assert "24.2 GB bfloat16" in shown


def test_the_pages_say_what_the_dry_run_of_llama_70b_says(plan: Plans) -> None:
    _, planned = plan("llama-3-70b")
    shown = io.StringIO()
    render_dry_run(planned, Console(file=shown, width=80))
    lines = [line.strip() for line in shown.getvalue().splitlines()]
    page = (ROOT / "megascore/job/README.md").read_text()
    excerpt = page.split("megascore score launch/configs/llama-3-70b.yaml run.steps=0")[1].split("```text\n")[1]
    excerpt_lines = [line.strip() for line in excerpt.split("```")[0].splitlines() if line.strip()]
    assert len(excerpt_lines) > 8
    assert [line for line in excerpt_lines if line != "..." and line not in lines] == []
    # 161 norms, a row of sums and a count of tokens for each.
    assert plan_of(planned, 0).sample_bytes == 161 * (8192 + 1) * 8
    # Beside the sums every site counts calls and tokens, and l2_norm samples; all of these, and the scores, also by 8
    # groups of steps.
    sums = 80 * (28672 + 8192 + 1) + 161 * 8192 + 2 * len(planned.sites) + (80 + 80 + 161)
    scores = 80 * (28672 + 64 + 1) + 161 * 8192
    assert planned.finish_bytes == (1 + 8) * (sums + scores) * 8
    table = (ROOT / "megascore/parallel/README.md").read_text().split("## What it sends")[1].split("\n## ")[0]
    assert f"{format_bytes(plan_of(planned, 0).sample_bytes)} for each sample with sequence parallelism" in table
    assert f"two all-reduces, {format_bytes(planned.finish_bytes)}, once" in table
    # The published hook gathers the inputs of both projections over the tensor-parallel ranks, in bfloat16.
    gathered = 80 * 8192 * (28672 + 8192) * 2 * 7 // 8
    assert f"{format_bytes(gathered)} for each micro-batch and rank" in table
