"""How soon a trainer learns: its learning curves on the shared draws, and the epochs until they have risen."""

import math
import statistics
from collections.abc import Sequence

import numpy as np
import pandas as pd

from nnunetv2_misfm.benchmark.grid import ALL
from nnunetv2_misfm.benchmark.pairs import stock_of
from nnunetv2_misfm.benchmark.results import RUN_COLUMNS, Results
from nnunetv2_misfm.benchmark.statistics import shared_draws
from nnunetv2_misfm.benchmark.tables import Table, display_name

REACHED_SHARE = 0.95  # of the reference's final pseudo Dice; ours, near the end and above the noise of the epochs
FINAL_SHARE = 0.1  # ours: the last tenth of the epochs is what a run ended with, a single epoch is noisy


def size_label(train_cases: str, results: Results) -> str:
    """Returns a number of labelled cases for readers, e.g. `10 labelled cases` or `all labelled cases (156)`."""
    if train_cases != ALL:
        return f"{train_cases} labelled case{'s' if train_cases != '1' else ''}"
    numbers = sorted({int(number) for number in runs_of(results, ALL)["num_train"].dropna()})
    return f"all labelled cases ({' to '.join(map(str, dict.fromkeys([numbers[0], numbers[-1]])))})" if numbers else ALL


def epochs_to_reach(pseudo_dice: Sequence[float], target: float) -> int | None:
    """Returns after how many epochs a curve first reaches a target, None where it never does.

    Args:
        pseudo_dice: One value per epoch, from the first.
        target: Value to reach (inclusive).
    """
    return next((epoch for epoch, value in enumerate(pseudo_dice, start=1) if value >= target), None)


def epochs_table(results: Results) -> Table | None:
    """Returns how many epochs each trainer needs to come near the end of the reference; None where there are no curves.

    The reference is stock nnU-Net, or the first trainer where stock is not in the grid. In each shared draw the target
    is `REACHED_SHARE` of the reference's pseudo Dice, mean over the last tenth of its epochs; shown is the median over
    draws, a run that does not reach it counting as slower than all that do.
    """
    trainers, by_size = results.grid.trainers, curves_by_size(results)
    reference = stock_of(trainers) or trainers[0]
    counted = {size: _epochs_of_size(curves, reference) for size, curves in by_size.items()}
    if not any(counted.values()):
        return None
    rows = [
        [display_name(trainer), *(_epochs_text(counted[size].get(trainer, [])) for size in counted)]
        for trainer in trainers
    ]
    return Table(
        slug="epochs_to_reach",
        title="How soon the curves rise",
        caption=(
            f"Epochs until the pseudo Dice first reaches {100 * REACHED_SHARE:.0f} % of what {display_name(reference)} "
            "ends with in the same draw (mean over the last tenth of its epochs): median over runs, and how many of "
            "them reach it at all."
        ),
        columns=["trainer", *(size_label(size, results) for size in counted)],
        rows=rows,
    )


def _epochs_of_size(curves: pd.DataFrame, reference: str) -> dict[str, list[int | None]]:
    """Returns the epochs of every run by trainer, for draws in which the reference has a curve."""
    counted: dict[str, list[int | None]] = {}
    for _, of_draw in curves.sort_values("epoch").groupby(["fold", "seed"]):
        ends_with = of_draw.loc[of_draw["trainer"] == reference, "pseudo_dice"]
        if ends_with.empty:
            continue
        target = REACHED_SHARE * float(ends_with.tail(max(1, round(FINAL_SHARE * len(ends_with)))).mean())
        for trainer, own in of_draw.groupby("trainer"):
            counted.setdefault(str(trainer), []).append(epochs_to_reach(own["pseudo_dice"].tolist(), target))
    return counted


def _epochs_text(epochs: Sequence[int | None]) -> str:
    if not epochs:
        return "–"
    reached = sum(epoch is not None for epoch in epochs)
    median = statistics.median(math.inf if epoch is None else epoch for epoch in epochs)
    text = "not reached" if math.isinf(median) else f"{median:g}"
    return f"{text} ({reached} of {len(epochs)} runs)"


def epochs_run(results: Results) -> dict[str, dict[str, tuple[int, int]]]:
    """Returns the least and the most epochs of a run in the shared draws, by number of labelled cases and trainer."""
    found = {}
    for size, curves in _curves_of_shared_draws(results).items():
        lengths = curves.groupby(["trainer", "fold", "seed"])["epoch"].max() + 1
        found[size] = {str(name): (int(own.min()), int(own.max())) for name, own in lengths.groupby("trainer")}
    return found


def curves_by_size(results: Results) -> dict[str, pd.DataFrame]:
    """Returns the learning curves of the shared draws by number of labelled cases; sizes without any are left out."""
    curves = {size: own.dropna(subset=["pseudo_dice"]) for size, own in _curves_of_shared_draws(results).items()}
    return {size: own for size, own in curves.items() if len(own)}


def runs_of(results: Results, train_cases: str) -> pd.DataFrame:
    """Returns the planned runs with this number of labelled cases."""
    return results.runs[results.runs["train_cases"].astype(str) == train_cases]


def _curves_of_shared_draws(results: Results) -> dict[str, pd.DataFrame]:
    if results.curves.empty:
        return {}
    curves = results.curves.astype({"train_cases": str, "fold": str, "seed": int})
    found = {}
    for size, draws in shared_draws(results.runs).items():
        wanted = [draw in draws for draw in zip(curves["fold"], curves["seed"], strict=True)]
        own = curves[(curves["train_cases"] == size) & np.array(wanted, dtype=bool)]
        finished = runs_of(results, size)
        finished = finished[finished["state"] == "finished"]
        own = own.merge(finished[RUN_COLUMNS].astype({"train_cases": str, "fold": str, "seed": int}), on=RUN_COLUMNS)
        if len(own):
            found[size] = own
    return found
