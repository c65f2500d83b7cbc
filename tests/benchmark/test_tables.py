from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmark_results import FINETUNED, SCRATCH, STOCK, toy_results

from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.tables import (
    Table,
    comparison_tables,
    cost_table,
    display_name,
    result_tables,
    run_table,
)
from nnunetv2_misfm.errors import MisfmError

NAME = "nnUNetTrainer (stock nnU-Net)"


def results(**options) -> Results:
    return toy_results(Path("nowhere"), files=False, **options)


def with_dice(base: Results, dice: dict[str, float]) -> Results:
    """Every score of a trainer is the same; distances are 1 - Dice in mm."""
    values = base.cases["trainer"].map(dice)
    scores = {"dice": values, "assd_mm": 1 - values, "hd95_mm": 1 - values, "surface_dice": values}
    return replace(base, cases=base.cases.assign(**scores))


def table(tables: list[Table], slug: str) -> Table:
    [found] = [table for table in tables if table.slug == slug]
    return found


def test_stock_nnunet_is_told_by_name():
    assert display_name(STOCK) == NAME and display_name(SCRATCH) == SCRATCH


def test_there_is_a_table_for_each_size_in_order_and_each_metric():
    tables = result_tables(results(sizes=("all", "10", "5", "20"), cases=2))
    metrics = ["dice", "assd", "hd95", "surface_dice"]
    assert [t.slug for t in tables] == [f"{m}_{n}_cases" for n in (5, 10, 20, "all") for m in metrics]
    assert tables[0].title == "Dice (%) with 5 labelled cases"
    assert tables[-1].title == "Surface Dice (%) with all labelled cases"
    assert "Tolerance 1 mm." in tables[-1].caption


def test_all_tables_are_as_wide_as_their_columns():
    base = results(missing=[f"{SCRATCH}__n5"], cases=4)
    for made in [*result_tables(base), *comparison_tables(base), run_table(base), cost_table(base)]:
        assert all(len(row) == len(made.columns) for row in made.rows)
        assert all(isinstance(text, str) and text and "nan" not in text for row in made.rows for text in row)


def test_cells_are_mean_and_spread_over_cases_and_the_average_is_of_class_means():
    base = results(trainers=(STOCK,), sizes=("5",), seeds=(0, 1), cases=3)
    # Cases 0.80, 0.90, 1.00 for Anterior and 0.1 less for Posterior; seed 1 is 0.02 above seed 0
    case = base.cases["case"].str[-1].astype(int)
    dice = 0.79 + 0.1 * case + 0.02 * base.cases["seed"] - 0.1 * (base.cases["label"] == "Posterior")
    [shown, *_] = result_tables(replace(base, cases=base.cases.assign(dice=dice)))
    assert shown.columns == ["trainer", "Anterior", "Posterior", "average", "n cases", "runs", "std over runs"]
    # Two runs with means 0.84 and 0.86: spread 0.02 / sqrt(2)
    assert shown.rows == [[NAME, "90.00 ± 10.00", "80.00 ± 10.00", "85.00 ± 10.00", "3", "2 of 2", "1.41"]]


def test_the_best_of_each_column_is_marked_by_what_is_shown():
    tables = result_tables(with_dice(results(sizes=("5",)), {STOCK: 0.8, SCRATCH: 0.9, FINETUNED: 0.900001}))
    both = {(row, column) for row in (1, 2) for column in (1, 2, 3)}
    assert table(tables, "dice_5_cases").best == both
    assert table(tables, "assd_5_cases").best == both


def test_the_only_trainer_with_scores_is_not_the_best():
    base = results(sizes=("5",), missing=[f"{SCRATCH}__", f"{FINETUNED}__"])
    assert all(not made.best for made in result_tables(base))


def test_a_trainer_without_a_finished_run_keeps_its_row():
    shown = table(result_tables(results(missing=[f"{SCRATCH}__n5"])), "dice_5_cases")
    assert shown.rows[1] == [SCRATCH, "–", "–", "–", "–", "missing", "–"]
    assert shown.rows[0][4:6] == shown.rows[2][4:6] == ["12", "2 of 2"]
    assert "Left out" not in shown.caption


def test_a_draw_that_one_trainer_lacks_is_left_out_for_all_and_said():
    base = results(folds=("0", "1"), missing=[f"{SCRATCH}__n5__fold1__seed0"])
    shown = table(result_tables(base), "dice_5_cases")
    assert [row[5] for row in shown.rows] == ["3 of 4"] * 3
    assert "Runs: fold 0 with seeds 0 and 1; fold 1 with seed 1, the same for every trainer" in shown.caption
    assert f"Left out for all: fold 1, seed 0 ({SCRATCH} missing)." in shown.caption
    # The score of a case is the mean over the three draws that are left
    cases = base.cases
    rest = (cases["train_cases"] == "5") & ((cases["fold"] == "0") | (cases["seed"] == 1))
    own = cases[rest & (cases["trainer"] == STOCK) & (cases["label"] == "Anterior")]
    means = np.array([own.loc[own["case"] == case, "dice"].mean() for case in sorted(set(own["case"]))])
    assert shown.rows[0][1] == f"{100 * means.mean():.2f} ± {100 * means.std(ddof=1):.2f}"


def test_trainers_that_share_no_draw_are_not_compared():
    missing = [f"{STOCK}__n5__fold0__seed0", f"{SCRATCH}__n5__fold0__seed1"]
    shown = table(result_tables(results(missing=missing)), "dice_5_cases")
    assert [row[1] for row in shown.rows] == ["–"] * 3 and shown.rows[0][5] == "0 of 2"
    assert "nothing is compared" in shown.caption and f"fold 0, seed 0 ({STOCK} missing)" in shown.caption


def test_a_grid_without_a_finished_run_is_all_gaps():
    base = results(missing=["nnUNet"])
    assert all(row[-2] == "missing" for made in result_tables(base) for row in made.rows)
    assert "No run is finished." in result_tables(base)[0].caption
    assert {text for row in comparison_tables(base)[0].rows for text in row[2:]} == {"–"}
    assert {row[4] for row in run_table(base).rows} == {"missing"}


def test_the_caption_tells_how_many_cases_of_which_kind_and_absent_classes():
    shown = result_tables(replace(results(folds=("0", "1"), validation=True), absent=["Lesion"]))[0]
    assert "over 12 validation cases" in shown.caption and "not scored: Lesion" in shown.caption
    assert "over 12 test cases" in result_tables(results())[0].caption


def test_one_class_has_no_average_and_a_hundred_have_a_column_each():
    assert result_tables(results(classes=("Liver",)))[0].columns[:3] == ["trainer", "Liver", "n cases"]
    many = [f"organ {i}" for i in range(100)]
    assert result_tables(results(classes=many, cases=2))[0].columns[1:102] == [*many, "average"]


def test_one_case_has_no_spread():
    shown = result_tables(with_dice(results(cases=1), {STOCK: 0.8, SCRATCH: 0.9, FINETUNED: 0.95}))[0]
    assert shown.rows[0][1] == "80.00 ± –"


def test_different_cases_are_an_error():
    base = results()
    lost = (base.cases["trainer"] == SCRATCH) & (base.cases["case"] == "case_003")
    broken = replace(base, cases=base.cases[~lost])
    for make in (result_tables, comparison_tables):
        with pytest.raises(MisfmError, match=rf"{SCRATCH} has no score of case_003 .*never silently averaged"):
            make(broken)


def test_comparisons_show_difference_interval_and_verdict():
    base = with_dice(results(sizes=("5",), cases=8), {STOCK: 0.8, SCRATCH: 0.75, FINETUNED: 0.8})
    tables = comparison_tables(base)
    assert [t.slug for t in tables] == [f"comparison_{m}" for m in ("dice", "assd", "hd95", "surface_dice")]
    dice, assd = tables[:2]
    # Eight equal differences of one sign: p = 2 / 2^8; Holm: three times the smallest
    assert [row[:5] + row[7:] for row in dice.rows] == [
        [f"{SCRATCH} against {NAME}", "5", "8", "-5.00", "-5.00 to -5.00", "worse"],
        [f"{FINETUNED} against {NAME}", "5", "8", "+0.00", "+0.00 to +0.00", "level"],
        [f"{FINETUNED} against {SCRATCH}", "5", "8", "+5.00", "+5.00 to +5.00", "better"],
    ]
    assert [row[5:7] for row in dice.rows] == [["0.008", "0.023"], ["1.000", "1.000"], ["0.008", "0.023"]]
    assert assd.rows[2][3] == "-0.05" and assd.rows[2][7] == "better"
    assert "3 comparisons" in dice.caption and "fewer than 10 cases" in dice.caption
    assert "fewer than" not in comparison_tables(results())[0].caption


def test_a_single_comparison_needs_no_correction_and_single_things_are_not_plural():
    base = results(trainers=(STOCK, SCRATCH), sizes=("5",), seeds=(0,), missing=[f"{SCRATCH}__n5"], cases=1)
    assert "1 of 2 planned runs is finished" in run_table(base).caption
    assert "over 1 test case;" in result_tables(base)[0].caption
    alone = comparison_tables(results(trainers=(STOCK, SCRATCH), sizes=("5",)))[0]
    assert "over a single comparison, and so changes nothing." in alone.caption and "1 comparisons" not in alone.caption


def test_costs_tell_whether_prediction_mirrored_the_images():
    base = results(sizes=("5",))
    without = replace(base, grid=replace(base.grid, mirroring=False))
    assert "Prediction: with nnU-Net's mirroring." in cost_table(base).caption
    assert "Prediction: without nnU-Net's mirroring." in cost_table(without).caption


def test_a_single_trainer_has_nothing_to_be_compared_with():
    assert comparison_tables(results(trainers=(STOCK,))) == []


def test_the_table_of_runs_shows_every_planned_run_with_state_and_hashes():
    base = results(missing=[f"{FINETUNED}__n5__fold0__seed1"])
    base = replace(base, runs=base.runs.sample(frac=1, random_state=1))
    shown = run_table(base)
    assert len(shown.rows) == 12 and shown.caption.startswith("11 of 12 planned runs are finished.")
    assert [row[:4] for row in shown.rows[:4]] == [
        [NAME, "5", "0", "0"],
        [SCRATCH, "5", "0", "0"],
        [FINETUNED, "5", "0", "0"],
        [NAME, "5", "0", "1"],
    ]
    own = base.cases[(base.cases["trainer"] == FINETUNED) & (base.cases["train_cases"] == "5")]
    run = base.runs[(base.runs["trainer"] == FINETUNED) & (base.runs["train_cases"] == "5")].sort_values("seed")
    splits = [text[:12] for text in run["splits_sha256"]]
    dice, weights = f"{100 * own['dice'].mean():.2f}", run["weights_sha256"].iloc[0][:12]
    assert shown.rows[2][4:] == ["finished", "–", dice, weights, splits[0]]
    assert shown.rows[5][4:] == ["missing", run["why"].iloc[1], "–", "–", splits[1]]
    assert shown.rows[6][1] == "all (40)"


def test_costs_are_medians_over_runs_and_gaps_are_visible():
    base = results(seeds=(0, 1, 2), sizes=("5",))
    runs = base.runs.assign(seconds_per_epoch=base.runs["seed"].map({0: 1.0, 1: 9.0, 2: 2.0}))
    shown = cost_table(replace(base, runs=runs, costs=base.costs[base.costs["trainer"] != SCRATCH]))
    assert shown.rows[0] == [NAME, "5.64", "48.5", "2.0", "2.10", "resident on the CPU", "0.80"]
    assert shown.rows[1] == [SCRATCH, "–", "–", "2.0", "–", "–", "0.80"]
    assert base.hardware in shown.caption


def test_the_order_of_rows_changes_no_table():
    base = results(missing=[f"{SCRATCH}__n5__fold0__seed1"])
    tables = {name: getattr(base, name).sample(frac=1, random_state=4) for name in ("cases", "runs", "costs")}
    mixed = replace(base, **tables)
    for make in (result_tables, comparison_tables, run_table, cost_table):
        assert make(mixed) == make(base)
