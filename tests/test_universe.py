import json
from dataclasses import replace

import pytest

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.universe import PLANS_KEY, Source, Universe

HIPPOCAMPUS = Source("Dataset004_Hippocampus", (0, 1), ((1,), (2,)), 1, num_cases=7)
TUMOURS = Source(
    "Dataset101_Tumours", (2, 3, 0), ((1, 2), (2,), (4,)), 0, has_regions=True, ignore_label=5, mirror_axes=(0, 2)
)
UNIVERSE = Universe(
    "Dataset950_Universal", ("anterior", "posterior", "whole", "core"), ("CT", "MR"), (HIPPOCAMPUS, TUMOURS)
)


def plans_of(universe: Universe) -> dict[str, object]:
    """As they come back from a plans file."""
    return json.loads(json.dumps({"plans_name": "nnUNetPlans", PLANS_KEY: universe.as_dict()}))


@pytest.mark.parametrize("universe", [UNIVERSE, UNIVERSE.answering("Dataset101_Tumours")], ids=["whole", "source"])
def test_plans_keep_all_of_it(universe: Universe) -> None:
    restored = Universe.from_plans(plans_of(universe))
    assert restored == universe and hash(restored) == hash(universe)  # tuples all through


def test_plans_hold_plain_data() -> None:
    content = plans_of(UNIVERSE)[PLANS_KEY]
    assert content == {
        "dataset": "Dataset950_Universal",
        "tasks": ["anterior", "posterior", "whole", "core"],
        "modalities": ["CT", "MR"],
        "sources": [
            {
                "dataset": "Dataset004_Hippocampus", "tasks": [0, 1], "values": [[1], [2]], "modality": 1,
                "has_regions": False, "ignore_label": None, "mirror_axes": [0, 1, 2], "num_cases": 7,
            },
            {
                "dataset": "Dataset101_Tumours", "tasks": [2, 3, 0], "values": [[1, 2], [2], [4]], "modality": 0,
                "has_regions": True, "ignore_label": 5, "mirror_axes": [0, 2], "num_cases": 0,
            },
        ],
        "source": None,
        "extends": None,
    }  # fmt: skip


def test_ordinary_plans_are_refused_with_the_way_out() -> None:
    with pytest.raises(
        MisfmError,
        match=r"^expected plans of a universal dataset or of one of its sources, got nnUNetPlans of "
        r"Dataset004_Hippocampus, .*nnUNetv2_misfm universal.* -p .*\.$",
    ):
        Universe.from_plans({"plans_name": "nnUNetPlans", "dataset_name": "Dataset004_Hippocampus"})


def test_answering_changes_only_the_source() -> None:
    answering = UNIVERSE.answering("Dataset004_Hippocampus")
    assert UNIVERSE.source is None and answering.source == "Dataset004_Hippocampus"
    assert replace(answering, source=None) == UNIVERSE


def test_a_case_belongs_to_the_source_whose_number_it_begins_with() -> None:
    assert (HIPPOCAMPUS.prefix, TUMOURS.prefix) == ("004_", "101_")
    assert UNIVERSE.source_of("004_hippocampus_101_") == HIPPOCAMPUS
    assert UNIVERSE.source_of("101_004_case") == TUMOURS
    # The table that is kept after the first question does not follow a changed universe
    assert replace(UNIVERSE, sources=(replace(HIPPOCAMPUS, num_cases=8),)).source_of("004_a").num_cases == 8


def test_sources_are_found_by_name() -> None:
    assert UNIVERSE.named("Dataset101_Tumours") is TUMOURS
    with pytest.raises(
        MisfmError,
        match=r"^expected a source of Dataset950_Universal \(Dataset004_Hippocampus, Dataset101_Tumours\), got "
        r"Dataset950_Universal\.$",
    ):
        UNIVERSE.named("Dataset950_Universal")


def test_samples_are_padded_to_the_most_tasks_of_a_source() -> None:
    assert UNIVERSE.max_tasks == 3
