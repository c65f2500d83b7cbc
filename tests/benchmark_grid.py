"""A grid of the toy dataset, prepared as the benchmark does it."""

from collections.abc import Callable

from conftest import Workspace

from nnunetv2_misfm.benchmark.grid import Grid
from nnunetv2_misfm.benchmark.prepare import Request, plan_grid, prepare
from nnunetv2_misfm.benchmark.run import Options

STOCK, PCT = "nnUNetTrainer", "nnUNetTrainerPCTNet"
CPU = Options(device="cpu")
Commands = Callable[[], list[str]]


def made_grid(workspace: Workspace, test: bool = True, **changes: object) -> Grid:
    """Prepares a grid of two trainers; with the test folder of the fixture `workspace`, or on validation cases."""
    fields = {"dataset": "555", "configuration": "quick", "trainers": [STOCK, PCT], "settings": ["num_epochs=1"]}
    grid = plan_grid(Request(**{**fields, "test": workspace.root / "test" if test else None, **changes}))  # type: ignore
    prepare(grid)
    return grid
