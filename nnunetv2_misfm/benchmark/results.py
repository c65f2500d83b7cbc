"""What a benchmark has come to: scores, learning curves, costs and gaps as tables, gathered once for the report."""

from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from nnunetv2_misfm.benchmark.grid import Grid

# The columns by which a run is told from others, in every table. `train_cases` is text: a number or `all`.
RUN_COLUMNS = ["trainer", "train_cases", "fold", "seed"]


@dataclass(frozen=True)
class Results:
    """All that the report shows.

    Attributes:
        grid: The planned runs.
        labels: Names of the classes (or regions) that are compared, in the order of the dataset.
        absent: Those of the dataset's classes that no truth holds; they are not in `labels` and not scored.
        cases: One row per run, case and class: RUN_COLUMNS, `case`, `label`, `dice`, `assd_mm`, `hd95_mm`,
            `surface_dice`, `truth_empty`, `prediction_empty`. No NaN. Finished runs only.
        curves: One row per run and epoch: RUN_COLUMNS, `epoch` (from 0), `train_loss`, `val_loss`, `pseudo_dice` (mean
            over classes, nnU-Net's, on validation patches), `seconds`.
        runs: One row per planned run: RUN_COLUMNS, `num_train` (cases it learned from), `state` (finished, failed,
            unfinished, missing, mismatched), `why` (a sentence where not finished), `train_commands` (text, one per
            line), `seconds_per_epoch` (median), `prediction_s_per_case`, `weights_file`, `weights_sha256`,
            `weights_share` (pretrained weights; empty text or NaN where there are none), `splits_sha256`,
            `checkpoint_sha256`.
        costs: One row per trainer: `trainer`, `parameters`, `gflops` (a forward pass of one patch, multiply and add
            counted as two), `peak_memory_gib` (a training step), `memory_kind` (GPU, or resident on the CPU).
        images: Image file of channel 0 of each compared case.
        truths: Label file of each compared case.
        predictions: Folder of the predictions of each finished run, by the name of its cell.
        compared: `test`, or `validation` where the folds' validation cases are compared.
        hardware: One line on the machine(s) of the runs.
        notes: Sentences on what a reader must know: mismatches, left-out runs, what pretraining saw.
    """

    grid: Grid
    labels: list[str]
    absent: list[str]
    cases: pd.DataFrame
    curves: pd.DataFrame
    runs: pd.DataFrame
    costs: pd.DataFrame
    images: dict[str, Path]
    truths: dict[str, Path]
    predictions: dict[str, Path]
    compared: str
    hardware: str
    notes: list[str] = field(default_factory=list)
