"""A run ends when its scores are sure enough: after whole rounds of the groups, and not before."""

from __future__ import annotations

import logging

import pytest
import torch

import megascore
from megascore.config import JobConfig, RunConfig
from megascore.errors import ConfigError
from megascore.runs.until import Until, is_looked_at
from tests.blockwise.tiny_decoder import TinyDecoder, make_batches

pytestmark = pytest.mark.fast

SCORES = [{"target": "ffn"}, {"target": "layers"}]


def steps_until(wanted: float, batches: list[torch.Tensor]) -> tuple[int, Until]:
    """Run steps until it is reached; return how many, all of them where it is not."""
    model, until = TinyDecoder(), Until({"overlap": wanted})
    with megascore.attach(model, scores=SCORES) as run, torch.no_grad():
        for batch in batches:
            if until.is_reached(run):
                break
            model(batch)
            run.step()
        return run.num_steps, until


def test_data_that_is_the_same_in_each_step_is_enough_at_the_first_look() -> None:
    [batch] = make_batches(1)
    steps, until = steps_until(0.99, [batch] * 30)
    assert steps == 16
    facts = until.facts()["until"]
    assert facts["reached"]
    assert facts["last_look"] == {"ffn/l2_norm": 1, "layers/block_similarity": 1}


def test_data_that_scatters_takes_all_steps_and_that_is_told(caplog: pytest.LogCaptureFixture) -> None:
    batches = make_batches(20)
    steps, until = steps_until(0.9999, batches)
    assert steps == 20
    assert not until.facts()["until"]["reached"]
    with caplog.at_level(logging.WARNING):
        until.tell(20, 20)
    assert "an overlap of 0.9999 was not reached in all 20 steps" in caplog.text


def test_looks_are_rare_and_after_whole_rounds() -> None:
    looks = [step for step in range(3000) if is_looked_at(step)]
    assert all(step % 8 == 0 and step >= 16 for step in looks)
    assert len(looks) < 30
    assert not Until(None).facts()


def test_what_can_not_end_early_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run.until is \{'tokens': 5.0\}: expected \{overlap: 0.98\}"):
        RunConfig(until={"tokens": 5.0})
    with pytest.raises(ConfigError, match="another part below 1"):
        RunConfig(until={"overlap": 1.0})
    with pytest.raises(ConfigError, match="run.until is given with run.blockwise=true"):
        RunConfig(until={"overlap": 0.9}, blockwise=True)
    iterative = [{"target": "ffn", "method": "iterative_contribution", "iterations": 4}]
    with pytest.raises(ConfigError, match="ffn/iterative_contribution needs 4 steps"):
        JobConfig(scores=iterative, run=RunConfig(until={"overlap": 0.9}))
