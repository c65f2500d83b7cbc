"""The raw dataset that an import makes: its folder, its description, and what is known of it."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from nnunetv2.paths import nnUNet_raw

from nnunetv2_misfm import __version__
from nnunetv2_misfm.data.import_scan import FILE_ENDING
from nnunetv2_misfm.data.outcome import Outcome, Settings
from nnunetv2_misfm.data.records import CannotWrite, State
from nnunetv2_misfm.data.report import REPORT, TAKEN
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import VALID_NAME, read_json, write_json

STATE_FOLDER = ".misfm_import"  # beside the datasets; nnU-Net looks only at folders called Dataset...
_OUR_FILES = re.compile(r"scan_[0-9a-f]{16}(_0000)?" + re.escape(FILE_ENDING))


def raw_folder(dataset_id: int, name: str, inputs: Sequence[Path], split_by_modality: bool) -> Path:
    """Returns nnUNet_raw, after checks of what shall be made there of which folders.

    Raises:
        MisfmError: The variable is not set, the id or name is none of nnU-Net's, or nnUNet_raw lies in an input.
    """
    if not nnUNet_raw.is_set():
        raise MisfmError("expected the environment variable nnUNet_raw to name a folder, but it is not set.")
    highest = 998 if split_by_modality else 999  # nnU-Net writes ids with three digits
    if not 1 <= dataset_id <= highest:
        raise MisfmError(f"expected a dataset id from 1 to {highest}, got {dataset_id}.")
    if not VALID_NAME.fullmatch(name):
        raise MisfmError(f"expected a name of letters, digits, _ . and -, without __, got {name!r}.")
    raw = Path(str(nnUNet_raw)).absolute()
    for top in inputs:
        if top.is_dir() and raw.resolve().is_relative_to(top.resolve()):
            raise MisfmError(f"expected folders outside {raw}, got {top}, which holds it: name the scans' own folders.")
    return raw


@contextmanager
def locked(folder: Path) -> Iterator[State]:
    """Holds the state of a dataset for this process alone; the system lets go of it when the process ends.

    Raises:
        MisfmError: Another process holds it, or nothing can be written there.
    """
    state, lock = State(folder, folder), FileLock(folder / "lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise MisfmError(f"another import into the same dataset id is running ({folder / 'lock'} is held).") from error
    except OSError as error:
        raise CannotWrite(folder, error) from error
    try:
        shutil.rmtree(state.unfinished, ignore_errors=True)  # left by a run that was killed
        yield state
        shutil.rmtree(state.unfinished, ignore_errors=True)  # left by workers that died
    finally:
        lock.release()


@dataclass(frozen=True)
class Target:
    """A dataset being made.

    Attributes:
        folder: in nnUNet_raw.
        state: what is known of it.
        settings: how its scans are judged.
    """

    folder: Path
    state: State
    settings: Settings


def state_folder(raw: Path, number: int) -> Path:
    """Returns where an import keeps what it knows of a dataset: beside it, so that the dataset is nnU-Net's alone."""
    return raw / STATE_FOLDER / f"Dataset{number:03d}"


def check_target(folder: Path, number: int, settings: Settings) -> None:
    """Checks that a dataset can be made, or added to.

    Args:
        folder: of the dataset.
        number: its id.
        settings: with "auto" as its modality any is right.

    Raises:
        MisfmError: The id belongs to another dataset, or the dataset was made otherwise or with other settings.
    """
    others = [other.name for other in folder.parent.glob(f"Dataset{number:03d}_*") if other != folder]
    if others:
        raise MisfmError(f"dataset id {number} is taken by {others[0]}: choose another with --dataset.")
    if not folder.exists():
        return
    known = state_folder(folder.parent, number) / "settings.json"
    if not known.is_file():
        raise MisfmError(f"{folder} was not made by import: choose another --dataset and --name.")
    if not (folder / "dataset.json").is_file():
        return  # nothing was taken yet, so nothing holds
    earlier = read_json(known)
    now = {key: value for key, value in _made_with(folder, settings).items() if (key, value) != ("modality", "auto")}
    changed = ", ".join(f"{key}={earlier.get(key)!r}" for key in now if earlier.get(key) != now[key])
    if changed:
        raise MisfmError(f"{folder} was made with {changed}: use the same settings to add to it, or another --dataset.")


def open_target(folder: Path, number: int, settings: Settings, pool: State) -> Target:
    """Returns a dataset that can be made or added to (`check_target`), its folder made.

    Args:
        folder: of the dataset.
        number: its id.
        settings: with the modality that it has.
        pool: state of the pool that it is made of.
    """
    check_target(folder, number, settings)
    state = State(state_folder(folder.parent, number), pool.pool)
    known, made_with = state.folder / "settings.json", _made_with(folder, settings)
    deleted = not folder.exists()  # or new: what was recorded of it no longer holds
    if deleted or read_json(known) != made_with:
        shutil.rmtree(state.imported.folder, ignore_errors=True)
        state.folder.mkdir(parents=True, exist_ok=True)
        write_json(made_with, known)
        folder.mkdir(parents=True, exist_ok=True)
    return Target(folder, state, settings)


def _made_with(folder: Path, settings: Settings) -> dict[str, Any]:
    return {**asdict(settings), "name": folder.name}


def is_there(folder: Path, outcome: Outcome) -> bool:
    """Tells whether image and mask of a scan that was taken are where its outcome says."""
    return (folder / outcome.image).is_file() and (folder / "labelsTr" / f"{outcome.case}{FILE_ENDING}").is_file()


def describe(target: Target, outcomes: list[Outcome]) -> None:
    """Writes dataset.json, or removes it where no scan was taken.

    It lists every case, as nnU-Net allows: finding them by name takes it n^2 comparisons.
    """
    taken = sorted((outcome for outcome in outcomes if outcome.verdict in TAKEN), key=lambda outcome: outcome.case)
    if not taken:
        (target.folder / "dataset.json").unlink(missing_ok=True)
        return
    verdicts = Counter(outcome.verdict for outcome in outcomes)
    content = {
        "name": target.folder.name.split("_", 1)[1],
        "channel_names": {"0": target.settings.modality},
        "labels": {"background": 0, "body": 1},
        "numTraining": len(taken),
        "file_ending": FILE_ENDING,
        "overwrite_image_reader_writer": "SimpleITKIO",
        "misfm": {
            "labels": "body_mask",
            "source": "import",
            "version": __version__,
            "settings": asdict(target.settings),
            "verdicts": dict(sorted(verdicts.items())),
            "report": REPORT,
        },
        "dataset": {
            outcome.case: {"images": [outcome.image], "label": f"labelsTr/{outcome.case}{FILE_ENDING}"}
            for outcome in taken
        },
    }
    write_json(content, target.folder / "dataset.json")


def sweep(folder: Path, taken: list[Outcome]) -> None:
    """Removes images and masks of ours that belong to no case: of duplicates, and of files that have changed."""
    images = {os.path.basename(outcome.image) for outcome in taken if not os.path.isabs(outcome.image)}
    masks = {f"{outcome.case}{FILE_ENDING}" for outcome in taken}
    for part, wanted in (("imagesTr", images), ("labelsTr", masks)):
        for entry in os.scandir(folder / part) if (folder / part).is_dir() else ():
            if _OUR_FILES.fullmatch(entry.name) and entry.name not in wanted:
                os.unlink(entry.path)
