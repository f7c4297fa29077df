"""Configs as people write them: what can be meant is taken, and everything else is refused by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from megascore.config import RunConfig, load_config
from megascore.data.batches import num_steps
from megascore.errors import ConfigError, DataError

pytestmark = pytest.mark.fast


@pytest.fixture
def job(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    # A section in which everything is commented out has no value.
    path.write_text("model: {hf: llama}\nrun:\nparallel:\n")
    return path


def test_an_empty_section_has_its_defaults(job: Path) -> None:
    assert load_config(job).run == RunConfig()
    assert load_config(job, ["run.steps=3"]).run.steps == 3
    assert load_config(job, ["run=null", "run.steps=3"]).run.steps == 3


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data=words.txt"], "data is 'words.txt', but it is a section: give its keys, such as data.text=FILE"),
        (["run=3", "run.output=x"], "run is 3, but it is a section"),
        (["parallel.pipeline_layers=5"], "parallel.pipeline_layers: Invalid value assigned: expected a list"),
        (["run.seed=-1"], "run.seed is -1: expected a whole number from 0"),
        (["run.seed=99999999999999999999"], "run.seed is 9+: expected a whole number from 0"),
        (["run.timeout_minutes=1e30"], "run.timeout_minutes is 1e\\+30: expected 525600 at most"),
        (["scores=[{target: ffn, method: iterative_contribution, iterations: true}]"], "has iterations=True"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(overrides: list[str], words: str, job: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(job, overrides)


def test_more_steps_than_the_data_has_are_refused() -> None:
    assert [num_steps(9, 4), num_steps(9, 4, 3), num_steps(9, 4, 2)] == [3, 3, 2]
    with pytest.raises(DataError, match="run.steps is 4, but there are 9 samples, which is 3 steps of 4"):
        num_steps(9, 4, 4)
