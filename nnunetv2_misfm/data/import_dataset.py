"""A pile of unlabelled scans becomes an nnU-Net raw dataset.

The order of work: list the folders, find the scans in them, tell CT from MR where asked to, import scan by scan on all
workers, settle which of equal scans counts, and write the dataset's description. Every step records what it has done
(`records.py`), so the command started again goes on where it was; nothing in the dataset depends on the order in which
workers finish. A dataset is the union of all that was ever imported into it.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
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
    places = {settings.modality: (dataset_id, raw / f"Dataset{dataset_id:03d}_{name}")}
    if split_by_modality:
        numbers = {modality: dataset_id + place for place, modality in enumerate(MODALITIES)}
        places = {kind: (number, raw / f"Dataset{number:03d}_{name}{kind}") for kind, number in numbers.items()}
    for number, folder in places.values():
        check_target(folder, number, settings)
    with locked(state_folder(raw, dataset_id)) as pool:
        folders = list(folders_below(inputs))
        unreadable = _run(partial(scan_folder, scanned=pool.scanned), folders, workers, "Looking for scans")
        _require_same_files(unreadable, workers)
        sources = sources_in(folders, pool.scanned)
        no_scans = {folder: _no_scans(folder, pool, unreadable.get(folder)) for folder in folders}
        if settings.modality == "auto":
            by_modality = _by_modality(sources, pool, workers, split_by_modality)
        else:
            by_modality = {settings.modality: sources}
        said: list[str] = []
        for modality, some in by_modality.items():
            number, folder = places[modality if split_by_modality else settings.modality]
            target = open_target(folder, number, replace(settings, modality=modality), pool)
            if not said:  # what is no scan stands in the first report
                _record_no_scans(no_scans, target.state)
            said.append(_import_into(target, some, workers))
    return "\n\n".join(said)


def _import_into(target: Target, sources: list[Source], workers: Workers) -> str:
    """Imports sources into one dataset and brings its description up to date."""
    import_one = partial(import_source, dataset=target.folder, state=target.state, settings=target.settings)
    failed = _run(import_one, sources, workers, f"Importing {target.settings.modality}")
    outcomes = _settled(target, failed)
    gone = {o.path for o in outcomes if o.verdict in TAKEN and not is_there(target.folder, o)}
    if gone:
        again = [source for source in sources if source.path in gone]
        failed |= _run(partial(import_one, again=True), again, workers, "Importing again what is gone")
        outcomes = _settled(target, failed)
    outcomes = [_lost(o) if o.verdict in TAKEN and not is_there(target.folder, o) else o for o in outcomes]
    write_report(outcomes, target.folder)
    taken = [outcome for outcome in outcomes if outcome.verdict in TAKEN]
    said = f"{target.folder}\n\n{summary(outcomes)}\n\nEvery file is listed in {target.folder / REPORT}"
    if not taken:
        raise MisfmError(f"no scan was accepted.\n{said}")
    describe(target, outcomes)
    sweep(target.folder, taken)
    shutil.rmtree(target.state.unfinished, ignore_errors=True)  # that of a second dataset of the pool
    command = f"nnUNetv2_plan_and_preprocess -d {target.folder.name[7:10]} -c 3d_fullres"
    return f"{said}\nNext: {command}"


def _lost(outcome: Outcome) -> Outcome:
    reason = "imported earlier, but its files are gone from the dataset; with its folder at --input it comes back"
    return replace(outcome, verdict="rejected", reason=reason, case="", image="")


def _settled(target: Target, failed: dict[Source, str]) -> list[Outcome]:
    recorded = [Outcome(**row) for _, rows in target.state.imported for row in rows]
    crashed = [Outcome(source.path, "rejected", reason) for source, reason in failed.items()]
    paths = {outcome.path for outcome in crashed}
    outcomes = [outcome for outcome in recorded if outcome.path not in paths] + crashed
    if target.settings.keep_duplicates:
        return sorted(outcomes, key=by_path_and_part)
    return settle_duplicates(outcomes)


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
        return [Outcome(folder, "rejected", unreadable)]
    others = (pool.scanned.last(folder) or {}).get("others", {})
    return [Outcome(os.path.join(folder, name), "rejected", reason) for name, reason in others.items()]


def _record_no_scans(no_scans: dict[str, list[Outcome]], state: State) -> None:
    for folder, outcomes in no_scans.items():
        rows = [asdict(outcome) for outcome in outcomes]
        if rows != (state.imported.last(folder) or []):
            state.imported.put(folder, "", rows)
