"""The report's tables as text: numbers rounded for readers, gaps visible."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from nnunetv2_misfm.benchmark.grid import ALL, STOCK
from nnunetv2_misfm.benchmark.pairs import default_pairs
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.statistics import (
    MEAN,
    METRICS,
    SharedDraws,
    case_scores,
    compare,
    draw_order,
    run_means,
    shared_draws,
    size_order,
    summarise,
)

DASH = "–"
SLUGS = {"dice": "dice", "assd_mm": "assd", "hd95_mm": "hd95", "surface_dice": "surface_dice"}
HASH_DIGITS = 12  # of 64; enough to tell files apart, short enough for a column
FEW_CASES = 10  # ours: below it the caption warns of the bootstrap


@dataclass(frozen=True)
class Table:
    """A table as the report shows it in HTML, Markdown and CSV alike.

    Attributes:
        slug: Name of its CSV file without ending, e.g. `dice_10_cases`.
        title: Heading.
        caption: One or two sentences: what is averaged over what, n, rules that matter here.
        columns: Heads of the columns; the first column names the rows.
        rows: One list of texts per row, as long as `columns`; a gap is a dash.
        best: Cells (row, column) that hold the best value of their column.
    """

    slug: str
    title: str
    caption: str
    columns: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def display_name(trainer: str) -> str:
    """Returns how tables name a trainer: stock nnU-Net is told, others go by their class."""
    return f"{trainer} (stock nnU-Net)" if trainer == STOCK else trainer


def result_tables(results: Results) -> list[Table]:
    """Returns the tables in the paper's layout: one per number of training cases and metric.

    One row per trainer and one column per class, the average over classes last; mean ± standard deviation over cases.
    A trainer without a finished run keeps its row.

    Raises:
        MisfmError: The trainers were not evaluated on the same cases.
    """
    draws = shared_draws(results.runs)
    summary = summarise(case_scores(results.cases, draws))
    cells = {
        (row["train_cases"], row["metric"], row["trainer"], row["label"]): row for row in summary.to_dict("records")
    }
    means = run_means(results.cases, draws)
    return [_result_table(results, size, metric, draws, cells, means) for size in draws for metric in METRICS]


def comparison_tables(results: Results) -> list[Table]:
    """Returns one table of paired comparisons per metric; none where there is nothing to compare with.

    Raises:
        MisfmError: The trainers were not evaluated on the same cases.
    """
    pairs = default_pairs(results.grid.trainers)
    if not pairs:
        return []
    draws = shared_draws(results.runs)
    compared = compare(case_scores(results.cases, draws), pairs, sizes=list(draws))
    return [_comparison_table(metric, compared[compared["metric"] == metric]) for metric in METRICS]


def run_table(results: Results) -> Table:
    """Returns all planned runs with their state, mean Dice and the hashes of what they started from."""
    trainers = {trainer: i for i, trainer in enumerate(results.grid.trainers)}
    dice = {_run_key(run): run["dice"] for run in run_means(results.cases).to_dict("records")}
    runs = results.runs.to_dict("records")
    runs.sort(key=lambda run: (size_order(str(run["train_cases"])), draw_order(_draw(run)), trainers[run["trainer"]]))
    rows = [
        [
            display_name(run["trainer"]),
            _cases_of(run),
            str(run["fold"]),
            str(run["seed"]),
            run["state"],
            _text(run["why"]),
            _number(dice.get(_run_key(run)), 2, METRICS["dice"].scale),
            _text(run["weights_sha256"])[:HASH_DIGITS],
            _text(run["splits_sha256"])[:HASH_DIGITS],
        ]
        for run in runs
    ]
    finished = sum(run["state"] == "finished" for run in runs)
    are = "is" if finished == 1 else "are"
    return Table(
        "all_runs",
        "All runs",
        f"{finished} of {len(runs)} planned runs {are} finished. Dice is the mean over cases and classes of the run "
        f"alone. Weights and splits: the first {HASH_DIGITS} digits of the SHA-256 of the pretrained weights and of "
        "the lists of cases. The file csv/runs.csv of the report's folder holds the runs with all their digits, "
        "commands and times.",
        ["trainer", "training cases", "fold", "seed", "state", "why", METRICS["dice"].title, "weights", "splits"],
        rows,
    )


def cost_table(results: Results) -> Table:
    """Returns what each trainer costs: size, computation, time and memory."""
    costs = {cost["trainer"]: cost for cost in results.costs.to_dict("records")}
    times = results.runs.groupby("trainer")[["seconds_per_epoch", "prediction_s_per_case"]].median()
    rows = []
    for trainer in results.grid.trainers:
        cost = costs.get(trainer, {})
        time = times.loc[trainer] if trainer in times.index else {}
        rows.append(
            [
                display_name(trainer),
                _number(cost.get("parameters"), 2, 1e-6),
                _number(cost.get("gflops"), 1),
                _number(time.get("seconds_per_epoch"), 1),
                _number(cost.get("peak_memory_gib"), 2),
                _text(cost.get("memory_kind")),
                _number(time.get("prediction_s_per_case"), 2),
            ]
        )
    predicted = ""
    if results.compared == "test":
        predicted = f" Prediction: {'with' if results.grid.mirroring else 'without'} nnU-Net's mirroring."
    heads = ["parameters (million)", "GFLOPs per patch", "seconds per epoch", "peak memory (GiB)", "kind of memory"]
    return Table(
        "costs",
        "Costs",
        "GFLOPs: a forward pass of one patch, a multiplication and an addition counted as two. Memory: the peak of a "
        f"training step. Times: the median over the runs of a trainer.{predicted} Hardware: {results.hardware}.",
        ["trainer", *heads, "prediction (s per case)"],
        rows,
    )


# ---------------------------------------------------------------------- results


def _result_table(
    results: Results,
    size: str,
    metric: str,
    draws: SharedDraws,
    cells: dict[tuple[str, str, str, str], dict[str, Any]],
    means: pd.DataFrame,
) -> Table:
    shown = METRICS[metric]
    labels = [*results.labels, MEAN] if len(results.labels) > 1 else list(results.labels)
    rows, values = [], []
    for trainer in results.grid.trainers:
        found: list[dict[str, Any]] = [cells.get((size, metric, trainer, label), {}) for label in labels]
        values.append([_shown(cell.get("mean"), shown.scale) for cell in found])
        own = means[(means["train_cases"] == size) & (means["trainer"] == trainer)]
        rows.append(
            [
                display_name(trainer),
                *(_mean_and_std(cell.get("mean"), cell.get("std"), shown.scale) for cell in found),
                str(found[-1].get("n_cases", DASH)),
                _runs_of(results.runs, trainer, size, len(own)),
                _number(own[metric].std(), 2, shown.scale),
            ]
        )
    heads = ["average" if label == MEAN else label for label in labels]
    counts = [cell["n_cases"] for key, cell in cells.items() if key[:2] == (size, metric)]
    return Table(
        f"{SLUGS[metric]}_{size}_cases",
        f"{shown.title} with {_words(size)}",
        _caption(results, size, metric, draws[size], max(counts, default=0)),
        ["trainer", *heads, "n cases", "runs", "std over runs"],
        rows,
        _best(values, shown.larger_is_better),
    )


def _best(values: Sequence[Sequence[float | None]], larger_is_better: bool) -> frozenset[tuple[int, int]]:
    """Returns the cells with the best shown value of their column, where two or more compete; ties are all best."""
    cells = set()
    for column in range(len(values[0]) if values else 0):
        there = {i: value for i, row in enumerate(values) if (value := row[column]) is not None}
        if len(there) > 1:
            best = max(there.values()) if larger_is_better else min(there.values())
            cells |= {(i, column + 1) for i, value in there.items() if value == best}
    return frozenset(cells)


def _caption(results: Results, size: str, metric: str, draws: Sequence[tuple[str, int]], num_cases: int) -> str:
    shown = METRICS[metric]
    sentences = [f"{'Higher' if shown.larger_is_better else 'Lower'} is better."]
    if metric == "surface_dice":
        sentences.append(f"Tolerance {results.grid.tolerance_mm:g} mm.")
    if draws:
        kind = f"{'test' if results.compared == 'test' else 'validation'} case{'' if num_cases == 1 else 's'}"
        sentences.append(
            f"Mean ± standard deviation over {num_cases} {kind}; a case's score is its mean over its runs. "
            f"{_runs_in_words(draws)}, the same for every trainer; std over runs is that of their means."
        )
    elif (results.runs.loc[results.runs["train_cases"].astype(str) == size, "state"] == "finished").any():
        sentences.append("No draw was finished by every trainer that has finished any, so nothing is compared.")
    else:
        sentences.append("No run is finished.")
    left_out = _left_out(results.runs, size, draws)
    if left_out:
        sentences.append(f"Left out for all: {'; '.join(left_out)}.")
    if results.absent:
        sentences.append(f"In no truth, so not scored: {', '.join(results.absent)}.")
    return " ".join(sentences)


def _runs_in_words(draws: Sequence[tuple[str, int]]) -> str:
    """Returns the draws as text; folds that share their seeds are named together."""
    seeds_of: dict[str, list[str]] = {}
    for fold, seed in draws:
        seeds_of.setdefault(fold, []).append(str(seed))
    folds_of: dict[tuple[str, ...], list[str]] = {}
    for fold, seeds in seeds_of.items():
        folds_of.setdefault(tuple(seeds), []).append(fold)
    parts = [f"{_listed('fold', folds)} with {_listed('seed', seeds)}" for seeds, folds in folds_of.items()]
    return f"Runs: {'; '.join(parts)}"


def _left_out(runs: pd.DataFrame, size: str, draws: Sequence[tuple[str, int]]) -> list[str]:
    """Returns the draws that some trainer finished but that are not compared, with who lacks them and why."""
    planned = [run for run in runs.to_dict("records") if str(run["train_cases"]) == size]
    finished = [run for run in planned if run["state"] == "finished"]
    with_runs = {run["trainer"] for run in finished}
    sentences = []
    for draw in sorted({_draw(run) for run in planned} - set(draws), key=draw_order):
        states = {run["trainer"]: run["state"] for run in planned if _draw(run) == draw}
        lacking = {trainer: states.get(trainer, "not planned") for trainer in sorted(with_runs)}
        why = ", ".join(f"{trainer} {state}" for trainer, state in lacking.items() if state != "finished")
        if why:
            sentences.append(f"fold {draw[0]}, seed {draw[1]} ({why})")
    return sentences


def _runs_of(runs: pd.DataFrame, trainer: str, size: str, num_compared: int) -> str:
    """Returns how many of the planned runs are compared, or `missing` where none is finished."""
    own = runs[(runs["train_cases"].astype(str) == size) & (runs["trainer"] == trainer)]
    return f"{num_compared} of {len(own)}" if (own["state"] == "finished").any() else "missing"


# ---------------------------------------------------------------------- comparisons


def _comparison_table(metric: str, compared: pd.DataFrame) -> Table:
    shown = METRICS[metric]
    rows = [
        [
            f"{display_name(row['trainer'])} against {display_name(row['reference'])}",
            row["train_cases"],
            str(row["n_cases"]) if row["n_cases"] else DASH,
            _number(row["mean_difference"], 2, shown.scale, signed=True),
            _interval(row["low"], row["high"], shown.scale),
            _p_value(row["p"]),
            _p_value(row["p_holm"]),
            _text(row["better"]),
        ]
        for row in compared.to_dict("records")
    ]
    counts = compared.loc[compared["n_cases"] > 1, "n_cases"]
    few = f" Intervals of fewer than {FEW_CASES} cases tend to be too narrow." if (counts < FEW_CASES).any() else ""
    comparisons = f"the {len(counts)} comparisons of this table"
    if len(counts) < 2:
        comparisons = "a single comparison, and so changes nothing"
    return Table(
        f"comparison_{SLUGS[metric]}",
        f"{shown.title}: paired differences",
        f"Differences of the cases' class means in {shown.unit}, first minus second; "
        f"{'above' if shown.larger_is_better else 'below'} zero the first is better. Interval: bootstrap over cases, "
        "95 %; it does not hold the spread over seeds. p: Wilcoxon's signed-rank test, two-sided; Holm's correction is "
        f"over {comparisons}. Better and worse ask for an "
        f"interval without zero and a corrected p below 0.05; all else is level.{few}",
        ["pair", "training cases", "n cases", "difference", "95 % interval", "p", "p (Holm)", "verdict"],
        rows,
    )


# ---------------------------------------------------------------------- texts


def _run_key(run: dict[Any, Any]) -> tuple[str, str, str, int]:
    return (run["trainer"], str(run["train_cases"]), *_draw(run))


def _draw(run: dict[Any, Any]) -> tuple[str, int]:
    return str(run["fold"]), int(run["seed"])


def _cases_of(run: dict[Any, Any]) -> str:
    known = run["train_cases"] == ALL and not pd.isna(run["num_train"])
    return f"{ALL} ({int(run['num_train'])})" if known else str(run["train_cases"])


def _words(size: str) -> str:
    return f"{size} labelled case{'' if size == '1' else 's'}"


def _listed(noun: str, values: Sequence[str]) -> str:
    return f"{noun} {values[0]}" if len(values) == 1 else f"{noun}s {', '.join(values[:-1])} and {values[-1]}"


def _shown(value: float | None, scale: float) -> float | None:
    return None if value is None or pd.isna(value) else round(value * scale, 2)


def _number(value: float | None, digits: int, scale: float = 1.0, signed: bool = False) -> str:
    if value is None or pd.isna(value):
        return DASH
    rounded = round(value * scale, digits) + 0.0  # turns -0.0 into 0.0
    return f"{rounded:{'+' if signed else ''}.{digits}f}"


def _mean_and_std(mean: float | None, std: float | None, scale: float) -> str:
    return DASH if mean is None else f"{_number(mean, 2, scale)} ± {_number(std, 2, scale)}"


def _interval(low: float, high: float, scale: float) -> str:
    if pd.isna(low):
        return DASH
    return f"{_number(low, 2, scale, signed=True)} to {_number(high, 2, scale, signed=True)}"


def _p_value(p: float) -> str:
    return DASH if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _text(value: object) -> str:
    return value if isinstance(value, str) and value else DASH
