"""Experts score the same on every layout: Megatron's own MoE layers on gloo processes against a float64 oracle."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megascore.config import ParallelConfig
from megascore.errors import ModelError
from megascore.mcore.sites.experts import PADDING, padding_of_experts
from megascore.parallel.axes import Placement
from megascore.scores.score_file import UNSEEN_VALUE, Scores
from megascore.sites.places import Place
from megascore.sites.requests import ScoreRequest
from megascore.sites.site import hook_at
from megascore.sites.targets import PlaceKind
from tests.mcore.expert_model import NUM_EXPERTS, SIZES, UNREACHABLE, Variant
from tests.mcore.order import assert_same_order
from tests.pool import WorkerPool

NUM_SAMPLES, GLOBAL_BATCH_SIZE = 8, 4
"""As many on each data-parallel rank: expert-parallel ranks exchange tokens in every micro-batch."""
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
"""float64: only the order of additions differs between layouts. float32: the model's own sums differ as well."""
METHODS = {
    "experts": ("router_weighted_norm", "output_norm", "frequency", "output_variance"),
    "expert_ffn": ("l2_norm", "mean_mean", "variance", "wanda", "fluctuation", "weight_norm"),
    "shared_expert_ffn": ("l2_norm", "independent_contribution"),
}
REQUESTS = [{"target": target, "method": method} for target, methods in METHODS.items() for method in methods]

Layouts = dict[str, tuple[dict[str, Any], Variant]]
TP_SP: dict[str, Any] = {"tensor": 2, "sequence": True}
LAYOUTS: dict[int, Layouts] = {
    1: {
        "one process": ({}, Variant()),
        "all-to-all": ({}, Variant("alltoall")),
        "grouped by Megatron": ({}, Variant("allgather", "legacy_grouped")),
        "float32": ({}, Variant(dtype="float32")),
    },
    2: {
        "EP=2": ({"expert": 2}, Variant()),
        "EP=2, all-to-all": ({"expert": 2}, Variant("alltoall")),
        "EP=2, float32": ({"expert": 2}, Variant("alltoall", dtype="float32")),
        "DP=2": ({}, Variant()),
        "CP=2, EP=2": ({"context": 2, "expert": 2}, Variant("alltoall")),
        "TP=2, each token on both ranks": ({"tensor": 2}, Variant()),
        "TP=2, experts split": ({"tensor": 2, "expert_tensor": 2}, Variant("alltoall")),
        "TP=2, EP=2, grouped by Megatron": ({"expert": 2, "tensor": 2}, Variant("alltoall", "legacy_grouped")),
    },
    4: {
        "EP=4, a rank without tokens": ({"expert": 4}, Variant("alltoall")),
        "EP=4, grouped by Megatron": ({"expert": 4}, Variant("allgather", "legacy_grouped")),
        "TP=2 SP, EP=2": ({**TP_SP, "expert": 2}, Variant("alltoall")),
        "TP=2 SP, EP=2, shared experts overlapped": ({**TP_SP, "expert": 2}, Variant("alltoall", overlap=True)),
        "TP=2, EP=2": ({"tensor": 2, "expert": 2}, Variant()),
        "TP=2 SP, EP=2, ETP=2": ({**TP_SP, "expert": 2, "expert_tensor": 2}, Variant()),
        "TP=2, EP=2, ETP=2": ({"tensor": 2, "expert": 2, "expert_tensor": 2}, Variant("alltoall")),
        "TP=2 SP, CP=2, EP=4": ({**TP_SP, "context": 2, "expert": 4}, Variant("alltoall")),
        "PP=2, EP=2": ({"pipeline": 2, "expert": 2}, Variant()),
        "TP=2 SP, EP=2, ETP=2, float32": (
            {**TP_SP, "expert": 2, "expert_tensor": 2},
            Variant("alltoall", dtype="float32"),
        ),
    },
    8: {
        "TP=2 SP, PP=2, EP=2": ({**TP_SP, "pipeline": 2, "expert": 2}, Variant("alltoall")),
        "TP=2 SP, EP=4, ETP=2": ({**TP_SP, "expert": 4, "expert_tensor": 2}, Variant("alltoall")),
    },
}


@pytest.fixture(scope="module")
def expected(world: WorkerPool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Scores and tokens per expert, by key."""
    return world.run(1, compute_expected)[0]


@pytest.mark.parametrize("world_size", LAYOUTS)
def test_experts_score_as_the_oracle_says(
    world_size: int, world: WorkerPool, expected: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    for by_layout in world.run(world_size, score_on, LAYOUTS[world_size]):
        for layout, (values, metadata, unseen) in by_layout.items():
            dtype = LAYOUTS[world_size][layout][1].dtype
            check_values(layout, values, unseen, expected[0], TOLERANCE[dtype])
            check_tokens(layout, metadata, expected[1])


def check_values(
    layout: str, values: dict[str, Tensor], unseen: dict[str, Any], expected: dict[str, Tensor], tolerance: float
) -> None:
    assert values.keys() | unseen.keys() == expected.keys(), layout
    for key, wanted in expected.items():
        if any(f".experts.{number}." in key for number in UNREACHABLE):
            assert unseen[key] == "all", f"{key} on {layout}"
            continue
        if "/experts/" in key:
            assert unseen[key] == list(UNREACHABLE), f"{key} on {layout}"
            wanted = wanted.clone()
            wanted[list(UNREACHABLE)] = UNSEEN_VALUE
        message = f"{key} on {layout}"
        torch.testing.assert_close(values[key], wanted, rtol=tolerance, atol=0, msg=lambda text: f"{message}: {text}")  # noqa: B023
        assert_same_order(values[key], wanted, tolerance, message)


def check_tokens(layout: str, metadata: dict[str, Any], tokens: dict[str, Tensor]) -> None:
    assert metadata["num_tokens"] == NUM_SAMPLES * SIZES["sequence"], layout
    for key in (key for key in tokens if key.endswith("/experts/router_weighted_norm")):
        wanted, site = tokens[key], metadata["sites"][key]
        assert site["tokens_per_expert"] == wanted.tolist(), f"{key} on {layout}"
        assert site["few_tokens"] == [number for number, count in enumerate(wanted) if 0 < count < 100]
        for number in range(NUM_EXPERTS):
            inside = metadata["sites"][f"{key.split('/')[0]}.{number}.linear_fc2/expert_ffn/l2_norm"]
            assert inside["num_tokens"] == wanted[number]
            assert inside["few_tokens"] == (number in site["few_tokens"])


def compute_expected() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world
    from tests.mcore.expert_model import build_expert_model
    from tests.mcore.expert_oracle import record

    with parallel_world(ParallelConfig(), torch.device("cpu"), timedelta(seconds=60)):
        chunks = build_expert_model(ParallelConfig())
        recorded = record(chunks[0])
        forward_only(chunks, list(make_tokens().split(1)), compute_loss=False)
        return recorded.scores(), dict(recorded.tokens)


def score_on(layouts: Layouts) -> dict[str, Any]:
    results = {}
    for name, (degrees, variant) in layouts.items():
        scores = score_layout(ParallelConfig(**degrees), variant)
        results[name] = dict(scores), scores.metadata, scores.unseen
    return results


def score_layout(parallel: ParallelConfig, variant: Variant) -> Scores:
    from megatron.core import parallel_state

    import megascore
    from megascore.data import micro_batches_of_step
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world
    from tests.mcore.expert_model import build_expert_model

    tokens = make_tokens()
    with parallel_world(parallel, torch.device("cpu"), timedelta(seconds=60)):
        chunks = build_expert_model(parallel, variant)
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        with megascore.attach(chunks, scores=REQUESTS) as run:
            for step in range(NUM_SAMPLES // GLOBAL_BATCH_SIZE):
                slices = micro_batches_of_step(step, NUM_SAMPLES, GLOBAL_BATCH_SIZE, 1, *ranks)
                forward_only(chunks, [tokens[part] for part in slices], compute_loss=False)
                run.step()
        return run.finish()


def make_tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SIZES["vocab"], (NUM_SAMPLES, SIZES["sequence"]), generator=generator)


@pytest.mark.parametrize("option", PADDING)
def test_padding_among_an_experts_tokens_is_refused(option: str) -> None:
    config = SimpleNamespace(fp8=None, fp4=None)
    assert padding_of_experts(config) is None
    setattr(config, option, "e4m3" if option.startswith("fp") else True)
    name = "decoder.layers.1.mlp.experts"
    place = Place(
        PlaceKind.ROUTED_EXPERTS,
        name,
        torch.nn.Identity(),
        name,
        Placement.whole(NUM_EXPERTS),
        lambda *_: None,
        obstacle=padding_of_experts(config),
    )
    with pytest.raises(ModelError, match=f"{name}: with {option} set"):
        hook_at(place, [ScoreRequest("experts", "router_weighted_norm")])


def test_experts_of_other_sizes_or_makes_are_told(world: WorkerPool) -> None:
    refused, unknown = world.run(1, look_at_other_experts)[0]
    assert (
        "experts have 24 channels on each of 1 expert-tensor-parallel ranks, but moe_ffn_hidden_size is 20" in refused
    )
    assert unknown == ["decoder.layers.1.mlp.experts: OtherExperts"]


def look_at_other_experts() -> tuple[str, list[str]]:
    from megascore.errors import LayoutError
    from megascore.mcore.sites.view import MegatronModelView
    from megascore.mcore.world.parallel_world import parallel_world
    from tests.mcore.expert_model import build_expert_model

    with parallel_world(ParallelConfig(), torch.device("cpu"), timedelta(seconds=60)):
        (model,) = build_expert_model(ParallelConfig())
        model.config.moe_ffn_hidden_size = 20
        with pytest.raises(LayoutError) as caught:
            _ = MegatronModelView([model]).places
        model.config.moe_ffn_hidden_size = SIZES["moe_ffn"]
        other = type("OtherExperts", (nn.Module,), {})()
        other.weights = model.decoder.layers[1].mlp.experts.local_experts
        model.decoder.layers[1].mlp.experts = other
        view = MegatronModelView([model])
        assert PlaceKind.ROUTED_EXPERTS in {place.kind for place in view.places}
        return str(caught.value), list(view.unknown)
