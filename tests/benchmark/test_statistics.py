from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmark_results import toy_results
from scipy import stats

from nnunetv2_misfm.benchmark.pairs import default_pairs
from nnunetv2_misfm.benchmark.statistics import (
    METRICS,
    bootstrap_interval,
    case_scores,
    compare,
    run_means,
    shared_draws,
    summarise,
)
from nnunetv2_misfm.errors import MisfmError

NAMES = ["trainer", "train_cases", "fold", "seed"]


def runs(*rows: tuple[str, str, str, int, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=[*NAMES, "state"])


def cases(*rows: tuple[str, str, str, int, str, str, float]) -> pd.DataFrame:
    """Rows of trainer, train_cases, fold, seed, case, label, Dice; the other scores follow from Dice."""
    table = pd.DataFrame(rows, columns=[*NAMES, "case", "label", "dice"])
    return table.assign(assd_mm=1 - table["dice"], hd95_mm=2 - table["dice"], surface_dice=table["dice"])


def of_differences(differences: dict[str, list[float]]) -> pd.DataFrame:
    """Scores of trainers `a` and `b` by size whose Dice differs by these numbers, a minus b."""
    rows = []
    for size, values in differences.items():
        for i, value in enumerate(values):
            rows += [("a", size, "0", 0, f"c{i:02d}", "x", 0.5 + value), ("b", size, "0", 0, f"c{i:02d}", "x", 0.5)]
    return case_scores(cases(*rows), {size: [("0", 0)] for size in differences})


def test_shared_draws_are_those_that_every_trainer_with_a_finished_run_has_finished():
    table = runs(
        ("a", "all", "0", 0, "finished"),
        ("a", "5", "1", 0, "finished"),
        ("a", "5", "0", 1, "finished"),
        ("a", "5", "0", 0, "finished"),
        ("b", "5", "0", 0, "finished"),
        ("b", "5", "0", 1, "failed"),
        ("b", "5", "1", 0, "finished"),
        ("c", "5", "0", 0, "missing"),
    )
    assert shared_draws(table) == {"5": [("0", 0), ("1", 0)], "all": [("0", 0)]}


def test_no_draw_is_shared_where_trainers_finished_different_ones_or_none():
    table = runs(("a", "5", "0", 0, "finished"), ("b", "5", "0", 1, "finished"), ("a", "10", "0", 0, "failed"))
    assert shared_draws(table) == {"5": [], "10": []}


def test_sizes_are_in_the_order_of_numbers_and_all_comes_last():
    table = runs(*((t, size, "0", 0, "finished") for t in "ab" for size in ("all", "10", "5", "20")))
    assert list(shared_draws(table)) == ["5", "10", "20", "all"]
    rows = [(t, size, "0", 0, "c", "x", 0.5) for t in "ab" for size in ("all", "10", "5", "20")]
    scores = case_scores(cases(*rows), shared_draws(table))
    assert list(scores[scores["trainer"] == "a"]["train_cases"].unique()) == ["5", "10", "20", "all"]
    assert list(compare(scores, [("a", "b")], ["dice"])["train_cases"]) == ["5", "10", "20", "all"]


def test_a_case_is_averaged_over_the_shared_draws_alone_and_then_over_its_classes():
    table = cases(
        ("a", "5", "0", 0, "c", "x", 0.2),
        ("a", "5", "0", 1, "c", "x", 0.4),
        ("a", "5", "0", 2, "c", "x", 1.0),
        ("a", "5", "0", 0, "c", "y", 0.6),
        ("a", "5", "0", 1, "c", "y", 0.8),
        ("a", "5", "0", 2, "c", "y", 1.0),
        ("a", "10", "0", 0, "c", "y", 1.0),
    )
    scores = case_scores(table, {"5": [("0", 0), ("0", 1)], "10": []})
    assert list(scores["label"]) == ["x", "y", "mean"]
    assert scores["dice"].tolist() == pytest.approx([0.3, 0.7, 0.5])
    assert scores["assd_mm"].tolist() == pytest.approx([0.7, 0.3, 0.5])


def test_without_a_test_set_a_case_is_averaged_over_the_seeds_of_its_fold():
    table = cases(
        ("a", "5", "0", 0, "c", "x", 0.2),
        ("a", "5", "0", 1, "c", "x", 0.4),
        ("a", "5", "1", 0, "d", "x", 0.9),
    )
    scores = case_scores(table, {"5": [("0", 0), ("0", 1), ("1", 0)]})
    assert scores.loc[scores["label"] == "x", "dice"].tolist() == pytest.approx([0.3, 0.9])


def test_another_set_of_cases_is_an_error_that_names_the_trainer_and_five_cases():
    rows = [(t, "5", "0", 0, f"c{i}", "x", 0.5) for t in "ab" for i in range(8)]
    table = cases(*rows)
    lacking = table[(table["trainer"] == "a") | (table["case"] == "c7")]
    with pytest.raises(
        MisfmError, match=r"but b has no score of c0 \(fold 0, seed 0, x\), .* c4 .* and 2 more: .*never"
    ):
        case_scores(lacking, {"5": [("0", 0)]})


@pytest.mark.parametrize("lost", [("0", 1, "c0", "x"), ("0", 0, "c1", "y")])
def test_a_lost_seed_or_class_of_a_case_is_an_error(lost):
    rows = [
        (t, "5", "0", seed, f"c{i}", label, 0.5) for t in "ab" for seed in (0, 1) for i in range(3) for label in "xy"
    ]
    fold, seed, case, label = lost
    kept = [row for row in rows if row[:6] != ("b", "5", fold, seed, case, label)]
    with pytest.raises(MisfmError, match=rf"b has no score of {case} \(fold {fold}, seed {seed}, {label}\): "):
        case_scores(cases(*kept), {"5": [("0", 0), ("0", 1)]})


def test_a_trainer_without_any_score_of_the_shared_draws_is_an_error():
    table = cases(("a", "5", "0", 0, "c", "x", 0.5), ("b", "5", "0", 1, "c", "x", 0.5))
    with pytest.raises(MisfmError, match="b has no score of c"):
        case_scores(table, {"5": [("0", 0)]})


def test_a_repeated_score_and_one_that_is_no_number_are_errors():
    row = ("a", "5", "0", 0, "c", "x", 0.5)
    with pytest.raises(MisfmError, match="a has more than one score of c"):
        case_scores(cases(row, row), {"5": [("0", 0)]})
    with pytest.raises(MisfmError, match="a has a score that is no number of c"):
        case_scores(cases((*row[:6], float("nan"))), {"5": [("0", 0)]})


def test_a_class_called_mean_is_an_error():
    with pytest.raises(MisfmError, match="other names than 'mean'"):
        case_scores(cases(("a", "5", "0", 0, "c", "mean", 0.5)), {"5": [("0", 0)]})


def test_mean_and_spread_are_over_cases_with_n_minus_one():
    rows = [("a", "5", "0", 0, f"c{i}", "x", dice) for i, dice in enumerate((0.8, 0.9, 1.0))]
    summary = summarise(case_scores(cases(*rows), {"5": [("0", 0)]})).set_index(["label", "metric"])
    assert len(summary) == 8
    assert summary.loc[("x", "dice"), ["mean", "std", "n_cases"]].tolist() == pytest.approx([0.9, 0.1, 3])
    assert summary.loc[("mean", "hd95_mm"), ["mean", "std", "n_cases"]].tolist() == pytest.approx([1.1, 0.1, 3])


def test_one_case_has_a_mean_and_no_spread():
    summary = summarise(case_scores(cases(("a", "5", "0", 0, "c", "x", 0.8)), {"5": [("0", 0)]}))
    assert summary["std"].isna().all() and (summary["n_cases"] == 1).all()


def test_the_means_of_runs_are_over_their_cases_and_classes():
    table = cases(
        ("a", "5", "0", 0, "c", "x", 0.2),
        ("a", "5", "0", 0, "c", "y", 0.4),
        ("a", "5", "0", 0, "d", "x", 0.6),
        ("a", "5", "0", 0, "d", "y", 1.0),
        ("a", "5", "0", 1, "c", "x", 0.7),
    )
    means = run_means(table)
    assert means["dice"].tolist() == pytest.approx([0.55, 0.7]) and means["n_cases"].tolist() == [2, 1]
    assert run_means(table, {"5": [("0", 1)]})["seed"].tolist() == [1]


def test_wilcoxon_is_that_of_the_differences():
    differences = [0.01, -0.02, 0.03, 0.04, 0.06, -0.005, 0.08, 0.012]
    [row] = compare(of_differences({"5": differences}), [("a", "b")], ["dice"]).to_dict("records")
    # Ranks of the two negative differences, -0.005 and -0.02: 1 and 4 of 8, so W = 5. Sets of distinct ranks with a sum
    # of 5 or less: {}, 1, 2, 3, 4, 5, 12, 13, 14, 23: 10 of 2^8, twice for two sides
    assert row["p"] == pytest.approx(2 * 10 / 256)
    assert row["p"] == pytest.approx(stats.wilcoxon(np.array(differences)).pvalue)
    assert row["mean_difference"] == pytest.approx(sum(differences) / 8)
    assert row["n_cases"] == 8


def test_holm_is_over_all_pairs_and_sizes_of_one_metric():
    # All positive and without ties: p = 2 / 2^n
    rising = {size: [0.01 * (i + 1) for i in range(n)] for size, n in {"5": 6, "10": 5, "all": 8}.items()}
    table = compare(of_differences(rising), [("a", "b")])
    for metric in METRICS:
        of_metric = table[table["metric"] == metric]
        assert of_metric["p"].tolist() == pytest.approx([0.03125, 0.0625, 0.0078125])
        # Sorted: 3 x 0.0078125; 2 x 0.03125; 1 x 0.0625, none below the one before
        assert of_metric["p_holm"].tolist() == pytest.approx([0.0625, 0.0625, 0.0234375])


def slow_interval(values: np.ndarray, corrected: bool) -> tuple[float, float]:
    """Efron's BCa interval of the mean, resample by resample; without the correction plain percentiles."""
    generator = np.random.default_rng(99)
    means = np.array([values[generator.integers(0, len(values), len(values))].mean() for _ in range(8_000)])
    bias, acceleration = 0.0, 0.0
    if corrected:
        bias = stats.norm.ppf((means < values.mean()).mean())
        left_out = np.array([np.delete(values, i).mean() for i in range(len(values))])
        pull = left_out.mean() - left_out
        acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    ends = []
    for z in stats.norm.ppf([0.025, 0.975]):
        share = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        ends.append(float(np.quantile(means, share)))
    return ends[0], ends[1]


def test_the_interval_agrees_with_a_slow_bootstrap():
    values = np.random.default_rng(3).exponential(0.02, 15) - 0.01
    low, high, method = bootstrap_interval(values)
    # An end from 8,000 resamples is off by about 0.01 of the width (binomial error of the 2.5 % quantile)
    tolerance = 0.04 * (high - low)
    assert method == "BCa"
    assert (low, high) == pytest.approx(slow_interval(values, corrected=True), abs=tolerance)
    assert (low, high) != pytest.approx(slow_interval(values, corrected=False), abs=tolerance)


def test_equal_differences_have_an_interval_of_a_point():
    table = compare(of_differences({"5": [0.1] * 8}), [("a", "b")], ["dice", "assd_mm"])
    assert table["low"].tolist() == table["high"].tolist() == pytest.approx([0.1, -0.1])
    assert (
        table["interval"].tolist() == ["percentile"] * 2 and table["better"].tolist() == ["better"] * 2
    )  # p = 2 / 2^8


def test_no_difference_at_all_is_level_with_p_one():
    [row] = compare(of_differences({"5": [0.0] * 4}), [("a", "b")], ["dice"]).to_dict("records")
    assert (row["low"], row["high"], row["p"], row["p_holm"], row["better"]) == (0, 0, 1, 1, "level")


def test_one_case_has_a_difference_and_nothing_else():
    [row] = compare(of_differences({"5": [0.1]}), [("a", "b")], ["dice"]).to_dict("records")
    assert row["mean_difference"] == pytest.approx(0.1) and row["n_cases"] == 1 and row["better"] == ""
    assert np.isnan([row["low"], row["high"], row["p"], row["p_holm"]]).all()


def test_an_interval_without_zero_is_level_where_the_corrected_p_is_not_small():
    scores = of_differences({"5": [0.1, 0.2, 0.15, 0.12, 0.3, 0.2]})  # p = 2 / 2^6 = 0.031
    assert compare(scores, [("a", "b")], ["dice"])["better"].tolist() == ["better"]
    table = compare(scores, [("a", "b"), ("b", "a")], ["dice"])
    assert (table["low"] * table["high"] > 0).all() and table["better"].tolist() == ["level"] * 2


def test_two_cases_have_an_interval_of_percentiles():
    [row] = compare(of_differences({"5": [0.1, 0.3]}), [("a", "b")], ["dice"]).to_dict("records")
    # A resample holds 0.1 twice, or 0.3 twice, with a chance of a quarter each
    assert (row["low"], row["high"], row["interval"]) == (pytest.approx(0.1), pytest.approx(0.3), "percentile")


def test_lower_distances_are_better_and_the_mirrored_pair_is_worse():
    positive = [0.1, 0.2, 0.15, 0.12, 0.3, 0.11, 0.21, 0.16, 0.13, 0.31]
    scores = of_differences({"5": positive, "10": [0.1, -0.1, 0.05, -0.05, 0.01]})
    table = compare(scores, [("a", "b"), ("b", "a")])
    for _, of_metric in table.groupby("metric"):
        assert of_metric["better"].tolist() == ["better", "worse", "level", "level"]
        assert of_metric["mean_difference"].tolist()[0] == pytest.approx(-of_metric["mean_difference"].tolist()[1])


def test_a_pair_without_scores_and_a_size_without_any_keep_their_rows():
    table = compare(of_differences({"5": [0.1, 0.2]}), [("a", "b"), ("c", "b")], ["dice"], ["10", "5"])
    assert list(zip(table["train_cases"], table["n_cases"], strict=True)) == [("5", 2), ("5", 0), ("10", 0), ("10", 0)]
    assert table["better"].tolist()[1:] == [""] * 3
    assert table["p_holm"].tolist()[0] == table["p"].tolist()[0]


def test_a_pair_with_other_cases_is_an_error():
    scores = of_differences({"5": [0.1, 0.2, 0.3]})
    short = scores[(scores["trainer"] == "a") | (scores["case"] != "c01")]
    with pytest.raises(MisfmError, match=r"expected a and b with scores of the same cases .*got 3 and 2"):
        compare(short, [("a", "b")])


def test_the_order_of_rows_changes_nothing(tmp_path: Path):
    results = toy_results(tmp_path, files=False, folds=("0", "1"), missing=["nnUNetTrainer__n5__fold1__seed1"])
    shuffled_runs = results.runs.sample(frac=1, random_state=1)
    shuffled_cases = results.cases.sample(frac=1, random_state=2)
    pairs = default_pairs(results.grid.trainers)
    draws = shared_draws(results.runs)
    assert shared_draws(shuffled_runs) == draws
    scores, shuffled = case_scores(results.cases, draws), case_scores(shuffled_cases, draws)
    pd.testing.assert_frame_equal(shuffled, scores, check_exact=True)
    mixed = shuffled.sample(frac=1, random_state=3)
    first, again = (compare(table, pairs, ["dice"]) for table in (scores, mixed))
    pd.testing.assert_frame_equal(again, first, check_exact=True)
    pd.testing.assert_frame_equal(run_means(shuffled_cases), run_means(results.cases), check_exact=True)


def test_no_finished_run_gives_empty_tables(tmp_path: Path):
    results = toy_results(tmp_path, files=False, missing=["nnUNet"])
    draws = shared_draws(results.runs)
    scores = case_scores(results.cases, draws)
    assert draws == {"5": [], "all": []}
    assert scores.empty and summarise(scores).empty and run_means(results.cases).empty
