"""The sections of a report, as data that the HTML and the Markdown template both show."""

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
from nnunetv2_misfm.benchmark.reproduction import Commands, commands, draws_table, settings, weights_table
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.statistics import case_scores, shared_draws, size_order
from nnunetv2_misfm.benchmark.tables import (
    Table,
    comparison_tables,
    cost_table,
    display_name,
    result_tables,
    run_table,
)
from nnunetv2_misfm.plans_file import read_json

# The metrics that the paper reports; the others are folded away
_SHOWN_FIRST = ("dice", "assd", "comparison_dice", "comparison_assd")
_MOST_ROWS = 24  # ours: a longer table of runs or splits is folded away


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
        commands: Command lines.
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
    citations: Sequence[Citation] = ()


def sections_of(results: Results) -> list[Section]:
    """Returns the sections of a report.

    Raises:
        MisfmError: The trainers were not evaluated on the same cases.
    """
    scores, comparisons, runs = result_tables(results), comparison_tables(results), run_table(results)
    weights, draws = weights_table(results), draws_table(results)
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
                "The benchmark's own command lines"
                f"{', oldest first' if results.grid.requests else ' are not recorded'}; then the commands that it ran, "
                "or would run, by the cases that they learn from: nnU-Net's own, and the one that writes their "
                "configuration into the plans."
            ],
            commands=commands(results),
            terms=settings(results),
        ),
        Section(
            "hashes",
            "Weights and splits",
            texts=[] if weights else ["No finished run started from pretrained weights."],
            tables=[*([weights] if weights else []), *([] if len(draws.rows) > _MOST_ROWS else [draws])],
            more=[draws] if len(draws.rows) > _MOST_ROWS else [],
            more_title=f"All {len(draws.rows)} splits",
        ),
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
                f"above decide.{_other_cases(results)}",
                figure,
            )
        ]
    )
    texts = [] if drawings else ["Nothing to draw: no draw was finished by every trainer."]
    return Section("labelled-cases", "Dice against labelled cases", texts, drawings)


def _other_cases(results: Results) -> str:
    """Returns a sentence where the means of different numbers of labelled cases rest on different cases."""
    scores = case_scores(results.cases, shared_draws(results.runs))
    cases = {str(size): frozenset(own["case"]) for size, own in scores.groupby("train_cases")}
    if len(set(cases.values())) < 2:
        return ""
    counts = ", ".join(f"{len(cases[size])} with {size}" for size in sorted(cases, key=size_order))
    return (
        " The numbers of labelled cases are not all compared on the same cases, as other runs are finished "
        f"({counts}): compare trainers at one number, not the ends of a line."
    )


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
    choice, base = choose(results), str(nnUNet_preprocessed) if nnUNet_preprocessed.is_set() else "nnUNet_preprocessed"
    file = Path(base) / results.grid.dataset / "dataset.json"
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
    if choice.all_equal:
        texts.append("All cases have the same Dice there, so which are called best, median and worst is arbitrary.")
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
