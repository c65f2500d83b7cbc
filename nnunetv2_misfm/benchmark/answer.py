"""The report's answer in plain sentences: who stands where against whom, how sure that is, and what is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from nnunetv2_misfm.benchmark.convergence import epochs_run
from nnunetv2_misfm.benchmark.pairs import default_pairs, scratch_of, stock_of
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.statistics import (
    SharedDraws,
    case_scores,
    compare,
    draw_order,
    run_means,
    shared_draws,
)
from nnunetv2_misfm.benchmark.tables import display_name

_NAMED_AT_MOST = 5  # ours: the table of runs names all
_WORDS = {
    "better": "better with {}",
    "worse": "worse with {}",
    "level": "no clear difference with {}",
    "none": "without an interval, as there is a single case, with {}",
}


def answer(results: Results) -> list[str]:
    """Returns the comparisons in mean Dice that matter, and what is missing.

    They are those of fine-tuned trainers with stock nnU-Net and with their counterparts from scratch; where no trainer
    is fine-tuned, those of all with stock. "Better" and "worse" mean that the 95 % interval excludes zero and the
    corrected p is below 0.05; nothing is said of what was not run.

    Raises:
        MisfmError: The trainers were not evaluated on the same cases.
    """
    trainers = results.grid.trainers
    pairs = default_pairs(trainers)
    if not pairs:
        first = "There is nothing to compare: the grid holds no stock nnU-Net beside another trainer."
        return [first, *_missing(results)]
    tuned = [pair for pair in pairs if is_fine_tuned(results, pair[0])]
    draws = shared_draws(results.runs)
    # all pairs, as in the tables
    table = compare(case_scores(results.cases, draws), pairs, ["dice"])
    table["agreeing"] = _agreeing(table, run_means(results.cases, draws))
    stock = stock_of(trainers)
    found = [_against(pair, stock, table, draws) for pair in tuned or pairs]
    return [*found, *_evidence(results, table, draws), *_missing(results)]


def is_fine_tuned(results: Results, trainer: str) -> bool:
    """Whether a trainer starts from pretrained weights: by its class, by the grid, or by what its runs recorded."""
    own = results.runs.loc[results.runs["trainer"] == trainer, "weights_sha256"]
    recorded = bool((own.fillna("").astype(str) != "").any())
    return recorded or trainer in results.grid.weights or scratch_of(trainer, results.grid.trainers) is not None


def warnings(results: Results) -> list[str]:
    """Returns what a reader must know: notes of the runs, settings, absent classes, left-out draws, missing runs."""
    found = list(results.notes)
    if results.grid.settings:
        found.append(
            f"Every trainer had the same configuration, {' '.join(results.grid.settings)}, which is not nnU-Net's own; "
            'not every trainer reads every key (see "How to reproduce it").'
        )
    found += _unequal_lengths(results)
    if results.absent:
        found.append(
            f"No truth of the compared cases holds {', '.join(results.absent)}: not scored, and in no mean over "
            "classes."
        )
    runs = results.runs.astype({"train_cases": str, "fold": str})
    draws = shared_draws(results.runs)
    for size, rows in runs[runs["state"] == "finished"].groupby("train_cases", sort=False):
        finished = {(fold, int(seed)) for fold, seed in zip(rows["fold"], rows["seed"], strict=True)}
        lost = [f"fold {fold}, seed {seed}" for fold, seed in sorted(finished - {*draws[str(size)]}, key=draw_order)]
        if lost:
            found.append(
                f"With {_cases([str(size)])}, left out of every comparison, as not all trainers have finished there: "
                f"{'; '.join(lost)}."
            )
    gaps = runs[runs["state"] != "finished"]
    found += [
        f"{display_name(row['trainer'])} with {_cases([row['train_cases']])}, fold {row['fold']}, seed {row['seed']}: "
        f"{row['state']} ({str(row['why']).rstrip('.')})."
        for row in gaps.head(_NAMED_AT_MOST).to_dict("records")
    ]
    if more := max(0, len(gaps) - _NAMED_AT_MOST):
        found.append(
            "1 more run is not finished; the table of runs names it."
            if more == 1
            else f"{more} more runs are not finished; the table of runs names them."
        )
    return found


def _unequal_lengths(results: Results) -> list[str]:
    """Returns a sentence for the numbers of labelled cases at which trainers ran for different numbers of epochs."""
    sizes_of: dict[str, list[str]] = {}
    for size, lengths in epochs_run(results).items():
        if len(set(lengths.values())) > 1:
            ran = [(t, _range(sorted(set(lengths[t])))) for t in results.grid.trainers if t in lengths]
            texts = [f"{trainer} {epochs}" for trainer, epochs in ran]
            sizes_of.setdefault(f"{ran[0][0]} ran {ran[0][1]} epochs, {', '.join(texts[1:])}", []).append(size)
    return [f"With {_cases(sizes)}: {ran}: not the same number of steps." for ran, sizes in sizes_of.items()]


def _against(pair: tuple[str, str], stock: str | None, table: pd.DataFrame, draws: SharedDraws) -> str:
    trainer, reference = pair
    who = f"{trainer} against {f'stock nnU-Net ({stock})' if reference == stock else reference}"
    rows = table[(table["trainer"] == trainer) & (table["reference"] == reference)].to_dict("records")
    parts = []
    for verdict, words in _WORDS.items():
        found = [row for row in rows if row["n_cases"] and (row["better"] or "none") == verdict]
        if found:
            parts.append(words.format(_cases([_with_difference(row) for row in found])))
    compared = {row["train_cases"] for row in rows if row["n_cases"]}
    if lacking := [size for size in draws if size not in compared]:
        parts.append(f"not compared with {_cases(lacking)}, for want of common finished runs")
    return f"{who}, mean Dice: {'; '.join(parts)}."


def _with_difference(row: Mapping[str, Any]) -> str:
    points = f"{row['train_cases']} ({_points(row['mean_difference'])} points"
    interval = f", {_points(row['low'])} to {_points(row['high'])}" if row["better"] else ""
    return f"{points}{interval}{row['agreeing']})"


def _agreeing(table: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Returns for each comparison in how many of its runs the difference has the sign of the mean one.

    The interval does not hold the spread over runs; a difference that single runs contradict rests on few of them.
    """
    means = runs.set_index(["trainer", "train_cases", "fold", "seed"])["dice"]
    texts = []
    for row in table.to_dict("records"):
        try:
            differences = means[row["trainer"], row["train_cases"]] - means[row["reference"], row["train_cases"]]
        except KeyError:  # one of the two has no finished run here
            differences = means.iloc[:0]
        agreeing = int((differences * row["mean_difference"] > 0).sum())
        texts.append(f"; so in {agreeing} of {len(differences)} runs" if len(differences) > 1 else "")
    return texts


def _points(difference: float) -> str:
    return f"{round(100 * difference, 1) + 0.0:+.1f}"  # turns -0.0 into 0.0


def _evidence(results: Results, table: pd.DataFrame, draws: SharedDraws) -> list[str]:
    """Returns on how much the comparisons rest, and what their intervals leave out."""
    cases = sorted({int(n) for n in table["n_cases"] if n})
    runs = sorted({len(of_size) for of_size in draws.values() if of_size})
    if not cases:
        return []
    plural = "" if cases == [1] else "s"
    kind = f"test case{plural}" if results.compared == "test" else f"validation case{plural} of the folds"
    alone = " A single run per trainer cannot tell an effect from the chance of that run." if runs[0] == 1 else ""
    unequal = " The trainings were not equally long: see below." if _unequal_lengths(results) else ""
    return [
        f"Differences in percentage points of Dice with 95 % intervals, over {_range(cases)} {kind} and {_range(runs)} "
        f"run{'s' if runs[-1] > 1 else ''} per trainer and number of labelled cases. The intervals speak of other "
        f"cases like these, not of other seeds, training cases or datasets.{alone}{unequal}"
    ]


def _missing(results: Results) -> list[str]:
    states = results.runs["state"].value_counts()
    missing, planned = len(results.runs) - int(states.get("finished", 0)), len(results.runs)
    if not missing:
        return []
    rest = ", ".join(f"{count} {state}" for state, count in states.items() if state != "finished")
    are = "is" if missing == 1 else "are"
    return [f"Missing: {missing} of {planned} planned runs {are} not finished ({rest})."]


def _range(numbers: Sequence[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _cases(sizes: Sequence[str]) -> str:
    """Returns sizes (each perhaps with more behind it) as words."""
    if len(sizes) > 1:
        return f"{', '.join(sizes[:-1])} and {sizes[-1]} labelled cases"
    number, _, more = sizes[0].partition(" ")
    return f"{number} labelled case{'' if number == '1' else 's'} {more}".rstrip()
