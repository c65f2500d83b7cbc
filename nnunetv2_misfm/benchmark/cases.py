"""One case of a comparison: its two files read, checked against each other, and scored class by class.

Apart from `evaluate.py` so that its worker processes load neither PyTorch nor pandas.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter

from nnunetv2_misfm.benchmark.damage import is_truncated_nifti
from nnunetv2_misfm.benchmark.metrics import score

# Absolute, of spacing and origin in mm and of direction cosines: NIfTI's quaternions round by less than 4e-4, and no
# scan is resolved to a micrometre. Ours
GEOMETRY_TOLERANCE = 1e-3
FLOAT32_TOLERANCE = 1e-6  # relative, beside it: nnU-Net's reader calls a single slice 999 pixels thick
_NAMED_VALUES = 5  # ours: an image in the place of labels has thousands


@dataclass(frozen=True)
class Case:
    """The two files of a case.

    Attributes:
        name: As in the dataset, e.g. hippocampus_001.
        truth: File of labels.
        prediction: File of labels.
    """

    name: str
    truth: Path
    prediction: Path


@dataclass(frozen=True)
class Labels:
    """What the values in a file of labels mean, and how it is read.

    Attributes:
        reader: nnU-Net's reader class of the dataset.
        classes: The values of each class or region, by name, without background, in the order of the dataset.
        known: All values that labels may take, without the ignore label.
        ignore: Value of voxels that count nowhere; None where the dataset has none.
    """

    reader: type[BaseReaderWriter]
    classes: Mapping[str, tuple[int, ...]]
    known: tuple[int, ...]
    ignore: int | None


class Unfit(Exception):
    """Why a case cannot be scored, as a part of a sentence."""


def problem_of(case: Case, labels: Labels) -> str | None:
    """Returns why a case cannot be scored, as a part of a sentence; None where it can."""
    try:
        _read_both(case, labels)
    except Unfit as unfit:
        return str(unfit)
    return None


def score_case(case: Case, labels: Labels, tolerance_mm: float) -> list[dict[str, Any]]:
    """Returns one row per class or region: `case`, `label` and the fields of `Scores`.

    Voxels that the truth marks with the ignore label are taken out of both masks.

    Raises:
        Unfit: `problem_of` the case is not None.
    """
    truth, prediction, spacing_mm = _read_both(case, labels)
    counts = truth != labels.ignore if labels.ignore is not None else np.ones(truth.shape, bool)
    return [
        {
            "case": case.name,
            "label": label,
            **asdict(
                score(np.isin(truth, values) & counts, np.isin(prediction, values) & counts, spacing_mm, tolerance_mm)
            ),
        }
        for label, values in labels.classes.items()
    ]


def _read_both(case: Case, labels: Labels) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Returns truth and prediction [D, H, W], integers, and the spacing in mm along these axes."""
    truth, geometry = _read(case.truth, "truth", labels.reader)
    prediction, other_geometry = _read(case.prediction, "prediction", labels.reader)
    if truth.shape != prediction.shape:
        raise Unfit(f"the prediction has shape {prediction.shape}, the truth {truth.shape} (D, H, W)")
    _check_geometry(geometry, other_geometry)
    with_ignore = labels.known if labels.ignore is None else (*labels.known, labels.ignore)
    _check_values(truth, "truth", with_ignore)
    _check_values(prediction, "prediction", labels.known)
    return truth, prediction, [float(size) for size in geometry["spacing"]]


def _read(file: Path, role: str, reader: type[BaseReaderWriter]) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        labels, geometry = reader().read_seg(str(file))
    except MemoryError:
        raise
    except Exception as error:  # the readers raise whatever they like at a damaged file
        reason = " ".join(str(error).split())[-200:] or type(error).__name__  # ITK names its own source file first
        raise Unfit(f"the {role} {file} cannot be read by nnU-Net's {reader.__name__} ({reason})") from error
    if is_truncated_nifti(file):
        raise Unfit(f"the {role} {file} is truncated")
    if len(labels) != 1:
        raise Unfit(f"the {role} {file} holds {len(labels)} channels, one of labels was expected")
    if not all(0 < size < math.inf for size in geometry["spacing"]):
        raise Unfit(f"the {role} {file} has spacing {_numbers(geometry['spacing'])}, positive sizes were expected")
    return labels[0], geometry


def _check_geometry(truth: dict[str, Any], prediction: dict[str, Any]) -> None:
    expected, got = _placement(truth), _placement(prediction)
    for part, value in expected.items():
        other = got[part]
        if np.shape(value) != np.shape(other) or not np.allclose(value, other, FLOAT32_TOLERANCE, GEOMETRY_TOLERANCE):
            raise Unfit(f"the prediction has {part} {_numbers(other)}, the truth {_numbers(value)}")


def _placement(geometry: dict[str, Any]) -> dict[str, Any]:
    """Returns what a reader says of where its array lies: at least the spacing; the affine is the array's own."""
    nested: dict[str, Any] = {}
    for value in geometry.values():  # `sitk_stuff` or `nibabel_stuff`
        nested.update(value if isinstance(value, dict) else {})
    affine = nested.get("reoriented_affine", nested.get("original_affine"))
    parts = {
        "spacing (D, H, W)": geometry["spacing"],
        "origin": nested.get("origin"),
        "direction": nested.get("direction"),
        "affine": affine,
    }
    return {part: value for part, value in parts.items() if value is not None}


def _check_values(labels: np.ndarray, role: str, known: Sequence[int]) -> None:
    is_known = np.isin(labels, known)
    if is_known.all():
        return
    unknown = np.unique(labels[~is_known])
    fractions = unknown[unknown != np.round(unknown)]  # NaN, too
    if fractions.size:
        raise Unfit(f"the {role} holds values that are no integers, such as {fractions[0]:g}")
    named = ", ".join(f"{value:g}" for value in unknown[:_NAMED_VALUES])
    more = f" and {len(unknown) - _NAMED_VALUES} more" if len(unknown) > _NAMED_VALUES else ""
    raise Unfit(f"the {role} holds {named}{more}, where dataset.json allows {', '.join(map(str, known))}")


def _numbers(values: Any) -> str:
    return f"({', '.join(f'{value:g}' for value in np.ravel(values))})"
