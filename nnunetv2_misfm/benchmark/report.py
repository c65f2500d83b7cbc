"""Writes the report of a benchmark: one HTML file that opens offline, Markdown with figures, and all numbers as CSV."""

import csv
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from nnunetv2_misfm.benchmark.answer import answer, warnings
from nnunetv2_misfm.benchmark.reproduction import split_cases
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.sections import Section, sections_of
from nnunetv2_misfm.benchmark.tables import Table
from nnunetv2_misfm.errors import MisfmError

HTML, MARKDOWN, FIGURES, TABLES = "report.html", "report.md", "figures", "csv"
# What a number in a table may look like: with sign, thousands, spread, unit or interval, a p value, or all cases
_NUMBER = re.compile(r"[<>≥≤]?\s*[+−-]?\d[\d.,e+−-]*(\s*(±|to|of|\(|%|e-).*)?|all( \(\d+\))?")
_FITS_A_PHONE = 560  # CSS pixels, ours: scaled to 360 a wider figure could not be read
_GAPS = ("", "–", "-", "—", "missing")


def write_report(results: Results, output: Path) -> Path:
    """Writes the report into a folder and returns its HTML file.

    The folder then holds `report.html`, `report.md`, `figures/*.png` and `csv/*.csv`. It is written beside its place
    and moved there at the end, so an interrupted report leaves the former one as it was.

    Args:
        results: Of `gather`.
        output: Folder: a new one, an empty one, or that of a former report, which is replaced.

    Raises:
        MisfmError: The folder holds other files, or cannot be written; or the trainers were not evaluated on the same
            cases.
    """
    output = Path(output).absolute()
    _check_replaceable(output)
    part = output.with_name(f".{output.name}.part-{os.getpid()}")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        _write(results, part)
        _move(part, output)
    except OSError as error:
        raise MisfmError(
            f"the report could not be written to {output} ({error}); a former one is intact: choose another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return output / HTML


def _check_replaceable(output: Path) -> None:
    """Raises where something would be lost that is no report."""
    if output.exists() and not output.is_dir():
        raise MisfmError(f"expected a folder for the report, got the file {output}: choose another name.")
    others = sorted({path.name for path in output.glob("*")} - {HTML, MARKDOWN, FIGURES, TABLES})
    if others:
        raise MisfmError(
            f"expected a new or empty folder for the report, or that of a former report, but {output} also holds "
            f"{', '.join(others[:3])}: choose another folder."
        )


def _write(results: Results, folder: Path) -> None:
    sections = sections_of(results)
    (folder / FIGURES).mkdir()
    for drawing in [drawing for section in sections for drawing in section.drawings]:
        (folder / FIGURES / f"{drawing.slug}.png").write_bytes(drawing.png)
    _write_tables(results, sections, folder / TABLES)
    content = {
        "title": f"{results.grid.dataset}: benchmark {results.grid.name}",
        "subtitle": _subtitle(results),
        "answer": answer(results),
        "warnings": warnings(results),
        "sections": sections,
    }
    (folder / HTML).write_text(_render("report.html.j2", content), encoding="utf-8")
    (folder / MARKDOWN).write_text(_tidy(_render("report.md.j2", content)), encoding="utf-8")


def _move(part: Path, output: Path) -> None:
    """Puts a finished report in its place; where that fails the former one goes back."""
    former = output.with_name(f".{output.name}.former-{os.getpid()}")
    if output.exists():
        os.replace(output, former)
    try:
        os.replace(part, output)
    except BaseException:
        if former.exists():
            os.replace(former, output)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _write_tables(results: Results, sections: Sequence[Section], folder: Path) -> None:
    """Writes every table as it is shown, and the long tables in full precision."""
    folder.mkdir()
    for table in [table for section in sections for table in (*section.tables, *section.more)]:
        with open(folder / f"{table.slug}.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([table.columns, *table.rows])
    long = {
        "cases": results.cases,
        "curves": results.curves,
        "runs": results.runs,
        "splits": split_cases(results),
        "trainer_costs": results.costs,
    }
    for name, table in long.items():
        table.to_csv(folder / f"{name}.csv", index=False)


def _subtitle(results: Results) -> str:
    grid = results.grid
    kind = "test case" if results.compared == "test" else "validation case"
    return (
        f"{_counted(len(grid.trainers), 'trainer', 's')}, {grid.configuration} of {grid.plans}, "
        f"{_counted(len(results.labels), 'class', 'es')}, {_counted(results.cases['case'].nunique(), kind, 's')}"
        f"{'' if results.compared == 'test' else ' of the folds'}"
    )


def _counted(number: int, noun: str, ending: str) -> str:
    return f"{number} {noun}{'' if number == 1 else ending}"


def _render(template: str, content: dict[str, Any]) -> str:
    loader = PackageLoader("nnunetv2_misfm.benchmark")
    environment = Environment(
        loader=loader, autoescape=".html" in template, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"md": _markdown, "breakable": _breakable}
    style = Markup(loader.get_source(environment, "style.css")[0])  # ours; quotes in it are not to be escaped
    helpers = {"text_columns": _text_columns, "is_gap": _is_gap, "fits_a_phone": _FITS_A_PHONE}
    return environment.get_template(template).render(**content, style=style, **helpers)


def _markdown(text: object) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(re.sub(r"([\\|*`\[\]])", r"\\\1", escaped).split())


def _breakable(text: str) -> Markup:
    """Returns text for HTML in which a trainer's long name may break behind `Trainer`."""
    return Markup("Trainer<wbr>").join(escape(part) for part in text.split("Trainer"))


def _tidy(markdown: str) -> str:
    """Returns Markdown with at most one blank line in a row and none at its end."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", markdown)).strip() + "\n"


def _text_columns(table: Table) -> list[int]:
    """Returns the columns that hold words, which are set to the left; the first always does."""
    return [
        column
        for column in range(len(table.columns))
        if column == 0 or any(not _is_gap(row[column]) and not _NUMBER.fullmatch(row[column]) for row in table.rows)
    ]


def _is_gap(text: str) -> bool:
    return text in _GAPS or text.startswith("not reached")
