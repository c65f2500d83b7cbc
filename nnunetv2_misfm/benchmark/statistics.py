"""Statistics of a benchmark: pure functions on the tables of `benchmark/results.py`.

The rule behind all of them: rows that stand side by side rest on the same draws and the same cases. Draws that one
trainer lacks are left out for all; different cases within the same draws are an error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from statsmodels.stats.multitest import multipletests

from nnunetv2_misfm.benchmark.grid import ALL
from nnunetv2_misfm.benchmark.results import RUN_COLUMNS
from nnunetv2_misfm.errors import MisfmError

# Draws by number of labelled cases, each a fold (as text) and a seed
SharedDraws = Mapping[str, Sequence[tuple[str, int]]]

KEYS = ["fold", "seed", "case", "label"]  # what tells the scores of a trainer at one number of training cases apart
MEAN = "mean"  # stands among the labels for the mean over the classes of a case
ALPHA = 0.05  # of the corrected p below which a difference is called one; the usual level
CONFIDENCE = 0.95  # the and the field's usual level
RESAMPLES = 9_999  # scipy's default: the ends of the interval move by about a hundredth of its width
SEED = 0  # of the resampling; any would do, a fixed one makes a report reproducible
DECIMALS = 12  # of a difference, in Dice or mm; what is left behind them is rounding of the machine


@dataclass(frozen=True)
class Metric:
    """How a column of scores is read.

    Attributes:
        title: Name with unit, as tables show it.
        unit: Unit of a difference.
        scale: Factor from the column's values to the shown ones.
        larger_is_better: Direction.
    """

    title: str
    unit: str
    scale: float
    larger_is_better: bool


METRICS = {
    "dice": Metric("Dice (%)", "percentage points", 100.0, True),
    "assd_mm": Metric("ASSD (mm)", "mm", 1.0, False),
    "hd95_mm": Metric("HD95 (mm)", "mm", 1.0, False),
    "surface_dice": Metric("Surface Dice (%)", "percentage points", 100.0, True),
}


def size_order(train_cases: str) -> float:
    """Returns the key that sorts numbers of training cases given as text: 5, 10, 20, all."""
    return float("inf") if train_cases == ALL else float(train_cases)


def draw_order(draw: tuple[str, int]) -> tuple[float, int]:
    """Returns the key that sorts draws (fold as text, seed): folds 0, 1, ..., all; then seeds."""
    return (float("inf") if draw[0] == ALL else float(draw[0])), draw[1]


def shared_draws(runs: pd.DataFrame) -> dict[str, list[tuple[str, int]]]:
    """Returns the (fold, seed) pairs on which the trainers can be compared, for each number of training cases.

    Args:
        runs: `Results.runs`.

    Returns:
        By number of training cases (5, 10, 20, all): the draws that every trainer with a finished run at this number
        has finished. Trainers without one do not count. Empty where no draw is left.
    """
    draws = {}
    for size in sorted(set(runs["train_cases"].astype(str)), key=size_order):
        finished = runs[(runs["train_cases"].astype(str) == size) & (runs["state"] == "finished")]
        of_trainers = [_draws(group) for _, group in finished.groupby("trainer")]
        draws[size] = sorted(set.intersection(*of_trainers), key=draw_order) if of_trainers else []
    return draws


def case_scores(cases: pd.DataFrame, draws: SharedDraws) -> pd.DataFrame:
    """Returns each case's scores, averaged over the draws in which the case was compared.

    With a test set these are all folds and seeds of `draws`; without, the seeds of the one fold that holds the case.

    Args:
        cases: `Results.cases`.
        draws: From `shared_draws`.

    Returns:
        Columns `trainer`, `train_cases`, `case`, `label` and those of METRICS, sorted. The label `mean` holds the mean
        over the classes of a case.

    Raises:
        MisfmError: A trainer lacks a case or a class that another has, a score is there twice or not a number, or a
            class is called `mean`.
    """
    rows = _restricted(cases, draws)
    for size, group in cases.groupby(cases["train_cases"].astype(str)):
        if draws.get(str(size)):
            _check_same_cases(rows[rows["train_cases"] == size], sorted(set(group["trainer"])), draws[str(size)])
    columns = ["trainer", "train_cases", "case", "label"]
    scores = rows.groupby(columns, as_index=False)[list(METRICS)].mean()
    means = scores.groupby(columns[:-1], as_index=False)[list(METRICS)].mean().assign(label=MEAN)
    both = pd.concat([scores, means], ignore_index=True)[columns + list(METRICS)]
    order = [both["trainer"], both["train_cases"].map(size_order), both["case"], both["label"] == MEAN, both["label"]]
    return both.iloc[np.lexsort([key.to_numpy() for key in reversed(order)])].reset_index(drop=True)


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Returns mean and spread over cases.

    Args:
        scores: From `case_scores`.

    Returns:
        Columns `trainer`, `train_cases`, `label`, `metric`, `mean`, `std` (n - 1 in the denominator; NaN for one case)
        and `n_cases`.
    """
    columns = ["trainer", "train_cases", "label"]
    long = scores.melt([*columns, "case"], list(METRICS), var_name="metric", value_name="score")
    groups = long.groupby([*columns, "metric"], sort=False)["score"]
    return groups.agg(mean="mean", std="std", n_cases="count").reset_index()


def run_means(cases: pd.DataFrame, draws: SharedDraws | None = None) -> pd.DataFrame:
    """Returns each run's scores averaged over its cases and classes, for the spread over folds and seeds.

    Args:
        cases: `Results.cases`.
        draws: Restricts the runs to these draws; None takes all.

    Returns:
        RUN_COLUMNS, those of METRICS and `n_cases`, sorted.
    """
    rows = cases if draws is None else _restricted(cases, draws)
    groups = rows.sort_values([*RUN_COLUMNS, "case", "label"]).groupby(RUN_COLUMNS)
    return groups[list(METRICS)].mean().assign(n_cases=groups["case"].nunique()).reset_index()


def compare(
    scores: pd.DataFrame,
    pairs: Sequence[tuple[str, str]],
    metrics: Sequence[str] = tuple(METRICS),
    sizes: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Returns paired comparisons of the per-case class means, trainer minus reference.

    The interval is a bootstrap over cases: it tells how the difference would move with other cases, not with other
    seeds. p is Wilcoxon's signed-rank test, two-sided, zero differences dropped (1 where all are zero). `p_holm`
    corrects p by Holm within a family: all pairs and numbers of training cases of this call, one family per metric.

    Args:
        scores: From `case_scores`.
        pairs: (trainer, reference), e.g. from `pairs.default_pairs`.
        metrics: Columns of `scores`.
        sizes: Numbers of training cases that get rows, even where nobody has scores; None takes those of `scores`.

    Returns:
        One row per metric, number of training cases and pair: `trainer`, `reference`, `train_cases`, `metric`,
        `n_cases`, `mean_difference`, `low` and `high` (ends of the 95 % interval), `interval` (BCa, percentile or
        empty), `p`, `p_holm`, `better` (better or worse where the interval excludes zero and `p_holm` is below 0.05,
        else level; empty without an interval).
        A pair of which one has no scores keeps its row with 0 cases; fewer than two cases have neither interval nor p
        (NaN).

    Raises:
        MisfmError: The two of a pair have different cases.
    """
    means = scores[scores["label"] == MEAN]
    rows = []
    for metric in metrics:
        for size in sorted(set(means["train_cases"] if sizes is None else sizes), key=size_order):
            table = means[means["train_cases"] == size].pivot(index="case", columns="trainer", values=metric)
            for trainer, reference in pairs:
                differences = _differences(table, trainer, reference, size)
                verdict = _judge(differences, METRICS[metric].larger_is_better)
                rows.append(
                    {"trainer": trainer, "reference": reference, "train_cases": size, "metric": metric, **verdict}
                )
    columns = ["trainer", "reference", "train_cases", "metric", "n_cases", "mean_difference", "low", "high", "interval"]
    result = pd.DataFrame(rows, columns=[*columns, "p", "better"])
    result.insert(len(columns) + 1, "p_holm", np.nan)
    for metric in metrics:
        family = (result["metric"] == metric) & result["p"].notna()
        if family.any():
            result.loc[family, "p_holm"] = multipletests(result.loc[family, "p"], method="holm")[1]
    result.loc[result["better"].isin(["better", "worse"]) & (result["p_holm"] >= ALPHA), "better"] = "level"
    return result


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float, str]:
    """Returns the 95 % interval of the mean, and how it was found.

    Bias-corrected and accelerated (Efron 1987) where that is defined; else percentiles: fewer than three values, or
    values that are all equal.

    Args:
        differences: float [n], n >= 2.
    """
    for method in ("BCa", "percentile"):
        if method == "BCa" and (len(differences) < 3 or np.ptp(differences) == 0):
            continue
        low, high = stats.bootstrap(
            (differences,),
            np.mean,
            n_resamples=RESAMPLES,
            batch=1_000,  # bounds the memory
            confidence_level=CONFIDENCE,
            method=method,
            rng=np.random.default_rng(SEED),
        ).confidence_interval
        if np.isfinite([low, high]).all():
            break
    return float(low), float(high), method


def _draws(rows: pd.DataFrame) -> set[tuple[str, int]]:
    return {(str(fold), int(seed)) for fold, seed in zip(rows["fold"], rows["seed"], strict=True)}


def _restricted(cases: pd.DataFrame, draws: SharedDraws) -> pd.DataFrame:
    """Returns the rows of these draws, in an order that does not depend on theirs."""
    rows = cases.assign(train_cases=cases["train_cases"].astype(str), fold=cases["fold"].astype(str))
    wanted = [(size, fold, seed) for size, pairs in draws.items() for fold, seed in pairs]
    keep = pd.DataFrame(wanted, columns=["train_cases", "fold", "seed"]).astype(rows.dtypes[RUN_COLUMNS[1:]].to_dict())
    return rows.merge(keep, on=RUN_COLUMNS[1:]).sort_values([*RUN_COLUMNS, "case", "label"], ignore_index=True)


def _check_same_cases(rows: pd.DataFrame, trainers: Sequence[str], draws: Sequence[tuple[str, int]]) -> None:
    """Raises unless each trainer has each case of a fold, with every class, once per seed of that fold."""
    labels = rows[["label"]].drop_duplicates()
    if (labels["label"] == MEAN).any():
        raise MisfmError(
            f"expected classes of other names than {MEAN!r}, which stands for their mean: rename that class."
        )
    seeds = pd.DataFrame(list(draws), columns=["fold", "seed"]).astype(rows.dtypes[["fold", "seed"]].to_dict())
    expected = rows[["fold", "case"]].drop_duplicates().merge(seeds, on="fold").merge(labels, how="cross")
    for trainer in trainers:
        own = rows[rows["trainer"] == trainer]
        merged = expected.merge(own[KEYS], how="left", on=KEYS, indicator="where")
        lacking = merged[merged["where"] == "left_only"]
        if len(lacking):
            raise MisfmError(_sentence(trainer, lacking, "no score of"))
        twice = own[own.duplicated(KEYS)]
        if len(twice):
            raise MisfmError(_sentence(trainer, twice, "more than one score of"))
        odd = own[~np.isfinite(own[list(METRICS)]).all(axis=1)]
        if len(odd):
            raise MisfmError(_sentence(trainer, odd, "a score that is no number of"))


def _sentence(trainer: str, rows: pd.DataFrame, what: str) -> str:
    first = rows.sort_values(["case", "fold", "seed", "label"], ignore_index=True).drop_duplicates("case")
    places = zip(first["case"], first["fold"], first["seed"], first["label"], strict=True)
    names = [f"{case} (fold {fold}, seed {seed}, {label})" for case, fold, seed, label in places]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return (
        f"expected one score per case and class of every trainer, but {trainer} has {what} "
        f"{', '.join(names[:5])}{more}: evaluate its runs again, or leave it out; "
        "different cases are never silently averaged."
    )


def _differences(table: pd.DataFrame, trainer: str, reference: str, size: str) -> np.ndarray:
    if trainer not in table or reference not in table:
        return np.empty(0)
    if (table[trainer].isna() != table[reference].isna()).any():
        raise MisfmError(
            f"expected {trainer} and {reference} with scores of the same cases (training cases: {size}), got "
            f"{table[trainer].count()} and {table[reference].count()}: restrict both with case_scores first."
        )
    return (table[trainer] - table[reference]).dropna().sort_index().to_numpy(float).round(DECIMALS)


def _judge(differences: np.ndarray, larger_is_better: bool) -> dict[str, float | int | str]:
    n = len(differences)
    mean = float(differences.mean()) if n else float("nan")
    if n < 2:
        gaps: dict[str, float | str] = {
            "low": float("nan"),
            "high": float("nan"),
            "interval": "",
            "p": float("nan"),
            "better": "",
        }
        return {"n_cases": n, "mean_difference": mean, **gaps}
    low, high, method = bootstrap_interval(differences)
    good_end, bad_end = (low, high) if larger_is_better else (-high, -low)
    better = "better" if good_end > 0 else "worse" if bad_end < 0 else "level"
    p = float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0
    return {
        "n_cases": n,
        "mean_difference": mean,
        "low": low,
        "high": high,
        "interval": method,
        "p": p,
        "better": better,
    }
