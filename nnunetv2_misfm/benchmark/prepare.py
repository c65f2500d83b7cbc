"""From what the user asks to a grid of runs: every fault is found here, before anything is written or trained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.benchmark.checks import check_test, check_trainers
from nnunetv2_misfm.benchmark.commands import draw_settings
from nnunetv2_misfm.benchmark.grid import (
    ALL,
    Cell,
    Draw,
    Grid,
    cell_of,
    check_name,
    configuration_of,
    draws_of,
    has_grid,
    other_configurations,
    read_grid,
    write_grid,
)
from nnunetv2_misfm.benchmark.splits import append_splits, preprocessed_cases, read_splits, split_of, with_splits
from nnunetv2_misfm.benchmark.state import is_begun
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.configure import configure, configured
from nnunetv2_misfm.plans_file import find_plans, read_json
from nnunetv2_misfm.weights.checkpoint import file_sha256

# Keys of the block that give stock nnU-Net another length than its own
LENGTH_KEYS = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")
# What the runs of a benchmark have in common from first to last
_KEPT = ("plans", "configuration", "settings", "test", "tolerance_mm", "mirroring")


@dataclass(frozen=True)
class Request:
    """What the user asks for; the fields are the options of `nnUNetv2_misfm benchmark`.

    Attributes:
        dataset: Number or name.
        configuration: Of the plans, e.g. 3d_fullres.
        trainers: Names of trainers.
        plans: Name of the plans.
        folds: Numbers, or `all`.
        train_cases: Numbers of labelled cases, or `all`.
        seeds: One run of every trainer for each.
        settings: `key=value` as `nnUNetv2_misfm configure` takes them.
        test: Folder with imagesTs and labelsTs; None compares the folds' validation cases.
        weights: Files of pretrained weights by trainer.
        name: Of the benchmark.
        tolerance_mm: Of the surface Dice.
        mirroring: Whether the test cases are predicted with nnU-Net's mirroring.
        command: The command line, for the record.
    """

    dataset: str
    configuration: str
    trainers: Sequence[str]
    plans: str = "nnUNetPlans"
    folds: Sequence[int | str] = (0,)
    train_cases: Sequence[int | str] = (ALL,)
    seeds: Sequence[int] = (0,)
    settings: Sequence[str] = ()
    test: Path | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    name: str = "benchmark"
    tolerance_mm: float = 1.0
    mirroring: bool = True
    command: str = ""


def weights_by_trainer(texts: Sequence[str]) -> dict[str, Path]:
    """Returns the files of `TRAINER=FILE` texts.

    Raises:
        MisfmError: A text has no such form.
    """
    pairs = [text.partition("=") for text in texts]
    if wrong := ["".join(pair) for pair in pairs if not pair[0] or not pair[2]]:
        raise MisfmError(f"expected --weights of the form TRAINER=FILE, got {wrong[0]!r}.")
    return {trainer: Path(file) for trainer, _, file in pairs}


def plan_grid(request: Request) -> Grid:
    """Returns the grid of a request, together with the cells of the recorded benchmark of this name, if there is one.

    Nothing is written.

    Raises:
        MisfmError: No such dataset, plans, configuration, trainer, fold or weights; a setting that does not exist; a
            fold without so many cases; a test folder that does not fit or holds training cases; a recorded benchmark
            with other settings.
    """
    _check_numbers(request)
    plans_file = find_plans(request.dataset, request.plans)
    base, plans = plans_file.parent, read_json(plans_file)
    configuration = _resolved(plans, request.configuration, plans_file)
    cases = preprocessed_cases(base / configuration["data_identifier"])
    test = None if request.test is None else request.test.resolve()
    _check_sources(request, test, base, cases)
    recorded = _recorded(base.name, request)
    splits = read_splits(base, cases)
    asked = draws_of(request.folds, request.train_cases, request.seeds)
    draws = {draw: split_of(draw, splits, cases) for draw in asked}
    folds = with_splits(splits, _in_recorded_order(recorded, draws))[1]
    block = configuration.get("misfm") or {}
    length = any(key in block or _sets(request, key) for key in LENGTH_KEYS)
    cells = [
        cell_of(trainer, draw, request.name, request.configuration, folds[draw], length)
        for draw in draws
        for trainer in dict.fromkeys(request.trainers)
    ]
    weights = {trainer: str(Path(file).resolve()) for trainer, file in request.weights.items()}
    grid = Grid(
        name=request.name,
        dataset=base.name,
        plans=request.plans,
        configuration=request.configuration,
        settings=tuple(request.settings),
        test=None if test is None else str(test),
        tolerance_mm=request.tolerance_mm,
        mirroring=request.mirroring,
        weights=weights,
        weights_sha256={trainer: _sha256(trainer, file) for trainer, file in weights.items()},
        requests=(request.command,) if request.command else (),
        cells=tuple(cells),
        splits={draw.name: split for draw, split in draws.items()},
    )
    _check_configurations(grid)
    grid = grid if recorded is None else _joined(recorded, grid, folds)
    check_trainers(grid, plans, length)
    return grid


def prepare(grid: Grid) -> None:
    """Writes the configurations, the splits and the record of a grid."""
    plans_file = find_plans(grid.dataset, grid.plans)
    grid.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(plans_file.parent / f".{plans_file.name}.lock"):  # two benchmarks of one dataset at once
        for draw in {cell.configuration: cell.draw for cell in grid.cells}.values():
            name = configuration_of(draw, grid.name, grid.configuration)
            configure(grid.dataset, grid.configuration, name, draw_settings(grid, draw), grid.plans)
    configuration = _resolved(read_json(plans_file), grid.configuration, plans_file)
    cases = preprocessed_cases(plans_file.parent / configuration["data_identifier"])
    draws = {draw: grid.splits[draw.name] for draw in _by_fold(grid)}
    folds = append_splits(plans_file.parent, cases, draws)
    if any(folds[cell.draw] != cell.run_fold for cell in grid.cells):
        raise MisfmError(
            f"the folds of {grid.dataset} changed while the benchmark was being prepared: run the command again."
        )
    write_grid(grid)


def cells_of(grid: Grid, request: Request) -> list[Cell]:
    """Returns the cells of a grid that a request asks for (a recorded grid may hold more)."""
    draws = draws_of(request.folds, request.train_cases, request.seeds)
    return [cell for cell in grid.cells if cell.trainer in request.trainers and cell.draw in draws]


# ---------------------------------------------------------------------- checks of a request


def _check_numbers(request: Request) -> None:
    """Raises for a name, a tolerance, a number of cases or a setting that cannot be meant."""
    check_name(request.name)
    if not 0 < request.tolerance_mm < math.inf:
        raise MisfmError(f"expected a --tolerance above 0 mm, got {request.tolerance_mm}.")
    if 0 in request.train_cases:
        raise MisfmError("expected --train-cases of 1 or more, or all, got 0.")
    if _sets(request, "seed"):
        raise MisfmError("expected seeds by --seeds, got one in --set: every run has the seed of its draw.")
    if request.test is None and ALL in request.folds:
        raise MisfmError(
            "expected --test DIR with the fold 'all', got none: such a run learns from every case, so other cases must "
            "be compared."
        )


def _check_sources(request: Request, test: Path | None, base: Path, cases: Sequence[str]) -> None:
    """Raises where the test folder or pretrained weights cannot be used."""
    for trainer, file in request.weights.items():
        if trainer not in request.trainers:
            raise MisfmError(f"expected --weights for one of {', '.join(request.trainers)}, got them for {trainer!r}.")
        if not file.is_file():
            raise MisfmError(f"expected pretrained weights for {trainer} at {file}, found none: check --weights.")
    if request.weights and _sets(request, "pretrained_weights"):
        raise MisfmError("expected --weights or pretrained_weights in --set, got both: the latter would win; name one.")
    if test is not None:
        check_test(test, base, cases)


def _check_configurations(grid: Grid) -> None:
    """Raises where a configuration could not be written, or would replace one of another benchmark."""
    others = other_configurations(grid.dataset, grid.name)
    for draw in {cell.configuration: cell.draw for cell in grid.cells}.values():
        name = configuration_of(draw, grid.name, grid.configuration)
        if name in others:
            raise MisfmError(
                f"the configuration {name} belongs to the benchmark {others[name]!r} already: choose another --name."
            )
        configured(grid.dataset, grid.configuration, name, draw_settings(grid, draw), grid.plans)


def _resolved(plans: dict[str, Any], configuration: str, plans_file: Path) -> dict[str, Any]:
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise MisfmError(f"expected one of the configurations {known} of {plans_file}, got {configuration!r}.")
    return PlansManager(plans).get_configuration(configuration).configuration


def _sets(request: Request, key: str) -> bool:
    return any(setting.partition("=")[0] == key for setting in request.settings)


def _sha256(trainer: str, file: str) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise MisfmError(f"the pretrained weights of {trainer}, {file}, cannot be read ({error.strerror}).") from error


# ---------------------------------------------------------------------- a recorded benchmark


def _recorded(dataset: str, request: Request) -> Grid | None:
    """Returns the recorded benchmark of this name; one of which no run was begun counts for nothing."""
    if not has_grid(dataset, request.name):
        return None
    recorded = read_grid(dataset, request.name)
    return recorded if is_begun(recorded) else None


def _by_fold(grid: Grid) -> list[Draw]:
    """Returns the draws in the order of their folds for nnU-Net, in which they were appended."""
    folds = {cell.draw: cell.run_fold for cell in grid.cells}
    return sorted(folds, key=lambda draw: (not isinstance(folds[draw], int), folds[draw]))


def _in_recorded_order(
    recorded: Grid | None, draws: Mapping[Draw, dict[str, list[str]]]
) -> dict[Draw, dict[str, list[str]]]:
    """Returns the splits of the recorded draws, as they were appended, and behind them the others."""
    before = [] if recorded is None else [(draw, recorded.splits[draw.name]) for draw in _by_fold(recorded)]
    return {**dict(before), **{draw: split for draw, split in draws.items() if draw not in dict(before)}}


def _joined(recorded: Grid, grid: Grid, folds: Mapping[Draw, int | str]) -> Grid:
    """Returns the recorded grid of this name with the new cells added.

    Raises:
        MisfmError: The recorded one has other settings, weights, or other cases under the name of a draw.
    """
    begun = f"benchmark {grid.name!r} of {grid.dataset} was begun with"
    for what in _KEPT:
        old, new = getattr(recorded, what), getattr(grid, what)
        if old != new:
            raise MisfmError(
                f"{begun} {what} {_shown(old)}, got {_shown(new)}: runs under different ones are no comparison; repeat "
                "the former or choose another --name."
            )
    for trainer, sha256 in grid.weights_sha256.items():
        if trainer in recorded.trainers and recorded.weights_sha256.get(trainer) != sha256:
            before = recorded.weights.get(trainer, "those that its own routes led to")
            raise MisfmError(
                f"{begun} the weights {before} for {trainer}, got {grid.weights[trainer]} (SHA-256 {sha256[:12]}), "
                "which are others: choose another --name."
            )
    other = [name for name, split in grid.splits.items() if recorded.splits.get(name, split) != split]
    moved = [cell.draw.name for cell in recorded.cells if folds.get(cell.draw, cell.run_fold) != cell.run_fold]
    if other or moved:
        raise MisfmError(
            f"{begun} other cases for {(other + moved)[0]}: splits_final.json changed since; put it back or choose "
            "another --name."
        )
    trainers = list(dict.fromkeys([*recorded.trainers, *grid.trainers]))
    cells = {cell.name: cell for cell in (*recorded.cells, *grid.cells)}
    return replace(
        recorded,
        weights={**recorded.weights, **grid.weights},
        weights_sha256={**recorded.weights_sha256, **grid.weights_sha256},
        requests=tuple(dict.fromkeys([*recorded.requests, *grid.requests])),
        cells=tuple(sorted(cells.values(), key=lambda cell: (_order(cell.draw), trainers.index(cell.trainer)))),
        splits={**recorded.splits, **grid.splits},
    )


def _order(draw: Draw) -> tuple[float, str, int]:
    cases = math.inf if isinstance(draw.train_cases, str) else draw.train_cases
    return cases, str(draw.fold), draw.seed


def _shown(value: object) -> str:
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "none"
