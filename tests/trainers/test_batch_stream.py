import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from time import sleep
from typing import Any

import pytest
import torch
from conftest import Workspace
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.batch_stream import BatchStream
from nnunetv2_misfm.trainers.unlabelled_batches import UnlabelledBatches

NUMBERS_OF_WORKERS = pytest.mark.parametrize("num_workers", [0, 1, 3])
WORKERS_NEED_SIGNALS = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="no signals with a sender here")


class Numbered:
    """Batch n holds n; some take their time."""

    def __getitem__(self, number: int) -> dict[str, Any]:
        sleep(0.02 * (number % 3 == 0))
        return {"data": torch.full((2,), float(number)), "keys": [f"c{number}"]}


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """Fails a test that waits for ever."""

    def give_up(*_: Any) -> None:
        raise TimeoutError("hung")

    former = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, former)


@pytest.fixture
def make_stream() -> Iterator[Callable[..., BatchStream]]:
    made = []

    def make(num_workers: int, batches: Any = None, **settings: Any) -> BatchStream:
        made.append(BatchStream(batches or Numbered(), num_workers, **settings))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def workers(stream: BatchStream) -> list[Any]:
    return list(stream._loader._iterator._workers)


def numbers(stream: BatchStream, count: int) -> list[int]:
    return [int(batch["keys"][0][1:]) for batch in islice(stream, count)]


def on_disk(workspace: Workspace) -> UnlabelledBatches:
    data = nnUNetDatasetBlosc2(str(workspace.base / "nnUNetPlans_3d_fullres"))
    return UnlabelledBatches(data, 3, (16, 16, 16), (16, 16, 16), False, (5, 1))


# Order


@NUMBERS_OF_WORKERS
def test_batches_come_in_the_order_of_their_numbers(workspace: Workspace, make_stream: Any, num_workers: int) -> None:
    batches = on_disk(workspace)
    for number, batch in enumerate(islice(make_stream(num_workers, batches), 12)):
        assert batch["keys"] == batches[number]["keys"]
        assert torch.equal(batch["data"], batches[number]["data"])


@NUMBERS_OF_WORKERS
def test_a_stream_starts_anywhere_and_knows_its_place(make_stream: Any, num_workers: int) -> None:
    stream = make_stream(num_workers, position=41)
    assert stream.position == 41
    assert numbers(stream, 5) == [41, 42, 43, 44, 45]
    assert stream.position == 46


@NUMBERS_OF_WORKERS
def test_after_a_seek_no_batch_that_was_made_ahead_comes(make_stream: Any, num_workers: int) -> None:
    stream = make_stream(num_workers)
    assert numbers(stream, 2) == [0, 1]
    for position in (100, 0, 7, 7):
        sleep(0.1)  # the workers are ahead
        stream.seek(position)
        assert stream.position == position
        assert numbers(stream, 4) == list(range(position, position + 4))
    stream.seek(20)
    stream.seek(30)
    assert numbers(stream, 2) == [30, 31]


@NUMBERS_OF_WORKERS
def test_pytorchs_global_generator_is_not_touched(make_stream: Any, num_workers: int) -> None:
    before = torch.get_rng_state()
    stream = make_stream(num_workers)
    numbers(stream, 5)
    stream.seek(3)
    numbers(stream, 2)
    assert torch.equal(torch.get_rng_state(), before)


@NUMBERS_OF_WORKERS
def test_time_that_is_waited_for_batches_adds_up(make_stream: Any, num_workers: int) -> None:
    stream = make_stream(num_workers)
    assert stream.seconds_waited == 0
    waited = [(numbers(stream, 1), stream.seconds_waited)[1] for _ in range(4)]
    assert 0 < waited[0] < waited[1] < waited[2] < waited[3]
    assert waited[0] > 0.015  # batch 0 takes its time


# Errors


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_workers_error_arrives_with_the_name_of_the_case(
    workspace: Workspace, make_stream: Any, num_workers: int
) -> None:
    batches = on_disk(workspace)
    file = workspace.base / "nnUNetPlans_3d_fullres" / "case_3.b2nd"
    file.write_bytes(file.read_bytes()[:2000])
    stream = make_stream(num_workers, batches)
    with pytest.raises(MisfmError, match=r"expected a preprocessed case case_3 in .*; preprocess it again"):
        list(islice(stream, 20))


def test_a_worker_that_is_killed_ends_the_stream_with_an_error(make_stream: Any) -> None:
    stream = make_stream(2)
    numbers(stream, 1)
    killed, other = workers(stream)
    with pytest.raises((RuntimeError, MisfmError), match=rf"worker \(pid\D* {killed.pid}\) (is killed|exited)"):
        os.kill(killed.pid, signal.SIGKILL)
        numbers(stream, 100)
    stream.close()
    assert (killed.exitcode, other.exitcode) == (-signal.SIGKILL, 0)


# Signals


@WORKERS_NEED_SIGNALS
@pytest.mark.parametrize("name", ["TERM", "USR1", "INT"])
def test_a_schedulers_signal_ends_no_worker(make_stream: Any, name: str) -> None:
    stream = make_stream(2)
    numbers(stream, 1)
    before = workers(stream)
    for _ in range(2):
        subprocess.run(["kill", f"-{name}", *(str(worker.pid) for worker in before)], check=True)  # not their parent
        sleep(0.2)
        numbers(stream, 10)
    assert stream.position == 21
    assert workers(stream) == before and all(worker.is_alive() for worker in before)
    stream.close()
    assert [worker.exitcode for worker in before] == [0, 0]


@WORKERS_NEED_SIGNALS
def test_the_parents_sigterm_ends_a_worker_also_after_a_schedulers(make_stream: Any) -> None:
    stream = make_stream(1)
    numbers(stream, 1)
    (worker,) = workers(stream)
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    sleep(0.2)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


# The end


@pytest.mark.parametrize("num_workers", [1, 3])
def test_close_ends_the_workers_and_seek_starts_others(make_stream: Any, num_workers: int) -> None:
    stream = make_stream(num_workers)
    numbers(stream, 3)
    before = workers(stream)
    assert len(before) == num_workers
    stream.close()
    stream.close()
    assert [worker.exitcode for worker in before] == [0] * num_workers
    stream.seek(stream.position)
    assert numbers(stream, 2) == [3, 4]


def test_close_ends_the_workers_while_an_error_is_handled(workspace: Workspace, make_stream: Any) -> None:
    batches = on_disk(workspace)
    for file in (workspace.base / "nnUNetPlans_3d_fullres").glob("*.pkl"):
        file.unlink()
    stream = make_stream(2, batches)
    before = workers(stream)
    try:
        numbers(stream, 1)
    except MisfmError:
        stream.close()
        assert [worker.exitcode for worker in before] == [0, 0]


PROCESS = """
import sys, time
import torch
from nnunetv2_misfm.trainers.batch_stream import BatchStream

class Numbered:
    def __getitem__(self, number):
        return {"data": torch.zeros(1000) + number, "keys": []}

def train():
    stream = BatchStream(Numbered(), num_workers=2)
    next(stream)
    print("has a batch", flush=True)
    exec(sys.argv[1])

train()
"""


@pytest.mark.parametrize(
    ("how", "code"),
    [("pass", 0), ("raise ValueError", 1), ("raise SystemExit(75)", 75), ("time.sleep(50)", -signal.SIGTERM)],
    ids=["end", "error", "exit", "the scheduler's signal to all"],
)
def test_a_process_ends_with_its_workers_though_nobody_closed_the_stream(how: str, code: int) -> None:
    command = [sys.executable, "-c", PROCESS, how]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "has a batch\n"
        if code == -signal.SIGTERM:
            os.killpg(process.pid, signal.SIGTERM)
        process.communicate(timeout=40)  # the workers hold the pipe, too: this waits for the last of them
        assert process.returncode == code


# The way of Python 3.14: a worker's parent in the system's eyes is the server, and it gets all it needs by pickle
FORKSERVER = """
import multiprocessing, subprocess, sys, time
from itertools import islice
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2_misfm.trainers.batch_stream import BatchStream
from nnunetv2_misfm.trainers.unlabelled_batches import UnlabelledBatches

multiprocessing.set_start_method("forkserver")
batches = UnlabelledBatches(nnUNetDatasetBlosc2(sys.argv[1]), 3, (16, 16, 16), (16, 16, 16), False, (5, 1))
stream = BatchStream(batches, num_workers=2)
assert all(batch["keys"] == batches[number]["keys"] for number, batch in enumerate(islice(stream, 4)))
workers = list(stream._loader._iterator._workers)
for _ in range(10):
    subprocess.run(["kill", "-TERM", *(str(worker.pid) for worker in workers)], check=True)
    time.sleep(0.02)
assert all(batch["keys"] == batches[4 + number]["keys"] for number, batch in enumerate(islice(stream, 8)))
workers[0].terminate()
workers[0].join(10)
assert workers[0].exitcode == 0
raise SystemExit(75)  # with a worker that nobody closed
"""


@WORKERS_NEED_SIGNALS
def test_workers_of_a_fork_server_do_the_same(workspace: Workspace) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # their threads block no signal
    command = [sys.executable, "-c", FORKSERVER, str(workspace.base / "nnUNetPlans_3d_fullres")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, env=environment)
    assert ended.returncode == 75, ended.stderr
