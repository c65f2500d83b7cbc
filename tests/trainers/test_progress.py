from types import SimpleNamespace
from typing import Any

import pytest

from nnunetv2_misfm.trainers import progress as module
from nnunetv2_misfm.trainers.progress import SECONDS_BETWEEN_LINES, Progress


class Clock:
    """Stands still unless it is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "perf_counter", made)
    return made


@pytest.fixture
def trainer() -> Any:
    """Twenty steps of four samples an epoch, the second of five epochs; two steps and 5 s of waiting lie behind it."""
    lines: list[str] = []
    return SimpleNamespace(
        steps_done=2,
        steps_per_epoch=20,
        samples_per_step=4,
        current_epoch=1,
        num_epochs=5,
        dataloader_train=SimpleNamespace(seconds_waited=5.0),
        lines=lines,
        print_to_log_file=lines.append,
    )


def test_a_line_says_rate_waiting_and_time_left(clock: Clock, trainer: Any) -> None:
    clock.now = 100
    progress = Progress()
    progress.start(trainer)
    trainer.steps_done, trainer.dataloader_train.seconds_waited = 8, 20.0
    clock.now = 160
    progress.note(trainer)
    # 6 steps in 60 s: 24 samples, 10 s a step; 15 s of waiting; 12 steps left, then 3 epochs of 200 s
    assert trainer.lines == [
        "epoch 1: step 8 of 20, 0.40 samples/s, 25.0% of the time waiting for data; left in this epoch 0:02:00, "
        "in this run 0:12:00"
    ]


def test_the_end_of_an_epoch_counts_for_all_that_are_left(clock: Clock, trainer: Any) -> None:
    progress = Progress()
    progress.start(trainer)
    trainer.steps_done = 20
    clock.now = 50
    progress.note(trainer)
    clock.now = 90  # 40 s of validation
    progress.end()
    trainer.steps_done, trainer.current_epoch, clock.now = 0, 2, 1000
    progress.start(trainer)
    trainer.steps_done, clock.now = 10, 2000
    progress.note(trainer)
    # 100 s a step: 1000 s of steps and 40 s left, then 2 epochs of 2040 s
    assert trainer.lines[-1].endswith("left in this epoch 0:16:40, in this run 1:25:20")
    assert "0.04 samples/s, 0.0% of the time" in trainer.lines[-1]


def test_lines_are_a_minute_apart(clock: Clock, trainer: Any) -> None:
    assert SECONDS_BETWEEN_LINES == 60
    progress = Progress()
    progress.start(trainer)
    written = []
    for clock.now in (10, 59, 60, 61, 119, 121, 180, 300, 310):
        trainer.steps_done += 1
        before = len(trainer.lines)
        progress.note(trainer)
        if len(trainer.lines) > before:
            written.append(clock.now)
    assert written == [60, 121, 300]


def test_the_last_step_of_the_last_epoch_leaves_nothing_but_its_validation(clock: Clock, trainer: Any) -> None:
    progress = Progress()
    progress.start(trainer)
    trainer.steps_done, trainer.current_epoch, clock.now = 20, 4, 90000
    progress.note(trainer)
    assert trainer.lines[0].endswith("left in this epoch 0:00:00, in this run 0:00:00")


def test_a_loader_that_does_not_measure_its_waiting_is_not_spoken_of(clock: Clock, trainer: Any) -> None:
    trainer.dataloader_train = object()
    progress = Progress()
    progress.start(trainer)
    trainer.steps_done, clock.now = 3, 80
    progress.note(trainer)
    assert trainer.lines[0].startswith("epoch 1: step 3 of 20, 0.05 samples/s; left in this epoch 0:22:40")
