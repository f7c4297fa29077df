"""Ranks killed at random moments, and started again with the same command: nothing is lost or counted twice."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from megascore.resume.progress_file import RunState, read_status
from tests.job.resumable import Job, make_job
from tests.ranks import RankProcesses

NUM_KILLS = int(os.environ.get("MEGASCORE_TEST_KILLS", "10"))
"""As many as the time of a whole test run allows; a change of the checkpoints deserves hundreds."""
LAYOUT = ("parallel.tensor=2", "parallel.sequence=true")


def start(job: Job) -> RankProcesses:
    return RankProcesses(2, ["score", str(job.config), *LAYOUT], job.folder / "log.txt")


def num_saved(job: Job) -> int:
    """Steps that the newest checkpoint holds."""
    paths = job.checkpoints.glob("megascore-step-*.safetensors")
    return max((int(path.stem.rpartition("-")[2]) for path in paths), default=0)


def test_kills_at_random_moments_change_nothing(model_root: Path, tmp_path: Path) -> None:
    undisturbed = make_job(tmp_path / "undisturbed", model_root, "float32")
    assert start(undisturbed).wait() == [0, 0], (undisturbed.folder / "log.txt").read_text()
    expected = undisturbed.scores()
    moments = random.Random(0)
    num_kills = num_resumed = num_runs = 0
    while num_kills < NUM_KILLS:
        num_runs += 1
        job = make_job(tmp_path / f"run{num_runs}", model_root, "float32")
        codes = None
        while codes != [0, 0]:
            saved = num_saved(job)
            ranks = start(job)
            victims = moments.choice([[0], [1], [0, 1]])
            # By what is saved and not by the clock, which says little on a busy machine. Past the loading of the model
            # in most cases, for there is more to be broken.
            steps = moments.choice([0, 1, 1, 2, 3])
            while num_saved(job) < saved + steps and ranks.are_running():
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.3 if steps else 3.0))
            ranks.kill(victims if num_kills < NUM_KILLS else [])
            codes = ranks.wait()
            killed = -signal.SIGKILL in codes
            num_kills += killed
            assert killed or codes == [0, 0], (codes, (job.folder / "log.txt").read_text())
        num_resumed += (job.folder / "log.txt").read_text().count("going on from")
        scores = job.scores()
        for key, value in expected.items():
            # Bit for bit, but for sums that were added up in another order: float64, one part in 1e15.
            torch.testing.assert_close(scores[key], value, rtol=1e-14, atol=0)
            assert "iterative" not in key or torch.equal(scores[key], value)
        assert scores.metadata["sites"] == expected.metadata["sites"]
        assert scores.metadata["loss"] == pytest.approx(expected.metadata["loss"], rel=1e-14)
        assert read_status(job.checkpoints)["state"] == RunState.FINISHED.value
    assert num_resumed >= NUM_KILLS // 3, "many kills should hit a run that has saved something"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_with_the_documented_code(
    number: signal.Signals, model_root: Path, tmp_path: Path
) -> None:
    job = make_job(tmp_path / "run", model_root, "float32")
    job.config.write_text(job.config.read_text().replace("checkpoint_interval: 1", "checkpoint_interval: null"))
    log = job.folder / "log.txt"
    ranks = start(job)
    # It saves by the clock only: what stands in the folder afterwards was saved because of the signal.
    while not (job.checkpoints / "progress.json").exists():
        time.sleep(0.01)
    ranks.signal(1, number)
    assert ranks.wait() == [75, 75], log.read_text()
    assert f"stopped by {number.name}" in log.read_text()
    assert read_status(job.checkpoints)["state"] == RunState.STOPPED.value
    assert start(job).wait() == [0, 0], log.read_text()


def test_a_second_run_in_the_same_folder_is_refused_and_harms_nothing(model_root: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", model_root, "float32")
    first = start(job)
    while not (job.checkpoints / "progress.json").exists():
        time.sleep(0.01)
    first.signal(0, signal.SIGSTOP)
    second = RankProcesses(2, ["score", str(job.config), *LAYOUT], job.folder / "second.txt")
    codes = second.wait()
    first.signal(0, signal.SIGCONT)
    assert codes == [2, 3]
    assert "another run is using the checkpoint folder" in (job.folder / "second.txt").read_text()
    assert first.wait() == [0, 0], (job.folder / "log.txt").read_text()


def test_no_rank_waits_for_a_silent_one_longer_than_the_config_says(model_root: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", model_root, "float32")
    patient = job.config.read_text()
    job.config.write_text(patient.replace("timeout_minutes: 1", "timeout_minutes: 0.1"))
    ranks = start(job)
    while not (job.checkpoints / "megascore-step-00000001.safetensors").exists():
        time.sleep(0.002)
    ranks.signal(1, signal.SIGSTOP)
    codes = ranks.wait()
    log = (job.folder / "log.txt").read_text()
    # Lost contact is another rank's failure; the silent one is killed, as torchrun does.
    assert codes == [3, -signal.SIGKILL], log
    assert "imed out" in log
    assert read_status(job.checkpoints)["state"] == RunState.INTERRUPTED.value
    # Where other programs run, one rank may start seconds after the other.
    job.config.write_text(patient)
    assert start(job).wait() == [0, 0], (job.folder / "log.txt").read_text()
