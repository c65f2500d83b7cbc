import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from toy_universe import (
    BRAIN,
    TRUNK,
    TUMOUR,
    toy_universe,
    universal_trainer,
    with_audible_priors,
    write_toy_universe,
)

from nnunetv2_misfm.architectures.context_prior import Context, Sample
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers import source_evaluation
from nnunetv2_misfm.trainers.source_evaluation import (
    CaseScore,
    chosen_cases,
    dice_of_tasks,
    score_cases,
    write_scores,
)

UNIVERSE = toy_universe()
SOURCES = {source.dataset: source for source in UNIVERSE.sources}
CASES = ["043_case_0", "041_case_3", "042_case_1", "041_case_0"]
NAN = float("nan")


def row(*values: int) -> np.ndarray:
    return np.array(values, np.int8)[None, None]


# ---------------------------------------------------------------------- which cases


@pytest.mark.parametrize(
    ("number", "expected"),
    [(1, "a"), (2, "ae"), (3, "ade"), (4, "acef"), (7, "abcdefg"), (8, "abcdefgh"), (20, "abcdefgh")],
)
def test_chosen_cases_are_spread_over_the_names(number: int, expected: str) -> None:
    cases = [f"041_{letter}" for letter in "hcaebgfd"]
    found = chosen_cases(cases, UNIVERSE, number)
    letters = "".join(case[4:] for case in found)
    assert letters[0] == "a" and len(set(letters)) == len(letters) == len(expected)
    gaps = np.diff([*("abcdefgh".index(letter) for letter in letters), 8])
    assert gaps.max() - gaps.min() <= 1


def test_each_dataset_is_chosen_from_by_itself_and_may_have_fewer_cases_or_none() -> None:
    cases = ["043_x", *(f"041_{i}" for i in range(6))]
    assert chosen_cases(cases, UNIVERSE, 3) == ["041_0", "041_2", "041_4", "043_x"]
    assert chosen_cases([], UNIVERSE, 3) == []


# ---------------------------------------------------------------------- Dice


@pytest.mark.parametrize(
    ("dataset", "predicted", "truth", "expected"),
    [
        # 2 of 3 + 2 voxels in common: 4/5; lesion 1 of 1 + 2: 2/3
        (BRAIN, row(1, 1, 1, 2, 0, 0), row(1, 1, 0, 2, 2, 0), [4 / 5, 2 / 3]),
        (BRAIN, row(0, 0, 2), row(0, 0, 1), [0, 0]),
        (BRAIN, row(0, 0, 2), row(0, 0, 2), [NAN, 1]),
        (BRAIN, row(0, 1), row(0, -1), [0, NAN]),  # -1 lies outside the non-zero mask: background
        # value 1 is the left kidney, value 2 the organ
        (TRUNK, row(1, 1, 2, 2), row(1, 2, 2, 2), [2 / 3, 4 / 5]),
        # the whole is values 1 and 2: 3 of 4 + 3; the core 1 of 1 + 2
        (TUMOUR, row(1, 1, 1, 2, 0), row(0, 1, 2, 2, 0), [6 / 7, 2 / 3]),
        # two voxels of value 3 are ignored: whole 1 of 1 + 2, no core
        (TUMOUR, row(1, 2, 2, 0), row(1, 3, 3, 1), [2 / 3, NAN]),
    ],
)
def test_dice_by_hand(dataset: str, predicted: np.ndarray, truth: np.ndarray, expected: list[float]) -> None:
    assert dice_of_tasks(predicted, truth, SOURCES[dataset]) == pytest.approx(expected, nan_ok=True)


# ---------------------------------------------------------------------- the table


def test_table_holds_the_mean_of_each_task_and_the_log_that_of_each_dataset(tmp_path: Path) -> None:
    scores = [
        CaseScore(BRAIN, 0, 0.5), CaseScore(BRAIN, 0, 1.0), CaseScore(BRAIN, 0, NAN), CaseScore(BRAIN, 1, 0.25),
        CaseScore(TRUNK, 0, 0.125), CaseScore(TRUNK, 2, NAN), CaseScore(TUMOUR, 3, NAN), CaseScore(TUMOUR, 4, NAN),
    ]  # fmt: skip
    lines = write_scores(scores, UNIVERSE, 49, tmp_path)
    assert lines == [
        "Evaluation of whole cases, Dataset041_Brain: mean Dice 0.5000",  # of 0.75 and 0.25
        "Evaluation of whole cases, Dataset042_Trunk: mean Dice 0.1250",
    ]
    assert write_scores([CaseScore(TRUNK, 2, 0.0)], UNIVERSE, 99, tmp_path) == [
        "Evaluation of whole cases, Dataset042_Trunk: mean Dice 0.0000"
    ]
    assert (tmp_path / "evaluation_per_dataset.csv").read_text().splitlines() == [
        "epoch,dataset,task,dice,cases",
        "49,Dataset041_Brain,41:organ,0.7500,2",
        "49,Dataset041_Brain,41:lesion,0.2500,1",
        "49,Dataset042_Trunk,41:organ,0.1250,1",
        "99,Dataset042_Trunk,42:left kidney,0.0000,1",
    ]


# ---------------------------------------------------------------------- whole cases


@pytest.fixture
def trainer(workspace: Workspace) -> Any:
    one_window: dict[str, Any] = {"patch_size": [24, 24, 24]}
    write_toy_universe(workspace.preprocessed, **one_window)
    trainer = universal_trainer(workspace, **one_window)
    trainer.initialize()
    with_audible_priors(trainer.bare_network)
    return trainer


def dataset_of(trainer: Any, cases: Sequence[str]) -> nnUNetDatasetBlosc2:
    return nnUNetDatasetBlosc2(trainer.preprocessed_dataset_folder, list(cases))


@torch.no_grad()
def answer_of(trainer: Any, case: str) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """The mask of each task, asked of the network directly, and the label map."""
    data, segmentation, _, _ = dataset_of(trainer, [case]).load_case(case)
    image = torch.zeros(1, 1, 24, 24, 24)
    inside = (..., slice(2, 22), slice(1, 23), slice(2, 22))  # 20 x 22 x 20 in the middle
    image[inside] = torch.from_numpy(np.array(data[:]))
    source = UNIVERSE.source_of(case)
    context = Context(torch.tensor([source.tasks]), torch.ones(1, 2, dtype=torch.bool), torch.tensor([source.modality]))
    logits = trainer.bare_network.eval()(Sample(image, context)).logits[inside][0].numpy()
    said = logits > 0
    if not source.has_regions:
        said[0] &= logits[0] >= logits[1]
        said[1] &= logits[1] > logits[0]
    elif source.dataset == TUMOUR:
        said[0] |= said[1]  # as label maps hold it: the core is part of the whole
    return dict(zip(source.tasks, said, strict=True)), np.array(segmentation[0])


def slow_dice(said: np.ndarray, truth: np.ndarray, labelled: np.ndarray) -> float:
    common = sizes = 0
    for a, b, counted in zip(said.flat, truth.flat, labelled.flat, strict=True):
        common += bool(a and b and counted)
        sizes += counted * (int(a) + int(b))
    return 2 * common / sizes if sizes else NAN


def test_whole_cases_are_scored_in_the_convention_of_their_dataset(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # else corners weigh less than float16 can say
    monkeypatch.setattr(source_evaluation, "nnUNetPredictor", partial(nnUNetPredictor, use_gaussian=False))
    scores = score_cases(trainer, dataset_of(trainer, CASES))
    expected = []
    for case in sorted(CASES):
        source = UNIVERSE.source_of(case)
        masks, labels = answer_of(trainer, case)
        for task, values in zip(source.tasks, source.values, strict=True):
            truth = sum(labels == value for value in values) > 0
            expected.append((source.dataset, task, slow_dice(masks[task], truth, labels != 3)))
    found = sorted((s.dataset, s.task, s.dice) for s in scores)
    assert [entry[:2] for entry in found] == sorted(entry[:2] for entry in expected)
    assert [d for *_, d in found] == pytest.approx([d for *_, d in sorted(expected)], abs=5e-4)  # nnU-Net: float16
    assert len({round(d, 4) for *_, d in found}) > 4 and max(d for *_, d in found) > 0.03, found


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_left_as_it_was(trainer: Any, training: bool) -> None:
    network = trainer.bare_network.train(training)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    random_numbers = torch.get_rng_state()
    score_cases(trainer, dataset_of(trainer, CASES[:2]))
    assert network.training is training and all(module.training is training for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), random_numbers)
    with pytest.raises(MisfmError, match="in the convention of one of its source datasets"):
        network(torch.zeros(1, 1, 16, 16, 16))


def test_a_case_that_cannot_be_read_leaves_the_network_as_it_was(trainer: Any) -> None:
    trainer.bare_network.train()
    dataset = dataset_of(trainer, CASES[:2])
    (Path(trainer.preprocessed_dataset_folder) / f"{CASES[1]}.pkl").unlink()
    with pytest.raises(FileNotFoundError):
        score_cases(trainer, dataset)
    assert trainer.bare_network.training
    with pytest.raises(MisfmError, match="in the convention of one of its source datasets"):
        trainer.bare_network(torch.zeros(1, 1, 16, 16, 16))


def test_no_case_is_no_score(trainer: Any) -> None:
    assert score_cases(trainer, dataset_of(trainer, [])) == []
    assert not any(math.isnan(s.dice) for s in score_cases(trainer, dataset_of(trainer, CASES[:1])))
