"""The measured costs of a grid's trainers, kept in its folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnunetv2_misfm.benchmark.cost import Cost
from nnunetv2_misfm.benchmark.grid import Grid
from nnunetv2_misfm.plans_file import read_json, write_json


def known_costs(grid: Grid) -> dict[str, dict[str, Any]]:
    """Returns the fields of the costs measured so far, by the trainer's name in the grid."""
    return read_json(_file(grid)) if _file(grid).is_file() else {}


def write_cost(grid: Grid, trainer: str, cost: Cost) -> None:
    """Adds a trainer's cost, or replaces it."""
    write_json({**known_costs(grid), trainer: {**asdict(cost), "trainer": trainer}}, _file(grid))


def _file(grid: Grid) -> Path:
    return grid.folder / "costs.json"
