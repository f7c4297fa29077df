"""Progress lines and bars, with a clock that the tests turn."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megascore.runs.progress import ScoringProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(
    total: int, seconds_per_step: float, *, enabled: bool = True, terminal: bool = False, stop: int | None = None
) -> str:
    clock, stream = Clock(), io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, _environ={"TERM": "xterm"})
    with ScoringProgress(total, 512, enabled=enabled, console=console, clock=clock) as progress:
        for _ in range(total if stop is None else stop):
            clock.now += seconds_per_step
            progress.advance()
    return stream.getvalue()


def test_a_log_gets_lines_by_time_and_one_at_the_end() -> None:
    assert run(6, 4.0).splitlines() == [
        "scoring: 6 steps of 512 tokens",
        "scoring: step 3/6, 1,536 tokens, 128 tokens/s, 0:00:12 left",
        "scoring: step 6/6, 3,072 tokens, 128 tokens/s, took 0:00:24",
    ]


def test_fast_steps_do_not_flood_the_log() -> None:
    # 15 s: the start, the line at 10 s, the end.
    assert len(run(15_000, 0.001).splitlines()) == 3


def test_a_run_that_stops_early_says_where() -> None:
    assert run(6, 1.0, stop=2).splitlines()[-1] == "scoring: stopped after step 2/6"


def test_other_ranks_are_silent() -> None:
    assert run(6, 100.0, enabled=False) == ""
    assert run(6, 100.0, enabled=False, terminal=True) == ""


def test_a_terminal_gets_a_bar() -> None:
    text = run(3, 2.0, terminal=True)
    assert "3/3" in text
    assert "256 tokens/s" in text
    assert "steps of" not in text


def test_steps_may_differ_in_tokens() -> None:
    clock = Clock()
    with ScoringProgress(2, 512, enabled=False, clock=clock) as progress:
        clock.now += 1
        progress.advance()
        clock.now += 1
        progress.advance(tokens=88)
    assert progress.tokens == 600
    assert progress.tokens_per_second == 300


def test_no_time_and_no_steps_give_no_rate() -> None:
    progress = ScoringProgress(2, 512, enabled=False, clock=Clock())
    with progress:
        assert progress.tokens_per_second is None
        assert progress.seconds_left is None


def test_an_error_inside_comes_through() -> None:
    with pytest.raises(ZeroDivisionError), ScoringProgress(2, 512, enabled=False):
        1 / 0  # noqa: B018 - the error is the point
