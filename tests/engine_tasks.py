"""Functions that the tests of the engine hand to other processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nnunetv2_misfm.data.engine import run


class TwoPartError(Exception):
    """Cannot be unpickled: pickle hands only the message to the constructor."""

    def __init__(self, what: str, where: str):
        super().__init__(f"{what} in {where}")


def square(number: int) -> int:
    if number == 13:
        raise ValueError("no squares of thirteen")
    return number * number


def raise_two_parts(number: int) -> int:
    raise TwoPartError("hole", "bucket")


def interrupt_a_worker_and_square(number: int) -> int:
    """What a terminal does to all processes when Ctrl-C is pressed."""
    os.kill(os.getpid(), signal.SIGINT)
    return number * number


def die_of_thirteen(number: int) -> int:
    if number == 13:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


def die_below_five(number: int) -> int:
    if number < 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def thirteen_exits(number: int) -> int:
    if number == 13:
        sys.exit(3)
    return number


def fail_to_start(pool_is_over: object) -> None:
    raise RuntimeError("no start")


class _OnlyInWorkers:
    """Can be unpickled in the workers and not by who asked for it."""

    def __init__(self, parent: int):
        self.parent = parent

    def __reduce__(self) -> tuple:
        return _unpickle, (self.parent,)


def _unpickle(parent: int) -> _OnlyInWorkers:
    if os.getpid() == parent:
        raise ValueError("not here")
    return _OnlyInWorkers(parent)


def result_that_unpickles_only_in_workers(number: int) -> _OnlyInWorkers:
    return _OnlyInWorkers(os.getppid())


def die_once(marker: Path) -> str:
    """Kills its process where the marker is absent."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker.name


def three_meet_and_one_dies(task: tuple[Path, int]) -> str:
    """The first three tasks wait for each other, and the first kills its process; then they look who else lives."""
    folder, number = task
    if number > 2:
        return "unharmed"
    tried = folder / str(number)
    if tried.exists():
        command = ["pgrep", "-c", "-P", str(os.getppid()), "-f", "spawn_main"]
        return "alone" if subprocess.run(command, capture_output=True).stdout.strip() == b"1" else "in company"
    tried.touch()
    while number or len(list(folder.iterdir())) < 3:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def process_id(number: int) -> int:
    time.sleep(0.02)
    return os.getpid()


def thirteen_is_unpicklable(number: int) -> object:
    return (lambda: number) if number == 13 else number


def sleep_long_but_for_zero(task: tuple[Path, int]) -> None:
    if task[1]:
        leave_pid_and_sleep(task[0])


def write_to_both_streams(number: int) -> int:
    os.write(1, b"torn")
    os.write(2, b"torn")
    return number


def leave_pid_and_sleep(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


if __name__ == "__main__":  # `python engine_tasks.py FOLDER` stays busy until it is killed
    for _ in run(leave_pid_and_sleep, [Path(sys.argv[1])] * 4, workers=2, description="sleep"):
        pass
