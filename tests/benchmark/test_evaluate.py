"""Folders of predictions: the right rows for good files, and a sentence for every kind of bad ones."""

import json
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_misfm.benchmark import evaluate
from nnunetv2_misfm.benchmark.evaluate import COLUMNS, absent_labels, evaluate_folder
from nnunetv2_misfm.errors import MisfmError

# surface-distance 0.1 imports through names that SciPy has moved
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")

SPACING = (3.0, 1.0, 2.0)  # D, H, W
PLANS = {"image_reader_writer": "SimpleITKIO", "label_manager": "LabelManager"}
LABELS = {"background": 0, "organ": 1, "lesion": 2}
REGIONS = {"background": 0, "whole": [1, 2], "core": [2]}


def dataset_json(labels: dict[str, Any] = LABELS, **keys: Any) -> dict[str, Any]:
    return {"labels": labels, "file_ending": ".nii.gz", **keys}


def write(file: Path, voxels: np.ndarray, **geometry: Any) -> Path:
    """Writes [D, H, W] or [H, W]; `geometry` in SimpleITK's order."""
    file.parent.mkdir(exist_ok=True)
    image = sitk.GetImageFromArray(voxels if voxels.dtype != bool else voxels.astype(np.uint8))
    image.SetSpacing(geometry.pop("Spacing", SPACING[::-1][: voxels.ndim]))
    for name, value in geometry.items():
        getattr(image, f"Set{name}")(value)
    sitk.WriteImage(image, str(file))
    return file


def labels_of(seed: int) -> np.ndarray:
    """An organ of 6 x 8 x 7 voxels somewhere in [10, 16, 14], a lesion of 2 x 2 x 2 in it."""
    voxels = np.zeros((10, 16, 14), np.uint8)
    d, h, w = np.random.default_rng(seed).integers(1, 3, 3)
    voxels[d : d + 6, h : h + 8, w : w + 7] = 1
    voxels[d + 2 : d + 4, h + 2 : h + 4, w + 2 : w + 4] = 2
    return voxels


class Folder:
    """Three cases with truths and equal predictions, of which a test replaces some."""

    def __init__(self, root: Path, names: tuple[str, ...] = ("b", "a", "c")):
        self.root = root
        self.truths = {name: self.write("truths", name, labels_of(seed)) for seed, name in enumerate(names)}
        for seed, name in enumerate(names):
            self.write("predictions", name, labels_of(seed))

    @property
    def predictions(self) -> Path:
        return self.root / "predictions"

    def write(self, kind: str, name: str, voxels: np.ndarray, **geometry: Any) -> Path:
        return write(self.root / kind / f"{name}.nii.gz", voxels, **geometry)

    def evaluate(self, **given: Any) -> pd.DataFrame:
        usual: dict[str, Any] = {"plans": PLANS, "dataset_json": dataset_json(), "tolerance_mm": 1.0, "workers": 1}
        return evaluate_folder(self.truths, self.predictions, **{**usual, **given})

    def error(self, **given: Any) -> str:
        with pytest.raises(MisfmError) as error:
            self.evaluate(**given)
        return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_one_row_per_case_and_class_in_the_order_given(folder: Folder) -> None:
    scores = folder.evaluate()
    assert list(scores.columns) == COLUMNS
    assert list(zip(scores["case"], scores["label"], strict=True)) == [
        (case, label) for case in ("b", "a", "c") for label in ("organ", "lesion")
    ]
    assert (scores["dice"] == 1).all()
    assert (scores[["assd_mm", "hd95_mm"]] == 0).all(axis=None)
    assert scores.dtypes[["truth_empty", "prediction_empty"]].tolist() == [bool, bool]


@pytest.mark.parametrize(("axis", "distance_mm"), [(0, 3.0), (1, 1.0), (2, 2.0)])
def test_distances_use_the_spacing_in_array_order(folder: Folder, axis: int, distance_mm: float) -> None:
    folder.write("predictions", "a", np.roll(labels_of(1), 1, axis))
    scores = folder.evaluate().set_index(["case", "label"])
    assert scores.loc[("a", "lesion"), "hd95_mm"] == distance_mm
    assert scores.loc[("a", "lesion"), "dice"] == 0.5


def test_other_files_in_the_folder_are_not_looked_at(folder: Folder) -> None:
    (folder.predictions / "d.nii.gz").write_text("no image")
    (folder.predictions / "dataset.json").write_text("{}")
    assert set(folder.evaluate()["case"]) == {"a", "b", "c"}


def test_plans_may_be_a_file(folder: Folder) -> None:
    plans = folder.root / "plans.json"
    plans.write_text(json.dumps(PLANS))
    pd.testing.assert_frame_equal(folder.evaluate(plans=plans), folder.evaluate())


def test_two_processes_give_the_same_table(folder: Folder) -> None:
    folder.write("predictions", "a", np.roll(labels_of(1), 1, 1))
    pd.testing.assert_frame_equal(folder.evaluate(workers=2), folder.evaluate(workers=1))


def test_a_process_that_dies_is_told(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying(ProcessPoolExecutor):
        def map(self, *_: Any, **__: Any) -> Any:
            raise BrokenProcessPool

    monkeypatch.setattr(evaluate, "ProcessPoolExecutor", Dying)
    assert "expected 2 processes to score cases, but one of them died" in folder.error(workers=2)


def test_regions_are_unions_of_labels(folder: Folder) -> None:
    folder.write("predictions", "a", np.minimum(labels_of(1), 1))  # the lesion is called organ
    regions = dataset_json(REGIONS, regions_class_order=[1, 2])
    scores = folder.evaluate(dataset_json=regions).set_index(["case", "label"])
    assert list(dict.fromkeys(scores.index.get_level_values("label"))) == ["whole", "core"]
    assert scores.loc[("a", "whole"), "dice"] == 1
    assert scores.loc[("a", "core"), "dice"] == 0
    assert scores.loc[("a", "core"), "prediction_empty"]


def test_voxels_that_the_truth_ignores_are_in_neither_mask(folder: Folder) -> None:
    with_ignore = dataset_json({**LABELS, "ignore": 3})
    truth = labels_of(1)
    truth[:, 8:] = 3
    prediction = labels_of(1)
    prediction[:, 8:] = 1
    folder.write("truths", "a", truth)
    folder.write("predictions", "a", prediction)
    scores = folder.evaluate(dataset_json=with_ignore)
    assert (scores["dice"] == 1).all()
    assert (scores["hd95_mm"] == 0).all()
    assert set(scores["label"]) == {"organ", "lesion"}


def test_dice_is_nnunets_own(folder: Folder) -> None:
    with_ignore = dataset_json({**LABELS, "ignore": 3})
    truth, prediction = labels_of(1), np.roll(labels_of(1), (1, 0, 1), (0, 1, 2))
    truth[-4:] = 3
    files = folder.write("truths", "a", truth), folder.write("predictions", "a", prediction)
    theirs = compute_metrics(str(files[0]), str(files[1]), SimpleITKIO(), [1, 2], 3)["metrics"]
    ours = folder.evaluate(dataset_json=with_ignore).set_index(["case", "label"])["dice"]
    assert ours["a", "organ"] == pytest.approx(theirs[1]["Dice"])
    assert ours["a", "lesion"] == pytest.approx(theirs[2]["Dice"])
    assert 0 < ours["a", "lesion"] < ours["a", "organ"] < 1


def test_a_class_that_a_truth_does_not_hold_counts_in_every_case(folder: Folder) -> None:
    folder.write("truths", "a", np.minimum(labels_of(1), 1))
    folder.write("predictions", "a", np.minimum(labels_of(1), 1))
    folder.write("truths", "b", np.minimum(labels_of(0), 1))
    scores = folder.evaluate().set_index(["case", "label"])
    assert scores.loc[("a", "lesion"), "dice"] == 1
    assert scores.loc[("b", "lesion"), "dice"] == 0
    assert scores.loc[("b", "lesion"), "assd_mm"] == pytest.approx(np.linalg.norm([30, 16, 28]))
    assert not scores.isna().any(axis=None)


def test_absent_are_the_labels_that_no_truth_holds(folder: Folder) -> None:
    assert absent_labels(folder.evaluate()) == []
    labels = {**LABELS, "vessel": 3, "bone": 4}
    folder.write("predictions", "a", labels_of(1) * 2)  # of labels 2 and 4: what is predicted does not matter
    assert absent_labels(folder.evaluate(dataset_json=dataset_json(labels))) == ["vessel", "bone"]


@pytest.mark.parametrize("reader", ["NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient"])
def test_every_reader_of_volumes_works_and_tells_another_place(folder: Folder, reader: str) -> None:
    plans = {**PLANS, "image_reader_writer": reader}
    assert (folder.evaluate(plans=plans)["dice"] == 1).all()
    folder.write("predictions", "a", labels_of(1), Origin=(0.0, 5.0, 0.0))
    assert "a: the prediction has " in folder.error(plans=plans)


def test_readers_that_reorient_compare_arrays_in_one_orientation(folder: Folder) -> None:
    file = folder.truths["a"]
    image = nibabel.load(file)
    nibabel.save(nibabel.as_closest_canonical(image), folder.predictions / "a.nii.gz")
    assert "a: the prediction has origin" in folder.error()
    plans = {**PLANS, "image_reader_writer": "NibabelIOWithReorient"}
    assert (folder.evaluate(plans=plans)["dice"] == 1).all()


@pytest.mark.parametrize(("reader", "ending"), [("SimpleITKIO", ".nii.gz"), ("NaturalImage2DIO", ".png")])
def test_slices_are_scored_in_their_plane(tmp_path: Path, reader: str, ending: str) -> None:
    truth = np.zeros((12, 12), np.uint8)
    truth[2:7, 2:9] = 1
    given = {"Spacing": (1.0, 1.0)}
    truths = {"x": write(tmp_path / "truths" / f"x{ending}", truth, **given)}
    write(tmp_path / "predictions" / f"x{ending}", np.roll(truth, 1, 0), **given)
    plans = {**PLANS, "image_reader_writer": reader}
    about = dataset_json({"background": 0, "organ": 1}) | {"file_ending": ending}
    [row] = evaluate_folder(truths, tmp_path / "predictions", plans, about, 0.5, 1).to_dict("records")
    assert row["hd95_mm"] == 1
    assert row["dice"] == pytest.approx(0.8)
    assert row["surface_dice"] < 0.7


def change_shape(folder: Folder) -> None:
    folder.write("predictions", "a", labels_of(1)[:-1])


def change_spacing(folder: Folder) -> None:
    folder.write("predictions", "a", labels_of(1), Spacing=(2.0, 1.0, 3.5))


def change_origin(folder: Folder) -> None:
    folder.write("predictions", "a", labels_of(1), Origin=(0.0, 5.0, 0.0))


def change_direction(folder: Folder) -> None:
    folder.write("predictions", "a", labels_of(1), Direction=(-1, 0, 0, 0, -1, 0, 0, 0, 1))


def add_labels(folder: Folder) -> None:
    folder.write("predictions", "a", labels_of(1) * 3)


def add_truth_labels(folder: Folder) -> None:
    folder.write("truths", "a", np.arange(10 * 16 * 14, dtype=np.int16).reshape(10, 16, 14))


def add_fractions(folder: Folder) -> None:
    folder.write("predictions", "a", labels_of(1) * np.float32(0.5))


def damage(folder: Folder) -> None:
    file = folder.predictions / "a.nii.gz"
    file.write_bytes(file.read_bytes()[:40])


@pytest.mark.parametrize(
    ("break_case", "problem"),
    [
        (change_shape, "a: the prediction has shape (9, 16, 14), the truth (10, 16, 14) (D, H, W)"),
        (change_spacing, "a: the prediction has spacing (D, H, W) (3.5, 1, 2), the truth (3, 1, 2)"),
        (change_origin, "a: the prediction has origin (0, 5, 0), the truth (0, 0, 0)"),
        (change_direction, "a: the prediction has direction (-1, 0, 0, 0, -1, 0, 0, 0, 1), the truth (1, 0, 0"),
        (add_labels, "a: the prediction holds 3, 6, where dataset.json allows 0, 1, 2"),
        (add_truth_labels, "a: the truth holds 3, 4, 5, 6, 7 and 2232 more, where dataset.json allows 0, 1, 2"),
        (add_fractions, "a: the prediction holds values that are no integers, such as 0.5"),
        (damage, "cannot be read by nnU-Net's SimpleITKIO ("),
    ],
)
def test_what_cannot_be_compared_is_named(folder: Folder, break_case: Callable[[Folder], None], problem: str) -> None:
    break_case(folder)
    sentence = folder.error()
    assert problem in sentence
    assert sentence.startswith(f"expected predictions in {folder.predictions} of the same geometry and labels")
    assert "got other for 1 of 3 cases" in sentence
    assert sentence.endswith("predict again from the images that the labels belong to, or mend the file that is wrong.")


def test_nan_is_no_label(folder: Folder) -> None:
    folder.write("truths", "a", np.where(labels_of(1) == 2, np.float32(np.nan), 0))
    plans = {**PLANS, "image_reader_writer": "NibabelIO"}  # ITK reads NaN in NIfTI as 0
    assert "the truth holds values that are no integers, such as nan" in folder.error(plans=plans)


def test_a_truncated_prediction_is_named_though_simpleitk_reads_it(folder: Folder) -> None:
    file = folder.predictions / "a.nii.gz"
    generator = np.random.default_rng(0)
    folder.write("predictions", "a", generator.integers(0, 2, labels_of(0).shape).astype(np.uint8))  # compresses badly
    file.write_bytes(file.read_bytes()[:-100])
    assert "a.nii.gz is truncated" in folder.error()


def test_rounding_of_headers_is_no_other_geometry(folder: Folder) -> None:
    folder.write("predictions", "a", labels_of(1), Origin=(0.0009, 0.0, 0.0), Spacing=(2.0, 1.0005, 3.0))
    assert (folder.evaluate()["dice"] == 1).all()


def test_a_prediction_may_not_hold_the_ignore_label(folder: Folder) -> None:
    folder.write("predictions", "a", labels_of(1) + np.uint8(1))
    assert "the prediction holds 3, where" in folder.error(dataset_json=dataset_json({**LABELS, "ignore": 3}))


def test_several_channels_are_no_labels(folder: Folder) -> None:
    folder.write("predictions", "a", np.stack([labels_of(1)] * 2), Spacing=(2.0, 1.0, 3.0, 1.0))
    assert "holds 2 channels, one of labels was expected" in folder.error()


def test_nothing_is_scored_before_all_cases_are_checked(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "score_case", lambda *_, **__: pytest.fail("scored before all was checked"))
    change_shape(folder)
    folder.write("predictions", "c", labels_of(2) * 3)
    sentence = folder.error()
    assert "got other for 2 of 3 cases (a: the prediction has shape" in sentence
    assert "; c: the prediction holds 3, 6, where" in sentence


def test_missing_predictions_are_counted_and_five_named(tmp_path: Path) -> None:
    folder = Folder(tmp_path, tuple("abcdefgh"))
    for name in "bcdefgh":
        (folder.predictions / f"{name}.nii.gz").unlink()
    expected = (
        f"expected predictions of all 8 cases in {folder.predictions}, 7 are missing: b, c, d, e, f, and 2 more; "
    )
    assert folder.error().startswith(expected)


def test_a_missing_truth_is_named(folder: Folder) -> None:
    folder.truths["c"].unlink()
    assert f"expected the labels of all 3 cases, 1 are missing: c ({folder.truths['c']})" in folder.error()


def test_no_folder_no_cases_and_no_tolerance_are_named(folder: Folder) -> None:
    assert "tolerance of the surface Dice of 0 mm or more, got -1." in folder.error(tolerance_mm=-1.0)
    with pytest.raises(MisfmError, match="expected a folder of predictions at .*nowhere, found none"):
        evaluate_folder(folder.truths, folder.root / "nowhere", PLANS, dataset_json(), 1.0, 1)
    folder.truths = {}
    assert "expected at least one case" in folder.error()
