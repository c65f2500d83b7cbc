"""The body of `nnUNetv2_misfm plan`: checks what it is given, lets nnU-Net and the planner work, says what came out."""

import contextlib
import io
import math
from pathlib import Path

from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprint_dataset
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.pct_net_planner import (
    DEFAULT_GPU_MEMORY_GB,
    DEFAULT_PLANS_NAME,
    GIB,
    PLANS_NAME,
    PCTNetPlanner,
    times,
)
from nnunetv2_misfm.plans_file import VALID_NAME, read_json


def plan(dataset: str, gpu_memory_gb: float = DEFAULT_GPU_MEMORY_GB, plans_name: str = PLANS_NAME) -> str:
    """Writes plans for PCT-Net beside nnU-Net's, and first the fingerprint where there is none.

    Args:
        dataset: Number or name of a raw dataset.
        gpu_memory_gb: Memory of the GPU in GiB.
        plans_name: Name of the plans file without its ending.

    Returns:
        A report: the file, what was planned for each configuration, and what is still to be preprocessed.

    Raises:
        MisfmError: No such dataset, 2D images, too little memory, a name that other plans have, or plans that are no
            JSON.
    """
    name = _find_dataset(dataset)
    if not 0 < gpu_memory_gb < math.inf:
        raise MisfmError(f"expected --gpu-memory-gb above 0, got {gpu_memory_gb:g}.")
    folder = Path(str(nnUNet_preprocessed)) / name
    _check_plans_name(folder, plans_name)
    # nnU-Net prints every candidate
    with contextlib.redirect_stdout(io.StringIO()):
        if not (folder / "dataset_fingerprint.json").is_file():
            extract_fingerprint_dataset(convert_dataset_name_to_id(name))
        planner = PCTNetPlanner(name, gpu_memory_gb, plans_name=plans_name)
        planner.plan_experiment()
    return "\n".join([f"wrote {folder / plans_name}.json", *_report(planner, folder)])


def _find_dataset(dataset: str) -> str:
    """Returns the name of a raw dataset given by number or name."""
    for variable in (nnUNet_raw, nnUNet_preprocessed):
        if not variable.is_set():
            raise MisfmError(
                f"expected the environment variable {variable.env_var_name} to name a folder, but it is not set."
            )
    try:
        name = str(maybe_convert_to_dataset_name(dataset))
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]  # nnU-Net goes on with a list of folders
        raise MisfmError(f"expected the number or name of a dataset, got {dataset!r}: {reason}.") from error
    described = Path(str(nnUNet_raw)) / name / "dataset.json"
    if not described.is_file():
        raise MisfmError(f"expected the raw dataset's description at {described}, found none: planning needs it.")
    return name


def _check_plans_name(folder: Path, plans_name: str) -> None:
    """Raises where plans of another planner have the name, or where it makes no results folder."""
    if not VALID_NAME.fullmatch(plans_name):
        raise MisfmError(
            "expected a --overwrite-plans-name of letters, digits, '.', '-' and single '_' that begins with a letter "
            f"or digit, got {plans_name!r}."
        )
    file = folder / f"{plans_name}.json"
    owner = read_json(file).get("experiment_planner_used") if file.is_file() else PCTNetPlanner.__name__
    if plans_name == DEFAULT_PLANS_NAME or owner != PCTNetPlanner.__name__:
        raise MisfmError(f"{plans_name} is the name of other plans, which stay as they are: choose another one.")


def _report(planner: PCTNetPlanner, folder: Path) -> list[str]:
    """Returns a line for each planned configuration, and the command that makes the cases still missing."""
    lines, missing = [], []
    for name in ("3d_lowres", "3d_fullres"):
        configuration = planner.plans["configurations"].get(name)
        if configuration is None:
            continue
        patch, batch = configuration["patch_size"], configuration["batch_size"]
        strides = configuration["architecture"]["arch_kwargs"]["strides"]
        memory = planner.estimate(tuple(patch), strides, batch) / GIB
        cases = configuration["data_identifier"]
        lines.append(
            f"{name}: patch {times(patch)}, batch {batch}, estimated memory {memory:.1f} of "
            f"{planner.UNet_vram_target_GB:g} GB, preprocessed cases in {cases}"
        )
        if not (folder / cases).is_dir():
            missing.append(name)
    if missing:
        number = convert_dataset_name_to_id(planner.dataset_name)
        lines.append(
            "to preprocess: "
            f"nnUNetv2_preprocess -d {number} -plans_name {planner.plans_identifier} -c {' '.join(missing)}"
        )
    return lines
