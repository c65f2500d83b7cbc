"""The grid of runs that a benchmark compares: which trainer learns from which cases, and what its runs are called.

A cell is one training run. All trainers of a grid share its settings and its draws, and a draw is a fold, a number of
labelled cases and a seed; what differs within a draw is the trainer alone.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_results

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import VALID_NAME, read_json, write_json

STOCK = "nnUNetTrainer"
# Stock nnU-Net in another length than its fixed 1000 epochs; at the same seed its losses are stock's
STOCK_WITH_LENGTH = "nnUNetTrainerBaseline"
ALL = "all"
GRID_FILE = "grid.json"
_PREFIX = "misfm_"


@dataclass(frozen=True)
class Draw:
    """The cases that a run learns from.

    Attributes:
        train_cases: Number of labelled training cases, or `all` of the fold's.
        fold: The user's fold, a number, or `all`.
        seed: Seeds the choice of the cases, and the training.
    """

    train_cases: int | str
    fold: int | str
    seed: int

    @property
    def name(self) -> str:
        """The draw as a part of a file name, e.g. `n10__fold0__seed1`."""
        return f"n{self.train_cases}__fold{self.fold}__seed{self.seed}"

    def __str__(self) -> str:
        return f"{self.train_cases} case{'' if self.train_cases == 1 else 's'}, fold {self.fold}, seed {self.seed}"


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        trainer: As the user named it; reports use this name.
        draw: The cases that it learns from.
        run_trainer: Class that nnU-Net runs: `nnUNetTrainerBaseline` where `nnUNetTrainer` got another length.
        configuration: Configuration of the plans that holds the settings and the seed of the draw.
        run_fold: Fold that nnU-Net is given: the user's, or one appended behind the user's for fewer cases.
    """

    trainer: str
    draw: Draw
    run_trainer: str
    configuration: str
    run_fold: int | str

    @property
    def name(self) -> str:
        """The cell as a folder's name, e.g. `nnUNetTrainerPCTNet__n10__fold0__seed1`."""
        return f"{self.trainer}__{self.draw.name}"

    def __str__(self) -> str:
        return f"{self.trainer} with {self.draw}"


@dataclass(frozen=True)
class Grid:
    """All runs of a benchmark, as its file `grid.json` records them.

    Attributes:
        name: Of the benchmark; several may exist for a dataset.
        dataset: Full name, e.g. Dataset004_Hippocampus.
        plans: Name of the plans.
        configuration: The user's configuration, from which those of the cells inherit.
        settings: `key=value` as `nnUNetv2_misfm configure` takes them, the same for every trainer.
        test: Folder with imagesTs and labelsTs, absolute; None where the folds' validation cases are compared.
        tolerance_mm: Tolerance of the surface Dice.
        mirroring: Whether the test cases are predicted with nnU-Net's mirroring.
        weights: Pretrained weights by trainer, where the user named a file.
        weights_sha256: Their SHA-256 when the benchmark was begun.
        requests: The command lines by which the grid came to be, oldest first.
        cells: The runs, draw by draw.
        splits: `train` and `val` cases of each draw, by its name.
    """

    name: str
    dataset: str
    plans: str
    configuration: str
    settings: tuple[str, ...]
    test: str | None
    tolerance_mm: float
    mirroring: bool
    weights: dict[str, str]
    weights_sha256: dict[str, str]
    requests: tuple[str, ...]
    cells: tuple[Cell, ...]
    splits: dict[str, dict[str, list[str]]]

    @property
    def trainers(self) -> list[str]:
        """The trainers in the order in which the user named them."""
        return list(dict.fromkeys(cell.trainer for cell in self.cells))

    @property
    def folder(self) -> Path:
        """Where logs, predictions and scores of the grid lie, beside nnU-Net's own results."""
        return grid_folder(self.dataset, self.name)

    def results(self, cell: Cell) -> Path:
        """Returns nnU-Net's folder of a run, with its checkpoints and its validation."""
        model = f"{cell.run_trainer}__{self.plans}__{cell.configuration}"
        return Path(str(nnUNet_results)) / self.dataset / model / f"fold_{cell.run_fold}"


def grid_folder(dataset: str, name: str) -> Path:
    """Returns the folder of a benchmark of this dataset.

    Raises:
        MisfmError: nnUNet_results is not set.
    """
    if not nnUNet_results.is_set():
        raise MisfmError("expected the environment variable nnUNet_results to name a folder, but it is not set.")
    return Path(str(nnUNet_results)) / dataset / f"{_PREFIX}{name}"


def draws_of(folds: Sequence[int | str], train_cases: Sequence[int | str], seeds: Sequence[int]) -> list[Draw]:
    """Returns all draws, in the order in which they are run: few cases first, every seed before more cases."""
    return [Draw(n, fold, seed) for n in train_cases for fold in folds for seed in seeds]


def cell_of(trainer: str, draw: Draw, benchmark: str, configuration: str, run_fold: int | str, length: bool) -> Cell:
    """Returns the run of a trainer on a draw.

    Args:
        trainer: As the user named it.
        draw: What it learns from.
        benchmark: Name of the benchmark.
        configuration: The user's configuration.
        run_fold: Fold for nnU-Net.
        length: Whether the settings name another length than nnU-Net's.
    """
    run_trainer = STOCK_WITH_LENGTH if trainer == STOCK and length else trainer
    return Cell(trainer, draw, run_trainer, configuration_of(draw, benchmark, configuration), run_fold)


def configuration_of(draw: Draw, benchmark: str, configuration: str) -> str:
    """Returns the name of the configuration for a draw: one per number of cases and seed."""
    return f"{configuration}_{benchmark}_n{draw.train_cases}_s{draw.seed}"


def check_name(name: str) -> None:
    """Raises where a benchmark may not be called `name`."""
    if not VALID_NAME.fullmatch(name):
        raise MisfmError(
            "expected a --name of letters, digits, '.', '-' and single '_' that begins with a letter or digit, "
            f"got {name!r}."
        )


def write_grid(grid: Grid) -> Path:
    """Writes a grid's record into its folder and returns the file."""
    grid.folder.mkdir(parents=True, exist_ok=True)
    write_json(asdict(grid), grid.folder / GRID_FILE)
    return grid.folder / GRID_FILE


def read_grid(dataset: str, name: str) -> Grid:
    """Returns a recorded grid.

    Raises:
        MisfmError: There is none of this name, or its file is damaged.
    """
    file = grid_folder(dataset, name) / GRID_FILE
    if not file.is_file():
        known = [folder.name.removeprefix(_PREFIX) for folder in _grids_of(dataset)]
        raise MisfmError(
            f"expected a benchmark {name!r} of {dataset} in {file.parent}, found none (benchmarks there: "
            f"{', '.join(known) or 'none'}): run nnUNetv2_misfm benchmark first, or name another with --name."
        )
    content = read_json(file)
    try:
        cells = tuple(_cell(entry) for entry in content.pop("cells"))
        texts = {name: tuple(content[name]) for name in ("settings", "requests")}
        return Grid(**{**content, **texts, "cells": cells})
    except (KeyError, TypeError) as error:
        raise MisfmError(
            f"{file} is no record of a benchmark ({error}): run the benchmark under another --name."
        ) from error


def has_grid(dataset: str, name: str) -> bool:
    """Whether a benchmark of this name is recorded."""
    return (grid_folder(dataset, name) / GRID_FILE).is_file()


def other_configurations(dataset: str, name: str) -> dict[str, str]:
    """Returns the configurations that the other benchmarks of a dataset have written, with the names of those."""
    found: dict[str, str] = {}
    for other in (folder.name.removeprefix(_PREFIX) for folder in _grids_of(dataset)):
        if other != name:
            with suppress(MisfmError):  # a damaged record is its own benchmark's fault
                found |= {cell.configuration: other for cell in read_grid(dataset, other).cells}
    return found


def _grids_of(dataset: str) -> Iterable[Path]:
    parent = grid_folder(dataset, "").parent
    return sorted(file.parent for file in parent.glob(f"{_PREFIX}*/{GRID_FILE}"))


def _cell(entry: dict[str, Any]) -> Cell:
    return Cell(**{**entry, "draw": Draw(**entry["draw"])})
