"""Plans files: where they lie, how they are read and written, and what names and keys mean in them."""

import json
import os
import re
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_misfm.errors import MisfmError

# nnU-Net's keys that change the preprocessed cases, which lie in the folder `data_identifier`
PREPROCESSING_KEYS = (
    "preprocessor_name",
    "spacing",
    "normalization_schemes",
    "use_mask_for_norm",
    "resampling_fn_data",
    "resampling_fn_seg",
    "resampling_fn_data_kwargs",
    "resampling_fn_seg_kwargs",
)
# A name of plans or of a configuration: a part of the results folder, which nnU-Net takes apart at double underscores
VALID_NAME = re.compile(r"(?!.*__)[A-Za-z0-9][A-Za-z0-9_.-]*")


def full_name(dataset: str) -> str:
    """Returns the full name of a dataset, given by number or name.

    Raises:
        MisfmError: There is none, or several of this number.
    """
    try:
        return maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]  # nnU-Net goes on with a list of folders
        raise MisfmError(f"expected the number or name of a dataset, got {dataset!r}: {reason}.") from error


def find_plans(dataset: str, plans: str = "nnUNetPlans") -> Path:
    """Returns the plans file of a dataset, given by number or name.

    Raises:
        MisfmError: nnUNet_preprocessed is not set, or there is no such dataset or file.
    """
    if not nnUNet_preprocessed.is_set():
        raise MisfmError("expected the environment variable nnUNet_preprocessed to name a folder, but it is not set.")
    plans_file = Path(str(nnUNet_preprocessed)) / full_name(dataset) / f"{plans}.json"
    if not plans_file.is_file():
        raise MisfmError(
            f"expected plans at {plans_file}, found none: run nnUNetv2_plan_and_preprocess -d {dataset} first."
        )
    return plans_file


def read_json(path: Path) -> dict[str, Any]:
    """Returns the content of a plans file.

    Raises:
        MisfmError: The file is no JSON.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise MisfmError(f"{path} is no JSON ({error}): mend it or plan again.") from error


def write_json(content: dict[str, Any] | list[Any], path: Path) -> None:
    """Replaces a JSON file atomically, so that an interrupted run leaves the former plans."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "w") as file:
            json.dump(content, file, indent=4)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise MisfmError(f"{path} could not be written ({error}); the former file is intact.") from error
    finally:
        temporary.unlink(missing_ok=True)
