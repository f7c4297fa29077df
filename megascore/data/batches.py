"""Batches: the samples that each data-parallel rank takes in each step; pure."""

from __future__ import annotations

from megascore.errors import DataError

__all__ = ["check_enough_samples", "check_equal_shares", "micro_batches_of_step", "num_steps"]


def num_steps(num_samples: int, global_batch_size: int, wanted: int | None = None) -> int:
    """Return how many steps go over all samples once, the last one maybe smaller; or ``wanted``, where that is given.

    Raises:
        DataError: there are fewer than are wanted.
    """
    available = -(-num_samples // global_batch_size)
    if wanted is not None and wanted > available:
        raise DataError(
            f"run.steps is {wanted}, but there are {num_samples} samples, which is {available} steps of "
            f"{global_batch_size}: give more data or samples, or leave out run.steps to use all there are."
        )
    return available if wanted is None else wanted


def micro_batches_of_step(
    step: int,
    num_samples: int,
    global_batch_size: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> list[slice]:
    """Return the micro-batches of one data-parallel rank in one step, as slices of the samples.

    Step ``k`` takes the samples from ``k * global_batch_size`` on, whatever the layout is. They are split over the
    ranks as evenly as possible: together the ranks take each sample exactly once. Where the number of samples does
    not divide, the last micro-batch of a rank is smaller and ranks may have different numbers of micro-batches; a
    rank has none where a step has fewer samples than there are ranks.

    Args:
        step: Counted from 0.
        num_samples: Samples of the whole run.
        global_batch_size: Samples of one step over all ranks.
        micro_batch_size: Samples of one forward pass.
        data_rank: This rank's place among the data-parallel ranks.
        data_size: Number of data-parallel ranks.
    """
    first = min(step * global_batch_size, num_samples)
    num_here = min(first + global_batch_size, num_samples) - first
    local_first = first + num_here * data_rank // data_size
    local_end = first + num_here * (data_rank + 1) // data_size
    return [
        slice(start, min(start + micro_batch_size, local_end))
        for start in range(local_first, local_end, micro_batch_size)
    ]


def check_enough_samples(num_samples: int, data_size: int) -> None:
    """Refuse a run in which a data-parallel rank would have nothing to do.

    Raises:
        DataError: there are fewer samples than data-parallel ranks.
    """
    if num_samples < data_size:
        raise DataError(
            f"{num_samples} samples for {data_size} data-parallel ranks: each rank needs at least one. Use more text, "
            f"a smaller data.sequence_length, or a larger parallel.tensor or parallel.pipeline."
        )


def check_equal_shares(num_samples: int, global_batch_size: int, data_size: int) -> None:
    """Refuse a run in which data-parallel ranks would have different numbers of samples in some step.

    Needed where they exchange tokens in every forward pass, as experts that are spread over them do: a rank with one
    micro-batch more would wait for the others forever.

    Raises:
        DataError: steps, or the samples of the last one, do not split evenly.
    """
    if global_batch_size % data_size or num_samples % data_size:
        below = num_samples // data_size * data_size
        raise DataError(
            f"{num_samples} samples in steps of {global_batch_size} do not split evenly over {data_size} data-parallel "
            f"ranks, which parallel.expert needs: choose a run.global_batch_size that is a multiple of {data_size}, "
            f"and data.num_samples={below or data_size}."
        )
