"""Gathers what a benchmark has come to from the files of its runs: the one place where the report's facts are read."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.benchmark.commands import configure_command
from nnunetv2_misfm.benchmark.costs import known_costs
from nnunetv2_misfm.benchmark.evaluate import absent_labels
from nnunetv2_misfm.benchmark.grid import ALL, Cell, Grid, read_grid
from nnunetv2_misfm.benchmark.results import RUN_COLUMNS, Results
from nnunetv2_misfm.benchmark.scores import TEST, VALIDATION, ending_of, predictions_of, scores_of, truths_of
from nnunetv2_misfm.benchmark.splits import splits_sha256
from nnunetv2_misfm.benchmark.state import (
    FINAL,
    State,
    is_validated,
    log_file,
    mismatch,
    recorded_steps,
    state_of,
    unpredicted,
)
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import find_plans, full_name, read_json
from nnunetv2_misfm.trainers.finetune import REPORT_NAME
from nnunetv2_misfm.weights.checkpoint import file_sha256, read_checkpoint


def gather(dataset: str, name: str = "benchmark", compared: str | None = None) -> Results:
    """Returns all that the report shows of a benchmark.

    Args:
        dataset: Number or name.
        name: Of the benchmark.
        compared: `test` or `validation`; None is the test folder where the benchmark has one.

    Raises:
        MisfmError: No such benchmark, or nothing of it is finished.
    """
    grid = read_grid(full_name(dataset), name)
    compared = compared or (VALIDATION if grid.test is None else TEST)
    if compared == VALIDATION and any(cell.draw.fold == ALL for cell in grid.cells):
        raise MisfmError(
            f"expected folds with validation cases of their own, but benchmark {name!r} has runs of the fold 'all', "
            "which learn from every case: compare on the test folder (--on test)."
        )
    runs, cases, curves, predictions, machines = [], [], [], {}, []
    for cell in grid.cells:
        run, found = _run_of(grid, cell, compared)
        runs.append(run)
        if found is None:
            continue
        scores, curve = found
        key = {column: run[column] for column in RUN_COLUMNS}
        cases.append(scores.assign(**key))
        curves.append(curve.assign(**key))
        predictions[cell.name] = predictions_of(grid, cell, compared)
        machines += [step["machine"] for step in recorded_steps(grid, cell)]
    if not cases:
        why = "; ".join(dict.fromkeys(run["why"] for run in runs))
        raise MisfmError(f"benchmark {name!r} of {grid.dataset} has no finished run yet: {why}")
    scored = pd.concat(cases, ignore_index=True)
    absent = absent_labels(scored)
    labels = [label for label in dict.fromkeys(scored["label"]) if label not in absent]
    if not labels:
        raise MisfmError(f"the truths of {grid.dataset} hold none of its classes ({', '.join(absent)}).")
    truths = {case: file for cell in grid.cells for case, file in truths_of(grid, cell, compared).items()}
    compared_truths = {case: truths[case] for case in dict.fromkeys(scored["case"])}
    return Results(
        grid=grid,
        labels=labels,
        absent=absent,
        cases=scored[scored["label"].isin(labels)].reset_index(drop=True),
        curves=pd.concat(curves, ignore_index=True),
        runs=pd.DataFrame(runs),
        costs=pd.DataFrame(
            [cost for trainer, cost in known_costs(grid).items() if trainer in grid.trainers],
            columns=["trainer", "parameters", "gflops", "peak_memory_gib", "memory_kind"],
        ),
        images=_images(grid, compared_truths, compared),
        truths=compared_truths,
        predictions=predictions,
        compared=compared,
        hardware="; ".join(dict.fromkeys(machines)) or "not recorded",
        notes=_notes(grid, scored, runs),
    )


def _run_of(grid: Grid, cell: Cell, compared: str) -> tuple[dict[str, Any], tuple[pd.DataFrame, pd.DataFrame] | None]:
    """Returns a run's row, and its scores and curve where it is finished; what is wrong with it is said in the row."""
    split = grid.splits[cell.draw.name]
    row: dict[str, Any] = {
        "trainer": cell.trainer,
        "train_cases": str(cell.draw.train_cases),
        "fold": str(cell.draw.fold),
        "seed": cell.draw.seed,
        "num_train": len(split["train"]),
        "state": "finished",
        "why": "",
        "train_commands": str(configure_command(grid, cell.draw)),
        "seconds_per_epoch": float("nan"),
        "prediction_s_per_case": float("nan"),
        "weights_file": "",
        "weights_sha256": "",
        "weights_share": float("nan"),
        "splits_sha256": splits_sha256(split),
        "checkpoint_sha256": "",
    }
    try:
        steps = recorded_steps(grid, cell)
        row["train_commands"] = "\n".join([row["train_commands"], *dict.fromkeys(step["command"] for step in steps)])
        row["prediction_s_per_case"] = _prediction_seconds(steps)
        if why := mismatch(grid, cell):
            return {**row, "state": "mismatched", "why": why}, None
        if gap := _gap(grid, cell, compared, steps):
            return {**row, "state": gap[0], "why": gap[1]}, None
        row["checkpoint_sha256"] = file_sha256(grid.results(cell) / FINAL)
        row |= _weights_of(grid, cell)
        curve = _curve_of(grid, cell)
        row["seconds_per_epoch"] = float(curve["seconds"].median())
        return row, (scores_of(grid, cell, compared), curve)
    except MisfmError as error:
        return {**row, "state": "unfinished", "why": str(error)}, None


def _gap(grid: Grid, cell: Cell, compared: str, steps: list[dict[str, Any]]) -> tuple[str, str] | None:
    """Returns state and reason of a run that lacks something, None where it is complete."""
    state = state_of(grid, cell)
    outstanding = unpredicted(grid, cell, [*truths_of(grid, cell, TEST)], ending_of(grid)) if grid.test else []
    if state is State.NEW:
        found = state.value, "not run yet"
    elif state is State.CUT:
        found = state.value, "its training is not finished"
    elif compared == TEST and outstanding:
        found = "unfinished", f"{len(outstanding)} test cases are not predicted yet by its final weights"
    elif compared == VALIDATION and not is_validated(grid, cell):
        found = "unfinished", "its validation cases are not predicted yet by its final weights"
    else:
        return None
    status = steps[-1]["status"] if steps else 0
    if status > 0:
        return "failed", f"{steps[-1]['title']} ended with status {status}; its output is in {log_file(grid, cell)}"
    return ("unfinished", f"{steps[-1]['title']} was stopped") if status < 0 else found


def _weights_of(grid: Grid, cell: Cell) -> dict[str, Any]:
    """Returns what a run recorded of the pretrained weights that it started from, nothing where there were none."""
    account = grid.results(cell) / REPORT_NAME
    if not account.is_file():
        return {}
    weights = read_json(account)
    file, sha256 = weights.get("file") or "", weights.get("sha256") or ""
    return {"weights_file": file, "weights_sha256": sha256, "weights_share": weights.get("share", float("nan"))}


def _curve_of(grid: Grid, cell: Cell) -> pd.DataFrame:
    """Returns what nnU-Net logged in each epoch of a finished run.

    Raises:
        MisfmError: The checkpoint cannot be read or holds no curves.
    """
    file = grid.results(cell) / FINAL
    logged = read_checkpoint(file).get("logging")
    keys = ("train_losses", "val_losses", "mean_fg_dice", "epoch_start_timestamps", "epoch_end_timestamps")
    if not isinstance(logged, dict) or not {*keys} <= {*logged}:
        raise MisfmError(f"{file}: expected nnU-Net's logged curves, found none; train the run again.")
    train, val, dice, start, end = (np.asarray(logged[key], dtype=float) for key in keys)
    count = min(map(len, (train, val, dice, start, end)))
    return pd.DataFrame(
        {
            "epoch": np.arange(count),
            "train_loss": train[:count],
            "val_loss": val[:count],
            "pseudo_dice": dice[:count],
            "seconds": (end[:count] - start[:count]),
        }
    )


def _prediction_seconds(steps: list[dict[str, Any]]) -> float:
    """Returns wall seconds of nnU-Net's prediction command per case, its start included; NaN where there was none."""
    done = [step for step in steps if step["title"] == "predict" and step["status"] == 0 and step["cases"]]
    return sum(s["seconds"] for s in done) / sum(s["cases"] for s in done) if done else float("nan")


def _images(grid: Grid, truths: dict[str, Path], compared: str) -> dict[str, Path]:
    ending = ending_of(grid)
    if compared == TEST:
        return {case: Path(str(grid.test)) / "imagesTs" / f"{case}_0000{ending}" for case in truths}
    if not nnUNet_raw.is_set():
        raise MisfmError("expected the environment variable nnUNet_raw to name a folder, but it is not set.")
    raw = Path(str(nnUNet_raw)) / grid.dataset / "imagesTr"
    return {case: raw / f"{case}_0000{ending}" for case in truths}


def _notes(grid: Grid, scores: pd.DataFrame, runs: list[dict[str, Any]]) -> list[str]:
    """Returns what a reader must know of the runs beside the numbers."""
    notes = []
    plans = PlansManager(read_json(find_plans(grid.dataset, grid.plans)))
    block = plans.get_configuration(grid.configuration).configuration.get("misfm") or {}
    if block:
        notes.append(f"The configuration {grid.configuration} itself sets {json.dumps(block)}.")
    for trainer in grid.trainers:
        hashes = {run["weights_sha256"][:12] for run in runs if run["trainer"] == trainer} - {""}
        if len(hashes) > 1:
            notes.append(
                f"The runs of {trainer} started from different pretrained weights: {', '.join(sorted(hashes))}."
            )
    evaluated = {*scores["case"]}
    for sha256, file in {run["weights_sha256"]: run["weights_file"] for run in runs if run["weights_sha256"]}.items():
        notes.append(_pretraining_note(grid, file, sha256, len(evaluated)))
    empty = scores[scores["prediction_empty"] & ~scores["truth_empty"]]
    for (trainer, label), rows in empty.groupby(["trainer", "label"], sort=False):
        total = ((scores["trainer"] == trainer) & (scores["label"] == label)).sum()
        notes.append(
            f"{trainer} predicted no {label} at all in {len(rows)} of {total} predictions over all its runs; these "
            "count with Dice 0 and the image's diagonal as their distance."
        )
    return notes


def _pretraining_note(grid: Grid, file: str, sha256: str, num_cases: int) -> str:
    """Returns where pretrained weights come from, and whether pretraining may have seen images that are compared."""
    name = f"Pretrained weights {Path(file).name} (SHA-256 {sha256[:12]})"
    if not Path(file).is_file():
        return f"{name}: the file {file} is no longer there, so what it was pretrained on is not known."
    if file_sha256(file) != sha256:
        return f"{name}: the file {file} holds other weights now than those that the runs started from."
    meta = read_checkpoint(file).get("misfm_meta") or {}
    data = meta.get("data") or {}
    if not data:
        return f"{name} say nothing of what they were pretrained on."
    recipe, batch = meta["recipe"], meta.get("batch_size")
    steps = recipe["num_epochs"] * recipe["num_iterations_per_epoch"]
    text = (
        f"{name}: {meta.get('method')}, {steps:,} steps of batch {batch} on {data['num_training_cases']} cases of "
        f"{data['dataset']}"
    )
    if data["dataset"] == grid.dataset and grid.test is None:
        return (
            f"{text}, the dataset of which {num_cases} cases are compared here: their images (never their labels) may "
            "have been in the pretraining; use --test for cases that were in neither."
        )
    return f"{text}."
