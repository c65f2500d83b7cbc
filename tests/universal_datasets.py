"""Tiny raw datasets for universal models, written with SimpleITK."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)
# The columns are the directions of x, y and z: here z of the array runs from left to right
SAGITTAL = (0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def write_volume(file: Path, array: np.ndarray, spacing: Sequence[float], direction: Sequence[float] = AXIAL) -> None:
    """Writes [D, H, W]; the spacing is that of D, H, W in mm."""
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing(list(spacing)[::-1])
    volume.SetDirection(direction)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(file))


def write_raw(
    raw: Path,
    name: str,
    *,
    channels: Sequence[str] = ("MRI",),
    labels: Mapping[str, Any] | None = None,
    num_cases: int = 6,
    shape: Sequence[int] = (24, 26, 28),
    spacing: Sequence[float] = (1.0, 1.0, 1.0),
    direction: Sequence[float] = AXIAL,
    file_ending: str = ".nii.gz",
    **entries: Any,
) -> Path:
    """Writes noise with a bright box for each label value; case names are case_0, case_1, ..."""
    labels = labels or {"background": 0, "organ": 1, "lesion": 2}
    values = sorted({v for value in labels.values() for v in (value if isinstance(value, list) else [value])} - {0})
    folder = raw / name
    for case in range(num_cases):
        generator = np.random.default_rng((int(name[7:10]), case))
        segmentation = np.zeros(shape, np.uint8)
        for i, value in enumerate(values):
            start = 2 + 5 * i
            segmentation[start : start + 4, 4 + case : 12 + case, 6:20] = value
        for channel in range(len(channels)):
            image = generator.normal(100, 10, shape).astype(np.float32) + 40 * segmentation
            write_volume(folder / f"imagesTr/case_{case}_{channel:04d}{file_ending}", image, spacing, direction)
        write_volume(folder / f"labelsTr/case_{case}{file_ending}", segmentation, spacing, direction)
    description = {
        "channel_names": {str(i): name for i, name in enumerate(channels)},
        "labels": dict(labels),
        "numTraining": num_cases,
        "file_ending": file_ending,
        **entries,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def run_here(function: Callable, tasks: Sequence[Any], **options: Any) -> Iterator[tuple[Any, Any]]:
    """Stands in for the engine's `run`, without its processes, which take seconds to start."""
    for task in tasks:
        try:
            yield task, function(task)
        except Exception as error:
            yield task, error
