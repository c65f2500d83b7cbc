from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from conftest import Workspace
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from toy import write_case
from toy_universe import toy_universe, universal_trainer, write_toy_universe

from nnunetv2_misfm.trainers.balanced_loader import case_probabilities, make_loader, num_worker_processes

# 9 cases of brain, 4 of trunk, 1 of tumour
CASES = ["041_a", "042_a", "043_a", *(f"042_{letter}" for letter in "bcd"), *(f"041_{letter}" for letter in "bcdefghi")]
CROP = (5, 5, 5)


def per_dataset(probabilities: np.ndarray, cases: Sequence[str]) -> dict[str, float]:
    """The probability of one case of each dataset; all of a dataset must be alike."""
    found: dict[str, float] = {}
    for case, probability in zip(cases, probabilities, strict=True):
        assert found.setdefault(case[:3], probability) == probability
    return found


@pytest.mark.parametrize(
    ("balance", "brain", "trunk", "tumour"),
    [
        (0.0, 1 / 27, 1 / 12, 1 / 3),  # a third for each dataset
        (0.5, 1 / 18, 1 / 12, 1 / 6),  # 3 : 2 : 1, so one half, one third, one sixth
        (1.0, 1 / 14, 1 / 14, 1 / 14),
    ],
)
def test_datasets_are_drawn_by_a_power_of_their_size(balance: float, brain: float, trunk: float, tumour: float) -> None:
    probabilities = case_probabilities(CASES, toy_universe(), balance, None)
    assert per_dataset(probabilities, CASES) == pytest.approx({"041": brain, "042": trunk, "043": tumour})
    assert probabilities.sum() == pytest.approx(1)


def test_given_weights_take_the_place_of_sizes() -> None:
    probabilities = case_probabilities(CASES, toy_universe(), 0.5, (1.0, 2.0, 5.0))
    expected = {"041": 1 / 8 / 9, "042": 2 / 8 / 4, "043": 5 / 8}
    assert per_dataset(probabilities, CASES) == pytest.approx(expected)


@pytest.mark.parametrize(("weights", "brain", "tumour"), [((1.0, 2.0, 5.0), 1 / 6, 5 / 6), (None, 3 / 4, 1 / 4)])
def test_a_dataset_without_a_case_takes_no_share(weights: Sequence[float] | None, brain: float, tumour: float) -> None:
    cases = [case for case in CASES if not case.startswith("042")]
    probabilities = case_probabilities(cases, toy_universe(), 0.5, weights)
    assert probabilities.sum() == pytest.approx(1)
    assert per_dataset(probabilities, cases) == pytest.approx({"041": brain / 9, "043": tumour})


@pytest.mark.parametrize(("allowed", "expected"), [("0", (0, 0)), ("1", (1, 1)), ("9", (9, 4))])
def test_workers_are_as_many_as_nnunets(
    monkeypatch: pytest.MonkeyPatch, allowed: str, expected: tuple[int, int]
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", allowed)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    assert num_worker_processes() == expected


# ---------------------------------------------------------------------- the loader


@pytest.fixture
def trainer(workspace: Workspace) -> Any:
    """A trainer on the toy whose loaders make batches of two crops without any transform."""
    np.random.seed(0)
    write_toy_universe(workspace.preprocessed)
    trainer = universal_trainer(workspace, batch_size=2, patch_size=list(CROP))
    trainer._set_batch_size_and_oversample()
    return trainer


def batches(trainer: Any, probabilities: dict[str, float], number: int) -> list[dict]:
    dataset = nnUNetDatasetBlosc2(trainer.preprocessed_dataset_folder, sorted(probabilities))
    odds = np.array([probabilities[case] for case in dataset.identifiers])
    loader = make_loader(trainer, dataset, CROP, None, odds, 0)
    return [next(loader) for _ in range(number)]


def test_cases_come_as_often_as_their_probabilities_say(trainer: Any) -> None:
    wanted = {"041_case_0": 0.5, "042_case_0": 0.3, "042_case_1": 0.0, "043_case_0": 0.2}
    drawn = Counter(case for batch in batches(trainer, wanted, 200) for case in batch["keys"])
    for case, probability in wanted.items():
        spread = 4 * (probability * (1 - probability) / 400) ** 0.5
        assert abs(drawn[case] / 400 - probability) <= spread


def test_a_dataset_of_few_cases_is_drawn_by_the_trainer_as_often_as_the_recipe_says(workspace: Workspace) -> None:
    np.random.seed(0)
    write_toy_universe(workspace.preprocessed)  # for training 5 cases of brain, 2 of trunk, 1 of tumour
    block = {"augmentation": "flips", "hermes": {"dataset_weights": [1, 1, 2]}}
    trainer = universal_trainer(workspace, block)
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    drawn = Counter(case[:3] for _ in range(120) for case in next(loader)["keys"])
    for dataset, share in {"041": 1 / 4, "042": 1 / 4, "043": 1 / 2}.items():
        assert abs(drawn[dataset] / 240 - share) < 0.13  # four standard deviations


def write_rare(trainer: Any, case: str, class_locations: Sequence[Any] = (1, 2)) -> None:
    """A case with a slab of label 1 and a single voxel of label 2, far from it; locations as of nnU-Net's classes."""
    segmentation = np.zeros((1, 24, 24, 24), np.int8)
    segmentation[:, :8] = 1
    segmentation[0, 20, 20, 20] = 2
    folder = Path(trainer.preprocessed_dataset_folder)
    write_case(folder, case, np.zeros((1, 24, 24, 24), np.float32), segmentation)
    properties = load_pickle(str(folder / f"{case}.pkl"))
    properties["class_locations"] = {key: np.argwhere(np.isin(segmentation, key)) for key in class_locations}
    write_pickle(properties, str(folder / f"{case}.pkl"))


def centres(trainer: Any, case: str, number: int) -> Counter:
    """How often each label lies at the centre of crops that all must hold foreground."""
    trainer.oversample_foreground_percent = 1.0
    return Counter(int(label) for b in batches(trainer, {case: 1.0}, number) for label in b["target"][:, 0, 2, 2, 2])


def test_every_task_of_a_case_is_equally_often_in_the_middle_of_a_foreground_crop(trainer: Any) -> None:
    write_rare(trainer, "041_case_0")
    found = centres(trainer, "041_case_0", 100)
    assert abs(found[2] / 200 - 0.5) < 0.15  # four standard deviations; by volume it would be one in ten thousand
    assert found[1] + found[2] >= 195  # a crop at the border has its centre elsewhere


def test_overlapping_regions_of_a_case_are_oversampled_alike(trainer: Any) -> None:
    write_rare(trainer, "043_case_0", [(1, 2), 2])
    found = centres(trainer, "043_case_0", 100)
    assert abs(found[2] / 200 - 0.5) < 0.15 and found[1] + found[2] >= 195


def test_all_annotated_voxels_are_no_class_of_an_incompletely_labelled_case(trainer: Any) -> None:
    write_rare(trainer, "043_case_0", [(1, 2), 2, (-1, 0, 1, 2)])  # as nnU-Net writes it where there is an ignore label
    assert centres(trainer, "043_case_0", 100)[0] <= 5


def test_the_last_third_of_a_batch_holds_foreground(trainer: Any) -> None:
    write_rare(trainer, "041_case_0")
    trainer.batch_size = 3
    assert trainer.oversample_foreground_percent == pytest.approx(1 / 3, abs=0.01)
    drawn = batches(trainer, {"041_case_0": 1.0}, 60)
    assert all((batch["target"][2] > 0).any() for batch in drawn)
    assert any(not (batch["target"][0] > 0).any() for batch in drawn)


def test_a_case_without_any_structure_is_cropped_anywhere(trainer: Any) -> None:
    case, empty = "042_case_0", np.zeros((1, 12, 12, 12), np.int8)
    write_case(Path(trainer.preprocessed_dataset_folder), case, np.ones((1, 12, 12, 12), np.float32), empty)
    assert centres(trainer, case, 5) == {0: 10}
