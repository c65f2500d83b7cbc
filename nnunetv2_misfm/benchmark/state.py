"""How far a cell of a grid has come, read off the files that nnU-Net and the benchmark left."""

import json
from enum import Enum
from pathlib import Path

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.benchmark.commands import test_predictions
from nnunetv2_misfm.benchmark.grid import Cell, Grid
from nnunetv2_misfm.planning.plans_file import find_plans, read_json

FINAL = "checkpoint_final.pth"
# From which nnU-Net's --c goes on
_EARLIER = ("checkpoint_latest.pth", "checkpoint_best.pth")
RUN_FILE = "run.json"


class State(str, Enum):
    """How far a training has come; prediction and scoring are looked up apart."""

    NEW = "missing"
    CUT = "unfinished"
    TRAINED = "trained"


def state_of(grid: Grid, cell: Cell) -> State:
    """Returns how far the training of a cell has come."""
    folder = grid.results(cell)
    if (folder / FINAL).is_file():
        return State.TRAINED
    return State.CUT if any((folder / name).is_file() for name in _EARLIER) else State.NEW


def is_validated(grid: Grid, cell: Cell) -> bool:
    """Whether nnU-Net's final validation has run to its end since the training did."""
    return _is_younger(grid.results(cell) / "validation" / "summary.json", grid.results(cell) / FINAL)


def unpredicted(grid: Grid, cell: Cell, cases: list[str], ending: str) -> list[Path]:
    """Returns the prediction files of test cases that are missing, or older than the weights (of a former training)."""
    final = grid.results(cell) / FINAL
    files = [test_predictions(grid, cell) / f"{case}{ending}" for case in cases]
    return [file for file in files if not _is_younger(file, final)]


def _is_younger(file: Path, than: Path) -> bool:
    return file.is_file() and than.is_file() and file.stat().st_mtime >= than.stat().st_mtime


def mismatch(grid: Grid, cell: Cell) -> str | None:
    """Returns a sentence where the results of a cell come from other plans, numbers or classes than the grid's."""
    model = grid.results(cell).parent
    if not (model / "plans.json").is_file() or not (model / "dataset.json").is_file():
        return None
    plans_file = find_plans(grid.dataset, grid.plans)
    now, then = read_json(plans_file), read_json(model / "plans.json")
    if cell.configuration not in then.get("configurations", {}):
        return (
            f"{model} comes from plans without the configuration {cell.configuration}: delete it or use another --name."
        )
    if cell.configuration in now["configurations"]:
        old, new = (PlansManager(p).get_configuration(cell.configuration).configuration for p in (then, now))
        if other := sorted(key for key in {*old, *new} if old.get(key) != new.get(key)):
            return (
                f"{model} comes from other plans: {', '.join(other)} of {cell.configuration} differ from those in "
                f"{plans_file}; delete it or use another --name."
            )
    labels = [read_json(file)["labels"] for file in (model / "dataset.json", plans_file.parent / "dataset.json")]
    if labels[0] != labels[1]:
        return f"{model} was trained on the classes {', '.join(labels[0])}, the dataset has {', '.join(labels[1])} now."
    return None


def recorded_steps(grid: Grid, cell: Cell) -> list[dict]:
    """Returns what the benchmark ran for a cell, oldest first: title, command, seconds, status, cases, machine."""
    file = grid.folder / cell.name / RUN_FILE
    return json.loads(file.read_text()) if file.is_file() else []


def log_file(grid: Grid, cell: Cell) -> Path:
    """Returns the file with the output of all commands of a cell."""
    return grid.folder / cell.name / "log.txt"
