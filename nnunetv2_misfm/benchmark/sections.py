"""The sections of a report, as data that the HTML and the Markdown template both show."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_misfm.benchmark.convergence import epochs_table, size_label
from nnunetv2_misfm.benchmark.explanations import Citation, citations, definitions, versions
from nnunetv2_misfm.benchmark.figures import (
    dice_against_cases,
    distributions,
    learning_curves,
    size_in_pixels,
    to_png,
)
from nnunetv2_misfm.benchmark.pictures import choose, draw_case
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.tables import (
    Table,
    comparison_tables,
    cost_table,
    display_name,
    result_tables,
    run_table,
)
from nnunetv2_misfm.planning.plans_file import read_json

# The metrics that the paper reports; the others are folded away
_SHOWN_FIRST = ("dice", "assd", "comparison_dice", "comparison_assd")
_MOST_ROWS = 24  # ours: a longer table of runs is folded away


@dataclass(frozen=True)
class Drawing:
    """A figure as PNG.

    Attributes:
        slug: Name of its file without ending.
        title: Short name.
        alt: What it shows, for those who do not see it.
        caption: Sentences below it.
        png: The file's content.
        width: In CSS pixels.
        height: In CSS pixels.
    """

    slug: str
    title: str
    alt: str
    caption: str
    png: bytes
    width: int
    height: int

    @property
    def base64(self) -> str:
        """The file's content for a `data:` address."""
        return b64encode(self.png).decode()


@dataclass(frozen=True)
class Commands:
    """Command lines below a heading."""

    title: str
    lines: list[str]


@dataclass(frozen=True)
class Section:
    """A section; its parts are shown in this order, and empty ones not at all.

    Attributes:
        slug: Its anchor.
        title: Heading.
        texts: Paragraphs.
        drawings: Figures.
        tables: Tables.
        more: Tables that are folded away.
        more_title: What to unfold.
        commands: Command lines, folded away.
        terms: Pairs of a term and its text.
        citations: Works.
    """

    slug: str
    title: str
    texts: Sequence[str] = ()
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    more: Sequence[Table] = ()
    more_title: str = ""
    commands: Sequence[Commands] = ()
    terms: Sequence[tuple[str, str]] = ()
    citations: Sequence[Citation] = field(default=())


def sections_of(results: Results) -> list[Section]:
    """Returns the sections of a report.

    Raises:
        MisfmError: The trainers were not evaluated on the same cases.
    """
    scores, comparisons, runs = result_tables(results), comparison_tables(results), run_table(results)
    long = len(runs.rows) > _MOST_ROWS
    return [
        Section(
            "scores",
            "Scores",
            tables=[table for table in scores if _is_first(table)],
            more=[table for table in scores if not _is_first(table)],
            more_title="HD95 and surface Dice",
        ),
        Section(
            "comparisons",
            "Comparisons",
            texts=[] if comparisons else ["No pair to compare: the grid holds no stock nnU-Net and no counterpart."],
            tables=[table for table in comparisons if _is_first(table)],
            more=[table for table in comparisons if not _is_first(table)],
            more_title="HD95 and surface Dice",
        ),
        _dice_section(results),
        _curves_section(results),
        _distributions_section(results),
        Section("cost", "Cost beside quality", tables=[cost_table(results)]),
        _pictures_section(results),
        Section(
            "states",
            "Runs",
            tables=[] if long else [runs],
            more=[runs] if long else [],
            more_title=f"All {len(runs.rows)} runs",
        ),
        Section(
            "reproduce",
            "How to reproduce it",
            texts=[
                "The commands that were run, or would be, by the cases that they learn from: nnU-Net's own, and the "
                "one that writes their settings into the plans."
            ],
            commands=_commands(results),
            terms=_settings(results),
        ),
        Section("hashes", "Weights and splits", tables=[_weights_table(results), _splits_table(results)]),
        Section("definitions", "Definitions", terms=definitions(results)),
        Section("cite", "What to cite", citations=citations(results.grid.trainers)),
        Section("made-with", "Hardware and versions", terms=[("Hardware", results.hardware), ("Versions", versions())]),
    ]


def _is_first(table: Table) -> bool:
    return table.slug in _SHOWN_FIRST or any(table.slug.startswith(f"{name}_") for name in _SHOWN_FIRST[:2])


def _drawing(slug: str, title: str, alt: str, caption: str, figure: Figure) -> Drawing:
    return Drawing(slug, title, alt, caption, to_png(figure), *size_in_pixels(figure))


def _dice_section(results: Results) -> Section:
    figure = dice_against_cases(results)
    drawings = (
        []
        if figure is None
        else [
            _drawing(
                "dice_against_cases",
                "Dice against the number of labelled cases",
                "Mean Dice per trainer against the number of labelled training cases; the numbers are in the tables "
                "above.",
                "Mean over cases with 95 % bootstrap intervals over cases; faint dots are the means of single runs. "
                "Intervals of one trainer alone may overlap where the paired difference is clear: the comparisons "
                "above decide.",
                figure,
            )
        ]
    )
    texts = [] if drawings else ["Nothing to draw: no draw was finished by every trainer."]
    return Section("labelled-cases", "Dice against labelled cases", texts, drawings)


def _curves_section(results: Results) -> Section:
    figure, table = learning_curves(results), epochs_table(results)
    drawings = (
        []
        if figure is None
        else [
            _drawing(
                "learning_curves",
                "Learning curves",
                "Pseudo Dice per epoch and trainer, a panel for each number of labelled cases.",
                "nnU-Net's pseudo Dice on validation patches: mean over the runs of the draws that all trainers "
                "finished, the band spans the least to the most.",
                figure,
            )
        ]
    )
    texts = [] if drawings else ["Nothing to draw: no learning curves were recorded."]
    return Section("learning", "Learning curves", texts, drawings, [table] if table else [])


def _distributions_section(results: Results) -> Section:
    drawings = [
        _drawing(
            f"distribution_{size}_cases",
            f"Dice per class with {size_label(size, results)}",
            f"Box plots of the Dice of single cases by class and trainer, with {size_label(size, results)}.",
            f"With {size_label(size, results)}: a dot is a case, averaged over its runs; boxes are quartiles and "
            "median, whiskers reach at most 1.5 box lengths further.",
            figure,
        )
        for size, figure in distributions(results).items()
    ]
    return Section("classes", "Single cases by class", [] if drawings else ["Nothing to draw."], drawings)


def _pictures_section(results: Results) -> Section:
    choice, file = choose(results), Path(str(nnUNet_preprocessed)) / results.grid.dataset / "dataset.json"
    if choice is None or not file.is_file():
        why = "no finished run left predictions" if choice is None else f"{file}, which tells the classes, is not there"
        return Section("pictures", "Pictures", [f"No pictures: {why}."])
    labels = read_json(file)["labels"]
    values = {name: tuple(value) if isinstance(value, list) else (value,) for name, value in labels.items()}
    who = display_name(choice.ranked_by)
    texts = [
        f"The best, median and worst case by the mean Dice over classes of {who}, in one draw: {choice.draw}. The Dice "
        "above each panel is that trainer's in this case and draw."
    ]
    drawings = []
    for rank, case in choice.cases.items():
        try:
            figure = draw_case(results, choice, case, values)
        except (OSError, RuntimeError) as error:
            texts.append(f"The {rank} case, {case}, could not be drawn: {error}.")
            continue
        alt = f"A slice of {case} with the contours of the truth and of the prediction, a panel for each trainer."
        drawings.append(_drawing(f"case_{rank}", f"The {rank} case", alt, f"The {rank} case of {who}: {case}.", figure))
    return Section("pictures", "Pictures", texts, drawings)


def _commands(results: Results) -> list[Commands]:
    """Returns the commands by draw, each once (trainers of a draw share its configuration)."""
    names = {(str(c.draw.train_cases), str(c.draw.fold), c.draw.seed): str(c.draw) for c in results.grid.cells}
    grouped: dict[str, list[str]] = {}
    for row in results.runs.to_dict("records"):
        lines = grouped.setdefault(names[str(row["train_cases"]), str(row["fold"]), int(row["seed"])], [])
        lines += [line for line in _known(row["train_commands"]).splitlines() if line and line not in lines]
    return [Commands(f"With {draw}", lines) for draw, lines in grouped.items() if lines]


def _settings(results: Results) -> list[tuple[str, str]]:
    grid = results.grid
    terms = [
        ("Dataset", grid.dataset),
        ("Plans and configuration", f"{grid.plans}, {grid.configuration}"),
        ("Settings, the same for every trainer", " ".join(grid.settings) or "those of the plans"),
        (
            "Compared on",
            f"{grid.test} (imagesTs, labelsTs)" if results.compared == "test" else "the folds' validation cases",
        ),
    ]
    return terms + [(f"Weights of {trainer}", file) for trainer, file in grid.weights.items()]


def _weights_table(results: Results) -> Table:
    runs = results.runs.to_dict("records")
    found = dict.fromkeys(
        (display_name(run["trainer"]), _known(run["weights_file"]), _known(run["weights_sha256"]), _share(run))
        for run in runs
        if _known(run["weights_sha256"])
    )
    return Table(
        slug="weights",
        title="Pretrained weights",
        caption="Files that fine-tuning started from, and the share of the network's parameters that came from them."
        + ("" if found else " No finished run started from pretrained weights."),
        columns=["trainer", "file", "SHA-256", "share"],
        rows=[list(row) for row in found],
    )


def _splits_table(results: Results) -> Table:
    found = dict.fromkeys(
        (
            str(run["train_cases"]),
            str(run["fold"]),
            str(run["seed"]),
            str(run["num_train"]),
            _known(run["splits_sha256"]),
        )
        for run in results.runs.to_dict("records")
    )
    return Table(
        slug="splits",
        title="Splits",
        caption="The cases that a draw learns from and is validated on; every trainer of a draw has the same.",
        columns=["labelled cases", "fold", "seed", "training cases", "SHA-256"],
        rows=[list(row) for row in found],
    )


def _share(run: dict) -> str:
    return "–" if pd.isna(run["weights_share"]) else f"{100 * run['weights_share']:.1f} %"


def _known(value: object) -> str:
    return "" if value is None or (isinstance(value, float) and pd.isna(value)) else str(value)
