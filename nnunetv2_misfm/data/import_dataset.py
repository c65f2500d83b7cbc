"""A pile of unlabelled scans becomes an nnU-Net raw dataset.

The order of work: list the folders, find the scans in them, tell CT from MR where asked to, import scan by scan on all
workers, settle which of equal scans counts, and write the dataset's description. Every step records what it has done
(`records.py`), so the command started again goes on where it was; nothing in the dataset depends on the order in which
workers finish. A dataset is the union of all that was ever imported into it.
"""

import os
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from nnunetv2_misfm.data import engine
from nnunetv2_misfm.data.import_scan import import_source
from nnunetv2_misfm.data.modality import MODALITIES, probe_modality
from nnunetv2_misfm.data.outcome import Outcome, Settings
from nnunetv2_misfm.data.records import CannotWrite, State
from nnunetv2_misfm.data.report import REPORT, TAKEN, by_path_and_part, settle_duplicates, summary, write_report
from nnunetv2_misfm.data.sources import Source, folders_below, scan_folder, sources_in
from nnunetv2_misfm.data.target import (
    STATE_FOLDER,
    Target,
    check_target,
    describe,
    is_there,
    locked,
    open_target,
    raw_folder,
    state_folder,
    sweep,
)
from nnunetv2_misfm.errors import MisfmError


@dataclass(frozen=True)
class Workers:
    """Where the work is done.

    Attributes:
        number: processes on this machine; one per processor where None.
        scheduler: address of a Dask scheduler, whose workers do it instead.
    """

    number: int | None = None
    scheduler: str | None = None


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
    if split_by_modality and settings.modality != "auto":
        raise MisfmError(f"expected --modality auto with --split-by-modality, got {settings.modality}: leave one out.")
    raw = raw_folder(dataset_id, name, inputs, split_by_modality)
    places = _places(raw, dataset_id, name, settings.modality, split_by_modality)
    for number, folder in places.values():
        check_target(folder, number, settings)
    with ExitStack() as stack:
        pool, *_ = [stack.enter_context(locked(state_folder(raw, number))) for number, _ in places.values()]
        ours = [raw / STATE_FOLDER, *(folder for _, folder in places.values())]
        folders = list(folders_below(inputs, without=ours))
        unreadable = _run(partial(scan_folder, scanned=pool.scanned), folders, workers, "Looking for scans")
        _require_same_files(unreadable, workers)
        sources = sources_in(folders, pool.scanned)
        no_scans = {folder: _no_scans(folder, pool, unreadable.get(folder)) for folder in folders}
        if settings.modality == "auto":
            by_modality = _by_modality(sources, pool, settings, workers, split_by_modality)
        else:
            by_modality = {settings.modality: sources}
        said: list[str] = []
        anything_taken = False
        for modality, some in by_modality.items():
            number, folder = places[modality if split_by_modality else settings.modality]
            target = open_target(folder, number, replace(settings, modality=modality), pool)
            if not said:  # what is no scan stands in the first report
                _record_no_scans(no_scans, target.state)
            outcomes = _import_into(target, some, set(folders), workers)
            taken = any(outcome.verdict in TAKEN for outcome in outcomes)
            anything_taken = anything_taken or taken
            said.append(_summary(target.folder, outcomes, taken))
    if not anything_taken:
        raise MisfmError("no scan was accepted.\n" + "\n\n".join(said))
    return "\n\n".join(said)


def _places(raw: Path, dataset_id: int, name: str, modality: str, split: bool) -> dict[str, tuple[int, Path]]:
    """Returns id and folder of the dataset that scans of a modality go to."""
    if not split:
        return {modality: (dataset_id, raw / f"Dataset{dataset_id:03d}_{name}")}
    numbers = {kind: dataset_id + place for place, kind in enumerate(MODALITIES)}
    return {kind: (number, raw / f"Dataset{number:03d}_{name}{kind}") for kind, number in numbers.items()}


def _import_into(target: Target, sources: list[Source], folders: set[str], workers: Workers) -> list[Outcome]:
    """Imports sources, found in some folders, into one dataset; returns all outcomes that it then has."""
    import_one = partial(import_source, dataset=target.folder, state=target.state, settings=target.settings)
    by_key = {source.key: source for source in sources}
    failed = _run(import_one, sources, workers, f"Importing {target.settings.modality}")
    outcomes, missing = _settled(target, failed, by_key, folders)
    if missing:
        again = [by_key[key] for key in sorted(missing)]
        failed |= _run(partial(import_one, again=True), again, workers, "Importing again what is gone")
        outcomes, _ = _settled(target, failed, {}, folders)
    write_report(outcomes, target.folder)
    describe(target, outcomes)
    sweep(target.folder, [outcome for outcome in outcomes if outcome.verdict in TAKEN])
    return outcomes


def _settled(
    target: Target, failed: dict[Source, str], here: Container[str], folders: set[str]
) -> tuple[list[Outcome], set[str]]:
    """Settles which outcomes count, of those recorded and of what failed in this run.

    Args:
        target: the dataset.
        failed: sources without a recorded outcome -> why.
        here: keys of the sources that can be imported again.
        folders: that were searched in this run: a refused file that is gone from them is forgotten.

    Returns:
        All outcomes, and the keys of sources `here` that count but whose files are gone from the dataset. Where files
        are gone whose source is not here, the outcome is rejected, and an equal scan takes its place.
    """
    crashed = {source.key: Outcome(source.key, source.path, "rejected", reason) for source, reason in failed.items()}
    recorded = [Outcome(**row) for _, record in target.state.imported for row in record["outcomes"]]
    outcomes = [outcome for outcome in recorded if outcome.key not in crashed and not _is_past(outcome, folders)]
    outcomes += crashed.values()
    while True:
        keep = target.settings.keep_duplicates
        settled = sorted(outcomes, key=by_path_and_part) if keep else settle_duplicates(outcomes)
        gone = [o for o in settled if o.verdict in TAKEN and not is_there(target.folder, o)]
        lost = {(o.key, o.part) for o in gone if o.key not in here}
        if not lost:
            return settled, {outcome.key for outcome in gone}
        outcomes = [_lost(outcome) if (outcome.key, outcome.part) in lost else outcome for outcome in outcomes]


def _is_past(outcome: Outcome, folders: set[str]) -> bool:
    refused = outcome.verdict == "rejected"
    return refused and os.path.dirname(outcome.path) in folders and not os.path.lexists(outcome.path)


def _lost(outcome: Outcome) -> Outcome:
    reason = "imported earlier, but its files are gone from the dataset; with its folder at --input it comes back"
    return replace(outcome, verdict="rejected", reason=reason, case="", image="")


def _summary(folder: Path, outcomes: list[Outcome], taken: bool) -> str:
    said = f"{folder}\n\n{summary(outcomes)}\n\nEvery file is listed in {folder / REPORT}"
    command = f"nnUNetv2_plan_and_preprocess -d {folder.name[7:10]} -c 3d_fullres"
    return f"{said}\nNext: {command}" if taken else said


def _by_modality(
    sources: list[Source], pool: State, settings: Settings, workers: Workers, split: bool
) -> dict[str, list[Source]]:
    """Returns the sources of each modality; those that are neither CT nor MR, or unreadable, go with the first."""
    found: dict[str, list[Source]] = {modality: [] for modality in MODALITIES}
    neither: list[Source] = []
    probe = partial(probe_modality, state=pool, settings=settings)
    for source, modality in _results(probe, sources, workers, "Telling CT from MR"):
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


def _require_same_files(unreadable: dict[str, str], workers: Workers) -> None:
    unseen = [
        folder for folder, reason in unreadable.items() if "FileNotFoundError" in reason and os.path.isdir(folder)
    ]
    if workers.scheduler and unseen:
        raise MisfmError(
            f"the workers of the Dask scheduler at {workers.scheduler} do not see {unseen[0]}: all machines need the "
            "scans and nnUNet_raw under the same paths."
        )


def _no_scans(folder: str, pool: State, unreadable: str | None) -> list[Outcome]:
    """The rows of the files in one folder that are no scans, or of the folder itself."""
    if unreadable is not None:
        return [Outcome(folder, folder, "rejected", unreadable)]
    others = (pool.scanned.last(folder) or {}).get("others", {})
    return [Outcome(folder, os.path.join(folder, name), "rejected", reason) for name, reason in others.items()]


def _record_no_scans(no_scans: dict[str, list[Outcome]], state: State) -> None:
    for folder, outcomes in no_scans.items():
        record = {"folders": [], "outcomes": [asdict(outcome) for outcome in outcomes]}
        known = state.imported.last(folder)
        if record != known and (outcomes or known):
            state.imported.put(folder, "", record)
