"""The commands of a benchmark: nnU-Net's own, as a user would type them."""

import os
from pathlib import Path

from nnunetv2_misfm._startup import SEARCH_PATH_VARIABLE
from nnunetv2_misfm.benchmark.grid import Cell, Draw, Grid, configuration_of
from nnunetv2_misfm.scripts import Command, search_path
from nnunetv2_misfm.trainers.base import SKIP_VALIDATION_VARIABLE
from nnunetv2_misfm.trainers.finetune import WEIGHTS_VARIABLE

_TITLES = {"": "train", "--c": "go on training", "--val": "validate"}


def configure_command(grid: Grid, draw: Draw) -> Command:
    """Returns the command that writes a draw's configuration into the plans."""
    name = configuration_of(draw, grid.name, grid.configuration)
    command = ["nnUNetv2_misfm", "configure", "-d", grid.dataset, "-c", grid.configuration, "-p", grid.plans]
    return Command("configure", (*command, "--name", name, *draw_settings(grid, draw)))


def draw_settings(grid: Grid, draw: Draw) -> list[str]:
    """Returns the settings of a draw's configuration: those of the grid, and its seed."""
    return [*grid.settings, f"seed={draw.seed}"]


def train_command(grid: Grid, cell: Cell, device: str, *, skip_validation: bool = False, option: str = "") -> Command:
    """Returns the training command of a cell.

    Args:
        grid: The grid.
        cell: One of its cells.
        device: cuda, cpu or mps.
        skip_validation: Leave out nnU-Net's final validation (trainers of this package only).
        option: `--c` to go on with a training, `--val` to validate a finished one.
    """
    command = ["nnUNetv2_train", grid.dataset, cell.configuration, str(cell.run_fold), "-tr", cell.run_trainer]
    command += ["-p", grid.plans, "-device", device, *([option] if option else [])]
    variables = {}
    if cell.trainer in grid.weights and option != "--val":
        variables[WEIGHTS_VARIABLE] = grid.weights[cell.trainer]
    if skip_validation:
        variables[SKIP_VALIDATION_VARIABLE] = "1"
    return Command(_TITLES[option], command, variables)


def predict_command(grid: Grid, cell: Cell, device: str) -> Command:
    """Returns the command that predicts the test folder with a cell's final weights."""
    assert grid.test is not None
    command = ["nnUNetv2_predict", "-d", grid.dataset, "-c", cell.configuration, "-f", str(cell.run_fold)]
    command += ["-tr", cell.run_trainer, "-p", grid.plans, "-i", str(Path(grid.test) / "imagesTs")]
    command += ["-o", str(test_predictions(grid, cell)), "-device", device, "--continue_prediction"]
    return Command("predict", command if grid.mirroring else [*command, "--disable_tta"])


def test_predictions(grid: Grid, cell: Cell) -> Path:
    """Returns the folder of a cell's predictions of the test cases."""
    return grid.folder / cell.name / "test"


def environment(gpu: str | None) -> dict[str, str]:
    """Returns this process's environment with our trainers in nnU-Net's search path, and one GPU visible if named."""
    visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
    return {**os.environ, SEARCH_PATH_VARIABLE: search_path(), **visible}
