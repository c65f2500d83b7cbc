import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nnunetv2_misfm.trainers.interruption import EXIT_CODE, SIGNALS, Interruption

POSIX = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def mine(number: int, frame: Any) -> None:
    raise AssertionError(f"signal {number} came here")


@pytest.fixture
def watch() -> Iterator[Callable[..., Interruption]]:
    """Makes interruptions that watch; handlers of this test stand behind them."""
    numbers = (*SIGNALS, signal.SIGINT)
    former = {number: signal.signal(number, mine) for number in numbers}
    made = []

    def start(*also: signal.Signals) -> Interruption:
        made.append(Interruption())
        made[-1].watch(also)
        return made[-1]

    yield start
    for interruption in reversed(made):
        interruption.release()
    assert all(signal.getsignal(number) is mine for number in numbers)
    for number, handler in former.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_schedulers_signal_is_noted_and_the_process_lives(watch: Callable, number: signal.Signals) -> None:
    interruption = watch()
    assert interruption.requested is None
    os.kill(os.getpid(), number)
    assert interruption.requested == number.name
    assert number.name in ("SIGTERM", "SIGUSR1")


def test_the_first_of_several_signals_is_named(watch: Callable) -> None:
    interruption = watch()
    for number in (*reversed(SIGNALS), SIGNALS[0]):
        os.kill(os.getpid(), number)
    assert interruption.requested == SIGNALS[-1].name


def test_ctrl_c_is_noted_only_where_asked(watch: Callable) -> None:
    watch()
    assert signal.getsignal(signal.SIGINT) is mine
    interruption = watch(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    assert interruption.requested == "SIGINT"


def test_release_gives_the_signals_back(watch: Callable) -> None:
    interruption = watch(signal.SIGINT)
    assert all(signal.getsignal(number) is not mine for number in (*SIGNALS, signal.SIGINT))
    for _ in range(2):
        interruption.release()
        assert all(signal.getsignal(number) is mine for number in (*SIGNALS, signal.SIGINT))
    with pytest.raises(AssertionError, match=f"signal {int(signal.SIGTERM)} came here"):
        os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.requested is None


@POSIX
@pytest.mark.parametrize("number", SIGNALS)
def test_a_forked_child_still_dies_of_the_signal(watch: Callable, number: signal.Signals) -> None:
    interruption = watch()
    fork = multiprocessing.get_context("fork")
    awake = fork.Event()
    child = fork.Process(target=lambda: (awake.set(), time.sleep(20)))
    child.start()
    assert child.pid is not None and awake.wait(10)  # Python forgets signals that come while it forks
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode == -number
    assert interruption.requested is None


@POSIX
def test_a_child_that_was_asked_before_it_was_forked_from_lives(watch: Callable) -> None:
    interruption = watch()
    os.kill(os.getpid(), signal.SIGTERM)
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0,))
    child.start()
    child.join()
    assert (child.exitcode, interruption.requested) == (0, "SIGTERM")


def test_beside_the_main_thread_nothing_is_watched_and_nothing_breaks(watch: Callable) -> None:
    interruption = Interruption()
    errors: list[BaseException] = []

    def elsewhere() -> None:
        try:
            interruption.watch((signal.SIGINT,))
            interruption.release()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    watch().release()
    assert not errors and signal.getsignal(signal.SIGTERM) is mine


def test_the_exit_code_is_the_systems_for_try_again() -> None:
    assert EXIT_CODE == getattr(os, "EX_TEMPFAIL", 75) == 75
