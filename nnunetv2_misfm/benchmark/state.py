"""How far a cell of a grid has come, read off the files that nnU-Net and the benchmark left."""

import json
from enum import Enum
from pathlib import Path
from typing import Any

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.benchmark.commands import test_predictions
from nnunetv2_misfm.benchmark.damage import is_whole_checkpoint
from nnunetv2_misfm.benchmark.grid import Cell, Grid
from nnunetv2_misfm.benchmark.splits import splits_sha256
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import find_plans, read_json, write_json

FINAL = "checkpoint_final.pth"
_EARLIER = ("checkpoint_latest.pth", "checkpoint_best.pth")
RUN_FILE = "run.json"
# What a training started from, beside its checkpoints
START_FILE = "misfm_benchmark.json"


class State(str, Enum):
    """How far a training has come; prediction and scoring are looked up apart."""

    NEW = "missing"
    CUT = "unfinished"
    TRAINED = "trained"


def state_of(grid: Grid, cell: Cell) -> State:
    """Returns how far the training of a cell has come; a truncated checkpoint counts as none."""
    files = checkpoints(grid, cell)
    whole = [file.name for file in files if file.is_file() and is_whole_checkpoint(file)]
    return State.TRAINED if FINAL in whole else State.CUT if whole else State.NEW


def checkpoints(grid: Grid, cell: Cell) -> list[Path]:
    """Returns the files, there or not, from which nnU-Net's --c goes on, in its order."""
    return [grid.results(cell) / name for name in (FINAL, *_EARLIER)]


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


def is_begun(grid: Grid) -> bool:
    """Whether any run of a grid was begun."""
    return any((grid.folder / cell.name).is_dir() or grid.results(cell).is_dir() for cell in grid.cells)


def note_start(grid: Grid, cell: Cell) -> None:
    """Records beside the checkpoints-to-be which cases and which pretrained weights a training starts from."""
    grid.results(cell).mkdir(parents=True, exist_ok=True)
    write_json(_start_of(grid, cell), grid.results(cell) / START_FILE)


def _start_of(grid: Grid, cell: Cell) -> dict[str, Any]:
    weights = grid.weights_sha256.get(cell.trainer, "")
    return {"splits_sha256": splits_sha256(grid.splits[cell.draw.name]), "weights_sha256": weights}


def mismatch(grid: Grid, cell: Cell) -> str | None:
    """Returns a sentence where the results of a cell are not those of the grid's plans, classes, cases or weights.

    A training that was run by hand (the commands of a dry run) has no record of its start and is taken as it is.
    """
    model, start = grid.results(cell).parent, grid.results(cell) / START_FILE
    if start.is_file() and (then := read_json(start)) != (now := _start_of(grid, cell)):
        what = "cases" if then.get("splits_sha256") != now["splits_sha256"] else "pretrained weights"
        return f"{start.parent} comes from a training with other {what}: delete it or use another --name."
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
    """Returns what the benchmark ran for a cell, oldest first: title, command, seconds, status, cases, machine.

    Raises:
        MisfmError: The file is damaged.
    """
    file = grid.folder / cell.name / RUN_FILE
    if not file.is_file():
        return []
    try:
        steps = json.loads(file.read_text())
    except ValueError:
        steps = None
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise MisfmError(
            f"expected a list of the commands that were run in {file}, got a damaged file: delete it (only their "
            "times are lost)."
        )
    return steps


def log_file(grid: Grid, cell: Cell) -> Path:
    """Returns the file with the output of all commands of a cell."""
    return grid.folder / cell.name / "log.txt"
