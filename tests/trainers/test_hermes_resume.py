from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from interrupting import LENGTH, Training, assert_same_end, checkpoint_of, disturb, end_soon, make_repeatable
from toy_universe import BRAIN, TRUNK, TUMOUR, universal_json, universal_plans, write_toy_universe

from nnunetv2_misfm.trainers import source_evaluation
from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes

EVALUATED = {"hermes": {"evaluate_every_epochs": 1}}
TABLE = "evaluation_per_dataset.csv"


class Killed(Exception):
    """Stands for a kill that no handler sees, in this process."""


def kill() -> None:
    raise Killed


@pytest.fixture
def training(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Training]]:
    make_repeatable(monkeypatch.setattr)
    write_toy_universe(workspace.preprocessed)
    made: list[Training] = []

    def make(block: dict[str, Any]) -> Training:
        plans = universal_plans({**LENGTH, **block})
        made.append(Training(workspace, nnUNetTrainerHermes, plans=plans, dataset_json=universal_json()))
        return made[-1]

    yield make
    for one in reversed(made):
        one.release()


def source_weights(run: Training, dataset: str) -> dict[str, torch.Tensor]:
    name = "nnUNetTrainerHermes__nnUNetPlansOf950__quick"
    file = run.workspace.root / "results" / dataset / name / "fold_0" / "checkpoint_final.pth"
    return torch.load(file, weights_only=True)["network_weights"]


def assert_sources_have(run: Training, folder: Path) -> None:
    """Fails unless every source's model folder holds a run's final weights."""
    expected = checkpoint_of(folder, "final")["network_weights"]
    for dataset in (BRAIN, TRUNK, TUMOUR):
        found = source_weights(run, dataset)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "block",
    [EVALUATED, {"ema_decay": 0.9, "accumulate_steps": 2, "augmentation": "flips"}],
    ids=["evaluated", "average, accumulation"],
)
def test_interrupted_within_an_epoch_it_ends_as_one_that_was_not(
    training: Callable[..., Training], block: dict[str, Any]
) -> None:
    run = training(block)
    expected = run.uninterrupted()
    run.end_at(1, 1)
    run.end_at(1, 1, "validation", resume=True)
    run.finish(resume=True)
    assert_same_end(run.folder, expected)
    assert_sources_have(run, run.folder)
    if block is EVALUATED:
        assert (run.folder / TABLE).read_text() == (expected / TABLE).read_text()


@pytest.mark.parametrize("place", [(1, 0, "training"), (2, 1, "training")])
def test_killed_it_goes_on_from_the_last_checkpoint_to_the_same_end(
    training: Callable[..., Training], place: tuple[int, int, str]
) -> None:
    run = training({**EVALUATED, "checkpoint_every_epochs": 1})
    expected = run.uninterrupted()
    trainer = run.trainer()
    disturb(trainer, kill, *place)  # type: ignore[arg-type]
    with pytest.raises(Killed):
        trainer.run_training()
    run.finish(resume=True)
    assert_same_end(run.folder, expected)
    assert_sources_have(run, expected)
    assert (run.folder / TABLE).read_text() == (expected / TABLE).read_text()


def test_evaluation_changes_nothing_that_is_trained(training: Callable[..., Training]) -> None:
    run = training({"ema_decay": 0.9})
    expected = run.uninterrupted()
    with_evaluation = training({"ema_decay": 0.9, **EVALUATED})
    with_evaluation.finish()
    assert_same_end(with_evaluation.folder, expected)


def test_a_signal_within_an_evaluation_leaves_it_out_and_loses_nothing_else(
    training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(EVALUATED)
    expected = run.uninterrupted()
    score = source_evaluation.score_cases

    def interrupted(trainer: Any, *arguments: Any) -> Any:
        if trainer.current_epoch == 1:
            end_soon()
        return score(trainer, *arguments)

    trainer = run.trainer()
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(source_evaluation, "score_cases", interrupted)
        trainer.run_training()
    run.finish(resume=True)
    assert_same_end(run.folder, expected)
    epochs = [line.split(",")[0] for line in (run.folder / TABLE).read_text().splitlines()[1:]]
    assert epochs == ["0"] * 6 + ["2"] * 6


def test_an_epoch_that_is_done_again_stands_in_the_table_once(training: Callable[..., Training]) -> None:
    run = training({**EVALUATED, "checkpoint_every_minutes": 1e-9})
    trainer = run.trainer()
    end_epoch = trainer.on_epoch_end

    def killed_before_the_next_checkpoint() -> None:
        end_epoch()
        if trainer.current_epoch == 2:
            kill()

    trainer.on_epoch_end = killed_before_the_next_checkpoint
    with pytest.raises(Killed):
        trainer.run_training()
    run.finish(resume=True)
    table = (run.folder / TABLE).read_text().splitlines()
    keys = [tuple(line.split(",")[:3]) for line in table]
    assert len(keys) == len(set(keys)) == 1 + 3 * 6
