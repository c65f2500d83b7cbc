"""What a universal dataset takes over from the one that it extends: plans, preprocessed cases, limits on mirroring."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.universal_plans import CONFIGURATION
from nnunetv2_misfm.planning.universal_sources import RawSource
from nnunetv2_misfm.plans_file import find_plans, read_json
from nnunetv2_misfm.universe import PLANS_KEY, Universe, dataset_number


def former_plans(number: int, plans_name: str) -> tuple[dict[str, Any], Universe]:
    """Returns the plans of a universal dataset, and what they say of its tasks.

    Raises:
        MisfmError: It is not there or not universal.
    """
    plans = read_json(find_plans(str(number), plans_name))
    former = Universe.from_plans(plans)
    if former.source is not None:
        raise MisfmError(f"expected a universal dataset to --extend, got {number}, a source of {former.dataset}.")
    return plans, former


def modalities_of(former: Universe) -> dict[int, str]:
    """Returns the modality of each of its sources, by number."""
    return {dataset_number(source.dataset): former.modalities[source.modality] for source in former.sources}


def check_channels(plans: dict[str, Any], former: Universe, sources: Sequence[RawSource]) -> None:
    """Raises where sources have other channels than the universal dataset that is extended."""
    num_channels = len(plans["configurations"][CONFIGURATION]["normalization_schemes"])
    for source in sources:
        if len(source.channels) != num_channels or (num_channels > 1 and source.modality not in former.modalities):
            raise MisfmError(
                f"expected datasets of the same channels as in {former.dataset} ({num_channels}: "
                f"{' or '.join(former.modalities)}), got {source.modality} in {source.dataset}: leave it out of -d."
            )


def extended_plans(plans: dict[str, Any], dataset: str) -> dict[str, Any]:
    """Returns the plans of the extending dataset: the former ones, with the configurations that the user added."""
    return {**{key: value for key, value in plans.items() if key != PLANS_KEY}, "dataset_name": dataset}


def reusing(own: dict[str, Any], former: Universe, plans_name: str) -> dict[str, Any]:
    """Returns the plans of a source with the preprocessed cases of its plans for the former universal dataset.

    Args:
        own: Plans of the source for the extending dataset.
        former: The universal dataset that is extended.
        plans_name: Name of the universal datasets' plans.
    """
    file = Path(str(nnUNet_preprocessed)) / own["dataset_name"] / f"{former.source_plans_name(plans_name)}.json"
    if not file.is_file():
        return own
    return {**read_json(file), "plans_name": own["plans_name"], PLANS_KEY: own[PLANS_KEY]}


def as_before_or_less(universe: Universe, former: Universe) -> Universe:
    """Returns the universe, its former sources mirrored along no axis along which they were not mirrored before."""
    known = {source.dataset: source.mirror_axes for source in former.sources}
    return replace(
        universe,
        sources=tuple(
            replace(
                source, mirror_axes=tuple(a for a in source.mirror_axes if a in known.get(source.dataset, (0, 1, 2)))
            )
            for source in universe.sources
        ),
    )
