"""The report's tables as text: numbers rounded for readers, gaps visible."""

from dataclasses import dataclass


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
