"""Named configurations in a plans file, so that nobody edits JSON by hand.

nnU-Net's own way to vary a run is a configuration that `inherits_from` another. Inheritance is shallow (a nested
dictionary of the child replaces the parent's whole), so the blocks written here are merged ones.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import PREPROCESSING_KEYS, VALID_NAME, find_plans, read_json, write_json
from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.five_levels import FiveLevelTrainer
from nnunetv2_misfm.trainers.recipe import Recipe, read_recipes

_ARCHITECTURE = "architecture"
_TRAINERS = [getattr(nnunetv2_misfm_trainers, name) for name in nnunetv2_misfm_trainers.__all__]
_METHODS = {trainer.method.method for trainer in _TRAINERS if trainer.method is not None}
# Keys of a configuration that are not set by name: blocks, and what ties configurations together
_STRUCTURE = (_ARCHITECTURE, "misfm", "inherits_from", "previous_stage", "next_stage")
# Keys of the block from which a trainer may find no network
_NETWORK_KEYS = ("features_per_stage", "num_heads")


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
        MisfmError: No such plans or configuration, an unknown key, a wrong value, a name that is taken, or settings
            from which no network can be built; the plans are as before.
    """
    plans_file, content = configured(dataset, configuration, name, settings, plans)
    write_json(content, plans_file)
    return plans_file


def configured(
    dataset: str, configuration: str, name: str, settings: Sequence[str], plans: str = "nnUNetPlans"
) -> tuple[Path, dict[str, Any]]:
    """Returns the plans file and its content with the configuration that `configure` would write; writes nothing.

    Raises:
        MisfmError: As `configure`.
    """
    plans_file = find_plans(dataset, plans)
    content = read_json(plans_file)
    configurations = content["configurations"]
    if configuration not in configurations:
        raise MisfmError(
            f"expected one of the configurations {', '.join(configurations)} of {plans_file}, got {configuration!r}."
        )
    try:
        parent = PlansManager(content).get_configuration(configuration).configuration
    except (RuntimeError, ValueError) as error:
        raise MisfmError(
            f"{configuration!r} of {plans_file} inherits from what is not there or itself: {error}"
        ) from error
    _check_name(name, configuration, configurations)
    read_recipes(parent.get("misfm"), Recipe())
    entry = {"inherits_from": configuration, **_merged(parent, settings)}
    read_recipes(entry.get("misfm"), Recipe())
    content["configurations"] = {**configurations, name: entry}
    _check_networks(PlansManager(content), name, entry)
    return plans_file, content


def _check_name(name: str, configuration: str, configurations: dict[str, Any]) -> None:
    """Raises where a configuration may not be written under a name."""
    if not VALID_NAME.fullmatch(name):
        raise MisfmError(
            "expected a --name of letters, digits, '.', '-' and single '_' that begins with a letter or digit, "
            f"got {name!r}."
        )
    if name in configurations and "inherits_from" not in configurations[name]:
        raise MisfmError(f"{name!r} is a planned configuration, which stays as it is: choose another --name.")
    lineage = [configuration]
    while "inherits_from" in configurations[lineage[-1]]:
        lineage.append(configurations[lineage[-1]]["inherits_from"])
    if name in lineage:
        raise MisfmError(f"{name!r} cannot inherit from {configuration!r}, which rests on it: choose another --name.")


def _merged(parent: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """Returns the keys of a child configuration: nnU-Net's own that are set, and whole merged blocks."""
    common = {field.name for field in fields(Recipe)}
    child: dict[str, Any] = {}
    block = deepcopy(parent.get("misfm") or {})
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
        elif key in parent and key not in _STRUCTURE:
            child[key] = _like(parent[key], key, value)
        else:
            own = ", ".join(k for k in parent if k not in _STRUCTURE)
            raise MisfmError(
                f"unknown key {key!r}; known are {', '.join(sorted(common))} (misfm), those of "
                f"{', '.join(sorted(_METHODS))} (method.key), {own} (nnU-Net) and {_ARCHITECTURE}.key."
            )
    changed = [key for key in PREPROCESSING_KEYS if key in child]
    if changed and child.get("data_identifier", parent["data_identifier"]) == parent["data_identifier"]:
        raise MisfmError(
            f"{changed[0]} asks for other preprocessed cases than those in {parent['data_identifier']}, so expected a "
            "folder of their own for them, got none: set data_identifier=NAME beside it."
        )
    if block:
        child["misfm"] = block
    return child


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=str)  # NaN and Infinity are no JSON
    except json.JSONDecodeError:
        return text


def _like(present: Any, key: str, value: Any) -> Any:
    """Returns a value for nnU-Net's own key, whole numbers as floats where the present one has floats.

    Raises:
        MisfmError: The value has not the type, the length or the sign of the present one (None says nothing of that).
    """
    if present is None:
        return value
    fitted: Any = float(value) if isinstance(present, float) and type(value) is int else value
    alike = type(fitted) is type(present)
    if alike and isinstance(present, list):
        if len(fitted) == len(present):
            return [_like(p, f"{key}[{i}]", v) for i, (p, v) in enumerate(zip(present, fitted, strict=True))]
        alike = False
    if type(present) in (int, float) and alike:
        alike = fitted > 0 or present <= 0
    if not alike:
        raise MisfmError(f"{key} expected a value like {present!r}, got {value!r}.")
    return fitted


def _architecture_value(parent: dict[str, Any], key: str, value: Any) -> Any:
    known = parent[_ARCHITECTURE]["arch_kwargs"]
    if key not in known:
        raise MisfmError(f"unknown key 'architecture.{key}'; the plans' network has {', '.join(known)}.")
    return _like(known[key], f"architecture.{key}", value)


def _check_networks(manager: PlansManager, name: str, entry: dict[str, Any]) -> None:
    """Raises where a trainer could not build its network under a configuration, from what `entry` sets of it."""
    block = entry.get("misfm", {})
    blocks = [b for b in (block, *block.values()) if isinstance(b, dict)]
    sized = any(key in b for b in blocks for key in _NETWORK_KEYS)
    resolved = manager.get_configuration(name)
    concerned = [nnUNetTrainerBaseline] if _ARCHITECTURE in entry else []
    if sized and len(resolved.patch_size) == 3:
        concerned += [trainer for trainer in _TRAINERS if issubclass(trainer, FiveLevelTrainer)]
    for trainer in concerned:
        try:
            with torch.device("meta"):  # shapes alone: takes neither time nor memory
                trainer.build_network_architecture(manager, resolved, 1, 2)
        except (AssertionError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise MisfmError(f"{trainer.__name__} could not build its network from these settings: {error}") from error
