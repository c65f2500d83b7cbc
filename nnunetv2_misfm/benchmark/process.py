"""One command in a process group of its own, its output in a log, and how it is stopped together with what it started.

nnU-Net's commands start workers, which outlive a parent that ends early and keep its output open. A group can be ended
as a whole, and Ctrl-C in a terminal reaches the benchmark alone.
"""

import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import BinaryIO, NoReturn

# Seconds between two looks at whether to stop: ours
_POLL_SECONDS = 0.2
# Seconds that a stopped command has to end by itself: ours, well below the 30 s after which SLURM kills (KillWait)
_GRACE_SECONDS = 10
_CHUNK_BYTES = 1 << 16
# Of SLURM and systemd; of a terminal that closed
_STOPPING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def run_process(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: BinaryIO,
    read: Callable[[str], None],
    stopping: threading.Event,
) -> int:
    """Runs a command to its end and returns its status, negative where a signal ended it.

    Nothing that it started in its group is left behind, however this function is left.

    Args:
        arguments: The path of the program and its arguments.
        environment: All its variables.
        log: Where its output is written, errors included.
        read: Is given every line of it.
        stopping: Ends the command where it is set.

    Raises:
        OSError: The program cannot be started, or the log cannot be written (a full disk).
    """
    process = subprocess.Popen(
        arguments,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    output, line = process.stdout.fileno(), b""

    def take(timeout: float) -> bytes:
        """Copies what the command has said; empty where it says nothing for so many seconds, or never will."""
        nonlocal line
        chunk = os.read(output, _CHUNK_BYTES) if select.select([output], [], [], timeout)[0] else b""
        log.write(chunk)
        log.flush()
        *lines, line = (line + chunk).split(b"\n")
        for complete in lines:
            read(complete.decode(errors="replace"))
        return chunk

    with process.stdout:
        try:
            while process.poll() is None and not stopping.is_set():
                if not take(_POLL_SECONDS):
                    stopping.wait(_POLL_SECONDS / 10)  # it may have closed its output and work on
        finally:
            status = _end(process)
        while take(0):
            pass
    return status


def _end(process: subprocess.Popen) -> int:
    """Ends a process, if it lives, and what it left in its group; returns its status."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        try:
            process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
    _signal_group(process, signal.SIGKILL)
    return process.wait()


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):  # none left; macOS says so where only zombies are
        pass


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP act as Ctrl-C does; those that are ignored (`nohup`) stay so.

    Only the main thread of a program can do this; in others nothing changes.
    """
    former = {}
    if threading.current_thread() is threading.main_thread():
        former = {number: signal.getsignal(number) for number in _STOPPING_SIGNALS}
        former = {number: kept for number, kept in former.items() if kept not in (None, signal.SIG_IGN)}
    try:
        for number in former:
            signal.signal(number, _interrupt)
        yield
    finally:
        for number, kept in former.items():
            signal.signal(number, kept)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
