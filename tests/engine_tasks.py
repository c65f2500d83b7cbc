"""Functions that the tests of the engine hand to other processes."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


def die_once(marker: Path) -> str:
    """Kills its process where the marker is absent."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return marker.name


def die_in_company(task: tuple[Path, int]) -> str:
    """Four tasks kill their process the first time, and say whether another task was at work the second time."""
    folder, number = task
    if number >= 4:
        with _at_work(folder):
            time.sleep(0.05)
        return "unharmed"
    if not (folder / f"tried_{number}").exists():
        (folder / f"tried_{number}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with _at_work(folder):
        time.sleep(0.05)
        return "alone" if len(list(folder.glob("at_work_*"))) == 1 else "in company"


@contextmanager
def _at_work(folder: Path) -> Iterator[None]:
    file = folder / f"at_work_{os.getpid()}"
    file.touch()
    yield
    file.unlink()


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
