"""From what the user asks to a grid of runs: every fault is found here, before anything is written or trained."""

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock
from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.benchmark.commands import draw_settings
from nnunetv2_misfm.benchmark.grid import (
    Cell,
    Draw,
    Grid,
    cell_of,
    check_name,
    configuration_of,
    draws_of,
    has_grid,
    read_grid,
    write_grid,
)
from nnunetv2_misfm.benchmark.splits import append_splits, preprocessed_cases, read_splits, split_of, with_splits
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.configure import configure
from nnunetv2_misfm.planning.plans_file import find_plans, read_json
from nnunetv2_misfm.trainers.finetune import WEIGHTS_VARIABLE, FinetuneTrainer
from nnunetv2_misfm.trainers.pretext import PretextTrainer

# Settings that give stock nnU-Net another length than its own
LENGTH_KEYS = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch")


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
    """

    dataset: str
    configuration: str
    trainers: Sequence[str]
    plans: str = "nnUNetPlans"
    folds: Sequence[int | str] = (0,)
    train_cases: Sequence[int | str] = ("all",)
    seeds: Sequence[int] = (0,)
    settings: Sequence[str] = ()
    test: Path | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    name: str = "benchmark"
    tolerance_mm: float = 1.0


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
        MisfmError: No such dataset, plans, configuration, trainer, fold or weights; a fold without so many cases; a
            test folder that does not fit or holds training cases; a recorded benchmark with other settings.
    """
    check_name(request.name)
    plans_file = find_plans(request.dataset, request.plans)
    base, plans = plans_file.parent, read_json(plans_file)
    cases = preprocessed_cases(base / _data_identifier(plans, request.configuration, plans_file))
    splits = read_splits(base, cases)
    draws = {
        draw: split_of(draw, splits, cases) for draw in draws_of(request.folds, request.train_cases, request.seeds)
    }
    folds = with_splits(splits, draws)[1]
    length = any(setting.partition("=")[0] in LENGTH_KEYS for setting in request.settings)
    cells = [
        cell_of(trainer, draw, request.name, request.configuration, folds[draw], length)
        for draw in draws
        for trainer in dict.fromkeys(request.trainers)
    ]
    test = None if request.test is None else request.test.resolve()
    grid = Grid(
        name=request.name,
        dataset=base.name,
        plans=request.plans,
        configuration=request.configuration,
        settings=tuple(request.settings),
        test=None if test is None else str(test),
        tolerance_mm=request.tolerance_mm,
        weights={trainer: str(Path(file).resolve()) for trainer, file in request.weights.items()},
        cells=tuple(cells),
        splits={draw.name: split for draw, split in draws.items()},
    )
    if test is None and "all" in request.folds:
        raise MisfmError(
            "expected --test DIR with the fold 'all', got none: such a run learns from every case, so other cases must "
            "be compared."
        )
    if test is not None:
        _check_test(test, base, cases)
    _check_trainers(grid, plans, base)
    return _extended(grid)


def prepare(grid: Grid) -> None:
    """Writes the configurations, the splits and the record of a grid."""
    plans_file = find_plans(grid.dataset, grid.plans)
    grid.folder.mkdir(parents=True, exist_ok=True)
    with FileLock(plans_file.parent / f".{plans_file.name}.lock"):  # two benchmarks of one dataset at once
        for draw in {cell.configuration: cell.draw for cell in grid.cells}.values():
            name = configuration_of(draw, grid.name, grid.configuration)
            configure(grid.dataset, grid.configuration, name, draw_settings(grid, draw), grid.plans)
    plans = read_json(plans_file)
    cases = preprocessed_cases(plans_file.parent / _data_identifier(plans, grid.configuration, plans_file))
    folds = append_splits(plans_file.parent, cases, {cell.draw: grid.splits[cell.draw.name] for cell in grid.cells})
    if any(folds[cell.draw] != cell.run_fold for cell in grid.cells):
        raise MisfmError(
            f"the folds of {grid.dataset} changed while the benchmark was being prepared: run the command again."
        )
    write_grid(grid)


def _data_identifier(plans: dict[str, Any], configuration: str, plans_file: Path) -> str:
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise MisfmError(f"expected one of the configurations {known} of {plans_file}, got {configuration!r}.")
    return PlansManager(plans).get_configuration(configuration).data_identifier


def _check_test(test: Path, base: Path, cases: Sequence[str]) -> None:
    """Raises where a test folder lacks images or labels, or holds cases to learn from."""
    dataset_json = read_json(base / "dataset.json")
    ending, channels = dataset_json["file_ending"], len(dataset_json["channel_names"])
    truths = test_truths(test, ending)
    if not truths:
        raise MisfmError(
            f"expected labels *{ending} in {test / 'labelsTs'}, found none: --test takes a folder with "
            "imagesTs and labelsTs in nnU-Net's format."
        )
    lacking = [
        f"{case}_{channel:04d}{ending}"
        for case in truths
        for channel in range(channels)
        if not (test / "imagesTs" / f"{case}_{channel:04d}{ending}").is_file()
    ]
    if lacking:
        raise MisfmError(f"expected {lacking[0]} in {test / 'imagesTs'}, found none ({len(lacking)} files missing).")
    names = sorted({*truths} & {*cases})
    if names:
        raise MisfmError(
            f"expected test cases that no run learns from, but {', '.join(names[:5])} of {test} are named as cases of "
            f"{base.name} ({len(names)} in all): take them out of one of the two, or rename them if they are others."
        )
    known = {(file.stat().st_size, _sha256(file)): file for file in (base / "gt_segmentations").glob(f"*{ending}")}
    for file in truths.values():
        if twin := known.get((file.stat().st_size, _sha256(file))):
            raise MisfmError(
                f"expected test cases that no run learns from, but {file} equals the training case {twin.name}: take "
                "it out of the test folder."
            )


def test_truths(test: Path, ending: str) -> dict[str, Path]:
    """Returns the label files of a test folder by the names of their cases."""
    return {file.name.removesuffix(ending): file for file in sorted((test / "labelsTs").glob(f"*{ending}"))}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _check_trainers(grid: Grid, plans: dict[str, Any], base: Path) -> None:
    """Raises where a trainer is unknown, learns without labels, or would find no pretrained weights."""
    for trainer, file in grid.weights.items():
        if trainer not in grid.trainers:
            raise MisfmError(f"expected --weights for one of {', '.join(grid.trainers)}, got them for {trainer!r}.")
        if not Path(file).is_file():
            raise MisfmError(f"expected pretrained weights for {trainer} at {file}, found none: check --weights.")
    for name in grid.trainers:
        try:
            with redirect_stdout(io.StringIO()):  # nnU-Net tells how it searches
                trainer = recursive_find_trainer_class_by_name(name)
        except RuntimeError as error:
            raise MisfmError(
                f"expected the name of a trainer that nnU-Net finds, got {name!r}: check the spelling, and "
                "nnUNet_extTrainer with nnUNetv2_misfm check."
            ) from error
        if not issubclass(trainer, nnUNetTrainer) or issubclass(trainer, PretextTrainer):
            raise MisfmError(f"expected trainers that learn from labels, got {name}, which pretrains without any.")
        if issubclass(trainer, FinetuneTrainer) and name not in grid.weights:
            _check_weights(grid, trainer, plans, base)


def _check_weights(grid: Grid, trainer: type[FinetuneTrainer], plans: dict[str, Any], base: Path) -> None:
    """Raises where a fine-tuning trainer of the grid would find no weights by any of its routes."""
    set_in_plans = any(s.startswith("pretrained_weights=") for s in grid.settings) or (
        PlansManager(plans).get_configuration(grid.configuration).configuration.get("misfm") or {}
    ).get("pretrained_weights")
    if set_in_plans or os.environ.get(WEIGHTS_VARIABLE):
        return
    configurations = [grid.configuration]
    while parent := plans["configurations"][configurations[-1]].get("inherits_from"):
        configurations.append(parent)
    results = Path(str(nnUNet_results)) / base.name
    runs = [results / f"{trainer.pretrain_trainer}__{grid.plans}__{name}" for name in configurations]
    for fold in dict.fromkeys(str(cell.run_fold) for cell in grid.cells):
        if not any((run / f"fold_{f}" / "checkpoint_final.pth").is_file() for run in runs for f in ("all", fold)):
            raise MisfmError(
                f"{trainer.__name__} expected pretrained weights and would find none: pretrain first with "
                f"nnUNetv2_train {base.name} {configurations[-1]} all -tr {trainer.pretrain_trainer} -p {grid.plans}, "
                f"or name a file with --weights {trainer.__name__}=FILE."
            )


def _extended(grid: Grid) -> Grid:
    """Returns the recorded grid of this name with the new cells added, or the grid where nothing is recorded.

    Raises:
        MisfmError: The recorded one has other settings, or other cases under the name of a draw.
    """
    if not has_grid(grid.dataset, grid.name):
        return grid
    recorded = read_grid(grid.dataset, grid.name)
    for what in ("plans", "configuration", "settings", "test", "tolerance_mm"):
        old, new = getattr(recorded, what), getattr(grid, what)
        if old != new:
            raise MisfmError(
                f"benchmark {grid.name!r} of {grid.dataset} was begun with {what} {_shown(old)}, got {_shown(new)}: "
                "runs under different ones are no comparison; repeat the former or choose another --name."
            )
    for trainer, file in grid.weights.items():
        if recorded.weights.get(trainer, file) != file:
            raise MisfmError(
                f"benchmark {grid.name!r} was begun with the weights {recorded.weights[trainer]} for {trainer}, got "
                f"{file}: choose another --name."
            )
    for draw, split in grid.splits.items():
        if recorded.splits.get(draw, split) != split:
            raise MisfmError(
                f"benchmark {grid.name!r} was begun with other cases for {draw}: splits_final.json changed since; put "
                "it back or choose another --name."
            )
    trainers = list(dict.fromkeys([*recorded.trainers, *grid.trainers]))
    cells = {cell.name: cell for cell in (*grid.cells, *recorded.cells)}  # a recorded fold stays
    return replace(
        recorded,
        weights={**recorded.weights, **grid.weights},
        cells=tuple(sorted(cells.values(), key=lambda cell: (_order(cell.draw), trainers.index(cell.trainer)))),
        splits={**recorded.splits, **grid.splits},
    )


def _order(draw: Draw) -> tuple[float, str, int]:
    cases = float("inf") if isinstance(draw.train_cases, str) else draw.train_cases
    return cases, str(draw.fold), draw.seed


def _shown(value: object) -> str:
    return (" ".join(value) if isinstance(value, tuple) else str(value)) or "none"


def cells_of(grid: Grid, request: Request) -> list[Cell]:
    """Returns the cells of a grid that a request asks for (a recorded grid may hold more)."""
    draws = draws_of(request.folds, request.train_cases, request.seeds)
    return [cell for cell in grid.cells if cell.trainer in request.trainers and cell.draw in draws]
