"""Commands are ended with all that they started: by themselves, by a signal to the benchmark, by a full disk."""

import fcntl
import io
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread

import pytest
from benchmark_grid import CPU, PCT, Commands, made_grid
from conftest import Workspace

from nnunetv2_misfm.benchmark import process
from nnunetv2_misfm.benchmark.process import run_process, stopped_by_signals
from nnunetv2_misfm.benchmark.run import run_grid
from nnunetv2_misfm.benchmark.state import recorded_steps

# Seconds in which what should happen has happened by far
PATIENCE = 30


def run(script: str, log: io.BytesIO | None = None, stop_at: str | None = None) -> tuple[int, list[str]]:
    """Runs a shell script; returns its status and its lines. A line `stop_at` stops it."""
    lines: list[str] = []
    stopping = Event()

    def read(line: str) -> None:
        lines.append(line)
        if line == stop_at:
            stopping.set()

    return run_process(["sh", "-c", script], os.environ, log or io.BytesIO(), read, stopping), lines


def test_output_is_read_in_lines_and_kept() -> None:
    log = io.BytesIO()
    assert run("printf 'one\\ntw'; sleep 0.3; printf 'o\\nthree'; exit 3", log) == (3, ["one", "two"])
    assert log.getvalue() == b"one\ntwo\nthree"


def test_a_worker_left_behind_neither_delays_the_end_nor_lives_on() -> None:
    started = time.monotonic()
    status, (worker,) = run("sleep 50 & echo $!")
    assert status == 0 and time.monotonic() - started < PATIENCE
    assert is_dead(int(worker))


def test_a_command_without_output_is_waited_for() -> None:
    assert run("exec >&- 2>&-; sleep 0.5; exit 4")[0] == 4


def test_a_stopped_command_has_a_negative_status_and_its_last_words_are_kept() -> None:
    status, lines = run("echo here; exec sleep 50", stop_at="here")
    assert (status, lines) == (-signal.SIGTERM, ["here"])
    assert run("trap 'echo bye; exit 7' TERM; echo here; while :; do sleep 0.1; done", stop_at="here") == (
        7,
        ["here", "bye"],
    )


def test_a_command_that_does_not_heed_sigterm_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.3)
    status, _ = run("trap '' TERM; echo here; while :; do sleep 0.1; done", stop_at="here")
    assert status == -signal.SIGKILL


def test_a_log_that_cannot_be_written_ends_the_command() -> None:
    class Full(io.BytesIO):
        def write(self, chunk: bytes) -> int:  # type: ignore[override]
            self.said = chunk
            raise OSError(28, "No space left on device")

    log = Full()
    with pytest.raises(OSError, match="No space left on device"):
        run("echo $$; exec sleep 50", log)
    assert is_dead(int(log.said))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_to_the_benchmark_end_its_commands_and_their_workers(
    workspace: Workspace, stand_in: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    monkeypatch.setenv("HANG", PCT)
    grid = made_grid(workspace, trainers=[PCT], train_cases=[2, "all"])
    benchmark = multiprocessing.get_context("fork").Process(target=run_grid, args=(grid, grid.cells, CPU))
    benchmark.start()
    lock = tmp_path / "stand_in.log.lock"
    assert comes_true(lambda: lock.exists() and lock.read_text() == "hangs")
    assert benchmark.pid is not None
    os.kill(benchmark.pid, number)
    benchmark.join(PATIENCE)
    assert benchmark.exitcode == 1  # it raised; by a signal it would be negative
    with lock.open() as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # free once the command and its worker are dead
    (step,) = recorded_steps(grid, grid.cells[0])
    assert (step["title"], step["status"]) == ("train", -signal.SIGTERM)
    assert len(stand_in()) == 1  # the second cell was not begun


def test_signals_are_handled_as_before_once_the_grid_has_run() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), stopped_by_signals():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == former
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with stopped_by_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_a_grid_in_another_thread_leaves_signals_alone() -> None:
    seen = []

    def enter() -> None:
        with stopped_by_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def is_dead(pid: int) -> bool:
    """Whether a process ends soon; one that nobody waits for counts as dead."""

    def gone() -> bool:
        try:
            os.kill(pid, 0)
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except (ProcessLookupError, FileNotFoundError):
            return True

    return comes_true(gone)


def comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while not (true := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(true)
