"""The body of `nnUNetv2_misfm universal`: joins nnU-Net datasets into one, by reference, for one universal model.

Nothing is copied. The universal dataset refers to the images of its sources; each source is preprocessed under plans of
its own (shared spacing, patch and network; its own normalisation), and the universal dataset links to those cases. The
same command goes on where an earlier one stopped.
"""

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nnunetv2.configuration import default_num_processes
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets

from nnunetv2_misfm.data.preprocess import preprocess
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.pct_net_planner import times
from nnunetv2_misfm.planning.universal_extend import (
    as_before_or_less,
    check_channels,
    extended_plans,
    former_plans,
    modalities_of,
    reusing,
)
from nnunetv2_misfm.planning.universal_join import (
    Splits,
    described,
    description,
    joint_splits,
    keep_splits,
    link_cases,
    missing_cases,
    source_splits,
)
from nnunetv2_misfm.planning.universal_plans import (
    CONFIGURATION,
    find_planner,
    joint_fingerprint,
    joint_plans,
    source_fingerprint,
    source_plans,
    with_overrides,
)
from nnunetv2_misfm.planning.universal_sources import UNIVERSAL, RawSource, check_cases, read_sources
from nnunetv2_misfm.planning.universal_tasks import number_tasks, with_mirror_axes
from nnunetv2_misfm.plans_file import PREPROCESSING_KEYS, VALID_NAME, full_name, read_json, write_json
from nnunetv2_misfm.universe import PLANS_KEY, Universe, dataset_number

TRAINER = "nnUNetTrainerHermes"
DEFAULT_PLANNER = "nnUNetPlannerResEncM"
# Tasks of a source that the table names
_MOST_TASKS = 4
# What else in plans and in dataset.json decides how preprocessed cases look
_PLANS_KEYS = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
_LABEL_KEYS = ("labels", "regions_class_order")

_Plans = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        datasets: Numbers or names of the source datasets.
        number: Of the universal dataset, 1 to 999.
        name: Of the universal dataset, without its number.
        same: Classes that share one task, as `4:Anterior=101:hippocampus`.
        modalities: By number of a source, where its channel_names do not tell.
        plans: Name of the universal dataset's plans.
        planner: Class of nnU-Net's planner, or PCTNetPlanner; `DEFAULT_PLANNER` where None.
        gpu_memory_gb: Memory of the GPU in GiB; the planner's default where None.
        spacing_mm: Target spacing (D, H, W) before transposition; nnU-Net's choice where None.
        patch_size: Voxels (D, H, W) after transposition; as planned where None.
        batch_size: As planned where None.
        features: Channels of each stage; as planned where None.
        no_mirroring: Numbers of sources that are not mirrored at all.
        processes: For reading and preprocessing; nnU-Net's default where None.
        preprocessing: Whether to preprocess; else the commands are named.
        extend: Number of a universal dataset whose plans, tasks and modalities are taken over, and its sources too.
        alone: With `extend`: its sources are not joined again.
    """

    datasets: Sequence[str]
    number: int
    name: str
    same: Sequence[str] = ()
    modalities: Mapping[int, str] = field(default_factory=dict)
    plans: str = "nnUNetPlans"
    planner: str | None = None
    gpu_memory_gb: float | None = None
    spacing_mm: Sequence[float] | None = None
    patch_size: Sequence[int] | None = None
    batch_size: int | None = None
    features: Sequence[int] | None = None
    no_mirroring: Sequence[int] = ()
    processes: int | None = None
    preprocessing: bool = True
    extend: int | None = None
    alone: bool = False

    @property
    def dataset(self) -> str:
        """Full name of the universal dataset."""
        return f"Dataset{self.number:03d}_{self.name}"

    @property
    def workers(self) -> int:
        """Processes at the same time."""
        return self.processes or default_num_processes


def join(request: Request) -> str:
    """Makes a universal dataset, ready for training, and returns a report: a line for each source, the next command.

    Args:
        request: What the user asks for.

    Raises:
        MisfmError: What is asked for cannot be had, or a case is unfit; no more is left than the sources' fingerprints.
    """
    _check_request(request)
    planner = find_planner(request.planner or DEFAULT_PLANNER)
    added = _source_names(request)
    former, base = (None, None) if request.extend is None else former_plans(request.extend, request.plans)
    names = added if base is None or request.alone else _with_former(added, base)
    _check_no_mirroring(request, names)
    _check_taken(request.dataset, names, base)
    known = {} if base is None or request.alone else modalities_of(base)
    sources = read_sources(names, {**known, **request.modalities})
    if former is not None and base is not None:
        check_channels(former, base, sources)
    universe = number_tasks(request.dataset, sources, request.same, base)
    splits = [source_splits(source) for source in sources]
    left_right = check_cases(sources, request.workers)
    fingerprints = [source_fingerprint(source, request.workers) for source in sources]
    with described(request.dataset, description(universe, sources), joint_fingerprint(fingerprints)):
        if former is None:
            plans = joint_plans(universe, request.plans, planner, request.gpu_memory_gb, request.spacing_mm)
        else:
            plans = extended_plans(former, request.dataset)
        plans = with_overrides(plans, request.patch_size, request.batch_size, request.features)
        universe = with_mirror_axes(universe, sources, left_right, plans["transpose_forward"], request.no_mirroring)
        if base is not None:
            universe = as_before_or_less(universe, base)
        own_plans = [
            source_plans(plans, universe, source, fingerprint)
            for source, fingerprint in zip(sources, fingerprints, strict=True)
        ]
        if base is not None:
            own_plans = [reusing(own, base, request.plans) for own in own_plans]
        plans = _with_users_configurations({**plans, PLANS_KEY: universe.as_dict()})
        own_plans = [_with_users_configurations(own) for own in own_plans]
    return _finish(request, universe, sources, splits, plans, own_plans)


def _check_request(request: Request) -> None:
    for variable in (nnUNet_raw, nnUNet_preprocessed):
        if not variable.is_set():
            raise MisfmError(
                f"expected the environment variable {variable.env_var_name} to name a folder, but it is not set."
            )
    if not 1 <= request.number <= 999:
        raise MisfmError(f"expected a --dataset of 1 to 999, got {request.number}.")
    for option, name in (("--name", request.name), ("-p", request.plans)):
        if not VALID_NAME.fullmatch(name):
            raise MisfmError(
                f"expected a {option} of letters, digits, '.', '-' and single '_' that begins with a letter or digit, "
                f"got {name!r}."
            )
    _check_numbers(request)
    if request.extend is None:
        if request.alone:
            raise MisfmError("expected --alone together with --extend, got it by itself: add --extend ID.")
        return
    if request.extend == request.number:
        raise MisfmError(f"expected another --dataset than the extended one, got {request.number} for both.")
    planned = {
        "--planner": request.planner,
        "--gpu-memory-gb": request.gpu_memory_gb,
        "--spacing": request.spacing_mm,
        "--patch-size": request.patch_size,
        "--features": request.features,
    }
    for option, value in planned.items():
        if value is not None:
            raise MisfmError(
                f"{option} cannot be had with --extend: dataset {request.extend} has decided it; leave it out."
            )


def _check_numbers(request: Request) -> None:
    memory_gb, spacing_mm = request.gpu_memory_gb, request.spacing_mm
    if memory_gb is not None and not 0 < memory_gb < math.inf:
        raise MisfmError(f"expected a finite --gpu-memory-gb above 0, got {memory_gb:g}.")
    if spacing_mm is not None and not all(0 < value < math.inf for value in spacing_mm):
        raise MisfmError(f"expected a finite --spacing above 0 mm, got {times(spacing_mm)}.")
    counts = {
        "--patch-size": request.patch_size,
        "--batch-size": request.batch_size,
        "--features": request.features,
        "-np": request.processes,
    }
    for option, given in counts.items():
        numbers = [given] if isinstance(given, int) else given or []
        if any(number < 1 for number in numbers):
            raise MisfmError(f"expected a {option} of 1 or more, got {times(numbers)}.")


def _source_names(request: Request) -> list[str]:
    names: list[str] = []
    for dataset in request.datasets:
        name = full_name(dataset)
        if name in names:
            raise MisfmError(f"{name} is given twice in -d: name every dataset once.")
        if dataset_number(name) == request.number:
            raise MisfmError(
                f"{name} is a source, so the universal dataset needs another number than {request.number}."
            )
        names.append(name)
    return names


def _with_former(added: Sequence[str], base: Universe) -> list[str]:
    """Returns the sources of the extended dataset and then the new ones."""
    former = [source.dataset for source in base.sources]
    for name in added:
        if name in former:
            raise MisfmError(f"{name} is a source of {base.dataset} already: leave it out of -d.")
    return [*former, *added]


def _check_no_mirroring(request: Request, names: Sequence[str]) -> None:
    numbers = {dataset_number(name) for name in names}
    stray = [number for number in request.no_mirroring if number not in numbers]
    if stray:
        raise MisfmError(f"expected --no-mirroring of datasets that are joined ({', '.join(names)}), got {stray[0]}.")


def _check_taken(dataset: str, sources: Sequence[str], base: Universe | None) -> None:
    """Raises where the number belongs to anything but a universal dataset of the same sources and origin."""
    number = dataset_number(dataset)
    others = [str(name) for name in find_candidate_datasets(number) if name != dataset]
    if others:
        raise MisfmError(f"dataset id {number} is taken by {others[0]}: choose another with --dataset.")
    folders = [Path(str(variable)) / dataset for variable in (nnUNet_raw, nnUNet_preprocessed)]
    if not any(folder.is_dir() and any(folder.iterdir()) for folder in folders):
        return
    file = folders[0] / "dataset.json"
    mark = read_json(file).get("misfm", {}).get(UNIVERSAL) if file.is_file() else None
    if mark is None:
        raise MisfmError(f"{dataset} was not made by this command: choose another --dataset and --name.")
    if not (folders[1] / "splits_final.json").is_file():
        return  # an earlier run ended before it joined anything
    made_of = {"sources": list(sources), "extends": None if base is None else base.dataset}
    for what, now in made_of.items():
        if mark[what] != now:
            raise MisfmError(
                f"{dataset} was made with {what} {mark[what]}, got {now}: choose another --dataset and --name."
            )


def _finish(
    request: Request,
    universe: Universe,
    sources: Sequence[RawSource],
    splits: Sequence[Splits],
    plans: _Plans,
    own_plans: Sequence[_Plans],
) -> str:
    """Writes all but the description, preprocesses, links, and returns the report."""
    base = Path(str(nnUNet_preprocessed)) / universe.dataset
    for source, own, folds in zip(sources, own_plans, splits, strict=True):
        _write_source_plans(source, own)
        keep_splits(source, folds)
    write_json(plans, base / f"{plans['plans_name']}.json")
    joint = joint_splits(universe, splits)
    write_json(joint, base / "splits_final.json")
    report = [_summary(universe, plans), "", *_table(universe), ""]
    identifiers = [own["configurations"][CONFIGURATION]["data_identifier"] for own in own_plans]
    incomplete = [
        (source, own) for source, own, where in zip(sources, own_plans, identifiers, strict=True)
        if missing_cases(source, where)
    ]  # fmt: skip
    if incomplete and not request.preprocessing:
        commands = [
            f"nnUNetv2_preprocess -d {source.number} -plans_name {own['plans_name']} -c {CONFIGURATION} "
            f"-np {request.workers}"
            for source, own in incomplete
        ]
        return "\n".join([*report, "to preprocess, and then the same command again:", *commands])
    for source, own in incomplete:
        preprocess(source.dataset, [CONFIGURATION], own["plans_name"], request.workers)
    link_cases(universe, sources, identifiers, base / plans["configurations"][CONFIGURATION]["data_identifier"])
    option = "" if request.plans == "nnUNetPlans" else f" -p {request.plans}"
    fold = 0 if joint[0]["val"] else "all"  # a fold that holds out no case cannot be validated
    return "\n".join([*report, f"next: nnUNetv2_train {request.number} {CONFIGURATION} {fold} -tr {TRAINER}{option}"])


def _with_users_configurations(plans: _Plans) -> _Plans:
    """Returns plans with the configurations that the user added to the former ones of their name."""
    file = Path(str(nnUNet_preprocessed)) / plans["dataset_name"] / f"{plans['plans_name']}.json"
    former = read_json(file)["configurations"] if file.is_file() else {}
    users = {name: content for name, content in former.items() if "inherits_from" in content}
    return {**plans, "configurations": {**plans["configurations"], **users}}


def _write_source_plans(source: RawSource, plans: _Plans) -> None:
    """Writes a source's plans and dataset.json, after removing preprocessed cases that they no longer describe."""
    base = Path(str(nnUNet_preprocessed)) / source.dataset
    base.mkdir(parents=True, exist_ok=True)
    plans_file, dataset_file = base / f"{plans['plans_name']}.json", base / "dataset.json"
    now = _of_preprocessing(plans, source.description)
    if plans_file.is_file() and dataset_file.is_file():
        former = _of_preprocessing(read_json(plans_file), read_json(dataset_file))
        if former != now:
            shutil.rmtree(base / plans["configurations"][CONFIGURATION]["data_identifier"], ignore_errors=True)
    write_json(dict(source.description), dataset_file)
    write_json(plans, plans_file)


def _of_preprocessing(plans: Mapping[str, Any], description: Mapping[str, Any]) -> list[Any]:
    configuration = plans["configurations"][CONFIGURATION]
    parts = ((configuration, PREPROCESSING_KEYS), (plans, _PLANS_KEYS), (description, _LABEL_KEYS))
    return [part.get(key) for part, keys in parts for key in keys]


def _summary(universe: Universe, plans: _Plans) -> str:
    planned = plans["configurations"][CONFIGURATION]
    cases = sum(source.num_cases for source in universe.sources)
    counts = (
        f"{cases} cases, {len(universe.tasks)} tasks, {len(universe.modalities)} modalities; spacing "
        f"{times(planned['spacing'])} mm, patch {times(planned['patch_size'])}, batch {planned['batch_size']}"
    )
    return f"wrote {universe.dataset}: {counts}"


def _table(universe: Universe) -> list[str]:
    rows = [("source", "cases", "tasks", "modality", "mirror axes")]
    for source in universe.sources:
        tasks = [universe.tasks[number] for number in source.tasks]
        named = ", ".join(tasks[:_MOST_TASKS]) + (
            f" and {len(tasks) - _MOST_TASKS} more" if tasks[_MOST_TASKS:] else ""
        )
        axes = ", ".join(map(str, source.mirror_axes)) or "none"
        rows.append((source.dataset, str(source.num_cases), named, universe.modalities[source.modality], axes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
