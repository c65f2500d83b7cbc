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
    """A ProcessPoolExecutor that a death does not end.

    A death fails all tasks that are under way (`BrokenProcessPool`); the next task starts a new pool.
    """

    def __init__(self, workers: int):
        """Args: workers: processes at most."""
        self.workers = workers
        self.pool: ProcessPoolExecutor | None = None

    def submit(self, function: Callable, /, *arguments: Any, **keywords: Any) -> Future:
        """Returns the future of a call, whose parts and result must be sure to unpickle: what does not breaks the pool.

        Raises:
            NoWorkers: No process can be started.
        """
        while True:
            pool = self.pool or self._start()
            try:
                return pool.submit(function, *arguments, **keywords)
            except BrokenProcessPool:
                self.shutdown()
            except (OSError, RuntimeError) as error:  # one more process was to be started
                raise _no_workers(str(error)) from error

    def _start(self) -> ProcessPoolExecutor:
        context = get_context("spawn")  # a forked child would inherit locks that SimpleITK's and PyTorch's threads hold
        for _ in range(START_ATTEMPTS):
            try:
                pool_is_over, self.lifeline = context.Pipe(duplex=False)
                self.pool = ProcessPoolExecutor(self.workers, context, _start_worker, (pool_is_over,))
                self.pool.submit(int).result()  # one process starts and answers, so a death from here on is a task's
                return self.pool
            except BrokenProcessPool:
                self.shutdown()
            except (OSError, RuntimeError) as error:  # no memory; multiprocessing's word on a script without a guard
                raise _no_workers(str(error)) from error
        raise _no_workers(f"{START_ATTEMPTS} in a row died as they started")

    def keep_to_one(self) -> None:
        """Ends all processes; from the next task on there is only one."""
        self.shutdown()
        self.workers = 1

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Ends all processes at once, whatever they do."""
        if self.pool is not None:
            self.lifeline.close()
            self.pool.shutdown(wait, cancel_futures=cancel_futures)
            self.pool = None


def _no_workers(cause: str) -> NoWorkers:
    return NoWorkers(
        f"no process could be started ({' '.join(cause.split())[:200]}): free memory or use fewer workers; "
        'a script that starts processes must do so below if __name__ == "__main__".'
    )


def _start_worker(pool_is_over: connection.Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_pool, args=(pool_is_over,), daemon=True).start()
    # ITK's MetaIO writes complaints to the descriptors themselves, past Python, and would tear the progress bar
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)


def _end_with_pool(pool_is_over: connection.Connection) -> None:
    """Nothing is ever sent: the pipe can be read once the parent closed its end or was killed.

    Before Python 3.14 a pool has no other way to end a process before its task is done.
    """
    connection.wait([pool_is_over])
    os._exit(1)
