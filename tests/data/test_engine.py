"""The engine with real processes and a real Dask cluster of this machine."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import active_children, set_executable
from multiprocessing.context import SpawnProcess
from multiprocessing.process import BaseProcess
from pathlib import Path

import engine_tasks
import pytest

from nnunetv2_misfm.data import engine, processes
from nnunetv2_misfm.data.engine import TASKS_UNDER_WAY_PER_DASK_THREAD, WorkerDied, run
from nnunetv2_misfm.errors import MisfmError

SQUARES = {number: number * number for number in range(40) if number != 13}
DIED = "the process that worked on it died, probably out of memory or by a crash in a library"


class CountingTasks(Sequence):
    """Numbers that know how many of them were taken."""

    def __init__(self, length: int):
        self.length, self.taken = length, 0

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if index >= self.length:
            raise IndexError
        self.taken += 1
        return index


def collect(function: Callable, tasks: Sequence, **options) -> dict:
    """Outcomes by task; every task must come once."""
    outcomes = list(run(function, tasks, description="test", **options))
    by_task = dict(outcomes)
    assert len(outcomes) == len(by_task) == len(tasks)
    return by_task


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> bool:
    end = time.monotonic() + seconds
    while not holds() and time.monotonic() < end:
        time.sleep(0.02)
    return holds()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


# One machine


def test_every_task_comes_once_with_its_result_or_the_exception_that_it_raised():
    outcomes = collect(engine_tasks.square, range(40), workers=2)
    error = outcomes.pop(13)
    assert outcomes == SQUARES
    assert isinstance(error, ValueError) and str(error) == "no squares of thirteen"
    assert not active_children()


def test_one_worker_is_a_process_too_and_no_tasks_need_none():
    assert collect(engine_tasks.square, [5], workers=1) == {5: 25}
    assert collect(engine_tasks.process_id, [0, 1], workers=1)[0] != os.getpid()
    assert collect(engine_tasks.square, [], workers=1) == {}


def test_workers_are_as_many_as_asked_for_and_one_per_processor_by_default():
    assert len(set(collect(engine_tasks.process_id, range(30), workers=3).values())) == 3
    default = set(collect(engine_tasks.process_id, range(30)).values())
    assert 1 <= len(default) <= len(os.sched_getaffinity(0))


def test_an_exception_that_cannot_be_unpickled_keeps_its_words():
    error = collect(engine_tasks.raise_two_parts, [1], workers=1)[1]
    assert isinstance(error, RuntimeError) and str(error) == "TwoPartError: hole in bucket"


def test_a_result_that_cannot_be_pickled_is_that_tasks_exception():
    outcomes = collect(engine_tasks.thirteen_is_unpicklable, [12, 13, 14], workers=1)
    assert isinstance(outcomes.pop(13), Exception) and outcomes == {12: 12, 14: 14}


def test_what_cannot_be_unpickled_costs_no_process(monkeypatch: pytest.MonkeyPatch):
    absent = type(sys)("absent_module")
    exec("def function(task):\n    pass", absent.__dict__)
    absent.function.__module__ = "absent_module"
    monkeypatch.setitem(sys.modules, "absent_module", absent)  # here, but not in the workers
    error = collect(absent.function, [1], workers=1)[1]
    assert isinstance(error, ModuleNotFoundError) and "absent_module" in str(error)
    error = collect(engine_tasks.result_that_unpickles_only_in_workers, [1], workers=1)[1]
    assert isinstance(error, ValueError) and str(error) == "not here"


def test_a_task_that_would_end_the_interpreter_only_fails():
    outcomes = collect(engine_tasks.thirteen_exits, [12, 13, 14], workers=1)
    assert str(outcomes.pop(13)) == "SystemExit: 3" and outcomes == {12: 12, 14: 14}


def test_a_task_that_kills_its_process_is_blamed_and_no_other():
    outcomes = collect(engine_tasks.die_of_thirteen, range(40), workers=2)
    error = outcomes.pop(13)
    assert outcomes == SQUARES
    assert isinstance(error, WorkerDied)
    assert str(error) == DIED


def test_a_task_whose_process_was_killed_once_succeeds(tmp_path: Path):
    markers = [tmp_path / name for name in "abcde"]
    assert collect(engine_tasks.die_once, markers, workers=1) == {marker: marker.name for marker in markers}


def test_many_tasks_that_kill_their_process_are_all_blamed_however_early_they_come():
    outcomes = collect(engine_tasks.die_below_five, range(10), workers=2)
    assert {task for task, outcome in outcomes.items() if isinstance(outcome, WorkerDied)} == set(range(5))
    assert all(outcomes[task] == task for task in range(5, 10))


def test_suspects_run_after_all_others_and_alone_in_the_only_process(tmp_path: Path):
    tasks = [(tmp_path, number) for number in range(12)]
    outcomes = list(run(engine_tasks.three_meet_and_one_dies, tasks, workers=3, description="test"))
    assert [result for _, result in outcomes] == ["unharmed"] * 9 + ["alone"] * 3
    assert {number for (_, number), _ in outcomes[-3:]} == {0, 1, 2}


def test_an_idle_process_that_is_killed_costs_no_task():
    outcomes = run(engine_tasks.process_id, range(50), workers=1, description="test")
    _, pid = next(outcomes)
    os.kill(pid, signal.SIGKILL)
    assert sorted(task for task, result in outcomes if isinstance(result, int)) == list(range(1, 50))


def test_few_tasks_are_taken_before_their_turn():
    tasks = CountingTasks(200)
    for finished, _ in enumerate(run(engine_tasks.square, tasks, workers=2, description="test")):
        assert tasks.taken <= finished + 1 + 2
    assert tasks.taken == 200


def test_closing_the_iterator_ends_the_processes_at_once(tmp_path: Path):
    outcomes = run(
        engine_tasks.sleep_long_but_for_zero, [(tmp_path, n) for n in range(9)], workers=2, description="test"
    )
    assert next(outcomes)[0] == (tmp_path, 0)
    assert wait_until(lambda: any(tmp_path.iterdir()))
    outcomes.close()
    assert not active_children() and not any(is_running(int(file.name)) for file in tmp_path.iterdir())


def test_ctrl_c_ends_the_processes_and_is_raised_in_the_caller(tmp_path: Path):
    tasks = [(tmp_path, number) for number in range(1, 9)]
    threading.Thread(
        target=lambda: wait_until(lambda: len(list(tmp_path.iterdir())) == 2) and os.kill(os.getpid(), signal.SIGINT)
    ).start()
    with pytest.raises(KeyboardInterrupt):
        next(run(engine_tasks.sleep_long_but_for_zero, tasks, workers=2, description="test"))
    assert not any(is_running(int(file.name)) for file in tmp_path.iterdir())


def test_a_worker_takes_no_notice_of_ctrl_c():
    assert collect(engine_tasks.interrupt_a_worker_and_square, [3, 4], workers=1) == {3: 9, 4: 16}


def test_workers_of_a_killed_parent_end_by_themselves(tmp_path: Path):
    parent = subprocess.Popen(
        [sys.executable, engine_tasks.__file__, str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert wait_until(lambda: len(list(tmp_path.iterdir())) == 2)
    workers = [int(file.name) for file in tmp_path.iterdir()]
    assert all(map(is_running, workers))
    parent.kill()
    parent.wait()
    ended = wait_until(lambda: not any(map(is_running, workers)), 10)
    for worker in filter(is_running, workers):
        os.kill(worker, signal.SIGKILL)
    assert ended


def test_progress_goes_to_standard_error_untorn_by_the_workers(capfd: pytest.CaptureFixture[str]):
    collect(engine_tasks.write_to_both_streams, range(5), workers=1)
    out, err = capfd.readouterr()
    assert out == "" and "torn" not in err
    assert "test: 100%" in err and "5/5" in err


def test_a_script_without_a_guard_is_told_so(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "from nnunetv2_misfm.data.engine import run\nprint(list(run(abs, [-1], workers=1, description='test')))\n"
    )
    finished = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    assert 'if __name__ == "__main__"' in finished.stderr.splitlines()[-1]


@pytest.fixture
def broken_interpreter() -> Iterator[None]:
    """Processes that are started die before they run a line of ours."""
    set_executable("/bin/false")
    yield
    set_executable(sys.executable)


def test_processes_that_die_as_they_start_end_the_run(broken_interpreter: None):
    with pytest.raises(MisfmError, match=r"^no process could be started \(A process .* abruptly .*\): free memory"):
        collect(engine_tasks.square, range(9), workers=2)


def test_processes_that_fail_to_get_ready_end_the_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(processes, "_start_worker", engine_tasks.fail_to_start)
    with pytest.raises(MisfmError, match=r"^no process could be started \(A process .* abruptly .*\): free memory"):
        collect(engine_tasks.square, range(9), workers=2)


def test_a_process_that_the_system_does_not_start_ends_the_run(monkeypatch: pytest.MonkeyPatch):
    started = []

    def start(process: SpawnProcess) -> None:
        if started:
            raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
        started.append(process)
        BaseProcess.start(process)

    monkeypatch.setattr(SpawnProcess, "start", start)
    with pytest.raises(MisfmError, match=r"^no process could be started \(.*temporarily unavailable\): free memory"):
        collect(engine_tasks.process_id, range(9), workers=2)
    assert len(started) == 1 and not active_children()


# A cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", silence_logs=50
    ) as cluster:
        yield cluster


def test_a_cluster_gives_the_same_results_and_exceptions(cluster):
    outcomes = collect(engine_tasks.square, range(40), scheduler=cluster.scheduler_address)
    error = outcomes.pop(13)
    assert outcomes == SQUARES
    assert isinstance(error, ValueError) and str(error) == "no squares of thirteen"


def test_a_cluster_is_asked_for_few_tasks_at_a_time(cluster):
    tasks = CountingTasks(60)
    for finished, _ in enumerate(run(engine_tasks.square, tasks, scheduler=cluster.scheduler_address, description="")):
        assert tasks.taken <= finished + 1 + 2 * TASKS_UNDER_WAY_PER_DASK_THREAD
    assert tasks.taken == 60


def test_a_killed_worker_of_a_cluster_changes_nothing(cluster):
    outcomes = run(engine_tasks.process_id, range(60), scheduler=cluster.scheduler_address, description="test")
    first, pid = next(outcomes)
    os.kill(pid, signal.SIGKILL)
    results = {first: pid, **dict(outcomes)}
    assert sorted(results) == list(range(60)) and all(isinstance(result, int) for result in results.values())
    assert len(set(results.values())) >= 2


def test_an_address_without_a_scheduler_is_named(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr(engine, "SCHEDULER_TIMEOUT_S", 0.5)
    with pytest.raises(MisfmError, match="^no Dask scheduler answers at tcp://127.0.0.1:9 .*: start one"):
        collect(engine_tasks.square, [1], scheduler="tcp://127.0.0.1:9")
    with pytest.raises(MisfmError, match="^expected the address .* got 'nonsense'"):
        collect(engine_tasks.square, [1], scheduler="nonsense")


def test_a_cluster_without_workers_is_an_error(monkeypatch: pytest.MonkeyPatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(engine, "WORKERS_TIMEOUT_S", 1)
    with distributed.LocalCluster(n_workers=0, dashboard_address=":0") as empty:
        with pytest.raises(MisfmError, match="has no workers, and none came within 1 s: start some"):
            collect(engine_tasks.square, [1], scheduler=empty.scheduler_address)


def test_workers_of_another_version_are_refused(cluster, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine, "__version__", "0.0.1")
    with pytest.raises(MisfmError, match=r"^expected nnunetv2-misfm 0\.0\.1 on the Dask workers, as here, found "):
        collect(engine_tasks.square, [1], scheduler=cluster.scheduler_address)


def test_workers_without_the_package_are_refused(cluster, monkeypatch: pytest.MonkeyPatch):
    absent = type(sys)("absent_module")
    exec("def _version():\n    pass", absent.__dict__)
    monkeypatch.setitem(sys.modules, "absent_module", absent)  # here, but not in the workers
    monkeypatch.setattr(engine, "_version", absent._version)
    absent._version.__module__ = "absent_module"
    with pytest.raises(
        MisfmError, match=r"cannot import nnunetv2_misfm .*No module named 'absent_module'.*: pip install"
    ):
        collect(engine_tasks.square, [1], scheduler=cluster.scheduler_address)


def test_a_closed_run_leaves_nothing_on_the_cluster(cluster):
    outcomes = run(engine_tasks.process_id, range(1000), scheduler=cluster.scheduler_address, description="test")
    next(outcomes)
    outcomes.close()
    assert wait_until(lambda: not cluster.scheduler.tasks)


def test_without_distributed_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MisfmError, match=r"not installed: pip install nnunetv2-misfm\[cluster\]"):
        collect(engine_tasks.square, [1], scheduler="tcp://127.0.0.1:9")


# the last one: its cluster may take long to have workers again
def test_a_task_that_kills_the_workers_of_a_cluster_is_blamed_and_no_other(cluster):
    outcomes = collect(engine_tasks.die_of_thirteen, range(40), scheduler=cluster.scheduler_address)
    error = outcomes.pop(13)
    assert outcomes == SQUARES
    assert isinstance(error, WorkerDied)
    assert str(error) == DIED
