"""Processes of this machine, each with a pipe of its own, so that it is known which task killed its process.

A ProcessPoolExecutor will not do: one death fails all tasks that are under way in it, it loses its processes over an
exception that cannot be unpickled, and before Python 3.14 nothing ends a process before its task is done.
"""

import os
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import connection, get_context, parent_process
from typing import Any

from nnunetv2_misfm.errors import MisfmError


class WorkerDied(Exception):
    """Stands for the result of a task whose process died."""


class NoWorkers(MisfmError):
    """Not the outcome of a task: the run cannot go on."""


class Processes(ThreadPoolExecutor):
    """An executor with as many processes as threads: a thread hands its task to an idle process and waits for it.

    The future of a task whose process died raises `WorkerDied`; it is not tried again.

    Attributes:
        ended: no process may live any longer.
    """

    def __init__(self, workers: int):
        """Args: workers: processes at most; each is started when a task has no idle one to go to."""
        super().__init__(workers)
        self.idle: list[_Process] = []
        self.alive: set[_Process] = set()
        self.ended = False

    def submit(self, function: Callable, /, *arguments: Any, **keywords: Any) -> Future:
        """Returns the future of a call whose function, arguments and outcome can be pickled."""
        return super().submit(self._call, partial(function, *arguments, **keywords))

    def _call(self, task: Callable[[], Any]) -> Any:
        message = pickle.dumps(task)
        try:
            process = self.idle.pop()
        except IndexError:
            process = self._start()
        try:
            answer = process.ask(message)
        except (EOFError, OSError) as error:
            self.alive.discard(process)
            raise WorkerDied(f"the process that worked on it died ({process.cause_of_death()})") from error
        self.idle.append(process)
        return pickle.loads(answer)

    def _start(self) -> "_Process":
        for _ in range(2):  # the first may have been killed from outside
            try:
                process = _Process()
            except (OSError, RuntimeError) as error:  # no memory; multiprocessing's word on a script without a guard
                cause = str(error).strip().splitlines()[0]
                break
            self.alive.add(process)
            if self.ended:
                process.kill()
            try:
                process.answer()
                return process
            except (EOFError, OSError):
                self.alive.discard(process)
                cause = process.cause_of_death()
        raise NoWorkers(
            f"no process could be started ({cause}): free memory or use fewer workers; "
            'a script that starts processes must do so below if __name__ == "__main__".'
        )

    def end(self) -> None:
        """Ends all processes at once, whatever they do."""
        self.ended = True
        self.shutdown(wait=False, cancel_futures=True)
        for process in list(self.alive):
            process.kill()
        self.shutdown()


class _Process:
    def __init__(self) -> None:
        context = get_context("spawn")  # a forked child would inherit locks that SimpleITK's and PyTorch's threads hold
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_work, args=(far_end,), daemon=True)
        self.process.start()
        far_end.close()

    def ask(self, message: bytes) -> bytes:
        self.pipe.send_bytes(message)
        return self.answer()

    def answer(self) -> bytes:
        connection.wait([self.pipe, self.process.sentinel])
        if not self.pipe.poll():
            raise EOFError
        return self.pipe.recv_bytes()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def cause_of_death(self) -> str:
        self.process.join()
        code = self.process.exitcode or 0
        if code == -signal.SIGKILL:
            return "killed, probably because memory ran out"
        return f"signal {-code}: {signal.strsignal(-code)}" if code < 0 else f"exit status {code}"


def _work(pipe: connection.Connection) -> None:
    """Answers tasks until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # ITK's MetaIO writes complaints to the descriptors themselves, past Python, and would tear the progress bar
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    pipe.send_bytes(b"ready")
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            return
        pipe.send_bytes(_answer(message))


def _answer(message: bytes) -> bytes:
    try:
        return pickle.dumps(pickle.loads(message)())
    except Exception as error:
        try:
            answer = pickle.dumps(error)
            pickle.loads(answer)
            return answer
        except Exception:  # an exception class that asks for more arguments than it hands on
            return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its children: they see its end of a pipe close."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
