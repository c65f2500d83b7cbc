"""Runs one function on many tasks, in a process pool of this machine or on a Dask cluster, and loses none of them.

Every task comes back with a result or with an exception, also where a process was killed. A pool then knows only which
tasks were under way: these are tried again at the end, each alone, so that neither a neighbour nor the memory that
neighbours took is held against it. Only a task whose process dies then is given up.
"""

import os
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from itertools import islice
from typing import Any, TypeVar

import SimpleITK as sitk
from tqdm import tqdm

from nnunetv2_misfm import __version__
from nnunetv2_misfm.data.processes import NoWorkers, Processes

T = TypeVar("T")
R = TypeVar("R")

# Ours: enough that no worker waits for the network, little enough that memory does not grow with the number of tasks
TASKS_UNDER_WAY_PER_DASK_THREAD = 3
SCHEDULER_TIMEOUT_S = 10  # ours: an address that does not answer by then is wrong or its cluster is down
CHECK_CLUSTER_EVERY_S = 10.0  # ours: without workers nothing ends that would wake the caller
WORKERS_TIMEOUT_S = 60  # ours: a nanny brings a dead worker back within seconds, a busy machine takes longer
SECONDS_PER_LOG_LINE = 30.0  # ours: a progress bar that is no terminal's leaves one line per update

_Pool = tuple[Executor, Callable[[], int]]  # and how many tasks may be under way in it, at least 1
_GONE = "the Dask scheduler went away: start the cluster and run the same command again."


class WorkerDied(Exception):
    """Stands for the result of a task whose process died."""


def run(
    function: Callable[[T], R],
    tasks: Sequence[T],
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    description: str,
) -> Iterator[tuple[T, R | Exception]]:
    """Yields every task once, as it ends, with its result or the exception that the function raised.

    What was yielded is no longer held, and few tasks are under way at a time. Closing the iterator, or Ctrl-C, ends
    the local processes at once.

    Args:
        function: importable by name, or a `functools.partial` of such; it, the tasks and the results can be pickled.
        tasks: read one by one.
        workers: local processes; one per processor that this process may use, where None.
        scheduler: address of a Dask scheduler, whose workers are used instead.
        description: what stands before the progress bar, on standard error.

    Yields:
        (task, result); `WorkerDied` as the result where its process died with nothing else under way.

    Raises:
        MisfmError: Dask is not installed, its scheduler does not answer, or there are no workers.
    """
    if len(tasks) == 0:
        return
    pool = _cluster(scheduler) if scheduler else _processes(workers or _num_processors())
    interval_s = 0.1 if sys.stderr.isatty() else SECONDS_PER_LOG_LINE
    style = {"unit": " items", "mininterval": interval_s, "dynamic_ncols": True}
    suspects: list[T] = []
    with pool as (executor, capacity), tqdm(total=len(tasks), desc=description, **style) as bar:
        for task, outcome in _outcomes(executor, function, tasks, capacity):
            if isinstance(outcome, WorkerDied):
                suspects.append(task)
                continue
            bar.update()
            yield task, outcome
        if isinstance(executor, Processes):
            executor.limit_to(1)
        for task, outcome in _outcomes(executor, function, suspects, lambda: min(1, capacity())):
            bar.update()
            yield task, outcome


def _outcomes(
    executor: Executor, function: Callable[[T], R], tasks: Sequence[T], capacity: Callable[[], int]
) -> Iterator[tuple[T, R | Exception]]:
    waiting = iter(tasks)
    under_way: dict[Future[bytes], T] = {}
    while True:
        for task in islice(waiting, max(0, capacity() - len(under_way))):
            under_way[executor.submit(_answer, pickle.dumps((function, task)))] = task
        if not under_way:
            return
        for future in wait(under_way, CHECK_CLUSTER_EVERY_S, FIRST_COMPLETED).done:
            yield under_way.pop(future), _outcome(future)


def _outcome(future: Future[bytes]) -> Any:
    try:
        return pickle.loads(future.result())
    except CancelledError as error:
        raise NoWorkers(_GONE) from error
    except Exception as error:
        # KilledWorker is distributed's, by name because the package is optional
        if isinstance(error, BrokenProcessPool) or type(error).__name__ == "KilledWorker":
            return WorkerDied("the process that worked on it died, probably out of memory or by a crash in a library")
        return error


def _answer(message: bytes) -> bytes:
    """Works on a task in a worker; a pool that is handed only bytes meets nothing that it cannot unpickle."""
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)  # the processes share the processors already
    sitk.ProcessObject.GlobalWarningDisplayOff()
    try:
        function, task = pickle.loads(message)
        return pickle.dumps(function(task))
    except BaseException as error:  # of a library that calls sys.exit, too
        with suppress(Exception):  # of an exception class that asks for more arguments than it hands on
            answer = pickle.dumps(error)
            if isinstance(pickle.loads(answer), Exception):
                return answer
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _num_processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _processes(workers: int) -> Iterator[_Pool]:
    with Processes(workers) as executor:
        yield executor, lambda: workers  # no more, because a death makes suspects of all that are under way


@contextmanager
def _cluster(scheduler: str) -> Iterator[_Pool]:
    try:
        import distributed
    except ImportError as error:
        raise NoWorkers(
            "a Dask cluster needs the package distributed, which is not installed: "
            "pip install nnunetv2-misfm[cluster] (here and on the workers)."
        ) from error

    def capacity() -> int:
        try:
            if not client.nthreads():
                client.wait_for_workers(1, WORKERS_TIMEOUT_S)
            return max(1, TASKS_UNDER_WAY_PER_DASK_THREAD * sum(client.nthreads().values()))
        except distributed.TimeoutError as error:
            raise NoWorkers(
                f"the Dask scheduler at {scheduler} has no workers, and none came within {WORKERS_TIMEOUT_S} s: "
                f"start some (dask worker {scheduler}) and run the same command again."
            ) from error
        except OSError as error:
            raise NoWorkers(_GONE) from error

    if not re.search(r":\d+$", scheduler):  # Dask would complain once more at its end
        raise NoWorkers(
            f"expected the address of a Dask scheduler with its port, such as tcp://node1:8786, got {scheduler!r}."
        )
    try:
        client = distributed.Client(scheduler, timeout=SCHEDULER_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, distributed.TimeoutError) as error:
        raise NoWorkers(
            f"no Dask scheduler answers at {scheduler} ({error}): start one (dask scheduler) "
            "or give the address that it prints, such as tcp://node1:8786."
        ) from error
    with client:
        capacity()
        _require_package(client, scheduler)
        yield client.get_executor(pure=False), capacity


def _require_package(client: Any, scheduler: str) -> None:
    """Where it is missing, every task would fail, each with an exception that passes for its outcome."""
    try:
        versions = set(client.run(_version).values())
    except Exception as error:  # Dask hands on the worker's, often only as text
        raise NoWorkers(
            f"the workers of the Dask scheduler at {scheduler} cannot import nnunetv2_misfm ({error}): "
            "pip install nnunetv2-misfm[cluster] in their environment."
        ) from error
    if versions - {__version__}:  # none, where all workers are just being started again
        found = ", ".join(sorted(versions))
        raise NoWorkers(f"expected nnunetv2-misfm {__version__} on the Dask workers, as here, found {found}.")


def _version() -> str:
    return __version__
