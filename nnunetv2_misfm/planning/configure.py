"""Named configurations in a plans file, so that nobody edits JSON by hand.

nnU-Net's own way to vary a run is a configuration that `inherits_from` another. Inheritance is shallow (a nested
dictionary of the child replaces the parent's whole), so the blocks written here are merged ones.
"""

import json
import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.recipe import Recipe, read_recipes

_ARCHITECTURE = "architecture"
_METHODS = {t.method.method for t in vars(nnunetv2_misfm_trainers).values() if getattr(t, "method", None) is not None}


def configure(dataset: str, configuration: str, name: str, settings: Sequence[str], plans: str = "nnUNetPlans") -> Path:
    """Writes the configuration `name` into a dataset's plans and returns the plans file.

    A setting is `key=value` with a JSON value (or a bare word): a key of the `misfm` block (`num_epochs=50`), of a
    method's own block (`volume_fusion.num_levels=8`), of nnU-Net's configuration (`batch_size=4`), or of its
    network's arguments (`architecture.features_per_stage=[16,32,64,128]`).

    Args:
        dataset: Number or name of the dataset.
        configuration: The configuration to inherit from.
        name: The configuration to write; one of that name that inherits is replaced, a planned one is not.
        settings: `key=value` strings; they add to what the parent's block says.
        plans: Name of the plans file without its ending.

    Raises:
        MisfmError: No such plans or configuration, an unknown key, a wrong value, or a name that is taken.
    """
    plans_file = find_plans(dataset, plans)
    content = json.loads(plans_file.read_text())
    configurations = content["configurations"]
    if configuration not in configurations:
        raise MisfmError(
            f"expected one of the configurations {', '.join(configurations)} of {plans_file}, got {configuration!r}."
        )
    if name == configuration or "inherits_from" not in configurations.get(name, {"inherits_from": ""}):
        raise MisfmError(f"{name!r} is a planned configuration of {plans_file}: choose another --name.")
    parent = PlansManager(content).get_configuration(configuration).configuration
    entry = {"inherits_from": configuration, **_merged(parent, settings)}
    read_recipes(entry.get("misfm"), Recipe())
    content["configurations"] = {**configurations, name: entry}
    _write_json(content, plans_file)
    return plans_file


def find_plans(dataset: str, plans: str = "nnUNetPlans") -> Path:
    """Returns the plans file of a dataset, given by number or name.

    Raises:
        MisfmError: nnUNet_preprocessed is not set, or there is no such dataset or file.
    """
    if not nnUNet_preprocessed.is_set():
        raise MisfmError("expected the environment variable nnUNet_preprocessed to name a folder, but it is not set.")
    try:
        dataset_name = maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset)
    except (RuntimeError, ValueError) as error:
        raise MisfmError(f"expected the number or name of a dataset, got {dataset!r}: {error}") from error
    plans_file = Path(str(nnUNet_preprocessed)) / dataset_name / f"{plans}.json"
    if not plans_file.is_file():
        raise MisfmError(
            f"expected plans at {plans_file}, found none: run nnUNetv2_plan_and_preprocess -d {dataset} first."
        )
    return plans_file


def _merged(parent: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Returns the keys of a child configuration: nnU-Net's own that are set, and whole merged blocks."""
    common = {field.name for field in fields(Recipe)}
    child: dict[str, Any] = {}
    block = deepcopy(parent.get("misfm", {}))
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise MisfmError(f"expected settings of the form key=value, got {setting!r}.")
        value = _value(text)
        first, dot, rest = key.partition(".")
        if key in common:
            block[key] = value
        elif dot and first in _METHODS:
            block.setdefault(first, {})[rest] = value
        elif dot and first == _ARCHITECTURE:
            child.setdefault(_ARCHITECTURE, deepcopy(parent[_ARCHITECTURE]))["arch_kwargs"].update(
                {rest: _architecture_value(parent, rest, value)}
            )
        elif key in parent and key not in (_ARCHITECTURE, "misfm", "inherits_from"):
            child[key] = _like(parent[key], key, value)
        else:
            own = ", ".join(k for k in parent if k not in (_ARCHITECTURE, "misfm", "inherits_from"))
            raise MisfmError(
                f"unknown key {key!r}; known are {', '.join(sorted(common))} (misfm), those of "
                f"{', '.join(sorted(_METHODS))} (method.key), {own} (nnU-Net) and {_ARCHITECTURE}.key."
            )
    if block:
        child["misfm"] = block
    return child


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _like(present: Any, key: str, value: Any) -> Any:
    """Returns a value for nnU-Net's own key if it has the present one's type and length."""
    numbers = isinstance(present, int | float) and isinstance(value, int | float) and not isinstance(value, bool)
    same = type(value) is type(present) or (numbers and not isinstance(present, bool))
    if isinstance(present, list):
        same = (
            same and len(value) == len(present) and all(type(v) is type(p) for v, p in zip(value, present, strict=True))
        )
    if not same:
        raise MisfmError(f"{key} expected a value like {present!r}, got {value!r}.")
    return value


def _architecture_value(parent: dict[str, Any], key: str, value: Any) -> Any:
    known = parent[_ARCHITECTURE]["arch_kwargs"]
    if key not in known:
        raise MisfmError(f"unknown key 'architecture.{key}'; the plans' network has {', '.join(known)}.")
    return _like(known[key], f"architecture.{key}", value)


def _write_json(content: dict[str, Any], path: Path) -> None:
    """Replaces a JSON file atomically, so that an interrupted run leaves the former plans."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=4, sort_keys=False))
    os.replace(temporary, path)
