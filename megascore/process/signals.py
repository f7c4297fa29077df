"""Signals that ask a run to save, or to save and stop. They are noted here, and obeyed at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["SAVE_SIGNALS", "STOP_SIGNALS", "Signals"]

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Signals that torchrun and Slurm send before they kill: SIGTERM on a stop, SIGUSR1 by ``sbatch --signal``."""
SAVE_SIGNALS = (signal.SIGUSR2,)


class Signals:
    """A note of the signals that came while the ``with`` block runs; only the main thread gets them from Python."""

    def __init__(self) -> None:
        """Begin with no signal noted."""
        self.stop: signal.Signals | None = None
        self.save = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Signals:
        """Take the signals over from whoever has them."""
        if threading.current_thread() is threading.main_thread():
            for number in (*STOP_SIGNALS, *SAVE_SIGNALS):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number in SAVE_SIGNALS:
            self.save = True
        else:
            self.stop = signal.Signals(number)
