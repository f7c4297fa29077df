"""Progress of a run: a bar on a terminal, plain lines in a log, on one rank only."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

__all__ = ["ScoringProgress"]

_LOG_SECONDS = 10.0


class ScoringProgress:
    """Steps done, tokens per second and time left.

    ``with ScoringProgress(steps, tokens_per_step, enabled=rank == 0) as progress: progress.advance()``. Not collective,
    and does nothing where it is not enabled: under torchrun all ranks share one output, so one of them should show it.

    On a terminal it draws a bar. Anywhere else (torchrun's log files, CI) it writes a whole line at the start, every
    `log_seconds`, and at the end.
    """

    def __init__(
        self,
        total_steps: int,
        tokens_per_step: int,
        *,
        enabled: bool,
        done_steps: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        log_seconds: float = _LOG_SECONDS,
        what: str = "scoring",
    ) -> None:
        """Prepare; nothing is shown before ``with``.

        Args:
            total_steps: Steps of the whole run.
            tokens_per_step: Tokens of one step over all ranks, where `advance` isn't told otherwise.
            enabled: Whether this rank shows anything.
            done_steps: Steps that an earlier process has done.
            console: Where to; standard error if None, so that standard output keeps the result.
            clock: Seconds, for tests.
            log_seconds: Least time between two lines where there is no terminal.
            what: What is done.
        """
        self.total_steps = total_steps
        self.tokens_per_step = tokens_per_step
        self.steps = self._first_step = done_steps
        self.tokens = 0
        self._enabled = enabled
        self._what = what
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._log_seconds = log_seconds
        self._started = self._last_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> ScoringProgress:
        """Start the clock and show the beginning."""
        self._started = self._last_line = self._clock()
        if not self._enabled:
            return self
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._start_bar()
        else:
            after = f", {self.steps} of them done" if self.steps else ""
            self._write(f"{self.total_steps} steps of {self.tokens_per_step:,} tokens{after}")
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the display; after an error it says how far the run came."""
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and self.steps < self.total_steps:
            self._write(f"stopped after step {self.steps}/{self.total_steps}")

    def advance(self, tokens: int | None = None) -> None:
        """Count one step done.

        Args:
            tokens: Tokens of this step over all ranks; None: `tokens_per_step`.
        """
        self.steps += 1
        self.tokens += self.tokens_per_step if tokens is None else tokens
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.steps, rate=self._rate_text())
        elif self._enabled and self._line_is_due():
            self._last_line = self._clock()
            self._write(f"step {self.steps}/{self.total_steps}, {self.tokens:,} tokens, {self._rate_text()}")

    @property
    def tokens_per_second(self) -> float | None:
        """Average since the start; None before any time has passed."""
        elapsed = self._clock() - self._started
        return self.tokens / elapsed if elapsed > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Time that the steps left take at the pace so far; None before this process's first step."""
        own_steps = self.steps - self._first_step
        if not own_steps:
            return None
        return (self._clock() - self._started) / own_steps * max(self.total_steps - self.steps, 0)

    def pace(self) -> dict[str, float | None]:
        """Return `tokens_per_second` and `seconds_left` as a progress file has them, rounded."""
        rate, left = self.tokens_per_second, self.seconds_left
        return {
            "tokens_per_second": None if rate is None else round(rate, 1),
            "eta_seconds": None if left is None else round(left, 1),
        }

    def _start_bar(self) -> None:
        columns = (TextColumn(self._what), BarColumn(), MofNCompleteColumn(), TextColumn("steps  {task.fields[rate]}"))
        self._bar = Progress(*columns, console=self._console, refresh_per_second=4)
        self._task = self._bar.add_task(self._what, total=self.total_steps, completed=self.steps, rate="")
        self._bar.start()

    def _line_is_due(self) -> bool:
        return self.steps >= self.total_steps or self._clock() - self._last_line >= self._log_seconds

    def _rate_text(self) -> str:
        rate, left = self.tokens_per_second, self.seconds_left
        if rate is None or left is None:
            return "- tokens/s"
        if self.steps < self.total_steps:
            return f"{rate:,.0f} tokens/s, {_duration(left)} left"
        return f"{rate:,.0f} tokens/s, took {_duration(self._clock() - self._started)}"

    def _write(self, text: str) -> None:
        # One write of one whole line: other ranks write to the same log.
        self._console.print(f"{self._what}: {text}", markup=False, highlight=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
