"""What a scheduler's signal does to a training: it is noted, and the run ends at a place of its own choosing."""

import os
import signal
import threading
from types import FrameType
from typing import Any

# SIGTERM is what schedulers send before they kill, SIGUSR1 what `sbatch --signal=USR1@120` asks for
SIGNALS = (signal.SIGTERM, signal.SIGUSR1) if hasattr(signal, "SIGUSR1") else (signal.SIGTERM,)
# EX_TEMPFAIL of BSD's sysexits.h: nothing is wrong, try again
EXIT_CODE = 75


class Interruption:
    """Notes the signals that ask this process to end soon.

    Attributes:
        requested: Name of the first signal that came, None before.
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._former: dict[int, Any] = {}
        self._process = os.getpid()

    def watch(self, also: tuple[signal.Signals, ...] = ()) -> None:
        """Notes `SIGNALS` and some more from now on, instead of ending at once (only in a process' main thread).

        Processes that are forked meanwhile inherit the handlers, and Python drops a signal that arrives in the very
        moment of the fork: start pools of processes before or after.
        """
        if not self._former and threading.current_thread() is threading.main_thread():
            for number in (*SIGNALS, *also):
                self._former[number] = signal.signal(number, self._note)

    def release(self) -> None:
        """Gives the signals back to whoever had them before."""
        for number, handler in self._former.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's
        self._former = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a process that was forked from this one: it has nothing to finish
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = self.requested or signal.Signals(number).name
