"""nnU-Net's preprocessing, case by case on the engine: resumable, and on a Dask cluster too.

Each case goes through nnU-Net's own preprocessor, so the files are those of `nnUNetv2_preprocess`. That command starts
from an empty folder and stops at the first fault; here what is finished stays, and one bad case stops no other.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_raw
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from nnunetv2_misfm.data.engine import run
from nnunetv2_misfm.data.records import Records, fingerprint
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import PREPROCESSING_KEYS, find_plans, read_json

OWN_FOLDER = ".misfm_preprocess"  # beside nnU-Net's data folders: it lists what is in those
# What else decides the files of a case (nnU-Net 2.8, default_preprocessor.py); the patch size gives their chunks
_CONFIGURATION_KEYS = (*PREPROCESSING_KEYS, "patch_size")
_PLANS_KEYS = (
    "transpose_forward",
    "image_reader_writer",
    "label_manager",
    "foreground_intensity_properties_per_channel",
    "foreground_intensity_properties_by_modality",
)
_DATASET_KEYS = ("labels", "regions_class_order")
_MOST_NAMES = 20  # ours: failed cases named in the error


@dataclass(frozen=True)
class _Target:
    """What all cases of a configuration share; plans and dataset.json as JSON."""

    configuration: str
    plans: str
    dataset_json: str
    folder: Path
    own_folder: Path

    @property
    def records(self) -> Records:
        return Records(self.own_folder / "records")

    @property
    def unfinished(self) -> Path:
        return self.own_folder / "unfinished" / self.folder.name


@dataclass(frozen=True)
class _Case:
    name: str
    images: tuple[str, ...]
    label: str
    made_from: str


def preprocess(
    dataset: str,
    configurations: Sequence[str] = ("3d_fullres",),
    plans: str = "nnUNetPlans",
    workers: int | None = None,
    scheduler: str | None = None,
) -> str:
    """Writes the preprocessed cases that are missing or out of date, and removes what is none; returns what was done.

    Afterwards the data folders and `gt_segmentations` hold what `nnUNetv2_preprocess` would have put there.

    Args:
        dataset: number or name.
        configurations: of the plans.
        plans: name of the plans.
        workers: local processes; one per processor where None.
        scheduler: address of a Dask scheduler, whose workers are used instead and see the same folders.

    Raises:
        MisfmError: There is no such dataset, plans or configuration, or cases failed; the others are finished.
    """
    plans_file = find_plans(dataset, plans).absolute()
    base, raw = plans_file.parent, _raw_folder(plans_file.parent.name)
    plans_content = read_json(plans_file)
    _require_configurations(configurations, plans_content, plans_file)
    if not (base / "dataset.json").is_file():
        raise MisfmError(
            f"expected {base / 'dataset.json'}, which planning puts there: run nnUNetv2_plan_experiment -d {dataset}."
        )
    dataset_json = read_json(base / "dataset.json")
    cases = _find_cases(raw, dataset_json)
    done, failures = [], {}
    for configuration in configurations:
        target = _target(configuration, plans_content, dataset_json, base)
        sentence, failed = _preprocess_configuration(target, cases, workers, scheduler)
        done.append(sentence)
        failures.update({f"{case} ({configuration})": error for case, error in failed.items()})
    if failures:
        raise _failed(failures, len(cases) * len(configurations))
    return "\n".join([*done, *_copy_labels(raw, base, dataset_json, cases)])


def _raw_folder(name: str) -> Path:
    if not nnUNet_raw.is_set():
        raise MisfmError("expected the environment variable nnUNet_raw to name a folder, but it is not set.")
    raw = Path(str(nnUNet_raw)).absolute() / name
    if not (raw / "dataset.json").is_file():
        raise MisfmError(
            f"expected the raw dataset at {raw}, found no dataset.json there: set nnUNet_raw to its folder."
        )
    return raw


def _require_configurations(configurations: Iterable[str], plans: dict[str, Any], plans_file: Path) -> None:
    known = plans["configurations"]
    for configuration in configurations:
        if configuration not in known:
            raise MisfmError(
                f"expected a configuration of {plans_file}, got {configuration!r}; it has {', '.join(known)}."
            )


def _find_cases(raw: Path, dataset_json: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns nnU-Net's list of training cases: name -> images (a path per channel) and label."""
    try:
        return get_filenames_of_train_images_and_targets(str(raw), dataset_json)
    except OSError as error:
        raise MisfmError(f"the training cases of {raw} could not be listed ({error}).") from error


def _target(configuration: str, plans: dict[str, Any], dataset_json: dict[str, Any], base: Path) -> _Target:
    # a list of all cases would travel with every case
    without_cases = {key: value for key, value in dataset_json.items() if key != "dataset"}
    identifier = PlansManager(plans).get_configuration(configuration).data_identifier
    own_folder = base / OWN_FOLDER
    return _Target(configuration, json.dumps(plans), json.dumps(without_cases), base / identifier, own_folder)


def _failed(failures: dict[str, Exception], num_cases: int) -> MisfmError:
    names = sorted(failures)
    error = failures[names[0]]
    reason = " ".join(str(error).split()).rstrip(".")
    return MisfmError(
        f"{len(names)} of {num_cases} cases failed: {', '.join(names[:_MOST_NAMES])}"
        f"{', ...' if len(names) > _MOST_NAMES else ''}. {names[0]} said: {type(error).__name__}: {reason}. "
        "Mend them and run the same command again; the others are finished."
    )


def _preprocess_configuration(
    target: _Target, cases: dict[str, dict[str, Any]], workers: int | None, scheduler: str | None
) -> tuple[str, dict[str, Exception]]:
    """Returns a sentence on what was done, and the failed cases."""
    settings = _settings(target)
    pending: list[_Case] = []
    finished_files: set[str] = set()
    failures: dict[str, Exception] = {}
    for name, files in cases.items():
        try:
            paths = [*files["images"], files["label"]]
            made_from = fingerprint(map(Path, paths), settings, json.dumps(paths))
        except OSError as error:
            failures[name] = error
            continue
        case = _Case(str(name), tuple(files["images"]), files["label"], made_from)
        written = _files_of_finished(target, case)
        finished_files.update(written)
        if not written:
            pending.append(case)
    num_finished = len(cases) - len(pending) - len(failures)
    num_removed = _remove_all_but(finished_files, target.folder)
    shutil.rmtree(target.unfinished, ignore_errors=True)
    target.unfinished.mkdir(parents=True)
    description = f"preprocessing {target.configuration}"
    task = partial(_preprocess_case, target)
    for case, outcome in run(task, pending, workers=workers, scheduler=scheduler, description=description):
        if isinstance(outcome, Exception):
            failures[case.name] = outcome
    shutil.rmtree(target.unfinished, ignore_errors=True)
    sentence = f"{target.configuration}: preprocessed {len(cases) - num_finished} cases into {target.folder}"
    sentence += f"; {num_finished} were finished before" if num_finished else ""
    sentence += f"; removed {num_removed} files that were out of date or not of this command" if num_removed else ""
    return sentence, failures


def _settings(target: _Target) -> str:
    """Returns all but the case's own files that decides its preprocessed files."""
    plans, dataset_json = json.loads(target.plans), json.loads(target.dataset_json)
    configuration = PlansManager(plans).get_configuration(target.configuration).configuration
    parts = ((configuration, _CONFIGURATION_KEYS), (plans, _PLANS_KEYS), (dataset_json, _DATASET_KEYS))
    # the order of labels and regions counts, hence no sorted keys
    return json.dumps([[part.get(key) for key in keys] for part, keys in parts])


def _files_of_finished(target: _Target, case: _Case) -> list[str]:
    """Returns the names of a case's files, none where it is not finished or another program has changed them."""
    record = target.records.get(f"{target.folder.name}/{case.name}", case.made_from)
    try:
        if record and fingerprint(target.folder / name for name in record["files"]) == record["written"]:
            return record["files"]
    except OSError:
        pass
    return []


def _remove_all_but(names: set[str], folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    stray = [entry for entry in folder.iterdir() if entry.name not in names]
    for entry in stray:
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return len(stray)


def _preprocess_case(target: _Target, case: _Case) -> None:
    """Writes the files of one case aside, moves them into place, and records them; runs in a worker."""
    preprocessor, plans, configuration = _preprocessor(target.plans, target.configuration)
    with tempfile.TemporaryDirectory(dir=target.unfinished) as unfinished:
        preprocessor.run_case_save(
            os.path.join(unfinished, case.name),
            list(case.images),
            case.label,
            plans,
            configuration,
            json.loads(target.dataset_json),
        )
        # the image last: nnU-Net takes it for the sign that a case is there
        names = sorted(os.listdir(unfinished), key=lambda name: name == f"{case.name}.b2nd")
        for name in names:
            os.replace(os.path.join(unfinished, name), target.folder / name)
    record = {"files": names, "written": fingerprint(target.folder / name for name in names)}
    target.records.put(f"{target.folder.name}/{case.name}", case.made_from, record)


@lru_cache(maxsize=1)
def _preprocessor(plans: str, configuration: str) -> tuple[Any, PlansManager, Any]:
    """Returns preprocessor, plans and configuration; nnU-Net searches its folders for the classes that they name."""
    plans_manager = PlansManager(json.loads(plans))
    configuration_manager = plans_manager.get_configuration(configuration)
    return configuration_manager.preprocessor_class(verbose=False), plans_manager, configuration_manager


def _copy_labels(raw: Path, base: Path, dataset_json: dict[str, Any], cases: dict[str, dict[str, Any]]) -> list[str]:
    """Copies the labels for validation, as nnU-Net does, by the raw dataset.json; returns sentences on what differs."""
    raw_json = read_json(raw / "dataset.json")
    raw_cases = _find_cases(raw, raw_json)
    folder = base / "gt_segmentations"
    folder.mkdir(exist_ok=True)
    for name, files in raw_cases.items():
        source, copy = Path(files["label"]), folder / f"{name}{raw_json['file_ending']}"
        if not copy.exists() or source.stat().st_mtime > copy.stat().st_mtime:
            unfinished = folder.with_name(OWN_FOLDER) / f"{copy.name}.{os.getpid()}"
            shutil.copy2(source, unfinished)
            os.replace(unfinished, copy)
    unplanned = raw_cases.keys() - cases.keys()
    if not unplanned:
        return []
    return [
        f"{len(unplanned)} cases of {raw} are missing in the dataset.json beside the plans, so they were left out: "
        "plan again (nnUNetv2_plan_experiment) to take them in."
    ]
