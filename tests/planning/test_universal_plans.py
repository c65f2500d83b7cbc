import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from toy import toy_plans
from universal_datasets import write_raw

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.pct_net_planner import PCTNetPlanner
from nnunetv2_misfm.planning.universal_join import description
from nnunetv2_misfm.planning.universal_plans import (
    find_planner,
    joint_fingerprint,
    joint_plans,
    source_plans,
    with_overrides,
)
from nnunetv2_misfm.planning.universal_sources import Case, RawSource, read_sources
from nnunetv2_misfm.planning.universal_tasks import number_tasks
from nnunetv2_misfm.universe import Universe

UNIVERSAL = "Dataset950_Universal"
INTENSITIES = {"0": {"mean": 50.0, "std": 20.0, "percentile_00_5": -10.0, "percentile_99_5": 90.0}}


def fingerprint(
    spacings: list[list[float]], shapes: list[list[int]], share: float = 1.0, **entries: Any
) -> dict[str, Any]:
    return {
        "spacings": spacings,
        "shapes_after_crop": shapes,
        "foreground_intensity_properties_per_channel": INTENSITIES,
        "median_relative_size_after_cropping": share,
        **entries,
    }


# Joint fingerprint


def test_every_source_has_one_row_however_many_cases_it_has() -> None:
    many = fingerprint([[1, 1, 1], [2, 1, 1], [5, 3, 3]], [[10, 20, 30], [12, 22, 30], [50, 50, 50]], 0.5)
    one = fingerprint([[4, 2, 2]], [[7, 9, 11]], 1.0, foreground_intensity_properties_per_channel={"0": {}})
    assert joint_fingerprint([many, one]) == {
        "spacings": [[2, 1, 1], [4, 2, 2]],
        "shapes_after_crop": [[12, 22, 30], [7, 9, 11]],
        "foreground_intensity_properties_per_channel": INTENSITIES,
        "median_relative_size_after_cropping": 0.75,
    }


# Planners


def test_planners_are_found_as_nnunet_finds_them() -> None:
    assert find_planner("nnUNetPlannerResEncM") is nnUNetPlannerResEncM
    assert find_planner("ExperimentPlanner") is ExperimentPlanner
    assert find_planner("PCTNetPlanner") is PCTNetPlanner


@pytest.mark.parametrize("name", ["Nobody", "DatasetFingerprintExtractor", "np"])
def test_what_is_no_planner_is_refused(name: str) -> None:
    with pytest.raises(MisfmError, match=rf"or PCTNetPlanner as --planner, got {name}\.$"):
        find_planner(name)


# Joint plans


@pytest.fixture
def planned(folders: Path) -> Universe:
    """A universal dataset whose description and fingerprint are written: 40 x 48 x 56 voxels of 1 mm."""
    write_raw(folders / "raw", "Dataset004_Brain", num_cases=2)
    write_raw(folders / "raw", "Dataset101_Abdomen", num_cases=2, channels=["CT"], labels={"background": 0, "liver": 1})
    sources = read_sources(["Dataset004_Brain", "Dataset101_Abdomen"], {})
    universe = number_tasks(UNIVERSAL, sources)
    for name in ("raw", "preprocessed"):
        (folders / name / UNIVERSAL).mkdir()
    (folders / "raw" / UNIVERSAL / "dataset.json").write_text(json.dumps(description(universe, sources)))
    joint = joint_fingerprint([fingerprint([[1, 1, 1]], [[40, 48, 56]])] * 2)
    (folders / "preprocessed" / UNIVERSAL / "dataset_fingerprint.json").write_text(json.dumps(joint))
    return universe


def test_joint_plans_hold_one_configuration_and_no_file_is_written(
    planned: Universe, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # no number of threads for nnU-Net's planner
    threads = torch.get_num_threads()
    plans = joint_plans(planned, "mine", nnUNetPlannerResEncM, gpu_memory_gb=1)
    assert os.environ["nnUNet_n_proc_DA"] == "0" and torch.get_num_threads() == threads
    assert list(plans["configurations"]) == ["3d_fullres"] and plans["plans_name"] == "mine"
    manager = PlansManager(plans).get_configuration("3d_fullres")
    assert manager.data_identifier == "mine_3d_fullres" and manager.spacing == [1, 1, 1]
    assert manager.network_arch_class_name.endswith("ResidualEncoderUNet")
    assert plans["dataset_name"] == UNIVERSAL and plans == json.loads(json.dumps(plans))
    assert not list((folders / "preprocessed" / UNIVERSAL).glob("mine*"))
    assert capsys.readouterr().out == ""


def test_given_spacing_is_transposed_as_nnunet_does(planned: Universe) -> None:
    plans = joint_plans(planned, "nnUNetPlans", nnUNetPlannerResEncM, 1, (1, 1, 3))
    assert plans["transpose_forward"] == [2, 0, 1]
    assert plans["configurations"]["3d_fullres"]["spacing"] == [3, 1, 1]


@pytest.mark.usefixtures("linear_memory")
def test_pct_net_is_planned_for_the_classes_of_one_source(planned: Universe, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    estimate = PCTNetPlanner.estimate

    def counted(planner: PCTNetPlanner, *arguments: Any) -> int:
        asked.append(planner.num_classes)
        return estimate(planner, *arguments)

    monkeypatch.setattr(PCTNetPlanner, "estimate", counted)
    plans = joint_plans(planned, "nnUNetPlans", PCTNetPlanner)
    assert plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"].endswith("PCTNet")
    assert set(asked) == {3}  # background and the two labels of Dataset004_Brain, of three tasks in all


# Overrides


def test_overrides_change_nothing_else() -> None:
    plans = toy_plans()
    before = json.dumps(plans)
    changed = with_overrides(plans, (24, 16, 8), 5, (4, 8, 12))
    entry = changed["configurations"]["3d_fullres"]
    assert (entry["patch_size"], entry["batch_size"]) == ([24, 16, 8], 5)
    assert entry["architecture"]["arch_kwargs"]["features_per_stage"] == [4, 8, 12]
    assert json.dumps(plans) == before == json.dumps(with_overrides(plans))


def test_heads_of_attention_follow_the_features() -> None:
    plans = toy_plans()
    arguments = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    arguments.update(features_per_stage=[24, 48, 128, 256, 512], num_heads=[6, 8, 16])
    entry = with_overrides(plans, features=(8, 16, 32, 64, 128))["configurations"]["3d_fullres"]
    heads = entry["architecture"]["arch_kwargs"]["num_heads"]
    assert len(heads) == 3 and all(width % n == 0 for width, n in zip((32, 64, 128), heads, strict=True))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ({"patch_size": (16, 16, 18)}, r"--patch-size of multiples of 4 x 4 x 4, .* got 16 x 16 x 18\.$"),
        ({"patch_size": (4, 4, 4)}, r"--patch-size of which .* more than one voxel, .* got 4 x 4 x 4: add 4 or more"),
        ({"features": (4, 8)}, r"--features of 3 stages, got 2: 4 x 8\.$"),
    ],
)
def test_overrides_that_do_not_fit_the_network_are_refused(overrides: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MisfmError, match=sentence):
        with_overrides(toy_plans(), **overrides)


def test_smallest_patch_leaves_two_voxels_at_the_deepest_level() -> None:
    planned = PlansManager(with_overrides(toy_plans(), (4, 8, 4))).get_configuration("3d_fullres")
    network = get_network_from_plans(
        planned.network_arch_class_name, planned.network_arch_init_kwargs,
        planned.network_arch_init_kwargs_req_import, 1, 2, deep_supervision=False,
    )  # fmt: skip
    assert network(torch.zeros(1, 1, 4, 8, 4)).shape[2:] == (4, 8, 4)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        network(torch.zeros(1, 1, 4, 4, 4))


# A source's plans


def own(channels: tuple[str, ...], print_: dict[str, Any], transpose: list[int]) -> dict[str, Any]:
    cases = (Case("a", ("i",), "l"),)
    source = RawSource("Dataset101_Abdomen", {}, channels, {"liver": (1,)}, False, None, "NibabelIO", cases)
    plans = {**toy_plans(), "dataset_name": UNIVERSAL, "transpose_forward": transpose}
    return source_plans(plans, number_tasks(UNIVERSAL, [source]), source, print_)


def test_source_shares_the_network_and_keeps_what_is_its_own() -> None:
    plans = own(("CT",), fingerprint([[3, 1, 2], [3, 1, 2]], [[10, 20, 30], [10, 21, 31]]), [0, 2, 1])
    entry, shared = plans["configurations"]["3d_fullres"], toy_plans()["configurations"]["3d_fullres"]
    assert list(plans["configurations"]) == ["3d_fullres"]
    assert {key: entry[key] for key in entry if entry[key] != shared[key]} == {
        "data_identifier": "nnUNetPlansOf950_3d_fullres", "normalization_schemes": ["CTNormalization"]
    }  # fmt: skip
    assert plans["dataset_name"] == "Dataset101_Abdomen" and plans["plans_name"] == "nnUNetPlansOf950"
    assert plans["image_reader_writer"] == "NibabelIO"
    assert plans["foreground_intensity_properties_per_channel"] == INTENSITIES
    assert plans["original_median_spacing_after_transp"] == [3, 2, 1]
    assert plans["original_median_shape_after_transp"] == [10, 30, 20]  # 30.5 and 20.5, halves to even
    universe = Universe.from_plans(plans)
    assert universe.source == "Dataset101_Abdomen" and universe.tasks == ("101:liver",)


@pytest.mark.parametrize(
    ("channels", "share", "schemes", "masked"),
    [
        (("MR",), 0.74, ["ZScoreNormalization"], [True]),
        (("MR",), 0.75, ["ZScoreNormalization"], [False]),
        (("CT",), 0.5, ["CTNormalization"], [False]),
        (("PET", "CT"), 0.5, ["ZScoreNormalization", "CTNormalization"], [True, False]),
    ],
)
def test_modality_decides_the_normalisation(
    channels: tuple[str, ...], share: float, schemes: list[str], masked: list[bool]
) -> None:
    entry = own(channels, fingerprint([[1, 1, 1]], [[9, 9, 9]], share), [0, 1, 2])["configurations"]["3d_fullres"]
    assert (entry["normalization_schemes"], entry["use_mask_for_norm"]) == (schemes, masked)
