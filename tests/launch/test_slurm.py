"""``score.sbatch`` with stand-ins for Slurm's commands and for megascore.

Where a test says so, `score_nodes.sh` and the agent between them are real; elsewhere srun starts the rank itself.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.processes import (
    REPOSITORY,
    SECONDS,
    put_fake_megascore,
    start,
    wait_until,
)

SCRIPT = REPOSITORY / "launch" / "score.sbatch"
CAN_GO_ON, FINISHED, UNREADABLE = "4", "0", "2"

# Starts the command here, as the first node's task, passes signals on and ends with its exit code, as srun does.
SRUN = f"""#!{sys.executable}
import os, signal, subprocess, sys
with open(os.environ["FAKE_NOTES"] + "/srun", "a") as file:
    print(*sys.argv[1:], sep="\\t", file=file)
words = sys.argv[1:]
while words[0].startswith("-"):
    words.pop(0)
if "FAKE_AGENT" in os.environ and words[1].endswith("/score_nodes.sh"):
    words = [sys.executable, "-m", "megascore", "score"]
task = subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": "0", "RANK": "0"}})
for signum in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(signum, lambda signum, frame: task.send_signal(signum))
sys.exit(task.wait())
"""
SCONTROL = """#!/bin/sh
case "$1" in
show) printf '127.0.0.1\\nnode-7\\n' ;;
requeue) echo "$2" >"$FAKE_NOTES/requeued"; exit "${FAKE_REQUEUE:-0}" ;;
*) exit 9 ;;
esac
"""


class Job:
    """A Slurm job that runs the script from a spool folder, with the checkout as the folder of submission."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "spool").mkdir()
        self.script = Path(shutil.copy(SCRIPT, folder / "spool" / "slurm_script"))
        (folder / "commands").mkdir()
        for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (folder / "commands" / name).write_text(text)
            (folder / "commands" / name).chmod(0o755)
        (folder / "job.yaml").touch()
        self.environment = put_fake_megascore(folder)
        self.environment |= {
            "PATH": f"{folder / 'commands'}:{self.environment['PATH']}",
            "SLURM_JOB_ID": "1234",
            "SLURM_JOB_NUM_NODES": "1",
            "SLURM_JOB_NODELIST": "node-[6-7]",
            "SLURM_SUBMIT_DIR": str(REPOSITORY),
        }

    def run(
        self, *arguments: str, signum: signal.Signals | None = None, real_agent: bool = False, **changes: str
    ) -> tuple[int, str]:
        """Run the job, send a signal once the run is under way, and return exit code and output."""
        if not real_agent:
            changes["FAKE_AGENT"] = "1"
        arguments = arguments or ("--nproc-per-node", "1", "job.yaml", "run.checkpoint_dir=kept")
        process = start("bash", self.script, *arguments, env=self.environment | changes, cwd=self.folder)
        if signum is not None:
            wait_until((self.folder / "ready0").exists, process)
            process.send_signal(signum)
        output, error = process.communicate(timeout=SECONDS)
        return process.returncode, output + error

    def note(self, name: str) -> str | None:
        path = self.folder / name
        return path.read_text().strip() if path.exists() else None


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


def test_the_script_passes_shellcheck_and_help_is_readable_without_slurm() -> None:
    shellcheck = Path(sys.executable).parent / "shellcheck"
    found = str(shellcheck) if shellcheck.exists() else shutil.which("shellcheck")
    assert found, "shellcheck is missing: pip install -e '.[dev]' brings it"
    result = subprocess.run([found, "-x", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    result = subprocess.run(["bash", SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: sbatch ")


def test_slurm_is_asked_for_a_signal_to_this_script_and_may_requeue() -> None:
    options = [line.split()[1] for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH")]
    assert "--signal=B:USR1@300" in options
    assert "--requeue" in options
    assert "--open-mode=append" in options, "a requeued job would lose the log of the one before"


def test_a_run_stopped_before_the_time_limit_is_requeued(job: Job) -> None:
    code, output = job.run(signum=signal.SIGUSR1, FAKE_END="wait 75", FAKE_STATUS=CAN_GO_ON, real_agent=True)
    assert code == 0, output
    assert job.note("signal0") == "SIGUSR1", "the rank was not told"
    assert job.note("status") == "kept"
    assert job.note("requeued") == "1234"


def test_a_run_that_finished_while_it_was_stopped_is_not_requeued(job: Job) -> None:
    code, output = job.run(signum=signal.SIGUSR1, FAKE_END="wait 75", FAKE_STATUS=FINISHED)
    assert code == 0, output
    assert job.note("status") == "kept"
    assert job.note("requeued") is None


@pytest.mark.parametrize(
    ("end", "status", "code"),
    [("wait 0", CAN_GO_ON, 0), ("wait 2", CAN_GO_ON, 2), ("wait 75", UNREADABLE, 75)],
    ids=["it just finished", "it failed", "its state is unknown"],
)
def test_a_signalled_run_is_not_requeued_when(job: Job, end: str, status: str, code: int) -> None:
    ended, output = job.run(signum=signal.SIGUSR1, FAKE_END=end, FAKE_STATUS=status)
    assert ended == code, output
    assert job.note("requeued") is None


@pytest.mark.parametrize("code", [0, 2, 75])
def test_the_exit_code_of_a_run_that_nobody_stopped_passes_on(job: Job, code: int) -> None:
    ended, output = job.run(FAKE_END=str(code), FAKE_STATUS=CAN_GO_ON, real_agent=code == 2)
    assert ended == code, output
    assert job.note("requeued") is None


def test_a_cancelled_run_saves_and_is_not_requeued(job: Job) -> None:
    code, output = job.run(signum=signal.SIGTERM, FAKE_END="wait 75", FAKE_STATUS=CAN_GO_ON, real_agent=True)
    assert code == 75, output
    assert job.note("signal0") == "SIGTERM"
    assert job.note("requeued") is None


def test_it_is_not_requeued_for_ever(job: Job) -> None:
    changes = {"SLURM_RESTART_COUNT": "3", "MEGASCORE_MAX_REQUEUES": "3"}
    code, output = job.run(signum=signal.SIGUSR1, FAKE_END="wait 75", FAKE_STATUS=CAN_GO_ON, **changes)
    assert code == 75
    assert "requeued 3 times already (MEGASCORE_MAX_REQUEUES)" in output
    assert job.note("requeued") is None


def test_where_requeueing_is_refused_the_user_is_told_how_to_go_on(job: Job) -> None:
    code, output = job.run(signum=signal.SIGUSR1, FAKE_END="wait 75", FAKE_STATUS=CAN_GO_ON, FAKE_REQUEUE="1")
    assert code == 75
    assert "the job could not be requeued, see above. The same sbatch command goes on." in output


def test_every_node_gets_an_agent_that_meets_the_others_at_the_first(job: Job) -> None:
    changes = {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "16",
        "SLURM_RESTART_COUNT": "1",
        "MEGASCORE_SRUN_OPTIONS": "--container-image=a.sqsh --container-mounts=/b",
    }
    code, output = job.run("--dry-run", "--max-restarts", "2", "a b.yaml", "run.checkpoint_dir=kept", **changes)
    assert code == 0, output
    words = shlex.split(output)
    options, command = words[: words.index("bash")], words[words.index("bash") :]
    assert options[0] == "srun"
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0"} <= set(options)
    assert {"--cpus-per-task=16", "--container-image=a.sqsh", "--container-mounts=/b"} <= set(options)
    assert command[1] == str(REPOSITORY / "launch" / "score_nodes.sh")
    meeting = "--nnodes 2 --rdzv-endpoint 127.0.0.1:21234 --rdzv-id megascore-1234-1"
    assert " ".join(command[2:8]) == meeting
    assert command[8:] == ["--max-restarts", "2", "a b.yaml", "run.checkpoint_dir=kept"]
    assert job.note("srun") is None, "the dry run started something"


@pytest.mark.parametrize(
    ("arguments", "changes", "error"),
    [
        (("job.yaml",), {}, "run.checkpoint_dir=FOLDER is missing"),
        (("job.yaml", "run.checkpoint_dir=kept"), {"SLURM_JOB_ID": ""}, "this is not a Slurm job"),
        (("job.yaml", "run.checkpoint_dir=kept"), {"SLURM_SUBMIT_DIR": "/"}, "submit from the checkout"),
    ],
)
def test_what_can_not_work_is_refused(
    job: Job, arguments: tuple[str, ...], changes: dict[str, str], error: str
) -> None:
    code, output = job.run(*arguments, **changes)
    assert code == 2
    assert output.startswith("error: ")
    assert error in output
