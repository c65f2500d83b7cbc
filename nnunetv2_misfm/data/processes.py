"""The process pool of one machine: Python's own, and a new one wherever a death broke it."""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context
from typing import Any

from nnunetv2_misfm.errors import MisfmError

START_ATTEMPTS = 3  # ours: a process may be killed from outside while it starts, hardly three in a row


class NoWorkers(MisfmError):
    """Not the outcome of a task: the run cannot go on."""


class Processes(Executor):
    """A ProcessPoolExecutor that outlives a death, which fails all tasks under way with `BrokenProcessPool`."""

    def __init__(self, workers: int):
        """Args: workers: processes at most."""
        self.workers = workers
        self.pool: ProcessPoolExecutor | None = None

    def submit(self, function: Callable, /, *arguments: Any, **keywords: Any) -> Future:
        """Returns the future of a call, in a new pool where a death broke the last one.

        Raises:
            NoWorkers: No process can be started.
        """
        cause: Exception | None = None
        for _ in range(1 + START_ATTEMPTS):
            try:
                pool = self.pool or self._start()
                return pool.submit(function, *arguments, **keywords)
            except BrokenProcessPool as error:
                self.shutdown()
                cause = error
            except (OSError, RuntimeError) as error:  # no memory; multiprocessing's word on a script without a guard
                cause = error
                break
        raise NoWorkers(
            f"no process could be started ({' '.join(str(cause).split())[:160]}): free memory or use fewer workers; "
            'a script that starts processes must do so below if __name__ == "__main__".'
        ) from cause

    def _start(self) -> ProcessPoolExecutor:
        context = get_context("spawn")  # a forked child would inherit locks that SimpleITK's and PyTorch's threads hold
        pool_is_over, self.lifeline = context.Pipe(duplex=False)
        self.pool = ProcessPoolExecutor(self.workers, context, _start_worker, (pool_is_over,))
        self.pool.submit(int).result()  # processes can start: later deaths are held against tasks
        return self.pool

    def limit_to(self, workers: int) -> None:
        """Ends all processes; from the next task on there are no more than this."""
        self.shutdown()
        self.workers = workers

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Ends all processes at once, whatever they do."""
        if self.pool is not None:
            self.lifeline.close()
            self.pool.shutdown(wait, cancel_futures=cancel_futures)
            self.pool = None


def _start_worker(pool_is_over: connection.Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_pool, args=(pool_is_over,), daemon=True).start()
    # ITK's MetaIO writes complaints to the descriptors themselves, past Python, and would tear the progress bar
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _end_with_pool(pool_is_over: connection.Connection) -> None:
    """Waits until the parent closes its end of the pipe or is killed: before Python 3.14 a pool cannot end a task."""
    connection.wait([pool_is_over])
    os._exit(1)
