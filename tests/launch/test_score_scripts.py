"""``score.sh`` and ``score_nodes.sh``: options and environment with a stand-in for megascore, and one real run each."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.launch.processes import REPOSITORY, SECONDS, environment, put_fake_megascore, start, wait_until
from tests.models import save_checkpoint, save_tokenizer

SCORE, NODES = REPOSITORY / "launch" / "score.sh", REPOSITORY / "launch" / "score_nodes.sh"
MEET = ("--nnodes", "2", "--rdzv-endpoint", "node-0:29400")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "a job.yaml"
    path.write_text("model: {hf: nowhere}\n")
    return path


def run(*command: str | Path, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", *map(str, command)],
        env=environment(**changes),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def dry_run(*command: str | Path, cwd: Path, **changes: str) -> tuple[dict[str, str], list[str]]:
    """The environment and the command that a script would use."""
    result = run(*command, cwd=cwd, **changes)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    first = next(i for i, word in enumerate(words) if "=" not in word)
    return dict(word.split("=", 1) for word in words[:first]), words[first:]


@pytest.mark.parametrize("script", [SCORE, NODES], ids=lambda path: path.name)
def test_help_names_every_option_and_the_exit_code_of_a_stop(script: Path, tmp_path: Path) -> None:
    result = run(script, "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.startswith(f"usage: bash launch/{script.name} ")
    [known] = [line for line in script.read_text().splitlines() if line.startswith("take_arguments")]
    options = [word.strip('"') for word in known.split() if word.startswith("--")]
    assert options
    for option in [*options, "--dry-run", "with 75"]:
        assert option in result.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "error"),
    [
        (SCORE, [], "which job? Give a YAML file"),
        (SCORE, ["missing.yaml"], "there is no file 'missing.yaml'"),
        (SCORE, ["--nnodes", "2", "a job.yaml"], "unknown option '--nnodes'"),
        (SCORE, ["--nproc-per-node", "0", "a job.yaml"], "--nproc-per-node takes a number of at least 1, got '0'"),
        (SCORE, ["--nproc-per-node"], "--nproc-per-node takes a value"),
        (SCORE, ["--max-restarts=some", "a job.yaml"], "--max-restarts takes a number, got 'some'"),
        (SCORE, ["a job.yaml", "nonsense"], "'nonsense' is not key=value"),
        (SCORE, ["a job.yaml", "--nproc-per-node"], "options go before it"),
        (NODES, ["--rdzv-endpoint", "node-0:1", "a job.yaml"], "--nnodes takes a number"),
        (NODES, ["--nnodes", "2", "--rdzv-endpoint", "node-0", "a job.yaml"], "takes HOST:PORT, got 'node-0'"),
    ],
)
def test_a_wrong_argument_is_refused(
    script: Path, arguments: list[str], error: str, config_file: Path, tmp_path: Path
) -> None:
    result = run(script, *arguments, cwd=tmp_path)
    assert result.returncode == 2
    first_line = result.stderr.splitlines()[0]
    assert first_line.startswith("error: ")
    assert error in first_line
    assert "usage: " in result.stderr


def test_the_job_and_its_overrides_are_passed_on(config_file: Path, tmp_path: Path) -> None:
    job = ["a job.yaml", "model.hf=a b", "run.steps=0"]
    settings, command = dry_run(SCORE, "--nproc-per-node=3", "--max-restarts", "2", "--dry-run", *job, cwd=tmp_path)
    assert command[0] == f"{sys.prefix}/bin/python"
    assert command[1] == str(REPOSITORY / "launch" / "agent.py")
    assert command[-6:] == ["-m", "megascore", "score", *job]
    torchrun = " ".join(command[2:-6])
    assert torchrun == "--nproc-per-node 3 --max-restarts 2 --standalone --local-addr 127.0.0.1"
    assert settings["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"
    assert int(settings["OMP_NUM_THREADS"]) >= 1


def test_without_gpus_there_is_one_process(config_file: Path, tmp_path: Path) -> None:
    _, command = dry_run(SCORE, "--dry-run", config_file, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert command[2:4] == ["--nproc-per-node", "1"]


def test_what_the_user_has_set_stays(config_file: Path, tmp_path: Path) -> None:
    changes = {"OMP_NUM_THREADS": "5", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": ""}
    settings, _ = dry_run(SCORE, "--nproc-per-node", "1", "--dry-run", config_file, cwd=tmp_path, **changes)
    assert not settings.keys() & changes.keys()


def test_the_nodes_meet_where_they_are_told(config_file: Path, tmp_path: Path) -> None:
    options = ["--rdzv-id", "mine", "--local-addr", "10.0.0.2", "--network-interface", "ib0", "--nproc-per-node", "8"]
    settings, command = dry_run(NODES, *MEET, *options, "--dry-run", config_file, cwd=tmp_path)
    torchrun = " ".join(command)
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node-0:29400 --rdzv-id mine" in torchrun
    assert "--local-addr 10.0.0.2" in torchrun
    assert settings["NCCL_SOCKET_IFNAME"] == settings["GLOO_SOCKET_IFNAME"] == "ib0"
    assert "is_host" not in torchrun
    # Without the option the network is chosen by NCCL and gloo.
    settings, _ = dry_run(NODES, *MEET, "--nproc-per-node", "8", "--dry-run", config_file, cwd=tmp_path)
    assert not [name for name in settings if name.endswith("IFNAME")]


@pytest.mark.parametrize(("node", "expected"), [("0", "is_host=true"), ("1", "is_host=false")])
def test_under_slurm_the_first_node_is_the_host(node: str, expected: str, config_file: Path, tmp_path: Path) -> None:
    arguments = [*MEET, "--nproc-per-node", "1", "--dry-run", config_file]
    _, command = dry_run(NODES, *arguments, cwd=tmp_path, SLURM_NODEID=node)
    assert expected in command[command.index("--rdzv-conf") + 1].split(",")


def test_an_environment_without_megascore_is_named(config_file: Path, tmp_path: Path) -> None:
    result = run(SCORE, config_file, cwd=tmp_path, VIRTUAL_ENV="/nowhere")
    assert result.returncode == 1
    assert result.stderr.startswith("error: the active environment /nowhere has no torch or no megascore")


def test_a_signal_to_the_script_reaches_every_rank(config_file: Path, tmp_path: Path) -> None:
    settings = put_fake_megascore(tmp_path, FAKE_END="wait 75")
    process = start("bash", SCORE, "--nproc-per-node", "2", config_file, "run.seed=1", env=settings, cwd=tmp_path)
    ready = [tmp_path / f"ready{rank}" for rank in range(2)]
    wait_until(lambda: all(path.exists() and path.read_text() for path in ready), process)
    process.send_signal(signal.SIGUSR1)
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, error
    assert [(tmp_path / f"signal{rank}").read_text() for rank in range(2)] == ["SIGUSR1", "SIGUSR1"]
    assert ready[0].read_text().splitlines()[:3] == ["score", str(config_file), "run.seed=1"]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the config of a tiny job, whose paths start there."""
    folder = tmp_path_factory.mktemp("job")
    save_tokenizer(save_checkpoint(folder / "llama", "llama"))
    (folder / "text.txt").write_text(" ".join(f"w{(7 * i * i + i) % 100}" for i in range(200)))
    (folder / "job.yaml").write_text(
        "model: {hf: llama, dtype: float32}\n"
        "data: {text: text.txt, sequence_length: 16}\n"
        "parallel: {tensor: 2, sequence: true}\n"
        "run: {device: cpu, global_batch_size: 4, timeout_minutes: 5}\n"
    )
    return folder


def test_two_nodes_get_the_scores_of_one(job: Path) -> None:
    result = run(SCORE, "--nproc-per-node", "2", "job.yaml", "run.output=one", cwd=job, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}", "--local-addr", "127.0.0.1"]
    loopback = ["--network-interface", "lo"] if sys.platform == "linux" else ["--network-interface", "lo0"]
    arguments = [NODES, *options, *loopback, "--nproc-per-node", "1", "job.yaml", "run.output=two"]
    with ThreadPoolExecutor(2) as pool:
        nodes = [pool.submit(run, *arguments, cwd=job, OMP_NUM_THREADS="1") for _ in range(2)]
    assert [node.result().returncode for node in nodes] == [0, 0], nodes[0].result().stderr + nodes[1].result().stderr
    from megascore.cli import main

    # The same layout, the same sums in the same order.
    assert main(["compare", str(job / "one"), str(job / "two"), "--tolerance", "0"]) == 0
