"""Padding never counts: padded batches on every layout against formulas on the same documents run one by one."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megascore.config import ModelConfig, ParallelConfig
from megascore.errors import DataError
from tests.mcore.expert_model import SIZES as EXPERT_SIZES
from tests.mcore.expert_model import Variant
from tests.mcore.oracle import (
    Recorder,
    all_scores,
    expected_contributions,
    expected_moments,
    expected_scores,
    moment_scores,
)
from tests.mcore.order import assert_same_order
from tests.mcore.sites.test_experts import REQUESTS, TP_SP, Layouts, check_values
from tests.models import SIZES, save_checkpoint
from tests.pool import RankErrors, WorkerPool

LENGTHS = (16, 3, 9, 1, 12, 5, 7, 4)
"""Real tokens of the documents. Short ones leave whole ranks without a token where the sequence is split."""
SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE = 16, 4, 2
STEPS = (slice(0, 4), slice(4, 8))
TOLERANCE = 1e-9
"""In float64 only the order of additions differs."""

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "TP=2": (2, {"tensor": 2}),
    "TP=2 with sequence parallel": (2, TP_SP),
    "CP=2": (2, {"context": 2}),
    "PP=2": (2, {"pipeline": 2}),
    "PP=2 x VPP=2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "DP=2": (2, {}),
    "TP=2 with sequence parallel x CP=2": (4, {**TP_SP, "context": 2}),
}

EXPERT_LAYOUTS: dict[int, Layouts] = {
    1: {
        "one process": ({}, Variant()),
        "grouped by Megatron": ({}, Variant("alltoall", "legacy_grouped")),
    },
    2: {
        "EP=2, allgather": ({"expert": 2}, Variant()),
        "EP=2, all-to-all": ({"expert": 2}, Variant("alltoall")),
        "CP=2, EP=2": ({"context": 2, "expert": 2}, Variant("alltoall")),
        "TP=2, each token on both ranks": ({"tensor": 2}, Variant()),
        "PP=2": ({"pipeline": 2}, Variant("alltoall")),
    },
    4: {
        "TP=2 SP, EP=2, ETP=2": ({**TP_SP, "expert": 2, "expert_tensor": 2}, Variant("alltoall")),
        "TP=2 SP, EP=2, ETP=2, allgather": ({**TP_SP, "expert": 2, "expert_tensor": 2}, Variant()),
        "TP=2 SP, EP=4, shared experts overlapped": ({**TP_SP, "expert": 4}, Variant("alltoall", overlap=True)),
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def expected(world: WorkerPool, checkpoint: Path) -> tuple[dict[str, Tensor], float]:
    return world.run(1, compute_expected, str(checkpoint))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_padded_batch_scores_as_its_documents_alone_on(
    layout: str, world: WorkerPool, checkpoint: Path, expected: tuple[dict[str, Tensor], float]
) -> None:
    world_size, degrees = LAYOUTS[layout]
    wanted, wanted_loss = expected
    ranks = world.run(world_size, score, str(checkpoint), ParallelConfig(**degrees), make_masks())
    for scores, _metadata, _ in ranks:
        assert scores.keys() == wanted.keys()
        for key, value in scores.items():
            message = f"{key} on {layout}"
            torch.testing.assert_close(value, wanted[key], rtol=TOLERANCE, atol=0, msg=message)
            assert_same_order(value, wanted[key], TOLERANCE, message)
    metadata = ranks[0][1]
    assert (metadata["num_tokens"], metadata["num_samples"]) == (sum(LENGTHS), len(LENGTHS))
    assert all(site["num_tokens"] == sum(LENGTHS) for site in metadata["sites"].values())
    nats, num_tokens = (sum(rank[2][i] for rank in ranks) for i in range(2))
    assert num_tokens % sum(length - 1 for length in LENGTHS) == 0
    assert nats / num_tokens == pytest.approx(wanted_loss, rel=TOLERANCE)


@pytest.mark.parametrize("layout", ["TP=2 with sequence parallel", "CP=2"])
def test_a_mask_that_leaves_the_first_rank_without_a_token_scores_as_in_one_process(
    layout: str, world: WorkerPool, checkpoint: Path
) -> None:
    masks = torch.zeros(len(LENGTHS), SEQUENCE_LENGTH, dtype=torch.bool)
    # Context parallelism gives the middle to the second rank, sequence parallelism the second half.
    masks[:, 8:11] = True
    one_process, metadata, _ = world.run(1, score, str(checkpoint), ParallelConfig(), masks)[0]
    world_size, degrees = LAYOUTS[layout]
    scores, _, _ = world.run(world_size, score, str(checkpoint), ParallelConfig(**degrees), masks)[0]
    assert metadata["num_tokens"] == int(masks.sum())
    for key, value in scores.items():
        torch.testing.assert_close(value, one_process[key], rtol=TOLERANCE, atol=0, msg=key)


@pytest.mark.parametrize(("cp_size", "tp_size"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_the_parts_of_a_mask_are_those_of_the_activations(cp_size: int, tp_size: int) -> None:
    from megascore.mcore.sites.masks import SequenceMask
    from megascore.mcore.world.context_parallel import local_positions
    from megascore.parallel.axes import Axis

    masks = make_masks()
    for cp_rank in range(cp_size):
        of_context = masks[:, local_positions(SEQUENCE_LENGTH, cp_rank, cp_size)]
        for tp_rank in range(tp_size):
            local_mask = SequenceMask(Axis("cp", cp_rank, cp_size), Axis("tp", tp_rank, tp_size))
            activations = torch.zeros(SEQUENCE_LENGTH // cp_size // tp_size, len(LENGTHS), 3)
            expected = of_context.T.chunk(tp_size)[tp_rank]
            assert torch.equal(local_mask(masks, activations), expected)
            # Loops in the style of Megatron-LM have cut their batch already.
            assert torch.equal(local_mask(of_context, activations), expected)
            for wrong in (masks[1:], masks[:, 1:]):
                with pytest.raises(DataError, match=r"the token mask is \[\d+, \d+\] \[samples, sequence\], but"):
                    local_mask(wrong, activations)


@pytest.mark.parametrize("world_size", EXPERT_LAYOUTS)
def test_padding_never_counts_for_experts(
    world_size: int, world: WorkerPool, expected_of_experts: tuple[dict[str, Tensor], dict[str, Tensor]]
) -> None:
    wanted, tokens = expected_of_experts
    for by_layout in world.run(world_size, score_experts, EXPERT_LAYOUTS[world_size]):
        for layout, (values, metadata, unseen) in by_layout.items():
            check_values(layout, values, unseen, wanted, TOLERANCE)
            for key in (key for key in tokens if key.endswith("/experts/router_weighted_norm")):
                assert metadata["sites"][key]["tokens_per_expert"] == tokens[key].tolist(), f"{key} on {layout}"


@pytest.fixture(scope="module")
def expected_of_experts(world: WorkerPool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return world.run(1, compute_expected_of_experts)[0]


def test_another_dispatcher_is_refused_by_name_once_a_mask_is_set(world: WorkerPool) -> None:
    with pytest.raises(RankErrors, match=r"decoder\.layers\.1\.mlp: a token mask cannot be sent through MoEFlex"):
        world.run(1, score_with_another_dispatcher)


def compute_expected(checkpoint: str) -> tuple[dict[str, Tensor], float]:
    """Scores and loss of the documents, each run alone and without padding in an unsharded model."""
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    device = torch.device("cpu")
    with parallel_world(ParallelConfig(), device, timedelta(seconds=60)):
        chunks = load_model(ModelConfig(hf=checkpoint, dtype="float64"), ParallelConfig(), device, SEQUENCE_LENGTH)
        recorder = Recorder(chunks[0])
        losses = forward_only(chunks, make_documents(SIZES["vocab_size"]), compute_loss=True)
        head_dim = SIZES["hidden_size"] // SIZES["num_attention_heads"]
        num_layers, samples = SIZES["num_hidden_layers"], list(range(len(LENGTHS)))
        contributions = expected_contributions(
            recorder,
            num_layers,
            SIZES["num_key_value_heads"],
            [samples[step] for step in STEPS],
            SIZES["num_attention_heads"],
        )
        moments = expected_moments(recorder, num_layers, head_dim)
        scores = {**expected_scores(recorder, num_layers, head_dim), **contributions, **moments}
        return scores, float(losses.nats) / losses.num_tokens


def score(
    checkpoint: str, parallel: ParallelConfig, masks: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[float, int]]:
    """Scores, metadata, and this rank's sums of the loss."""
    from megatron.core import parallel_state

    import megascore
    from megascore.data import micro_batches_of_step
    from megascore.mcore.models.build import load_model
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world

    device, tokens, nats, num_tokens = torch.device("cpu"), make_tokens(SIZES["vocab_size"]), 0.0, 0
    with parallel_world(parallel, device, timedelta(seconds=60)):
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        chunks = load_model(ModelConfig(hf=checkpoint, dtype="float64"), parallel, device, SEQUENCE_LENGTH)
        with megascore.attach(chunks, scores=all_scores(len(STEPS)) + moment_scores()) as run:
            for step in range(len(STEPS)):
                slices = micro_batches_of_step(step, len(tokens), GLOBAL_BATCH_SIZE, MICRO_BATCH_SIZE, *ranks)
                parts = [tokens[part] for part in slices], True, [masks[part] for part in slices]
                losses = forward_only(chunks, *parts, run)
                nats, num_tokens = nats + float(losses.nats), num_tokens + losses.num_tokens
                run.step()
            assert run.token_mask is None
        scores = run.finish()
        return dict(scores), dict(scores.metadata), (nats, num_tokens)


def compute_expected_of_experts() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world
    from tests.mcore.expert_model import build_expert_model
    from tests.mcore.expert_oracle import record

    with parallel_world(ParallelConfig(), torch.device("cpu"), timedelta(seconds=60)):
        chunks = build_expert_model(ParallelConfig())
        # In batches padded alike: the router rounds its weights to float32, and so would tell one length from another
        # by 1e-8. That padding changes nothing else is shown by the dense models.
        length = 0
        recorded = record(chunks[0], lambda: length)
        for tokens, length in zip(make_tokens(EXPERT_SIZES["vocab"]).split(1), LENGTHS, strict=True):  # noqa: B007
            forward_only(chunks, [tokens], compute_loss=False)
        return recorded.scores(), dict(recorded.tokens)


def score_experts(layouts: Layouts) -> dict[str, Any]:
    return {name: score_experts_on(ParallelConfig(**degrees), variant) for name, (degrees, variant) in layouts.items()}


def score_experts_on(parallel: ParallelConfig, variant: Variant, dispatcher: Any = None) -> tuple[Any, Any, Any]:
    from megatron.core import parallel_state

    import megascore
    from megascore.data import micro_batches_of_step
    from megascore.mcore.pipeline.schedule import forward_only
    from megascore.mcore.world.parallel_world import parallel_world
    from tests.mcore.expert_model import build_expert_model

    tokens, masks = make_tokens(EXPERT_SIZES["vocab"]), make_masks()
    with parallel_world(parallel, torch.device("cpu"), timedelta(seconds=60)):
        chunks = build_expert_model(parallel, variant)
        if dispatcher is not None:
            chunks[0].decoder.layers[1].mlp.token_dispatcher = dispatcher
        ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        with megascore.attach(chunks, scores=REQUESTS) as run:
            for step in range(len(STEPS)):
                slices = micro_batches_of_step(step, len(tokens), GLOBAL_BATCH_SIZE, 1, *ranks)
                forward_only(chunks, [tokens[p] for p in slices], False, [masks[p] for p in slices], run)
                run.step()
        scores = run.finish()
        return dict(scores), scores.metadata, scores.unseen


def score_with_another_dispatcher() -> None:
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

    score_experts_on(ParallelConfig(), Variant(), MoEFlexTokenDispatcher.__new__(MoEFlexTokenDispatcher))


def make_tokens(vocab_size: int) -> Tensor:
    """The padded batch; the padding is of tokens like any other, so that it would show in a score."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocab_size, (len(LENGTHS), SEQUENCE_LENGTH), generator=generator)


def make_documents(vocab_size: int) -> list[Tensor]:
    return [sample[None, :length] for sample, length in zip(make_tokens(vocab_size), LENGTHS, strict=True)]


def make_masks() -> Tensor:
    return torch.arange(SEQUENCE_LENGTH) < torch.tensor(LENGTHS)[:, None]
