"""Each rank keeps the samples that it runs, and finds them under the numbers that they have among all."""

from __future__ import annotations

import pytest
import torch

from megascore.data import MicroBatches, OwnSamples, Samples, Share, micro_batches_of_step, share_samples
from megascore.data import num_steps as steps_of
from tests.pool import WorkerPool

LENGTH = 6


def make_samples(number: int, *, padded: bool, largest: int = 100) -> Samples:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, 50, (number, LENGTH), generator=generator)
    tokens[-1, -1] = largest
    masks = None
    if padded:
        lengths = torch.randint(1, LENGTH + 1, (number, 1), generator=generator)
        masks = torch.arange(LENGTH) < lengths
    return Samples(tokens, "fingerprint", "made up", masks)


def parts_of(share: Share, num_samples: int, micro_batch_size: int) -> list[slice]:
    size = share.global_batch_size
    return [
        part
        for step in range(steps_of(num_samples, size))
        for part in micro_batches_of_step(step, num_samples, size, micro_batch_size, share.data_rank, share.data_size)
    ]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("data_size", [1, 2, 3, 5])
@pytest.mark.parametrize("num_samples", [7, 8, 19])
def test_the_ranks_keep_what_they_run_and_together_each_sample_once(
    num_samples: int, data_size: int, padded: bool
) -> None:
    whole = make_samples(num_samples, padded=padded)
    rows: list[int] = []
    for data_rank in range(data_size):
        share = Share(8, data_rank, data_size)
        own = share_samples(whole, share)
        rows += own.rows.tolist()
        assert own.tokens.shape == (len(own.rows), LENGTH)
        assert (own.num_samples, own.largest_token, own.fingerprint) == (num_samples, 100, "fingerprint")
        parts = parts_of(share, num_samples, 2)
        batches = MicroBatches(own, parts)
        assert len(batches) == len(parts)
        masks = own.masks_of(parts)
        for number, (part, (tokens, mask)) in enumerate(zip(parts, batches, strict=True)):
            assert tokens.dtype == torch.int64
            assert torch.equal(tokens, whole.tokens[part])
            if whole.masks is None:
                assert mask is masks is None
            else:
                assert mask is not None
                assert masks is not None
                assert torch.equal(mask, whole.masks[part])
                assert torch.equal(masks[number], mask)
        # Progress is told for all ranks by one of them.
        for some in (slice(3), slice(2, 5), slice(8, 100), slice(0)):
            count = whole.tokens[some].numel() if whole.masks is None else int(whole.masks[some].sum())
            assert own.num_tokens(some) == count
    assert sorted(rows) == list(range(num_samples))


def test_a_token_takes_four_bytes_where_they_hold_it() -> None:
    for largest, dtype in ((2**31 - 1, torch.int32), (2**31, torch.int64)):
        own = share_samples(make_samples(4, padded=False, largest=largest), Share(8))
        assert own.tokens.dtype == dtype
        assert int(own.tokens_of(slice(3, 4)).max()) == own.largest_token == largest


def test_samples_of_another_rank_are_not_given_as_ones_own() -> None:
    own = share_samples(make_samples(8, padded=False), Share(8, 0, 2))
    with pytest.raises(AssertionError, match="samples 3 to 5 are another rank's"):
        own.tokens_of(slice(3, 5))


def share_on_rank(num_samples: int) -> OwnSamples:
    import torch.distributed as dist

    from megascore.data import share as share_module

    rank, pieces = dist.get_rank(), share_module.PIECE_BYTES
    # Three samples of int32 a piece, which is no multiple of a rank's part of a step.
    share_module.PIECE_BYTES = 3 * LENGTH * 4
    try:
        whole = make_samples(num_samples, padded=True) if rank == 0 else None
        return share_samples(whole, Share(4, rank, dist.get_world_size()))
    finally:
        share_module.PIECE_BYTES = pieces


def test_samples_come_from_the_rank_that_read_them_in_pieces(world: WorkerPool) -> None:
    whole = make_samples(11, padded=True)
    assert whole.masks is not None
    ranks = world.run(2, share_on_rank, 11)
    assert [own.rows.tolist() for own in ranks] == [[0, 1, 4, 5, 8], [2, 3, 6, 7, 9, 10]]
    for own in ranks:
        assert own.masks is not None
        assert torch.equal(own.tokens, whole.tokens[own.rows].int())
        assert torch.equal(own.masks, whole.masks[own.rows])
