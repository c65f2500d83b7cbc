"""Trainings that are killed in earnest: each is a process of its own, and ends as one that nothing happened to."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from interrupting import LENGTH, assert_same_end, checkpoint_of
from preempted import FILLER, PATIENCE, VF, Job, Mishap
from toy import DATASET, toy_plans, write_plans, write_toy_dataset

from nnunetv2_misfm.trainers.interruption import EXIT_CODE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals and forked processes of POSIX"),
]

EVERY_STEP = {**LENGTH, "checkpoint_every_minutes": 1e-9}
# So many that a signal meets the epoch that it is meant for
STEPS_BY_COMMAND = 40
FULL = "checkpoint_latest.pth could not be written"
INTACT = "the former checkpoint, if any, is intact."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preemption")
    for name in ("raw", "preprocessed"):
        (folder / name).mkdir()
    write_toy_dataset(folder / "preprocessed", toy_plans())
    return folder


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> Path:
    """What Volume Fusion leaves without any mishap."""
    job = Job(root, root / "uninterrupted", block=LENGTH)
    assert job.run() == 0, job.output[-3000:]
    return job.folder


@pytest.fixture
def make_job(root: Path, request: pytest.FixtureRequest) -> Callable[..., Job]:
    name = "".join(letter if letter.isalnum() else "_" for letter in request.node.name)
    return lambda **options: Job(root, options.pop("results", root / name), **options)


def assert_finishes(job: Job, uninterrupted: Path) -> None:
    assert job.run(resume=True) == 0, job.output[-3000:]
    assert_same_end(job.folder, uninterrupted)


def state_of(job: Job) -> tuple[int, int]:
    """(epoch, steps done) of the newest checkpoint."""
    checkpoint = checkpoint_of(job.folder, "latest")
    return checkpoint["current_epoch"], len(checkpoint["misfm_state"]["ranks"][0]["losses"])


@pytest.mark.parametrize("workers", [0, 2])
def test_signals_to_all_processes_of_a_job_lose_nothing(
    make_job: Callable[..., Job], uninterrupted: Path, workers: int
) -> None:
    job = make_job(block=LENGTH, workers=workers)
    assert job.run(mishap=Mishap("signal_to_all", "SIGTERM")) == 75, job.output[-3000:]
    assert "Ended by SIGTERM in epoch 1 after 2 of 3 steps; go on with --c. Exit code 75." in job.output
    assert state_of(job) == (1, 2)
    mishap = Mishap("signal_to_all", "SIGUSR1", step=0, phase="validation")
    assert job.run(resume=True, mishap=mishap) == 75, job.output[-3000:]
    assert "Ended by SIGUSR1 in epoch 1 after 3 of 3 steps" in job.output
    assert job.steps() == [(1, 2)] and state_of(job) == (1, 3)
    assert_finishes(job, uninterrupted)
    assert job.steps() == [(2, 0), (2, 1), (2, 2)]


@pytest.mark.parametrize("function", ["fsync", "link", "replace"])
def test_kill_while_a_checkpoint_is_written_loses_the_steps_since_the_one_before(
    make_job: Callable[..., Job], uninterrupted: Path, function: str
) -> None:
    job = make_job(block=EVERY_STEP)
    assert job.run(mishap=Mishap("kill_in", function)) == -9, job.output[-3000:]
    assert state_of(job) == (1, 1)
    assert (job.folder / "checkpoint_latest.pth.tmp").is_file()
    assert_finishes(job, uninterrupted)
    assert job.steps()[0] == (1, 1)
    assert not list(job.folder.glob("*.tmp"))


def test_kill_within_an_epoch_loses_the_steps_since_the_last_checkpoint(
    make_job: Callable[..., Job], uninterrupted: Path
) -> None:
    job = make_job(block=EVERY_STEP)
    assert job.run(mishap=Mishap("kill_here", None, step=2)) == -9
    assert state_of(job) == (1, 2)
    assert_finishes(job, uninterrupted)
    assert job.steps() == [(1, 2), (2, 0), (2, 1), (2, 2)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", tmp_path], capture_output=True)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if mounted.returncode:
        pytest.skip(f"may not mount a file system here: {mounted.stderr.decode().strip()}")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_full_disk_is_reported_and_leaves_the_last_good_checkpoint(
    make_job: Callable[..., Job], uninterrupted: Path, small_disk: Path
) -> None:
    job = make_job(block=EVERY_STEP, results=small_disk / "results")
    assert job.run(mishap=Mishap("fill", str(small_disk))) == 1
    last = job.output.strip().splitlines()[-1]
    assert FULL in last and INTACT in last, job.output[-3000:]
    assert state_of(job) == (1, 1)
    (small_disk / FILLER).unlink()
    assert_finishes(job, uninterrupted)


def test_file_that_must_not_grow_is_reported_and_leaves_the_last_good_checkpoint(
    make_job: Callable[..., Job], uninterrupted: Path
) -> None:
    job = make_job(block=EVERY_STEP)
    size = (uninterrupted / "checkpoint_final.pth").stat().st_size
    assert job.run(mishap=Mishap("limit_file_size", size // 2)) == 1
    last = job.output.strip().splitlines()[-1]
    assert FULL in last and INTACT in last, job.output[-3000:]
    assert state_of(job) == (1, 1)
    assert_finishes(job, uninterrupted)


def test_killed_data_worker_ends_the_training_with_a_word_on_it(
    make_job: Callable[..., Job], uninterrupted: Path
) -> None:
    job = make_job(block={**LENGTH, "checkpoint_every_epochs": 1}, workers=2)  # PyTorch may raise while one is written
    assert job.run(mishap=Mishap("kill_a_worker", None, step=0)) == 1, job.output[-3000:]
    last = job.output.strip().splitlines()[-1]
    expected = r"DataLoader worker \(pid(\(s\))? \d+\) (exited unexpectedly|is killed by signal: Killed)"
    assert re.search(expected, last), last
    assert_finishes(job, uninterrupted)


def test_unreadable_case_is_named_by_the_worker(make_job: Callable[..., Job], root: Path) -> None:
    (file,) = (root / "preprocessed").rglob("case_2.b2nd")
    content = file.read_bytes()
    file.write_bytes(content[:50])
    try:
        job = make_job(block=LENGTH, workers=2)
        assert job.run() == 1
    finally:
        file.write_bytes(content)
    assert "expected a preprocessed case case_2 in" in job.output, job.output[-3000:]
    assert "preprocess it again or take it out of the dataset." in job.output


@pytest.mark.parametrize("trainer", [VF, "nnUNetTrainerBaseline"])
def test_signal_while_the_training_waits_for_data(make_job: Callable[..., Job], trainer: str) -> None:
    job = make_job(block=LENGTH, trainer=trainer, workers=2)
    mishap = Mishap("signal_to_all_while_waiting", "SIGTERM")
    assert job.run(mishap=mishap) == 75, job.output[-3000:]
    assert state_of(job)[0] == 1 and state_of(job)[1] >= 2
    assert job.run(resume=True) == 0, job.output[-3000:]


@pytest.mark.parametrize("phase", ["training", "validation"])
def test_signal_ends_a_training_with_labels_and_data_workers(make_job: Callable[..., Job], phase: str) -> None:
    job = make_job(block=LENGTH, trainer="nnUNetTrainerBaseline", workers=2)
    assert job.run(mishap=Mishap("signal_to_all", "SIGTERM", phase=phase)) == 75, job.output[-3000:]
    assert state_of(job) == (1, 2 if phase == "training" else 3)
    assert job.run(resume=True) == 0, job.output[-3000:]
    logged = checkpoint_of(job.folder, "final")["logging"]
    assert len(logged["train_losses"]) == len(logged["val_losses"]) == 3


def by_command(root: Path, results: str, resume: bool = False, number: int | None = None, epoch: int = 0) -> int:
    """Runs nnU-Net's own command, sends it a signal once an epoch has begun, and returns its exit code."""
    job = Job(root, root / results, workers=2)
    command = [Path(sys.executable).parent / "nnUNetv2_train", DATASET, "quick", "0", "-tr", VF, "-device", "cpu"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    inherited["OMP_WAIT_POLICY"] = "passive"
    logs = set(job.folder.glob("training_log*"))
    process = subprocess.Popen(
        [*command, *(["--c"] if resume else [])], env={**inherited, **job.variables}, stdout=subprocess.DEVNULL
    )
    while number is not None and process.poll() is None:
        (log,) = set(job.folder.glob("training_log*")) - logs or [None]
        if log and f"Epoch {epoch}" in log.read_text():
            process.send_signal(number)
            number = None
        time.sleep(0.01)
    return process.wait(PATIENCE)


def test_nnunets_own_command_ends_by_signals_and_goes_on(root: Path) -> None:
    block = {**LENGTH, "num_iterations_per_epoch": STEPS_BY_COMMAND}
    write_plans(root / "preprocessed", toy_plans(block))
    with ThreadPoolExecutor() as pool:
        whole = pool.submit(by_command, root, "whole")
        assert by_command(root, "command", number=signal.SIGTERM) == EXIT_CODE
        assert by_command(root, "command", resume=True, number=signal.SIGUSR1, epoch=1) == EXIT_CODE
        assert by_command(root, "command", resume=True) == 0
        assert whole.result() == 0
    fold = Path(DATASET) / f"{VF}__nnUNetPlans__quick" / "fold_0"
    assert_same_end(root / "command" / fold, root / "whole" / fold)
    logs = "".join(log.read_text() for log in sorted((root / "command" / fold).glob("training_log*")))
    assert re.findall(r"Ended by (SIG\w+) in epoch", logs) == ["SIGTERM", "SIGUSR1"]
