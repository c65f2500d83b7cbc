"""Results of a made-up benchmark: plausible numbers from a fixed seed, and small scans with spheres to draw."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import SimpleITK as sitk

from nnunetv2_misfm.benchmark.grid import ALL, Cell, Draw, Grid, cell_of, draws_of
from nnunetv2_misfm.benchmark.results import RUN_COLUMNS, Results

STOCK, SCRATCH, FINETUNED = TRAINERS = ("nnUNetTrainer", "nnUNetTrainerPCTNet", "nnUNetTrainerPCTNetVF")
SHAPE = (24, 28, 24)  # D, H, W in array order
SPACING = (1.0, 1.0, 1.5)  # mm in SimpleITK's order (x, y, z)
EPOCHS = 6
SCORES = ["dice", "assd_mm", "hd95_mm", "surface_dice"]
CASE_COLUMNS = [*RUN_COLUMNS, "case", "label", *SCORES, "truth_empty", "prediction_empty"]
CURVE_COLUMNS = [*RUN_COLUMNS, "epoch", "train_loss", "val_loss", "pseudo_dice", "seconds"]


@dataclass(frozen=True)
class Sphere:
    """A class in a scan: centre in voxels (D, H, W), radius in voxels."""

    centre: tuple[float, float, float]
    radius: float

    def mask(self) -> np.ndarray:
        """Returns bool [D, H, W]."""
        axes = np.ogrid[tuple(slice(0, n) for n in SHAPE)]
        return sum((axis - c) ** 2 for axis, c in zip(axes, self.centre, strict=True)) <= self.radius**2


def toy_results(
    tmp_path: Path,
    trainers: Sequence[str] = TRAINERS,
    sizes: Sequence[str] = ("5", "all"),
    folds: Sequence[str] = ("0",),
    seeds: Sequence[int] = (0, 1),
    classes: Sequence[str] = ("Anterior", "Posterior"),
    cases: int = 12,
    missing: Iterable[str] = (),
    *,
    validation: bool = False,
    files: bool = True,
) -> Results:
    """Returns results as `gather` would, and writes their scans.

    Args:
        tmp_path: Where scans and predictions go.
        trainers: As in the grid.
        sizes: Numbers of labelled cases as text, or `all`.
        folds: As text.
        seeds: Of the draws.
        classes: Names of the labels 1, 2, ...
        cases: Number of compared cases over all folds.
        missing: Names of cells that were not run, e.g. `nnUNetTrainerPCTNet__n5__fold0__seed1`, or the beginning of
            such a name for all that begin so.
        validation: Compare the validation cases of each fold in place of a test set.
        files: Whether to write images, truths and predictions; without them their tables name files that are absent.
    """
    generator = np.random.default_rng(5)
    names = [f"case_{i:03d}" for i in range(cases)]
    of_fold = {fold: names[i :: len(folds)] if validation else names for i, fold in enumerate(folds)}
    grid = _grid(tmp_path, trainers, sizes, folds, seeds, of_fold, validation)
    missing = tuple(missing)
    state = {cell.name: "missing" if missing and cell.name.startswith(missing) else "finished" for cell in grid.cells}
    finished = [cell for cell in grid.cells if state[cell.name] == "finished"]
    difficulty = {name: generator.normal(0, 0.03) for name in names}
    scores = [
        _score(cell, case, label, difficulty[case], generator)
        for cell in finished
        for case in of_fold[str(cell.draw.fold)]
        for label in classes
    ]
    images = {name: tmp_path / "imagesTs" / f"{name}_0000.nii.gz" for name in names}
    truths = {name: tmp_path / "labelsTs" / f"{name}.nii.gz" for name in names}
    predictions = {cell.name: tmp_path / "predictions" / cell.name for cell in finished}
    if files:
        _write_scans(names, len(classes), images, truths, generator)
        for cell in finished:
            _write_predictions(predictions[cell.name], of_fold[str(cell.draw.fold)], truths, generator)
    return Results(
        grid=grid,
        labels=list(classes),
        absent=[],
        cases=pd.DataFrame(scores, columns=CASE_COLUMNS),
        curves=pd.DataFrame([row for cell in finished for row in _curve(cell, generator)], columns=CURVE_COLUMNS),
        runs=pd.DataFrame([_run(cell, state[cell.name], grid) for cell in grid.cells]),
        costs=pd.DataFrame([_cost(trainer) for trainer in trainers]),
        images=images,
        truths=truths,
        predictions=predictions,
        compared="validation" if validation else "test",
        hardware="a made-up machine, 2 CPU cores",
        notes=["These numbers are made up."],
    )


def cell_columns(cell: Cell) -> dict[str, Any]:
    """Returns RUN_COLUMNS of a cell as the tables hold them."""
    draw = cell.draw
    return dict(zip(RUN_COLUMNS, (cell.trainer, str(draw.train_cases), str(draw.fold), draw.seed), strict=True))


def _grid(
    tmp_path: Path,
    trainers: Sequence[str],
    sizes: Sequence[str],
    folds: Sequence[str],
    seeds: Sequence[int],
    of_fold: dict[str, list[str]],
    validation: bool,
) -> Grid:
    numbers: list[int | str] = [size if size == ALL else int(size) for size in sizes]
    draws = draws_of([fold if fold == ALL else int(fold) for fold in folds], numbers, seeds)
    cells = [
        cell_of(trainer, draw, "toy", "3d_fullres", draw.fold if draw.train_cases == ALL else 5 + i, length=True)
        for i, draw in enumerate(draws)
        for trainer in trainers
    ]
    splits = {draw.name: {"train": _training_cases(draw), "val": list(of_fold[str(draw.fold)])} for draw in draws}
    settings = ("num_epochs=6", "num_iterations_per_epoch=20")
    test = None if validation else str(tmp_path)
    return Grid(
        name="toy",
        dataset="Dataset555_Toy",
        plans="nnUNetPlans",
        configuration="3d_fullres",
        settings=settings,
        test=test,
        tolerance_mm=1.0,
        mirroring=True,
        weights={},
        weights_sha256={},
        requests=("nnUNetv2_misfm benchmark -d 555 -c 3d_fullres --name toy",),
        cells=tuple(cells),
        splits=splits,
    )


def _training_cases(draw: Draw) -> list[str]:
    return [f"train_{i:03d}" for i in range(40 if draw.train_cases == ALL else int(draw.train_cases))]


def _score(cell: Cell, case: str, label: str, difficulty: float, generator: np.random.Generator) -> dict[str, Any]:
    gain = {STOCK: 0.0, SCRATCH: -0.01, FINETUNED: 0.02}.get(cell.trainer, 0.0)
    base = 0.88 if cell.draw.train_cases == ALL else 0.80
    dice = float(np.clip(base + gain + difficulty + generator.normal(0, 0.01), 0.05, 0.99))
    return {
        **cell_columns(cell),
        "case": case,
        "label": label,
        "dice": dice,
        "assd_mm": 4 * (1 - dice) * float(generator.uniform(0.9, 1.1)),
        "hd95_mm": 12 * (1 - dice) * float(generator.uniform(0.9, 1.1)),
        "surface_dice": min(1.0, dice + 0.08),
        "truth_empty": False,
        "prediction_empty": False,
    }


def _curve(cell: Cell, generator: np.random.Generator) -> list[dict[str, Any]]:
    start = 0.5 if cell.trainer == FINETUNED else 0.2
    learned = [1 - np.exp(-(epoch + 1) / 2) for epoch in range(EPOCHS)]
    return [
        {
            **cell_columns(cell),
            "epoch": epoch,
            "train_loss": -share * 0.8 + float(generator.normal(0, 0.01)),
            "val_loss": -share * 0.7 + float(generator.normal(0, 0.01)),
            "pseudo_dice": start + (0.88 - start) * share + float(generator.normal(0, 0.005)),
            "seconds": 11.0 + float(generator.normal(0, 0.2)),
        }
        for epoch, share in enumerate(learned)
    ]


def _run(cell: Cell, state: str, grid: Grid) -> dict[str, Any]:
    finished, tuned = state == "finished", cell.trainer.endswith("VF")
    train = f"nnUNetv2_train 555 {cell.configuration} {cell.run_fold} -tr {cell.run_trainer} -p {grid.plans}"
    return {
        **cell_columns(cell),
        "num_train": len(grid.splits[cell.draw.name]["train"]),
        "state": state,
        "why": "" if finished else f"no checkpoint_final.pth of {cell.run_trainer} was found.",
        "train_commands": train,
        "seconds_per_epoch": 11.0 + (len(cell.trainer) % 7) / 10 if finished else np.nan,
        "prediction_s_per_case": 0.8 if finished else np.nan,
        "weights_file": "pretrained/checkpoint_final.pth" if finished and tuned else "",
        "weights_sha256": _digest("weights") if finished and tuned else "",
        "weights_share": 0.998 if finished and tuned else np.nan,
        "splits_sha256": _digest(cell.draw.name),
        "checkpoint_sha256": _digest(cell.name) if finished else "",
    }


def _cost(trainer: str) -> dict[str, Any]:
    pct_net = "PCTNet" in trainer
    return {
        "trainer": trainer,
        "parameters": 17_300_000 if pct_net else 5_640_000,
        "gflops": 61.25 if pct_net else 48.5,
        "peak_memory_gib": 3.4 if pct_net else 2.1,
        "memory_kind": "resident on the CPU",
    }


def _digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def _write_scans(
    names: Sequence[str],
    num_classes: int,
    images: dict[str, Path],
    truths: dict[str, Path],
    generator: np.random.Generator,
) -> None:
    for name in names:
        labels = np.zeros(SHAPE, np.uint8)
        for label in range(1, num_classes + 1):
            labels[_sphere(label, num_classes, generator).mask()] = label
        _write(images[name], (100 + 80 * labels + generator.normal(0, 10, SHAPE)).astype(np.float32))
        _write(truths[name], labels)


def _sphere(label: int, num_classes: int, generator: np.random.Generator) -> Sphere:
    radius = min(5.0, 0.4 * SHAPE[1] / num_classes) + generator.uniform(-0.5, 0.5)
    return Sphere((12.0, SHAPE[1] * (label - 0.5) / num_classes, 12 + generator.uniform(-2, 2)), radius)


def _write_predictions(
    folder: Path, names: Sequence[str], truths: dict[str, Path], generator: np.random.Generator
) -> None:
    """Predictions are truths shifted by a voxel or two along the last axis."""
    for name in names:
        truth = sitk.GetArrayFromImage(sitk.ReadImage(str(truths[name])))
        _write(folder / f"{name}.nii.gz", np.roll(truth, int(generator.integers(-2, 3)), axis=2))


def _write(file: Path, voxels: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(file))
