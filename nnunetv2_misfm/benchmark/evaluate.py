"""The scores of a folder of predictions: of every case, all of them checked before the first is scored, or an error."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.benchmark.cases import Case, Labels, problem_of, score_case
from nnunetv2_misfm.errors import MisfmError

COLUMNS = ["case", "label", "dice", "assd_mm", "hd95_mm", "surface_dice", "truth_empty", "prediction_empty"]
_NAMED = 5  # cases that a sentence names at most: ours


def evaluate_folder(
    truths: Mapping[str, Path],
    predictions: Path,
    plans: dict[str, Any] | Path,
    dataset_json: dict[str, Any],
    tolerance_mm: float,
    workers: int,
) -> pd.DataFrame:
    """Returns the scores of the predictions of these cases, one row per case and class or region.

    Voxels that the truth marks with the dataset's ignore label are in neither mask. Files of other cases in the folder
    are not looked at. How empty masks count is stated at `metrics.score`.

    Args:
        truths: File of labels of each case, by its name.
        predictions: Folder that holds `<case><file ending of the dataset>`.
        plans: Content of the plans file or its path; names the reader.
        dataset_json: Content of the dataset's dataset.json.
        tolerance_mm: Tolerance of the surface Dice.
        workers: Processes; 1 works in this one.

    Returns:
        `COLUMNS`; cases in the order of `truths`, `label` the name in dataset.json and in its order. No NaN.

    Raises:
        MisfmError: A file is missing or cannot be read, truth and prediction differ in shape or geometry (by more than
            1e-3), or one holds a value that is no label; all cases are looked at before any is scored.
    """
    if not 0 <= tolerance_mm < math.inf:
        raise MisfmError(f"expected a tolerance of the surface Dice of 0 mm or more, got {tolerance_mm:g}.")
    cases = [
        Case(name, Path(truth), Path(predictions) / f"{name}{dataset_json['file_ending']}")
        for name, truth in truths.items()
    ]
    _check_files(cases, Path(predictions))
    labels = _labels(plans, dataset_json)
    with _each_case(min(workers, len(cases))) as each:
        _check_contents(cases, each(partial(problem_of, labels=labels), cases), Path(predictions))
        scored = each(partial(score_case, labels=labels, tolerance_mm=tolerance_mm), cases)
        return pd.DataFrame(list(chain.from_iterable(scored)), columns=COLUMNS)


def absent_labels(scores: pd.DataFrame) -> list[str]:
    """Returns the classes that no truth holds, in the order of the rows; their scores say little.

    Args:
        scores: Rows with `label` and `truth_empty`, e.g. those of `evaluate_folder`.
    """
    absent = scores.groupby("label", sort=False)["truth_empty"].all()
    return [str(label) for label in absent.index[absent]]


def _labels(plans: dict[str, Any] | Path, dataset_json: dict[str, Any]) -> Labels:
    planned = PlansManager(plans if isinstance(plans, dict) else str(plans))
    manager = planned.get_label_manager(dataset_json)
    named = {
        name: tuple(int(value) for value in (values if isinstance(values, list | tuple) else [values]))
        for name, values in manager.label_dict.items()
        if name != "ignore"
    }
    return Labels(
        reader=planned.image_reader_writer_class,
        classes={name: values for name, values in named.items() if set(values) != {0}},  # as nnU-Net tells background
        known=tuple(int(value) for value in manager.all_labels),
        ignore=manager.ignore_label,
    )


def _check_files(cases: Sequence[Case], predictions: Path) -> None:
    if not cases:
        raise MisfmError("expected at least one case with labels to compare with, got none: name a folder of labels.")
    if without := [f"{case.name} ({case.truth})" for case in cases if not case.truth.is_file()]:
        raise MisfmError(
            f"expected the labels of all {len(cases)} cases, {len(without)} are missing: {_some(without)}; "
            "put them back, or compare without these cases."
        )
    if not predictions.is_dir():
        raise MisfmError(f"expected a folder of predictions at {predictions}, found none: predict first.")
    if without := [case.name for case in cases if not case.prediction.is_file()]:
        raise MisfmError(
            f"expected predictions of all {len(cases)} cases in {predictions}, {len(without)} are missing: "
            f"{_some(without)}; let the prediction finish, or predict them with nnUNetv2_predict."
        )


def _check_contents(cases: Sequence[Case], problems: Iterator[str | None], predictions: Path) -> None:
    found = [f"{case.name}: {problem}" for case, problem in zip(cases, problems, strict=True) if problem]
    if found:
        raise MisfmError(
            f"expected predictions in {predictions} of the same geometry and labels as the truth, got other for "
            f"{len(found)} of {len(cases)} cases ({_some(found, '; ')}): predict again from the images that the labels "
            "belong to, or mend the file that is wrong."
        )


def _some(names: Sequence[str], between: str = ", ") -> str:
    more = f"{between}and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return between.join(names[:_NAMED]) + more


@contextmanager
def _each_case(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yields a `map` over cases, of this process or of a pool of its own."""
    if workers <= 1:
        yield map
        return
    # a forked child would inherit locks that SimpleITK's and PyTorch's threads hold
    pool = ProcessPoolExecutor(workers, get_context("spawn"))
    try:
        yield pool.map
    except BrokenProcessPool as error:
        raise MisfmError(
            f"expected {workers} processes to score cases, but one of them died, probably out of memory: use fewer."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
