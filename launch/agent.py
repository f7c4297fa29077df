"""torchrun, for runs that can be stopped: started by ``score.sh`` and ``score_nodes.sh`` in place of ``torchrun``.

    python launch/agent.py TORCHRUN_ARGUMENT...

Four things differ from ``torchrun``:

- SIGUSR1, SIGTERM, SIGINT and SIGHUP make the workers stop, which get ``MEGASCORE_STOP_SECONDS`` (240) to finish their
  step, save and leave. torchrun dies of SIGUSR1, kills what is still there 30 seconds after the others, and does so at
  SIGHUP even under nohup.
- SIGUSR2 is passed on, for the workers to save and go on. torchrun dies of it.
- Workers that leave because they were asked to are not restarted, whatever ``--max-restarts`` says, and the first one
  to leave does not cut the others short.
- The exit code is that of the worker that failed first, 128 + N if signal N ended it, and 75 once all have stopped.
  torchrun says 1 to everything.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import FrameType

__all__ = ["STOPPED", "StopHandler", "find_workers", "main"]

STOPPED = 75
"""Exit code of `megascore score` when a signal stopped it and the same command goes on (EX_TEMPFAIL of sysexits.h)."""

_STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_POLL_SECONDS = 0.1


class StopHandler:
    """Handler of the stop signals: asks the workers to stop, waits for them, and ends this process."""

    def __init__(self, seconds: float) -> None:
        """Let workers have a number of seconds."""
        self._seconds = seconds
        self._asked = False
        self._interrupted = False
        self._sent_later: set[signal.Signals] = set()

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Pass a signal on and wait. The agent's other threads, which keep the rendezvous alive, go on meanwhile.

        A signal that comes during the wait is passed on too; the second SIGINT ends the wait. The second SIGTERM does
        not: Slurm may well send it to this process both itself and through srun.

        Raises:
            SystemExit: always, but for a signal that comes during the wait.
        """
        if signum == signal.SIGINT and self._interrupted:
            _say("SIGINT again: ending without waiting")
            raise SystemExit(128 + signum)
        self._interrupted = self._interrupted or signum == signal.SIGINT
        # Workers are in sessions of their own, so the terminal's signals reach only this process. Sent on as they are,
        # SIGINT would become a KeyboardInterrupt in the middle of a step, and SIGHUP would kill.
        sent = signal.SIGUSR1 if signum == signal.SIGUSR1 else signal.SIGTERM
        workers = _send_to_workers(sent)
        if self._asked:
            self._sent_later.add(sent)
            return
        self._asked = True
        _say(f"{signal.Signals(signum).name}: {len(workers)} worker(s) get {self._seconds:g} s to save and stop")
        raise SystemExit(self._wait(workers, sent))

    def _wait(self, workers: Iterable[int], sent: signal.Signals) -> int:
        """Wait for the workers without reaping them, which is torchrun's task, and return the exit code."""
        waiting, codes = set(workers), []
        deadline = time.monotonic() + self._seconds
        while waiting:
            for pid in sorted(waiting):
                code = _exit_code(pid)
                if code is not None:
                    waiting.discard(pid)
                    codes.append(code)
            if 128 + sent in codes:
                # It was still starting: nothing of this run is lost, and the others cannot go on without it.
                return STOPPED
            # A worker that has saved and is leaving has no handler any more, so a second signal may still kill it.
            leaving = {STOPPED, *(128 + number for number in self._sent_later)}
            failed = [code for code in codes if code not in {0, *leaving}]
            if failed:
                return failed[0]
            if waiting and time.monotonic() > deadline:
                _say(f"{len(waiting)} worker(s) still there after {self._seconds:g} s: ending them")
                return 128 + sent
            time.sleep(_POLL_SECONDS)
        return 0 if codes and not any(codes) else STOPPED


def _pass_on(signum: int, frame: FrameType | None) -> None:
    _send_to_workers(signal.Signals(signum))


def _send_to_workers(signum: signal.Signals) -> list[int]:
    workers = find_workers()
    for pid in workers:
        with suppress(ProcessLookupError):
            os.kill(pid, signum)
    return workers


def find_workers() -> list[int]:
    """Return the process ids of this process's children that lead a session, as torchrun's workers do."""
    if Path("/proc/self/stat").exists():
        rows = [_read_stat(path) for path in Path("/proc").glob("[0-9]*/stat")]
    else:
        table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        rows = [(int(pid), int(parent)) for pid, parent in map(str.split, table.splitlines())]
    workers = []
    for pid, parent in rows:
        if parent == os.getpid():
            with suppress(ProcessLookupError, PermissionError):
                if os.getsid(pid) == pid:
                    workers.append(pid)
    return sorted(workers)


def _read_stat(path: Path) -> tuple[int, int]:
    """Return process id and parent's id from /proc/PID/stat, zeros if it has gone."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return 0, 0
    # "PID (NAME) STATE PARENT ...", and the name may hold spaces and parentheses.
    return int(path.parent.name), int(text.rpartition(")")[2].split()[1])


def _exit_code(pid: int) -> int | None:
    """Return the exit code of a child, in the shell's way of counting, or None while it runs."""
    try:
        result = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    if result is None:
        return None
    return result.si_status if result.si_code == os.CLD_EXITED else 128 + result.si_status


def main(arguments: list[str]) -> int:
    """Run torchrun's agent in this process.

    Args:
        arguments: torchrun's, without the program's name.

    Returns:
        The exit code.
    """
    handler = StopHandler(float(os.environ.get("MEGASCORE_STOP_SECONDS") or 240))
    for signum in _STOP_SIGNALS:
        # What nohup, or a shell for its background, had ignored stays so.
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)
    signal.signal(signal.SIGUSR2, _pass_on)
    # After the handlers: this takes seconds, and SIGUSR1 would end the process.
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main as torchrun

    try:
        # Otherwise torchrun takes all but SIGUSR1 for itself.
        torchrun(["--signals-to-handle", "SIGQUIT", *arguments])
    except ChildFailedError as error:
        code = int(error.get_first_failure()[1].exitcode)
        _say("stopped; the same command goes on" if code == STOPPED else f"a worker failed\n{error}")
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError as error:
        _say(
            f"the nodes did not meet: {error} ({error.__cause__ or 'no inner error'}). Every node needs the same "
            "--nnodes, --rdzv-id and --rdzv-endpoint, and the endpoint's port must be open on its host."
        )
        return 1
    return 0


def _say(text: str) -> None:
    sys.stderr.write(f"agent: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
