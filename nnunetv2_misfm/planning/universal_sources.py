"""The source datasets of a universal model as they lie in nnUNet_raw: their classes, modalities and cases, checked."""

import contextlib
import io
import re
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_misfm.data.engine import run
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import read_json
from nnunetv2_misfm.universe import dataset_number

# Name of the mark in `misfm` of the dataset.json of a universal dataset
UNIVERSAL = "universal"
# nnU-Net decides by the channel's name how it normalises; CT is its own word, MR and MRI mean one thing here
_SPELLINGS = {"CT": "CT", "MR": "MR", "MRI": "MR"}
# Names of channels that name no modality: nnU-Net's normalisations (map_channel_name_to_normalization.py) and what
# people write where nothing is to be said
_SAYS_NOTHING = re.compile(
    r"(no_?norm|z_?score|rescale_to_0_1|rgb_to_0_1|rgb|gr[ae]y|image|images|img|imaging|channel|modality|scan|volume|"
    r"data|intensity|unknown|none|default|input)?[\s_-]*\d*",
    re.IGNORECASE,
)
# Bytes of a compressed file read at a time (ours)
_CHUNK = 2**20
# Half a right angle: beyond it another axis of the array is nearer to left-right
_COS_45 = 0.5**0.5


@dataclass(frozen=True)
class Case:
    """A training case: name, a file for each channel, the label map's file."""

    name: str
    images: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class RawSource:
    """A labelled dataset in nnUNet_raw.

    Attributes:
        dataset: Full name, e.g. Dataset004_Hippocampus.
        description: Its dataset.json.
        channels: Modality of each channel.
        classes: Names of its foreground classes or regions with the label values of each, in nnU-Net's order.
        has_regions: Whether nnU-Net trains it on regions.
        ignore_label: Value of voxels that nobody labelled, None where all are.
        reader: Name of nnU-Net's reader for its files.
        cases: Its training cases, sorted by name.
    """

    dataset: str
    description: Mapping[str, Any]
    channels: tuple[str, ...]
    classes: Mapping[str, tuple[int, ...]]
    has_regions: bool
    ignore_label: int | None
    reader: str
    cases: tuple[Case, ...]

    @property
    def number(self) -> int:
        """Its number."""
        return dataset_number(self.dataset)

    @property
    def modality(self) -> str:
        """Its modality; that of several channels is a kind of its own, e.g. T1+FLAIR."""
        return "+".join(self.channels)

    @property
    def file_ending(self) -> str:
        """The ending of its files, e.g. .nii.gz."""
        return self.description["file_ending"]


def read_sources(datasets: Sequence[str], modalities: Mapping[int, str]) -> list[RawSource]:
    """Returns the datasets of some full names, in their order.

    Args:
        datasets: Full names.
        modalities: What the user says, by number of the dataset; e.g. CT, or T1+FLAIR for two channels.

    Raises:
        MisfmError: One is not there, has no labels, is universal itself, or they do not go together.
    """
    unknown = sorted(modalities.keys() - {dataset_number(dataset) for dataset in datasets})
    if unknown:
        raise MisfmError(f"expected --modality for datasets that are joined ({_listed(datasets)}), got {unknown[0]}.")
    sources = [_read_source(dataset, modalities.get(dataset_number(dataset))) for dataset in datasets]
    first = sources[0]
    for source in sources[1:]:
        if len(source.channels) != len(first.channels) or (
            len(first.channels) > 1 and source.channels != first.channels
        ):
            raise MisfmError(
                f"expected datasets of the same channels in the same order, got {_listed(first.channels)} in "
                f"{first.dataset} and {_listed(source.channels)} in {source.dataset}: join each with those of its "
                "kind, or say with --modality what their channels are."
            )
    return sources


def _read_source(dataset: str, modality: str | None) -> RawSource:
    folder = Path(str(nnUNet_raw)) / dataset
    file = folder / "dataset.json"
    if not file.is_file():
        raise MisfmError(
            f"expected the raw dataset's description at {file}, found none: its images and labels are needed."
        )
    description = read_json(file)
    marks = description.get("misfm", {})
    if UNIVERSAL in marks:
        raise MisfmError(f"{dataset} is a universal dataset, expected its sources: name them, or use --extend.")
    if marks.get("labels") == "body_mask":
        raise MisfmError(f"{dataset} has no labels but body masks, expected a labelled dataset: leave it out of -d.")
    channels = _channels(dataset, description, modality)
    try:
        manager = LabelManager(description["labels"], description.get("regions_class_order"))
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise MisfmError(f"the labels in {file} are not as nnU-Net wants them ({error}): mend them.") from error
    classes = _classes(manager, file)
    cases = _cases(folder, description, len(channels))
    return RawSource(
        dataset, description, channels, classes, manager.has_regions, manager.ignore_label,
        _reader(description, cases[0]), cases,
    )  # fmt: skip


def _channels(dataset: str, description: Mapping[str, Any], modality: str | None) -> tuple[str, ...]:
    number = dataset_number(dataset)
    names = list((description.get("channel_names") or description.get("modality") or {}).values())
    if not names:
        raise MisfmError(f"expected channel_names in the dataset.json of {dataset}, found none: add them.")
    if modality is not None:
        given = modality.split("+") if len(names) > 1 else [modality]
        if len(given) != len(names):
            raise MisfmError(
                f"expected --modality {number}=... to name {len(names)} channels joined by '+' (now {_listed(names)}), "
                f"got {modality}."
            )
        return tuple(_spelt(name) for name in given)
    for name in names:
        if _SAYS_NOTHING.fullmatch(str(name).strip()):
            raise MisfmError(
                f"expected channel_names of {dataset} that tell the modality (CT, MRI, T1, PET, ...), got {name!r}: "
                f"say it with --modality {number}={'+'.join(['CT'] * len(names))}, say."
            )
    return tuple(_spelt(str(name)) for name in names)


def _spelt(name: str) -> str:
    upper = name.strip().upper()
    return _SPELLINGS.get(upper, upper)


def _classes(manager: LabelManager, file: Path) -> dict[str, tuple[int, ...]]:
    named = {}
    for name, value in manager.label_dict.items():
        values = tuple(int(v) for v in value) if isinstance(value, (tuple, list)) else (int(value),)
        if name != "ignore" and any(values):
            named[name] = values
    if manager.has_regions:
        return named
    classes = dict(sorted(named.items(), key=lambda item: item[1]))
    found = [values[0] for values in classes.values()]
    if found != list(range(1, len(found) + 1)):
        raise MisfmError(f"expected the labels in {file} to be 1, 2, 3, ... as nnU-Net does, got {_listed(found)}.")
    if not classes:
        raise MisfmError(f"expected at least one label beside the background in {file}, found none.")
    return classes


def _cases(folder: Path, description: dict[str, Any], num_channels: int) -> tuple[Case, ...]:
    try:
        found = get_filenames_of_train_images_and_targets(str(folder), deepcopy(description))  # it makes paths absolute
    except (OSError, KeyError) as error:
        raise MisfmError(f"the training cases of {folder} could not be listed ({error!r}).") from error
    if not found:
        raise MisfmError(f"expected training cases in {folder}, found none.")
    cases = []
    for name, files in sorted(found.items()):
        case = Case(str(name), tuple(map(str, files["images"])), str(files["label"]))
        if len(case.images) != num_channels:
            raise MisfmError(
                f"expected {num_channels} images for case {name} of {folder}, one per channel, got {len(case.images)}."
            )
        missing = [file for file in (*case.images, case.label) if not Path(file).is_file()]
        if missing:
            raise MisfmError(
                f"{missing[0]} is missing: case {name} of {folder.name} needs it; add it or remove the case."
            )
        cases.append(case)
    return tuple(cases)


def _reader(description: Mapping[str, Any], case: Case) -> str:
    """Returns the name of nnU-Net's reader: the first that can open the first image."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            return determine_reader_writer_from_dataset_json(description, case.images[0], verbose=False).__name__
        except RuntimeError as error:
            raise MisfmError(
                f"{case.images[0]} can be read by none of nnU-Net's readers: mend or remove it."
            ) from error


def check_cases(sources: Sequence[RawSource], processes: int) -> dict[str, int | None]:
    """Opens every case and returns, for each source, which axis of its arrays runs from left to right.

    Axes are those of the arrays that nnU-Net's reader gives, 0 to 2 for D, H, W before transposition. None where the
    cases differ, where the nearest axis is 45 degrees or more off, or where files do not tell.

    Args:
        sources: Datasets whose files are listed.
        processes: At the same time.

    Raises:
        MisfmError: A case cannot be read or does not fit its dataset.json.
    """
    tasks = [(source, case) for source in sources for case in source.cases]
    openings = [
        _Opening(source.dataset, source.reader, len(source.channels), _label_values(source), case)
        for source, case in tasks
    ]
    axes: dict[str, set[int | None]] = {source.dataset: set() for source in sources}
    outcomes = run(partial(_open), openings, workers=processes, description="opening every case")
    with contextlib.closing(outcomes):  # type: ignore[type-var]
        for opening, outcome in outcomes:
            if isinstance(outcome, MisfmError):
                raise outcome
            if isinstance(outcome, Exception):
                raise MisfmError(f"{opening.case.images[0]} could not be checked: {type(outcome).__name__}: {outcome}.")
            axes[opening.dataset].add(outcome)
    return {dataset: found.pop() if len(found) == 1 else None for dataset, found in axes.items()}


@dataclass(frozen=True)
class _Opening:
    dataset: str
    reader: str
    num_channels: int
    values: frozenset[int]
    case: Case


def _label_values(source: RawSource) -> frozenset[int]:
    ignored = () if source.ignore_label is None else (source.ignore_label,)
    return frozenset({0, *ignored, *(value for values in source.classes.values() for value in values)})


def _open(opening: _Opening) -> int | None:
    """Returns the left-right axis of a case after checking it; runs in a worker."""
    case, reader = opening.case, recursive_find_reader_writer_by_name(opening.reader)()
    image, properties = _read(reader.read_images, list(case.images))
    label, _ = _read(lambda files: reader.read_seg(files[0]), [case.label])
    name = ", ".join(case.images)
    if image.shape[0] != opening.num_channels:
        raise MisfmError(f"expected {opening.num_channels} channels in {name}, got {image.shape[0]}: mend the case.")
    if image.ndim != 4 or 1 in image.shape[1:]:
        raise MisfmError(f"expected 3D images, got {_size(image)} voxels in {name}: leave its dataset out.")
    if image.shape[1:] != label.shape[1:]:
        raise MisfmError(
            f"expected {case.label} as large as its image ({_size(image)} voxels), got "
            f"{_size(label)}: mend or remove the case."
        )
    if not np.isfinite(image).all():
        raise MisfmError(f"{name} holds voxels that are no numbers or infinite: mend or remove the case.")
    unknown = sorted(set(np.unique(label).tolist()) - opening.values)
    if unknown:
        raise MisfmError(
            f"expected the values {_listed(sorted(opening.values))} that the dataset.json of {opening.dataset} knows, "
            f"got {_listed([f'{value:g}' for value in unknown])} in {case.label}: mend one of the two."
        )
    return left_right_axis(properties)


def _read(read: Any, files: list[str]) -> tuple[np.ndarray, dict[str, Any]]:
    try:
        for file in files:
            _read_to_the_checksum(file)
        return read(files)
    except Exception as error:  # whatever a reader of nnU-Net or a library below it says of a damaged file
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise MisfmError(f"{', '.join(files)} could not be read ({reason}): mend or remove the case.") from error


def _read_to_the_checksum(file: str) -> None:
    """Raises where a compressed file is cut off: ITK's NIfTI reader fills what is missing with zeros, in silence."""
    if file.lower().endswith(".gz"):
        with igzip.open(file) as stream:
            while stream.read(_CHUNK):
                pass


def left_right_axis(properties: Mapping[str, Any]) -> int | None:
    """Returns which array axis (0 to 2 for D, H, W) runs from left to right, None where none is nearest or known.

    Args:
        properties: As nnU-Net's readers give them beside the voxels.
    """
    if "sitk_stuff" in properties:
        entries = properties["sitk_stuff"]["direction"]
        if len(entries) != 9:
            return None
        columns = np.reshape(entries, (3, 3))  # a column for each of x, y, z; ITK's first row is left-right
    elif "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        columns = np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]))[:3, :3]
        columns = columns / np.linalg.norm(columns, axis=0)
    else:
        return None
    share = np.abs(columns[0])
    axis = int(np.argmax(share))
    return 2 - axis if share[axis] > _COS_45 + 1e-6 else None  # arrays are in the order z, y, x


def _listed(items: Collection[Any]) -> str:
    return ", ".join(map(str, items))


def _size(array: np.ndarray) -> str:
    """Returns the voxels of [C, D, H, W] as a text."""
    from nnunetv2_misfm.planning.pct_net_planner import times  # not above: every worker would load the trainers with it

    return times(array.shape[1:])
