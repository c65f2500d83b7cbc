"""Plans of a universal dataset and of its sources: one spacing, patch and network, but each source's normalisation.

The joint plans come from nnU-Net's planner on a joint fingerprint, in which every source has one vote: one row with its
median spacing and its median shape after cropping, however many cases it has.
"""

import contextlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nnunetv2
import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.json_export import recursive_fix_for_json_export

from nnunetv2_misfm.architectures.pct_net import default_num_heads
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.pct_net_planner import PCTNetPlanner, times
from nnunetv2_misfm.planning.universal_sources import RawSource
from nnunetv2_misfm.plans_file import read_json
from nnunetv2_misfm.universe import PLANS_KEY, Universe

CONFIGURATION = "3d_fullres"
# Share of the image that is left by cropping, below which nnU-Net normalises inside the mask alone
# (ExperimentPlanner.determine_normalization_scheme_and_whether_mask_is_used_for_norm)
_CROPPED_SHARE = 3 / 4


def source_fingerprint(source: RawSource, processes: int) -> dict[str, Any]:
    """Returns a source's fingerprint, extracted by nnU-Net where there is none."""
    file = Path(str(nnUNet_preprocessed)) / source.dataset / "dataset_fingerprint.json"
    if not file.is_file():
        with contextlib.redirect_stdout(io.StringIO()):
            extract_fingerprint_dataset(source.number, num_processes=processes)
    return read_json(file)


def joint_fingerprint(fingerprints: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the fingerprint of the universal dataset: a row for each source.

    Intensity properties are the first source's; nothing is normalised by them.
    """
    return {
        "spacings": [np.median(fingerprint["spacings"], axis=0).tolist() for fingerprint in fingerprints],
        "shapes_after_crop": [
            np.round(np.median(fingerprint["shapes_after_crop"], axis=0)).astype(int).tolist()
            for fingerprint in fingerprints
        ],
        "foreground_intensity_properties_per_channel": fingerprints[0]["foreground_intensity_properties_per_channel"],
        "median_relative_size_after_cropping": float(
            np.mean([fingerprint["median_relative_size_after_cropping"] for fingerprint in fingerprints])
        ),
    }


def find_planner(name: str) -> type[ExperimentPlanner]:
    """Returns a planner by its class's name, as nnU-Net finds its own; ours is PCTNetPlanner.

    Raises:
        MisfmError: There is none.
    """
    if name == PCTNetPlanner.__name__:
        return PCTNetPlanner
    folder = Path(nnunetv2.__path__[0]) / "experiment_planning"
    found = recursive_find_python_class(str(folder), name, "nnunetv2.experiment_planning")
    if not isinstance(found, type) or not issubclass(found, ExperimentPlanner):
        raise MisfmError(
            f"expected a planner of nnU-Net (ExperimentPlanner, nnUNetPlannerResEncM, ...) or {PCTNetPlanner.__name__} "
            f"as --planner, got {name}."
        )
    return found


def joint_plans(
    universe: Universe,
    plans_name: str,
    planner: type[ExperimentPlanner],
    gpu_memory_gb: float | None = None,
    spacing_mm: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Returns the plans of a universal dataset whose dataset.json and fingerprint are written.

    Memory is estimated for the classes of the source that has the most, since a sample is asked for its own alone.

    Args:
        universe: With the tasks of the sources.
        plans_name: Name of the plans.
        planner: The planner's class.
        gpu_memory_gb: Memory of the GPU in GiB; the planner's own default where None.
        spacing_mm: Target spacing (D, H, W) in mm before transposition; nnU-Net's choice where None.
    """
    memory = {} if gpu_memory_gb is None else {"gpu_memory_target_in_gb": gpu_memory_gb}
    spacing = None if spacing_mm is None else [float(value) for value in spacing_mm]
    planning: Any = planner(universe.dataset, plans_name=plans_name, overwrite_target_spacing=spacing, **memory)
    classes = {f"class_{number}": number for number in range(1, universe.max_tasks + 1)}
    planning.dataset_json = {**planning.dataset_json, "labels": {"background": 0, **classes}}
    planning.save_plans = recursive_fix_for_json_export  # the file is written once all is known, atomically
    with contextlib.redirect_stdout(io.StringIO()), _at_least_one_thread():
        plans = planning.plan_experiment()
    if CONFIGURATION not in plans["configurations"]:
        raise MisfmError(f"expected 3D images, but nnU-Net plans no {CONFIGURATION} for them: leave 2D datasets out.")
    planned = {**plans["configurations"][CONFIGURATION], "data_identifier": f"{plans_name}_{CONFIGURATION}"}
    return json.loads(json.dumps({**plans, "configurations": {CONFIGURATION: planned}}))


@contextlib.contextmanager
def _at_least_one_thread() -> Iterator[None]:
    """Lets planning run where nnUNet_n_proc_DA is 0: nnU-Net's planner computes with as many threads."""
    variable = "nnUNet_n_proc_DA"
    former = os.environ.get(variable)
    if former == "0":
        os.environ[variable] = "1"
    try:
        yield
    finally:
        if former == "0":
            os.environ[variable] = former


def with_overrides(
    plans: Mapping[str, Any],
    patch_size: Sequence[int] | None = None,
    batch_size: int | None = None,
    features: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Returns plans with what the user sets instead of what was planned.

    Args:
        plans: Of the universal dataset.
        patch_size: Voxels (D, H, W) of the preprocessed arrays, so after transposition.
        batch_size: Samples of a step.
        features: Channels of each stage of the network.

    Raises:
        MisfmError: The network cannot take them.
    """
    planned = plans["configurations"][CONFIGURATION]
    architecture = planned["architecture"]
    arguments = dict(architecture["arch_kwargs"])
    changed: dict[str, Any] = {}
    if patch_size is not None:
        divisor = np.prod(arguments["strides"], axis=0).astype(int).tolist()
        if any(size < 1 or size % by for size, by in zip(patch_size, divisor, strict=True)):
            raise MisfmError(
                f"expected a --patch-size of multiples of {times(divisor)}, by which the network pools (axes as in the "
                f"preprocessed arrays), got {times(patch_size)}."
            )
        if list(patch_size) == divisor:
            raise MisfmError(
                "expected a --patch-size of which the network's deepest level keeps more than one voxel, as its "
                f"normalisation needs, got {times(patch_size)}: add {min(divisor)} or more along an axis."
            )
        changed["patch_size"] = list(patch_size)
    if batch_size is not None:
        changed["batch_size"] = batch_size
    if features is not None:
        stages = len(arguments["features_per_stage"])
        if len(features) != stages:
            raise MisfmError(f"expected --features of {stages} stages, got {len(features)}: {times(features)}.")
        arguments["features_per_stage"] = list(features)
        if "num_heads" in arguments:
            arguments["num_heads"] = list(default_num_heads(tuple(features)))
        changed["architecture"] = {**architecture, "arch_kwargs": arguments}
    configurations = {**plans["configurations"], CONFIGURATION: {**planned, **changed}}
    return {**plans, "configurations": configurations}


def source_plans(
    plans: Mapping[str, Any], universe: Universe, source: RawSource, fingerprint: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the plans under which a source is preprocessed and predicted.

    Spacing, patch and network are the universal dataset's. Normalisation is the source's own, as nnU-Net would plan it
    for its modality: CT is clipped and scaled by the source's foreground intensities, all else z-scored case by case.

    Args:
        plans: Of the universal dataset.
        universe: Its tasks and modalities.
        source: The source.
        fingerprint: The source's.
    """
    name = universe.source_plans_name(plans["plans_name"])
    schemes = [get_normalization_scheme(channel) for channel in source.channels]
    masked = fingerprint["median_relative_size_after_cropping"] < _CROPPED_SHARE
    axes = plans["transpose_forward"]
    planned = {
        **plans["configurations"][CONFIGURATION],
        "data_identifier": f"{name}_{CONFIGURATION}",
        "normalization_schemes": [scheme.__name__ for scheme in schemes],
        "use_mask_for_norm": [
            masked and bool(scheme.leaves_pixels_outside_mask_at_zero_if_use_mask_for_norm_is_true)
            for scheme in schemes
        ],
    }
    return {
        **plans,
        "dataset_name": source.dataset,
        "plans_name": name,
        "original_median_spacing_after_transp": np.median(fingerprint["spacings"], axis=0)[axes].tolist(),
        "original_median_shape_after_transp": [
            round(size) for size in np.median(fingerprint["shapes_after_crop"], axis=0)[axes].tolist()
        ],
        "image_reader_writer": source.reader,
        "foreground_intensity_properties_per_channel": fingerprint["foreground_intensity_properties_per_channel"],
        "configurations": {CONFIGURATION: planned},
        PLANS_KEY: universe.answering(source.dataset).as_dict(),
    }
