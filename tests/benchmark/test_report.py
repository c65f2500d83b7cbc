import csv
import json
import re
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from benchmark_results import FINETUNED, SCRATCH, STOCK, toy_results

from nnunetv2_misfm.benchmark import report
from nnunetv2_misfm.benchmark.answer import answer, warnings
from nnunetv2_misfm.benchmark.explanations import citations
from nnunetv2_misfm.benchmark.report import write_report
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.sections import sections_of
from nnunetv2_misfm.errors import MisfmError

NASTY = 'a|<b>"&*c'
# Dice by trainer; differences to stock are +4 points throughout, and -3 and +3 in turn
BY_HAND = {STOCK: lambda i: 0.70, SCRATCH: lambda i: 0.67 + 0.06 * (i % 2), FINETUNED: lambda i: 0.72 + 0.001 * (i % 3)}


@dataclass
class Page(HTMLParser):
    """The elements and the text of a page."""

    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def with_dice(results: Results) -> Results:
    numbers = results.cases["case"].str[-3:].astype(int)
    dice = [BY_HAND[trainer](i) for trainer, i in zip(results.cases["trainer"], numbers, strict=True)]
    return replace(results, cases=results.cases.assign(dice=dice))


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    return page


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, Path]:
    """Results whose Dice is set by hand, with a class of a nasty name and missing runs, and their report."""
    folder = tmp_path_factory.mktemp("toy")
    missing = [f"{FINETUNED}__nall__fold0__seed1", f"{SCRATCH}__nall"]
    results = toy_results(folder, classes=(NASTY, "Posterior"), missing=missing, cases=12)
    results = with_dice(replace(results, absent=["Hilus"], notes=[f"Mind {NASTY}."]))
    (folder / "preprocessed" / results.grid.dataset).mkdir(parents=True)
    labels = {"background": 0, NASTY: 1, "Posterior": [2]}
    (folder / "preprocessed" / results.grid.dataset / "dataset.json").write_text(json.dumps({"labels": labels}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("nnUNet_preprocessed", str(folder / "preprocessed"))
        return results, write_report(results, folder / "report").parent


@pytest.fixture(scope="module")
def page(written: tuple[Results, Path]) -> Page:
    return parsed((written[1] / "report.html").read_text(encoding="utf-8"))


def test_the_answer_comes_first_with_difference_interval_and_what_is_missing(page: Page) -> None:
    text = " ".join(page.text.split())
    first = text.index("nnUNetTrainerPCTNetVF against stock nnU-Net (nnUNetTrainer), mean Dice: better with 5 (+2.1")
    assert first < text.index("To be known when reading") < text.index("Dice (%) with 5 labelled cases")
    assert "Missing: 3 of 12 planned runs are not finished (3 missing)." in text
    assert "not of other seeds" in text


def test_numbers_stand_in_html_markdown_and_csv(written: tuple[Results, Path], page: Page) -> None:
    results, folder = written
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    for text in (page.text, markdown):
        assert "70.00 ± 0.00" in text and "72.10 ± 0.09" in text  # 72.0, 72.1, 72.2 four times each: sqrt(0.08 / 11)
    with open(folder / "csv" / "dice_5_cases.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][:3] == ["trainer", NASTY, "Posterior"] and rows[3][1] == "72.10 ± 0.09"
    with open(folder / "csv" / "all_runs.csv", newline="", encoding="utf-8") as file:
        assert len(list(csv.reader(file))) == 1 + len(results.runs)  # the shown table, beside the long one
    kept = pd.read_csv(folder / "csv" / "cases.csv", dtype={"fold": str, "train_cases": str})
    pd.testing.assert_frame_equal(kept, results.cases, check_dtype=False, rtol=1e-14)
    assert len(pd.read_csv(folder / "csv" / "curves.csv")) == len(results.curves)
    assert set(pd.read_csv(folder / "csv" / "runs.csv")["checkpoint_sha256"].dropna()) < set(
        results.runs["checkpoint_sha256"]
    )


def test_missing_runs_absent_classes_and_left_out_draws_are_named(written: tuple[Results, Path], page: Page) -> None:
    sentences = warnings(written[0])
    gap = f"{FINETUNED} with all labelled cases, fold 0, seed 1: missing (no checkpoint_final.pth of"
    assert f"{gap} {FINETUNED} was found)." in sentences
    assert any("holds Hilus" in sentence for sentence in sentences)
    assert any(sentence.endswith("not all trainers have finished there: fold 0, seed 1.") for sentence in sentences)
    text = " ".join(page.text.split())
    assert all(sentence in text for sentence in sentences)


def test_names_are_escaped(written: tuple[Results, Path], page: Page) -> None:
    assert not page.all("b") and f"Mind {NASTY}." in page.text
    markdown = (written[1] / "report.md").read_text(encoding="utf-8")
    assert "<b>" not in markdown and r"a\|&lt;b&gt;" in markdown
    for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_the_page_needs_nothing_from_elsewhere(written: tuple[Results, Path], page: Page) -> None:
    images = page.all("img")
    assert len(images) == 7  # Dice, curves, two sizes, three cases
    assert all((image["src"] or "").startswith("data:image/png;base64,") and image["alt"] for image in images)
    assert not page.all("script") and not page.all("iframe")
    assert all((link["href"] or "").startswith("data:") for link in page.all("link"))
    style = page.text
    assert "@import" not in style and "url(" not in style
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "poster", "action"):
            if re.match(r"(\w+:)?//", attributes.get(name) or ""):
                assert tag == "a", f"{tag} loads {attributes[name]}"
    html = (written[1] / "report.html").read_text(encoding="utf-8")
    assert '"Segoe UI"' in html[: html.index("</style>")]
    assert page.all("html")[0]["lang"] == "en-GB"


def test_every_link_within_the_page_leads_somewhere_and_no_anchor_is_there_twice(page: Page) -> None:
    anchors = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(anchors) == len(set(anchors))
    inner = [link["href"] for link in page.all("a") if (link["href"] or "").startswith("#")]
    assert inner and {(href or "")[1:] for href in inner} <= set(anchors)


def test_the_markdown_links_to_figures_and_tables_that_are_there(written: tuple[Results, Path]) -> None:
    folder = written[1]
    links = re.findall(r"\]\(((?:figures|csv)/[^)]+)\)", (folder / "report.md").read_text(encoding="utf-8"))
    assert len(links) > 15 and all((folder / link).is_file() for link in links)
    assert {path.name for path in folder.iterdir()} == {"report.html", "report.md", "figures", "csv"}


def test_commands_hashes_definitions_and_citations_are_told(written: tuple[Results, Path], page: Page) -> None:
    results = written[0]
    for commands in results.runs["train_commands"]:
        assert commands in page.text
    for column in ("weights_sha256", "splits_sha256"):
        assert all(sha in page.text for sha in results.runs[column] if sha)
    for told in (
        "Holm",
        "Bootstrap over cases",
        "diagonal of the image",
        "within 1 mm",
        "arXiv:1809.04430",
        "2306.16925",
    ):
        assert told in page.text
    assert results.hardware in page.text and "nnunetv2 2." in page.text


def test_the_csv_names_every_case_of_every_draw(written: tuple[Results, Path]) -> None:
    results, folder = written
    rows = pd.read_csv(folder / "csv" / "splits.csv")
    assert len(rows) == sum(len(cases) for split in results.grid.splits.values() for cases in split.values())


def test_the_benchmarks_own_command_comes_first_and_unfolded(written: tuple[Results, Path], page: Page) -> None:
    (request,) = written[0].grid.requests
    assert page.text.index(request) < page.text.index("nnUNetv2_train")
    folded = [attributes for tag, attributes in page.elements if tag == "details"]
    assert [attributes for attributes in folded if "open" in attributes] == [{"open": None}]
    assert request in (written[1] / "report.md").read_text(encoding="utf-8")


def test_trainings_of_other_lengths_are_warned_of_by_name(tmp_path: Path) -> None:
    results = toy_results(tmp_path, sizes=("5", "all"), files=False)
    assert not any("number of steps" in sentence for sentence in warnings(results))
    curves = results.curves
    short = replace(results, curves=curves[(curves["trainer"] != SCRATCH) | (curves["epoch"] < 2)])
    ran = f"{STOCK} ran 6 epochs, {SCRATCH} 2, {FINETUNED} 6: not the same number of steps."
    assert f"With 5 and all labelled cases: {ran}" in warnings(short)
    assert any("not equally long: see below" in sentence for sentence in answer(short))


def test_other_cases_at_other_sizes_are_told_below_the_figure(tmp_path: Path) -> None:
    lost = [f"{SCRATCH}__nall__fold1"]
    options: dict[str, Any] = {"folds": ("0", "1"), "validation": True, "files": False}
    same, other = toy_results(tmp_path, **options), toy_results(tmp_path, **options, missing=lost)
    captions = [
        drawing.caption
        for results in (same, other)
        for section in sections_of(results)
        for drawing in section.drawings
        if drawing.slug == "dice_against_cases"
    ]
    assert "same cases" not in captions[0]
    assert "not all compared on the same cases" in captions[1] and "(12 with 5, 6 with all)" in captions[1]


def test_a_difference_of_nothing_has_no_minus(tmp_path: Path) -> None:
    results = toy_results(tmp_path, trainers=(STOCK, SCRATCH), sizes=("5",), seeds=(0,), files=False)
    dice = [0.7 - 1e-5 * (trainer == SCRATCH) for trainer in results.cases["trainer"]]
    (first, *_) = answer(replace(results, cases=results.cases.assign(dice=dice)))
    assert "+0.0 points, +0.0 to +0.0" in first


def test_works_are_cited_once_and_an_unknown_trainer_cites_nnunet() -> None:
    texts = [work.text for work in citations([STOCK, SCRATCH, FINETUNED])]
    assert len(texts) == len(set(texts)) == 3
    assert [work.url for work in citations(["nnUNetTrainerOfTheirs"])] == [None, "https://arxiv.org/abs/1809.04430"]
    assert "https://doi.org/10.1109/TIP.2025.3610249" in [work.url for work in citations(["nnUNetTrainerFMUNet"])]


def test_no_difference_is_claimed_where_the_interval_contains_zero_and_a_single_run_is_named(tmp_path: Path) -> None:
    results = toy_results(tmp_path, trainers=(STOCK, SCRATCH), sizes=("5",), seeds=(0,), files=False)
    sentences = answer(with_dice(results))
    level = r"no clear difference with 5 labelled cases \(\+0\.0 points, -\d\.\d to \+\d\.\d\)\."
    assert re.search(level, sentences[0])
    assert "A single run per trainer" in sentences[1] and len(sentences) == 2


def test_nothing_is_claimed_without_stock_or_common_runs(tmp_path: Path) -> None:
    alone = toy_results(tmp_path, trainers=(SCRATCH,), sizes=("5",), files=False)
    assert answer(alone)[0].startswith("There is nothing to compare")
    missing = [f"{STOCK}__n5__fold0__seed0", f"{FINETUNED}__n5__fold0__seed1"]
    apart = toy_results(tmp_path, trainers=(STOCK, FINETUNED), sizes=("5",), missing=missing, files=False)
    assert "not compared with 5 labelled cases, for want of common finished runs" in answer(apart)[0]


def test_an_interrupted_report_leaves_the_former_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: tuple[Results, Path]
) -> None:
    output = tmp_path / "report"
    output.mkdir()
    (output / "report.html").write_text("former")

    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "_render", interrupted)
        patch.setattr(report, "sections_of", lambda _: [])
        with pytest.raises(KeyboardInterrupt):
            write_report(written[0], output)
    assert (output / "report.html").read_text() == "former"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]
    monkeypatch.setattr(report, "sections_of", lambda _: [])
    assert write_report(written[0], output) == output / "report.html"
    assert (output / "report.html").read_text() != "former"
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path, written: tuple[Results, Path]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(MisfmError, match=r"also holds thesis\.tex: choose another folder"):
        write_report(written[0], tmp_path)
    with pytest.raises(MisfmError, match="got the file"):
        write_report(written[0], tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_scans_that_are_gone_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = toy_results(tmp_path, trainers=(STOCK, FINETUNED), sizes=("5",), cases=3, files=False)
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    text = write_report(results, tmp_path / "report").read_text(encoding="utf-8")
    assert "No pictures: " in text and "dataset.json, which tells the classes, is not there." in text
    (tmp_path / results.grid.dataset).mkdir()
    labels = {"background": 0, "Anterior": 1, "Posterior": 2}
    (tmp_path / results.grid.dataset / "dataset.json").write_text(json.dumps({"labels": labels}))
    text = write_report(results, tmp_path / "report").read_text(encoding="utf-8")
    gone = re.findall(r"The (?:best|median|worst) case, case_00\d, could not be drawn: .* is not there\.", text)
    assert len(gone) == 3


def test_a_difference_that_single_runs_contradict_says_so(tmp_path: Path) -> None:
    results = toy_results(tmp_path, trainers=("nnUNetTrainer", "nnUNetTrainerPCTNet"), sizes=("5",), files=False)
    cases = results.cases
    cases["dice"] = 0.8
    other = cases["trainer"] == "nnUNetTrainerPCTNet"
    cases.loc[other & (cases["seed"] == 0), "dice"] = 0.9
    cases.loc[other & (cases["seed"] == 1), "dice"] = 0.75
    assert "better with 5 labelled cases (+2.5 points, +2.5 to +2.5; so in 1 of 2 runs)" in answer(results)[0]
