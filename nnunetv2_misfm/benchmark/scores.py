"""The scores of a cell's predictions, computed once and kept beside them."""

from pathlib import Path

import pandas as pd
from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_misfm.benchmark.commands import test_predictions
from nnunetv2_misfm.benchmark.evaluate import COLUMNS, evaluate_folder
from nnunetv2_misfm.benchmark.grid import Cell, Grid
from nnunetv2_misfm.benchmark.splits import test_truths
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import find_plans, read_json

TEST, VALIDATION = "test", "validation"
# Fewer are not worth the start of a process (ours)
CASES_PER_WORKER = 20


def ending_of(grid: Grid) -> str:
    """Returns the ending of the dataset's image files, e.g. `.nii.gz`."""
    return read_json(find_plans(grid.dataset, grid.plans).parent / "dataset.json")["file_ending"]


def truths_of(grid: Grid, cell: Cell, compared: str) -> dict[str, Path]:
    """Returns the label files of the cases that a cell is compared on, by case."""
    base, ending = Path(str(nnUNet_preprocessed)) / grid.dataset, ending_of(grid)
    if compared == TEST:
        if grid.test is None:
            raise MisfmError(f"benchmark {grid.name!r} has no test folder: compare the validation cases.")
        if not (truths := test_truths(Path(grid.test), ending)):
            raise MisfmError(f"expected labels *{ending} in {Path(grid.test) / 'labelsTs'}, found none: put them back.")
        return truths
    return {case: base / "gt_segmentations" / f"{case}{ending}" for case in grid.splits[cell.draw.name]["val"]}


def predictions_of(grid: Grid, cell: Cell, compared: str) -> Path:
    """Returns the folder of a cell's predictions of the compared cases."""
    return test_predictions(grid, cell) if compared == TEST else grid.results(cell) / "validation"


def scores_of(grid: Grid, cell: Cell, compared: str) -> pd.DataFrame:
    """Returns the scores of a cell, from its file where that is younger than truths and predictions.

    Raises:
        MisfmError: Predictions are missing or do not fit the truths.
    """
    file = grid.folder / cell.name / f"scores_{compared}.csv"
    truths, predictions = truths_of(grid, cell, compared), predictions_of(grid, cell, compared)
    ending = ending_of(grid)
    inputs = [path for case, truth in truths.items() for path in (truth, predictions / f"{case}{ending}")]
    if file.is_file() and all(path.is_file() and path.stat().st_mtime < file.stat().st_mtime for path in inputs):
        kept = _read(file)
        if kept is not None and {*kept["case"]} == {*truths}:
            return kept
    plans_file = find_plans(grid.dataset, grid.plans)
    dataset_json = read_json(plans_file.parent / "dataset.json")
    workers = max(1, min(default_num_processes, len(truths) // CASES_PER_WORKER))
    scores = evaluate_folder(truths, predictions, read_json(plans_file), dataset_json, grid.tolerance_mm, workers)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    scores.to_csv(temporary, index=False)
    temporary.replace(file)
    return scores


def _read(file: Path) -> pd.DataFrame | None:
    """Returns the scores in a file, None where it is damaged (they are computed anew then)."""
    try:
        kept = pd.read_csv(file, dtype={"case": str, "label": str})
    except (ValueError, pd.errors.ParserError):  # an empty file is a ValueError
        return None
    return kept if list(kept.columns) == COLUMNS and not kept.isna().any().any() else None
