"""Processes of one checkout on request: python serve.py CHECKOUT, with the checkout first on Python's path.

Each line on standard input is a request as JSON, each line on standard output the list of exit codes by rank. Ranks are
forked from this process, which has imported everything: a job of two ranks costs a second in place of ten.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

CHECKOUT = Path(sys.argv[1])
SIDE = Path(__file__).parent
MODULES_OF_A_JOB = "modules.json"


def main() -> None:
    """Answer requests until standard input ends."""
    # What libraries print is kept apart from the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.path.append(str(SIDE))
    for name in ("torch", "transformers", "tokenizers", "megascore", "megascore.mcore"):
        importlib.import_module(name)
    sys.modules["transformers"].utils.logging.disable_progress_bar()
    found = Path(sys.modules["megascore"].__file__ or "").parent
    assert found == CHECKOUT / "megascore", f"the package of {found} is on Python's path, not that of {CHECKOUT}"
    for line in sys.stdin:
        request = json.loads(line)
        codes = run_ranks(request)
        learn_imports(Path(request["folder"]))
        answers.write(json.dumps(codes) + "\n")
        answers.flush()


def learn_imports(folder: Path) -> None:
    """Import what a rank had to import by itself, so that later ones need not."""
    noted = folder / MODULES_OF_A_JOB
    if not noted.exists():
        return
    for name in json.loads(noted.read_text()):
        if name not in sys.modules:
            with suppress(ImportError):
                importlib.import_module(name)
    noted.unlink()


def run_ranks(request: dict[str, Any]) -> list[int]:
    """Fork a process for each rank; return their exit codes, negative for the number of a signal."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = {}
    for rank in range(request["world"]):
        child = os.fork()
        if child == 0:
            run_rank(request, rank, port)
        ranks[child] = rank
    codes: dict[int, int] = {}
    deadline = time.monotonic() + request["seconds"]
    while len(codes) < request["world"]:
        for child in [child for child, rank in ranks.items() if rank not in codes]:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                codes[ranks[child]] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[rank] for rank in range(request["world"])]


def run_rank(request: dict[str, Any], rank: int, port: int) -> None:
    """Be one rank of a request, and end."""
    os.chdir(request["folder"])
    log = os.open(f"{request['name']}.rank{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Lines of both streams stand in the log in the order in which they came.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if request["world"] > 1:
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["world"], "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"})
    if request["stop"] is not None and rank in request["stop"]["ranks"]:
        stop_in_the_middle(**request["stop"])
    code = run_and_tell(request)
    if rank == 0:
        note_imports()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not as a child of the server would end: that has nothing to clean up here.
    os._exit(code)


def run_and_tell(request: dict[str, Any]) -> int:
    """Run what is asked for, as Python runs a program of its own; return its exit code."""
    try:
        if request["program"] is not None:
            module, _, function = request["program"].partition(":")
            getattr(importlib.import_module(module), function)()
        else:
            sys.argv = ["megascore", *request["arguments"]]
            runpy.run_module("megascore", run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        # A user's program that catches what explains itself; on the command line the package does so.
        errors = importlib.import_module("megascore.errors")
        if isinstance(error, errors.MegascoreError):
            print(f"{type(error).__name__}: {error}")
            return 75 if isinstance(error, errors.Preempted) else 2
        traceback.print_exc()
        return 1
    return 0


def note_imports() -> None:
    """Write down this process's modules of the package and of Megatron, once they are more than the server's."""
    names = [name for name in sys.modules if name.startswith(("megascore.", "megatron.", "omegaconf", "transformers."))]
    importable = [name for name in names if getattr(sys.modules[name], "__spec__", None) is not None]
    Path(MODULES_OF_A_JOB).write_text(json.dumps(importable))


def stop_in_the_middle(module: str, call: int, number: int, ranks: list[int]) -> None:
    """Send this process a signal when a module of the class named ``module`` is called for the ``call``-th time."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    calls = 0

    def count(called: Any, _: Any) -> None:
        nonlocal calls
        calls += type(called).__name__ == module
        if calls == call and type(called).__name__ == module:
            os.kill(os.getpid(), number)

    register_module_forward_pre_hook(count)


if __name__ == "__main__":
    main()
