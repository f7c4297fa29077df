"""Identities of runs: they stay what they were, and every difference between two is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from megascore.errors import ConfigError
from megascore.resume.snapshot import differences, fingerprint_of, identity_of
from megascore.sites.requests import ScoreRequest
from megascore.versions import installed_versions

FFN, LAYERS = ScoreRequest("ffn", "l2_norm"), ScoreRequest("layers", "block_similarity")
OF_A_JOB: dict[str, Any] = {
    "model": {
        "weights_fingerprint": "17336fb8",
        "dtype": "float64",
        "architecture": {"num_layers": 4, "sliding_layers": (False, True), "gpt": {"rotary_base": 10000.0}, "x": None},
    },
    "data": {"fingerprint": "60e0312b", "sequence_length": 16, "num_samples": 24},
    "run": {"seed": 0, "steps": 6, "global_batch_size": 4, "loss": True, "blockwise": False},
}


def in_version_0_1(identity: dict[str, Any]) -> dict[str, Any]:
    """Replace the one entry that each version of megascore changes."""
    assert identity["run.megascore"] == installed_versions()["megascore"]
    return {**identity, "run.megascore": "0.1.0"}


def test_a_jobs_identity_and_fingerprint_are_those_of_version_0_1() -> None:
    request = ScoreRequest("ffn", "iterative_contribution", (("iterations", 6),))
    identity = in_version_0_1(identity_of([FFN, request], **OF_A_JOB))
    assert identity == {
        "model.weights_fingerprint": "17336fb8",
        "model.dtype": "float64",
        "model.architecture.num_layers": 4,
        "model.architecture.sliding_layers": [False, True],
        "model.architecture.gpt.rotary_base": 10000.0,
        "model.architecture.x": None,
        "data.fingerprint": "60e0312b",
        "data.sequence_length": 16,
        "data.num_samples": 24,
        "run.seed": 0,
        "run.steps": 6,
        "run.global_batch_size": 4,
        "run.loss": True,
        "run.blockwise": False,
        "run.megascore": "0.1.0",
        "scores[0].target": "ffn",
        "scores[0].method": "l2_norm",
        "scores[1].target": "ffn",
        "scores[1].method": "iterative_contribution",
        "scores[1].iterations": 6,
    }
    # Computed with version 0.1: score files and checkpoints of jobs hold such numbers.
    assert fingerprint_of(identity) == "e2baa540f856f4abf4ffd0edcbf3057afd13cdfb2aa5abce588339d8e76da2c3"


def test_an_identity_is_what_a_checkpoint_gives_back() -> None:
    yours = {"data": ("c4", ["a", ("b",)]), "sizes": [{"width": 4}, {"width": (8, 9)}], "nothing": {}}
    identity = identity_of([FFN], model={}, run={}, yours=yours)
    assert json.loads(json.dumps(identity)) == identity
    assert identity["yours.data"] == ["c4", ["a", ["b"]]]
    assert identity["yours.sizes[1].width"] == [8, 9]


@pytest.mark.parametrize("value", [float("nan"), object(), b"bytes"])
def test_an_identity_that_has_no_form_in_json_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="the identity of the run has something that JSON can't hold"):
        identity_of([FFN], model={}, run={}, yours={"data": value})


def test_every_difference_between_two_runs_is_named() -> None:
    own = identity_of([FFN, LAYERS], model={"weights": "a" * 64, "dtype": "float32"}, run={})
    heads = ScoreRequest("attention_heads", "l2_norm")
    saved = identity_of([heads], model={"weights": "b" * 64, "dtype": "float32"}, run={})
    told = differences(saved, own)
    assert [text.split(" is ")[0] for text in told] == [
        "model.weights",
        "scores[0].target",
        "scores[1].target",
        "scores[1].method",
    ]
    assert "scores[1].target is 'not given' there, 'layers' here" in told
    assert differences(own, own) == []
