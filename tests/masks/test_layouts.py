"""A masked model computes what the pruned folder does, on every layout.

Tier: gloo processes, real Megatron on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import megascore
from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import PlanError
from megascore.mcore.models.build import load_model
from megascore.mcore.world.parallel_world import parallel_world
from tests.mcore.logits import CPU, TIMEOUT, run
from tests.models import load_with_transformers, save_checkpoint
from tests.pool import WorkerPool
from tests.smaller import exact, random_plan

SEQUENCE_LENGTH = 16
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
MODELS = {
    "dense": ("qwen3", {"hidden_size": 40, "layers": 3, "attention_heads": 2, "kv_heads": 2, "ffn": 56}),
    "experts": (
        "qwen3_moe",
        {"hidden_size": 40, "layers": 3, "attention_heads": 4, "kv_heads": 2, "experts": 4, "expert_ffn": 16},
    ),
}
LAYOUTS = {
    "tensor": (2, ParallelConfig(tensor=2)),
    "tensor, sequence, pipeline": (4, ParallelConfig(tensor=2, sequence=True, pipeline=2, pipeline_layers=[2, 2])),
    "virtual pipeline": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "context": (2, ParallelConfig(context=2)),
}
EXPERT_LAYOUTS = {
    "expert": (2, ParallelConfig(expert=2)),
    "expert tensor": (2, ParallelConfig(tensor=2, expert=1, expert_tensor=2)),
    "tensor, expert, pipeline": (
        4,
        ParallelConfig(tensor=2, sequence=True, expert=2, pipeline=2, pipeline_layers=[2, 2]),
    ),
}


@dataclass(frozen=True)
class Case:
    """A parent, a plan, and the folder that it makes."""

    parent: Path
    plan: megascore.Plan
    pruned: Path
    expected: Tensor
    """Logits of transformers, float64."""


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 128, (4, SEQUENCE_LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, tokens: Tensor) -> dict[str, Case]:
    found = {}
    for name, (family, wanted) in MODELS.items():
        root = tmp_path_factory.mktemp(name)
        parent = save_checkpoint(root / "parent", family, **HEADS)
        plan = random_plan(parent, **wanted)
        megascore.prune(parent, plan, root / "pruned")
        with torch.no_grad():
            found[name] = Case(parent, plan, root / "pruned", exact(root / "pruned")(tokens).logits)
    return found


def logits_of(case: Case, parallel: ParallelConfig, tokens: Tensor) -> tuple[Tensor | None, Tensor | None, bool]:
    """Logits of the masked parent and, where its layers split so, of the pruned folder; whether the masks are gone."""
    with parallel_world(parallel, CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(case.parent), dtype="float64"), parallel, CPU, SEQUENCE_LENGTH)
        before = run(chunks, tokens, compute_loss=True).logits
        with megascore.masked_units(chunks, case.plan):
            masked = run(chunks, tokens, compute_loss=True).logits
        after = run(chunks, tokens, compute_loss=True).logits
        # The hooks of `run` on the output layer add up: the last logits are of the last pass.
        same = before is None or after is None or torch.equal(before, after[-len(before) :])
        layers = [2, 1] if parallel.pipeline == 2 else None
        if parallel.virtual_pipeline > 1:
            return masked, None, same
        smaller = ParallelConfig(**{**vars(parallel), "pipeline_layers": layers})
    with parallel_world(smaller, CPU, TIMEOUT):
        chunks = load_model(ModelConfig(hf=str(case.pruned), dtype="float64"), smaller, CPU, SEQUENCE_LENGTH)
        return masked, run(chunks, tokens, compute_loss=True).logits, same


@pytest.mark.parametrize(
    ("name", "layout"),
    [("dense", layout) for layout in LAYOUTS] + [("experts", layout) for layout in EXPERT_LAYOUTS],
)
def test_masks_and_the_pruned_folder_agree_on_every_layout(
    name: str, layout: str, cases: dict[str, Case], tokens: Tensor, world: WorkerPool
) -> None:
    world_size, parallel = {**LAYOUTS, **EXPERT_LAYOUTS}[layout]
    case = cases[name]
    expected = case.expected
    if parallel.context > 1:
        # Each rank has the first and the last part of its half.
        expected = torch.empty(0)
    results = world.run(world_size, logits_of, case, parallel, tokens)
    assert all(same for _, _, same in results)
    having = [(masked, pruned) for masked, pruned, _ in results if masked is not None]
    assert having
    for masked, pruned in having:
        masked = masked[-len(tokens) :]
        if pruned is not None:
            # Sums over features and ranks in another order, in float64. Megatron-Core's router takes its softmax in
            # float32, here over fewer experts.
            assert float((masked - pruned).abs().max()) < (5e-7 if name == "experts" else 1e-9)
        if len(expected):
            # transformers and Megatron-Core compute rotary angles and softmax in float32.
            assert float((masked - expected).abs().max()) < 5e-6


def test_a_plan_of_another_model_is_refused(cases: dict[str, Case]) -> None:
    model = exact(cases["experts"].parent)
    with (
        pytest.raises(PlanError, match="the plan is for a model with experts None"),
        megascore.masked_units(model, cases["dense"].plan),
    ):
        pass


def test_features_behind_a_norm_with_a_mean_are_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "parent", "llama")
    plan, model = random_plan(folder, hidden_size=40), exact(folder)
    width = model.config.hidden_size
    model.model.norm = torch.nn.LayerNorm(width, dtype=torch.float64)
    with pytest.raises(PlanError, match="model.norm is a LayerNorm"), megascore.masked_units(model, plan):
        pass
    tokens = torch.arange(8).unsqueeze(0)
    whole = exact(folder)
    whole.model.norm = model.model.norm
    assert torch.equal(model(tokens).logits, whole(tokens).logits)


def test_in_half_precision_masks_are_as_near_as_the_smaller_model(tmp_path: Path, tokens: Tensor) -> None:
    folder = save_checkpoint(tmp_path / "parent", "qwen3", **HEADS)
    plan = random_plan(folder, hidden_size=40)
    megascore.prune(folder, plan, tmp_path / "pruned")
    parent, smaller = (load_with_transformers(path, torch.bfloat16) for path in (folder, tmp_path / "pruned"))
    with torch.no_grad():
        exact_logits = exact(tmp_path / "pruned")(tokens).logits
        own = smaller(tokens).logits.double() - exact_logits
        with megascore.masked_units(parent, plan):
            masked = parent(tokens).logits.double() - exact_logits
    # Rounding of the same size, and none that all features share, such as that of a scale.
    assert float(masked.norm()) < 1.5 * float(own.norm())
