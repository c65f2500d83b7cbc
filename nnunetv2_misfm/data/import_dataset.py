"""A pile of unlabelled scans becomes an nnU-Net raw dataset.

The order of work: list the folders, find the scans in them, tell CT from MR where asked to, import scan by scan on all
workers, settle which of equal scans counts, and write the dataset's description. Every step records what it has done
(`records.py`), so the command started again goes on where it was; nothing in the dataset depends on the order in which
workers finish. A dataset is the union of all that was ever imported into it.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from nnunetv2.paths import nnUNet_raw

from nnunetv2_misfm import __version__
from nnunetv2_misfm.data import engine
from nnunetv2_misfm.data.import_scan import FILE_ENDING, import_source
from nnunetv2_misfm.data.modality import MODALITIES, probe_modality
from nnunetv2_misfm.data.outcome import Outcome, Settings
from nnunetv2_misfm.data.records import CannotWrite, State
from nnunetv2_misfm.data.report import REPORT, TAKEN, settle_duplicates, summary, write_report
from nnunetv2_misfm.data.sources import Source, folders_below, scan_folder, sources_in
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.plans_file import VALID_NAME, write_json

STATE_FOLDER = ".misfm_import"  # beside the datasets; nnU-Net looks only at folders called Dataset...
_OUR_FILES = re.compile(r"scan_[0-9a-f]{16}(_0000)?" + re.escape(FILE_ENDING))


@dataclass(frozen=True)
class Workers:
    """Where the work is done.

    Attributes:
        number: processes on this machine; one per processor where None.
        scheduler: address of a Dask scheduler, whose workers do it instead.
    """

    number: int | None = None
    scheduler: str | None = None


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


def import_scans(
    inputs: Sequence[Path],
    dataset_id: int,
    name: str,
    settings: Settings,
    workers: Workers = Workers(),  # noqa: B008 - frozen
    *,
    split_by_modality: bool = False,
) -> str:
    """Imports all scans below some folders as `nnUNet_raw/DatasetXXX_Name`, or adds them to it.

    Args:
        inputs: folders.
        dataset_id: 1 to 999; of the CT scans where they are split, those of MR get the next.
        name: what follows the id in the folder's name; "CT" and "MR" are appended where they are split.
        settings: how scans are judged; a modality of "auto" stands for the one that all scans have.
        workers: where the work is done.
        split_by_modality: make one dataset of each modality.

    Returns:
        A summary for the user, with the verdicts counted.

    Raises:
        MisfmError: The dataset's id or name cannot be used, it was made in another way, the inputs are no folders or
            hold both CT and MR, no scan was accepted (the report says why), or the disk is full.
    """
    raw = _raw_folder(dataset_id, name, inputs, split_by_modality)
    with _locked(raw / STATE_FOLDER / f"Dataset{dataset_id:03d}") as pool:
        folders = list(folders_below(inputs))
        unreadable = _run(partial(scan_folder, scanned=pool.scanned), folders, workers, "Looking for scans")
        sources = sources_in(folders, pool.scanned)
        no_scans = {folder: _no_scans(folder, pool, unreadable.get(folder)) for folder in folders}
        if settings.modality == "auto" or split_by_modality:
            by_modality = _by_modality(sources, pool, workers, split_by_modality)
        else:
            by_modality = {settings.modality: sources}
        said = []
        for place, (modality, some) in enumerate(by_modality.items()):
            suffix = modality if split_by_modality else ""
            number = dataset_id + MODALITIES.index(modality) if split_by_modality else dataset_id
            folder = raw / f"Dataset{number:03d}_{name}{suffix}"
            target = _open(folder, raw, number, replace(settings, modality=modality), pool)
            if place == 0:
                _record_no_scans(no_scans, target.state)
            said.append(_import_into(target, some, workers))
    return "\n\n".join(said)


def _import_into(target: Target, sources: list[Source], workers: Workers) -> str:
    """Imports sources into one dataset and brings its description up to date."""
    import_one = partial(import_source, dataset=target.folder, state=target.state, settings=target.settings)
    failed = _run(import_one, sources, workers, f"Importing {target.settings.modality}")
    outcomes = _settled(target, failed)
    gone = {o.path for o in outcomes if o.verdict in TAKEN and not _is_there(target.folder, o)}
    if gone:
        again = [source for source in sources if source.path in gone]
        failed |= _run(partial(import_one, again=True), again, workers, "Importing again what is gone")
        outcomes = _settled(target, failed)
    lost = [o for o in outcomes if o.verdict in TAKEN and not _is_there(target.folder, o)]
    if lost:
        raise MisfmError(
            f"{len(lost)} scans imported earlier are gone from {target.folder}, the first {lost[0].path}: "
            "name their folder at --input too, so that they can be imported again."
        )
    write_report(outcomes, target.folder)
    taken = [outcome for outcome in outcomes if outcome.verdict in TAKEN]
    said = f"{target.folder}\n\n{summary(outcomes)}\n\nEvery file is listed in {target.folder / REPORT}"
    if not taken:
        raise MisfmError(f"no scan was accepted.\n{said}")
    _describe(target, outcomes)
    _sweep(target.folder, taken)
    shutil.rmtree(target.state.unfinished, ignore_errors=True)  # left by workers that died
    command = f"nnUNetv2_plan_and_preprocess -d {target.folder.name[7:10]} -c 3d_fullres"
    return f"{said}\nNext: {command}"


def _settled(target: Target, failed: dict[Source, str]) -> list[Outcome]:
    recorded = [Outcome(**row) for _, rows in target.state.imported for row in rows]
    crashed = [Outcome(source.path, "rejected", reason) for source, reason in failed.items()]
    paths = {outcome.path for outcome in crashed}
    outcomes = [outcome for outcome in recorded if outcome.path not in paths] + crashed
    if target.settings.keep_duplicates:
        return sorted(outcomes, key=lambda outcome: (outcome.path, len(outcome.part), outcome.part))
    return settle_duplicates(outcomes)


def _is_there(folder: Path, outcome: Outcome) -> bool:
    return (folder / outcome.image).is_file() and (folder / "labelsTr" / f"{outcome.case}{FILE_ENDING}").is_file()


def _describe(target: Target, outcomes: list[Outcome]) -> None:
    """Writes dataset.json. It lists every case, as nnU-Net allows: finding them by name takes it n^2 comparisons."""
    taken = sorted((outcome for outcome in outcomes if outcome.verdict in TAKEN), key=lambda outcome: outcome.case)
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


def _sweep(folder: Path, taken: list[Outcome]) -> None:
    """Removes images and masks of ours that belong to no case: of duplicates, and of files that have changed."""
    images = {os.path.basename(outcome.image) for outcome in taken if not os.path.isabs(outcome.image)}
    masks = {f"{outcome.case}{FILE_ENDING}" for outcome in taken}
    for part, wanted in (("imagesTr", images), ("labelsTr", masks)):
        for entry in os.scandir(folder / part) if (folder / part).is_dir() else ():
            if _OUR_FILES.fullmatch(entry.name) and entry.name not in wanted:
                os.unlink(entry.path)


def _by_modality(sources: list[Source], pool: State, workers: Workers, split: bool) -> dict[str, list[Source]]:
    """Returns the sources of each modality; those that are neither CT nor MR, or unreadable, go with the first."""
    found: dict[str, list[Source]] = {modality: [] for modality in MODALITIES}
    neither: list[Source] = []
    for source, modality in _results(partial(probe_modality, state=pool), sources, workers, "Telling CT from MR"):
        found.get(modality if isinstance(modality, str) else "", neither).append(source)
    found = {modality: some for modality, some in found.items() if some}
    if len(found) > 1 and not split:
        counts = " and ".join(f"{len(some)} of {modality}" for modality, some in found.items())
        raise MisfmError(
            f"expected scans of one modality, got {counts}: take only one with --modality, or make one dataset of each "
            "with --split-by-modality. Nothing was written."
        )
    first = next(iter(found), MODALITIES[0])
    return {**found, first: sorted([*found.get(first, []), *neither])}


def _run(function: Callable[[Any], None], tasks: Sequence[Any], workers: Workers, description: str) -> dict[Any, str]:
    """Runs a function that records its own results; returns the tasks that failed with their reasons."""
    return {
        task: f"failed: {type(outcome).__name__}: {outcome}"
        for task, outcome in _results(function, tasks, workers, description)
        if isinstance(outcome, Exception)
    }


def _results(
    function: Callable[[Any], Any], tasks: Sequence[Any], workers: Workers, description: str
) -> Iterator[tuple[Any, Any]]:
    """Yields every task with its result or exception.

    Raises:
        CannotWrite: The disk is full.
    """
    results = engine.run(function, tasks, workers=workers.number, scheduler=workers.scheduler, description=description)
    for task, outcome in results:
        if isinstance(outcome, CannotWrite):
            raise outcome
        yield task, outcome


def _no_scans(folder: str, pool: State, unreadable: str | None) -> list[Outcome]:
    """The rows of the files in one folder that are no scans, or of the folder itself."""
    if unreadable is not None:
        return [Outcome(folder, "rejected", unreadable)]
    others = (pool.scanned.last(folder) or {}).get("others", {})
    return [Outcome(os.path.join(folder, name), "rejected", reason) for name, reason in others.items()]


def _record_no_scans(no_scans: dict[str, list[Outcome]], state: State) -> None:
    for folder, outcomes in no_scans.items():
        rows = [asdict(outcome) for outcome in outcomes]
        if rows != (state.imported.last(folder) or []):
            state.imported.put(folder, "", rows)


def _raw_folder(dataset_id: int, name: str, inputs: Sequence[Path], split_by_modality: bool) -> Path:
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


def _open(folder: Path, raw: Path, number: int, settings: Settings, pool: State) -> Target:
    """Returns the dataset to be made or added to.

    Raises:
        MisfmError: The id belongs to another dataset, or the dataset was made otherwise or with other settings.
    """
    state = State(raw / STATE_FOLDER / f"Dataset{number:03d}", pool.pool)
    others = [other.name for other in raw.glob(f"Dataset{number:03d}_*") if other != folder]
    if others:
        raise MisfmError(f"dataset id {number} is taken by {others[0]}: choose another with --dataset.")
    made_with = {**asdict(settings), "name": folder.name}
    known = state.folder / "settings.json"
    if not folder.exists():  # new, or deleted by the user: what was recorded of it no longer holds
        shutil.rmtree(state.imported.folder, ignore_errors=True)
        state.folder.mkdir(parents=True, exist_ok=True)
        write_json(made_with, known)
        folder.mkdir(parents=True)
    elif not known.is_file():
        raise MisfmError(f"{folder} was not made by import: choose another --dataset and --name.")
    elif (earlier := json.loads(known.read_text())) != made_with:
        changed = ", ".join(f"{key}={earlier.get(key)!r}" for key in made_with if earlier.get(key) != made_with[key])
        raise MisfmError(f"{folder} was made with {changed}: use the same settings to add to it, or another --dataset.")
    shutil.rmtree(state.unfinished, ignore_errors=True)
    return Target(folder, state, settings)


@contextmanager
def _locked(folder: Path) -> Iterator[State]:
    """Holds the state of a dataset for this process alone; the system lets go of it when the process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            yield State(folder, folder)
    except Timeout as error:
        raise MisfmError(f"another import into the same dataset id is running ({folder / 'lock'} is held).") from error
