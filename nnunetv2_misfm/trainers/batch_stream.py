"""Batches in a fixed order, made ahead of time by PyTorch's data workers, from any position on."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import parent_process
from multiprocessing.connection import wait
from time import perf_counter
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.interruption import SIGNALS
from nnunetv2_misfm.trainers.unlabelled_batches import UnlabelledBatches

# How long a worker whose connection broke may take to be gone (ours)
SECONDS_TO_DIE = 1


class BatchStream:
    """The batches of an `UnlabelledBatches` in the order of their numbers, whatever the number of workers.

    A worker's exception is raised here with the worker's own traceback; a worker's death is an error, too.

    Args:
        batches: What makes a batch of a number.
        num_workers: Processes that make batches ahead of time; 0 makes them here.
        pin_memory: Whether batches lie in page-locked memory, for the way to a GPU.
        position: Number of the first batch.

    Attributes:
        position: Number of the next batch.
        seconds_waited: How long batches were waited for, in all.
    """

    def __init__(
        self, batches: UnlabelledBatches, num_workers: int, pin_memory: bool = False, position: int = 0
    ) -> None:
        self.batches = batches
        self.seconds_waited = 0.0
        self._loader = DataLoader(
            batches,
            batch_size=None,  # the dataset makes whole batches
            sampler=_NumbersFrom(self),
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
            collate_fn=_as_it_is,
            worker_init_fn=_ignore_the_scheduler,
            generator=torch.Generator(),  # PyTorch's own would draw from the global one
        )
        self.seek(position)

    def seek(self, position: int) -> None:
        """Goes on with the batch of that number; workers begin at once."""
        self.position = position
        self._iterator: Iterator[dict[str, Any]] | None = iter(self._loader)

    def __iter__(self) -> "BatchStream":
        return self

    def __next__(self) -> dict[str, Any]:
        """Returns the next batch.

        Raises:
            MisfmError: A worker was killed. (RuntimeError where PyTorch sees it first, which may be between batches.)
        """
        assert self._iterator is not None
        start = perf_counter()
        try:
            batch = next(self._iterator)
        except (OSError, EOFError) as error:  # what a dead worker's half-sent batch gives, or a worker's own error
            self._raise_if_killed(error)
            raise
        self.seconds_waited += perf_counter() - start
        self.position += 1
        return batch

    def _raise_if_killed(self, error: Exception) -> None:
        workers = getattr(self._iterator, "_workers", [])
        broken = wait([worker.sentinel for worker in workers], SECONDS_TO_DIE)
        for worker in workers:
            if worker.sentinel in broken:
                worker.join(SECONDS_TO_DIE)
                raise MisfmError(
                    f"DataLoader worker (pid {worker.pid}) exited unexpectedly, exit code {worker.exitcode} (-9: often "
                    "out of memory; -7: /dev/shm is full); set nnUNet_n_proc_DA to fewer workers, or ask for more "
                    "memory, and go on with --c."
                ) from error

    def close(self) -> None:
        """Ends the workers; `seek` starts them again."""
        if self._loader.num_workers > 0 and self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined] # a traceback may hold the iterator
        self._iterator = None
        self._loader._iterator = None  # PyTorch has no public way


class _NumbersFrom(Sampler[int]):
    """Whole numbers without end, from a stream's position on."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.stream.position)


def _as_it_is(batch: Any) -> Any:
    return batch


def _ignore_the_scheduler(worker: int) -> None:
    """Lets a data worker outlive the signals that a scheduler sends to all processes of a job.

    The training process needs no worker that dies while it finishes its step; it ends them itself, by the very signal
    (SIGTERM) that is told from the scheduler's by its sender.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # launchers send it to whole groups of processes
    if not hasattr(signal, "sigwaitinfo"):  # macOS and Windows, where no scheduler sends any
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    parent = parent_process()
    assert parent is not None

    def listen() -> None:
        while True:
            received = signal.sigwaitinfo(SIGNALS)
            if received.si_signo == signal.SIGTERM and received.si_pid == parent.pid:
                os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
