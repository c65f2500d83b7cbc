"""The verdicts of an import brought together: which of equal scans counts, the table, the summary."""

import csv
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from nnunetv2_misfm.data.outcome import Outcome
from nnunetv2_misfm.data.records import CannotWrite
from nnunetv2_misfm.data.volume import same_place

REPORT = "import_report.csv"
TAKEN = ("accepted", "repaired", "split")
VERDICTS = (*TAKEN, "duplicate", "rejected")
COLUMNS = (
    "path",
    "part",
    "verdict",
    "reason",
    "case",
    "modality",
    "files",
    "shape",
    "spacing_mm",
    "orientation",
    "dtype",
    "intensity_range",
    "body_share",
    "sha256",
)
_MOST_REASONS = 12  # lines of the summary; the table has all


def by_path_and_part(outcome: Outcome) -> tuple[str, list[int], str]:
    """The order of the report: by path, then by the numbers in the part, so that volume 2 comes before volume 10."""
    return outcome.path, [int(number) for number in re.findall(r"\d+", outcome.part)], outcome.part


def settle_duplicates(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Returns the outcomes sorted by path and part; of scans with equal voxels in the same place the first counts.

    The others become `duplicate` and name it. Places are compared by `same_place`.
    """
    settled = []
    originals: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in sorted(outcomes, key=by_path_and_part):
        if outcome.verdict in TAKEN:
            equal = next((first for first in originals[outcome.content] if _same_place(first, outcome)), None)
            if equal is None:
                originals[outcome.content].append(outcome)
            else:
                name = f"{equal.path}, {equal.part}" if equal.part else equal.path
                reason = f"same voxels and geometry as {name}"
                outcome = replace(outcome, verdict="duplicate", reason=reason, case=equal.case, image="")
        settled.append(outcome)
    return settled


def write_report(outcomes: Iterable[Outcome], folder: Path) -> None:
    """Writes `import_report.csv` into a dataset's folder, replacing the former one when it is whole.

    Raises:
        CannotWrite: The disk is full, say.
    """
    unfinished = folder / f"{REPORT}.tmp"
    try:
        with open(unfinished, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            table = csv.writer(file)
            table.writerow(COLUMNS)
            table.writerows([getattr(outcome, column) for column in COLUMNS] for outcome in outcomes)
        os.replace(unfinished, folder / REPORT)
    except OSError as error:
        raise CannotWrite(folder / REPORT, error) from error


def summary(outcomes: Iterable[Outcome]) -> str:
    """Returns a table of verdicts, and of the reasons why scans were not taken, the most frequent first."""
    outcomes = list(outcomes)
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    lines = [f"{verdict:<10}{verdicts[verdict]:>9}" for verdict in VERDICTS if verdicts[verdict]]
    reasons = Counter(_kind(outcome) for outcome in outcomes if outcome.verdict not in ("accepted", "split"))
    if reasons:
        lines += ["", "of these"]
    lines += [f"{count:>9}  {reason}" for reason, count in reasons.most_common(_MOST_REASONS)]
    rest = sum(reasons.values()) - sum(count for _, count in reasons.most_common(_MOST_REASONS))
    if rest:
        lines.append(f"{rest:>9}  for other reasons")
    return "\n".join(lines)


def _kind(outcome: Outcome) -> str:
    """The verdict with the reason up to its details."""
    reason = "same as another scan" if outcome.verdict == "duplicate" else outcome.reason
    kind = re.sub(r"\b\d+\b", "N", re.split(r" \(|:|;", reason)[0])
    return f"{outcome.verdict}: {kind}"


def _same_place(one: Outcome, other: Outcome) -> bool:
    affine, another = (np.reshape(outcome.affine, (4, 4)) for outcome in (one, other))
    return same_place(affine, another, tuple(one.size))  # equal content has equal size
