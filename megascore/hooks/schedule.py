"""The schedule of iterative pruning: how many channels each iteration removes."""

from __future__ import annotations

__all__ = ["num_pruned_after", "pruning_schedule"]


def pruning_schedule(num_channels: int, num_iterations: int) -> list[int]:
    """Return the number of channels that each iteration prunes; they add up to all.

    With at least as many channels as iterations, shares are equal and the remainder goes to the first ones. With fewer,
    single channels are spread so that the last iteration prunes one.

    >>> pruning_schedule(10, 4)
    [3, 3, 2, 2]
    >>> pruning_schedule(4, 10)
    [0, 1, 0, 0, 1, 0, 1, 0, 0, 1]
    """
    if num_channels >= num_iterations:
        share, remainder = divmod(num_channels, num_iterations)
        return [share + (iteration < remainder) for iteration in range(num_iterations)]
    schedule = [0] * num_iterations
    for number in range(1, num_channels + 1):
        schedule[number * num_iterations // num_channels - 1] = 1
    return schedule


def num_pruned_after(done: int, num_channels: int, num_iterations: int) -> int:
    """Return how many channels the first ``done`` iterations of `pruning_schedule` prune, without going through them.

    >>> [num_pruned_after(done, 10, 4) for done in range(5)]
    [0, 3, 6, 8, 10]
    >>> [num_pruned_after(done, 4, 10) for done in range(11)]
    [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4]
    """
    if num_channels >= num_iterations:
        share, remainder = divmod(num_channels, num_iterations)
        return done * share + min(done, remainder)
    # The largest number with number * num_iterations // num_channels <= done.
    return ((done + 1) * num_channels - 1) // num_iterations
