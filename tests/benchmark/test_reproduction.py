from dataclasses import replace
from pathlib import Path

import pandas as pd
from benchmark_results import FINETUNED, SCRATCH, STOCK, toy_results

from nnunetv2_misfm.benchmark.answer import warnings
from nnunetv2_misfm.benchmark.grid import Draw
from nnunetv2_misfm.benchmark.reproduction import commands, settings, split_cases, weights_table
from nnunetv2_misfm.benchmark.sections import sections_of


def of_draw(rows: pd.DataFrame, draw: Draw) -> pd.DataFrame:
    keys = {"train_cases": draw.train_cases, "fold": draw.fold, "seed": draw.seed}
    return rows[(rows[list(keys)] == [str(value) for value in keys.values()]).all(axis=1)]


def test_every_case_of_every_draw_is_written_with_the_hash_of_its_draw(tmp_path: Path) -> None:
    results = toy_results(tmp_path, folds=("0", "1"), sizes=("5", "all"), validation=True, files=False)
    rows = split_cases(results).astype(str)
    for cell in results.grid.cells:
        draw = cell.draw
        own = of_draw(rows, draw)
        found = {use: list(cases["case"]) for use, cases in own.groupby("use")}
        assert found == results.grid.splits[draw.name]
        assert set(own["splits_sha256"]) == set(of_draw(results.runs.astype(str), draw)["splits_sha256"])


def test_what_a_trainer_reads_and_how_cases_were_predicted_is_told(tmp_path: Path) -> None:
    results = toy_results(tmp_path, sizes=("5",), files=False)
    assert any("not every trainer reads every key" in sentence for sentence in warnings(results))
    terms = dict(settings(results))
    assert terms["Compared on"].endswith("predicted with nnU-Net's mirroring")
    assert "run as nnUNetTrainerBaseline" in terms["Stock nnU-Net"]
    assert "untouched nnUNetTrainer reads nothing" in terms["Who reads which key"]
    cells = tuple(replace(cell, run_trainer=cell.trainer) for cell in results.grid.cells)
    grid = replace(results.grid, cells=cells, mirroring=False, weights={FINETUNED: "w.pth"}, requests=())
    grid = replace(grid, weights_sha256={FINETUNED: "abc"})
    terms = dict(settings(replace(results, grid=grid)))
    assert terms["Compared on"].endswith("predicted without nnU-Net's mirroring")
    assert terms["Stock nnU-Net"].endswith("untouched, which reads neither another length nor a seed.")
    assert terms[f"Weights of {FINETUNED}"] == "w.pth (SHA-256 abc)"
    assert [block.title for block in commands(replace(results, grid=grid))][0].startswith("With 5 cases")
    validated = toy_results(tmp_path, sizes=("5",), files=False, validation=True)
    assert "mirroring" in dict(settings(validated))["Compared on"]


def test_a_report_without_pretrained_weights_has_no_table_of_them(tmp_path: Path) -> None:
    results = toy_results(tmp_path, trainers=(STOCK, SCRATCH), sizes=("5",), files=False)
    assert weights_table(results) is None
    (section,) = [section for section in sections_of(results) if section.slug == "hashes"]
    assert section.texts == ["No finished run started from pretrained weights."]
    assert [table.slug for table in section.tables] == ["draws"]
