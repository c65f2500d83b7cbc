"""The scores of a cell's predictions, computed once and kept beside them."""

from pathlib import Path

import pandas as pd
from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_misfm.benchmark.commands import test_predictions
from nnunetv2_misfm.benchmark.evaluate import evaluate_folder
from nnunetv2_misfm.benchmark.grid import Cell, Grid
from nnunetv2_misfm.benchmark.prepare import test_truths
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.plans_file import find_plans, read_json

TEST, VALIDATION = "test", "validation"


def ending_of(grid: Grid) -> str:
    """Returns the ending of the dataset's image files, e.g. `.nii.gz`."""
    return read_json(find_plans(grid.dataset, grid.plans).parent / "dataset.json")["file_ending"]


def truths_of(grid: Grid, cell: Cell, compared: str) -> dict[str, Path]:
    """Returns the label files of the cases that a cell is compared on, by case."""
    base, ending = Path(str(nnUNet_preprocessed)) / grid.dataset, ending_of(grid)
    if compared == TEST:
        if grid.test is None:
            raise MisfmError(f"benchmark {grid.name!r} has no test folder: compare the validation cases.")
        return test_truths(Path(grid.test), ending)
    return {case: base / "gt_segmentations" / f"{case}{ending}" for case in grid.splits[cell.draw.name]["val"]}


def predictions_of(grid: Grid, cell: Cell, compared: str) -> Path:
    """Returns the folder of a cell's predictions of the compared cases."""
    return test_predictions(grid, cell) if compared == TEST else grid.results(cell) / "validation"


def scores_of(grid: Grid, cell: Cell, compared: str, workers: int = 1) -> pd.DataFrame:
    """Returns the scores of a cell, from its file where that is younger than truths and predictions.

    Raises:
        MisfmError: Predictions are missing or do not fit the truths.
    """
    file = grid.folder / cell.name / f"scores_{compared}.csv"
    truths, predictions = truths_of(grid, cell, compared), predictions_of(grid, cell, compared)
    ending = ending_of(grid)
    inputs = [path for case, truth in truths.items() for path in (truth, predictions / f"{case}{ending}")]
    if file.is_file() and all(path.is_file() and path.stat().st_mtime <= file.stat().st_mtime for path in inputs):
        kept = pd.read_csv(file, dtype={"case": str, "label": str})
        if {*kept["case"]} == {*truths}:
            return kept
    plans_file = find_plans(grid.dataset, grid.plans)
    dataset_json = read_json(plans_file.parent / "dataset.json")
    scores = evaluate_folder(truths, predictions, read_json(plans_file), dataset_json, grid.tolerance_mm, workers)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    scores.to_csv(temporary, index=False)
    temporary.replace(file)
    return scores
