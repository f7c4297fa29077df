"""One checkout, running cases in a folder of each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO

from tests.benchmarks.two_checkouts.cases import Case, Start
from tests.launch.processes import environment
from tests.pool import WORKER_ENVIRONMENT

__all__ = ["CODES", "Checkout"]

SECONDS = 180
"""Time for one start."""
CODES = "codes.json"
"""In the folder of a case: exit codes of the ranks, by the name of the start."""
SIDE = Path(__file__).parent / "side"


class Checkout:
    """A checkout with a process that has imported its package; ``with Checkout(path, log) as checkout``."""

    def __init__(self, path: Path, log: Path) -> None:
        """Name the checkout; ``log`` gets what its server says."""
        self.path, self._log = path, log
        self._server: subprocess.Popen[str] | None = None

    def __enter__(self) -> Checkout:
        """Start the server."""
        command = [sys.executable, str(SIDE / "serve.py"), str(self.path)]
        with self._log.open("w") as log:
            self._server = subprocess.Popen(
                command, env=self._environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        return self

    def __exit__(self, *_: object) -> None:
        """End the server."""
        assert self._server is not None
        self._stream(self._server.stdin).close()
        self._server.wait(30)

    def run(self, case: Case, folder: Path, sources: Path) -> None:
        """Run a case in a new folder, which is two folders below that of the inputs.

        Args:
            case: What to run.
            folder: Where.
            sources: Where the cases lie whose files are copied.
        """
        folder.mkdir(parents=True)
        codes = {}
        for start in case.starts:
            for name, source in start.copies.items():
                _copy(sources / source, folder / name)
            codes[start.name] = self._torchrun(start, folder) if start.torchrun else self._ask(start, folder)
        (folder / CODES).write_text(json.dumps(codes))

    def _ask(self, start: Start, folder: Path) -> list[int]:
        assert self._server is not None
        request = {**asdict(start), "folder": str(folder), "seconds": SECONDS}
        stream = self._stream(self._server.stdin)
        stream.write(json.dumps(request) + "\n")
        stream.flush()
        answer = self._stream(self._server.stdout).readline()
        if not answer:
            raise RuntimeError(f"the server of {self.path} has ended:\n{self._log.read_text()}")
        codes: list[int] = json.loads(answer)
        return codes

    def _torchrun(self, start: Start, folder: Path) -> list[int]:
        options = [f"--nproc-per-node={start.world}", "--standalone", "--local-addr=127.0.0.1"]
        command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "megascore", *start.arguments]
        with (folder / f"{start.name}.rank0.txt").open("w") as log:
            process = subprocess.run(
                command, env=self._environment(), cwd=folder, stdout=log, stderr=subprocess.STDOUT, timeout=SECONDS
            )
        return [process.returncode]

    def _environment(self) -> dict[str, str]:
        # No bytecode: a checkout may be another's, and is left as it is.
        return environment(
            PYTHONPATH=str(self.path), PYTHONDONTWRITEBYTECODE="1", HF_HUB_OFFLINE="1", **WORKER_ENVIRONMENT
        )

    @staticmethod
    def _stream(stream: IO[str] | None) -> IO[str]:
        assert stream is not None
        return stream


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
