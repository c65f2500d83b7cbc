import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pct_net_plans import NAME, gigabytes, planned, written

from nnunetv2_misfm.cli import main
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.configure import configure
from nnunetv2_misfm.planning.plan import plan
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet

# What is written


@pytest.mark.usefixtures("linear_memory")
def test_large_images_get_a_low_resolution_and_a_cascade_as_in_nnunet(dataset: Callable) -> None:
    base = dataset(shape=(500, 500, 500))
    report = plan("801", gigabytes(128, 128, 128))
    configurations = written(base)["configurations"]
    assert configurations.keys() == {"3d_lowres", "3d_fullres", "3d_cascade_fullres"}
    low = configurations["3d_lowres"]
    assert low["patch_size"] == [128, 128, 128] and low["next_stage"] == "3d_cascade_fullres"
    assert math.prod(low["median_image_size_in_voxels"]) == pytest.approx(4 * 128**3, rel=0.1)
    assert configurations["3d_cascade_fullres"] == {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres"}
    command = "nnUNetv2_preprocess -d 801 -plans_name nnUNetPCTNetPlans -c 3d_lowres 3d_fullres"
    assert [line.split(":")[0] for line in report.splitlines()[1:3]] == ["3d_lowres", "3d_fullres"]
    assert report.splitlines()[0] == f"wrote {base / 'nnUNetPCTNetPlans.json'}"
    assert report.splitlines()[3] == f"to preprocess: {command}"


@pytest.mark.usefixtures("linear_memory")
def test_plans_of_another_name_and_number_of_the_dataset(dataset: Callable) -> None:
    base = dataset()
    plan(NAME, 8, "mine")
    plans = written(base, "mine")
    assert plans["plans_name"] == "mine"
    assert plans["configurations"]["3d_fullres"]["data_identifier"] == "mine_3d_fullres"


@pytest.mark.usefixtures("linear_memory")
def test_configurations_of_the_user_survive_planning_again(dataset: Callable) -> None:
    base = dataset()
    plan("801")
    configure("801", "3d_fullres", "cube", ["architecture.window_shrink=cube", "num_epochs=5"], "nnUNetPCTNetPlans")
    plan("801", 4)
    resolved = PlansManager(str(base / "nnUNetPCTNetPlans.json")).get_configuration("cube").configuration
    assert resolved["architecture"]["arch_kwargs"]["window_shrink"] == "cube"
    assert resolved["misfm"] == {"num_epochs": 5}


@pytest.mark.usefixtures("linear_memory")
def test_our_trainer_takes_the_network_of_the_plans(dataset: Callable) -> None:
    base = dataset(shape=(60, 400, 400), spacing=(4.0, 0.8, 0.8))
    plan("801")
    configure("801", "3d_fullres", "narrow", ["features_per_stage=[4,8,6,20,36]"], "nnUNetPCTNetPlans")
    manager = PlansManager(str(base / "nnUNetPCTNetPlans.json"))
    planned = manager.get_configuration("3d_fullres")
    description = nnUNetTrainerPCTNet.network_description(manager, planned)
    assert description["class"] == planned.network_arch_class_name
    assert description["kwargs"] == planned.network_arch_init_kwargs
    narrow = nnUNetTrainerPCTNet.network_description(manager, manager.get_configuration("narrow"))["kwargs"]
    assert narrow == {**description["kwargs"], "features_per_stage": [4, 8, 6, 20, 36], "num_heads": [3, 5, 12]}


@pytest.mark.usefixtures("linear_memory")
def test_command_plans_each_dataset_and_stops_at_a_fault(dataset: Callable, capsys: pytest.CaptureFixture[str]) -> None:
    base = dataset(shape=(10, 12, 9))
    assert main(["plan", "-d", "801", NAME, "--gpu-memory-gb", "2", "--overwrite-plans-name", "mine"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if line.startswith("wrote")] == [f"wrote {base / 'mine.json'}"] * 2
    assert " of 2 GB" in printed[1]
    assert main(["plan", "-d", "802", "801"]) == 2
    assert capsys.readouterr().err.startswith(
        "nnUNetv2_misfm plan: expected the number or name of a dataset, got '802'"
    )
    assert not (base / "nnUNetPCTNetPlans.json").exists()


# Preprocessed cases


def default_plans(base: Path, change: Callable[[dict, dict], Any] | None = None) -> None:
    """Writes nnU-Net's plans: ours, under the other name, with a change of plans or configuration."""
    plans = written(base)
    configuration = plans["configurations"]["3d_fullres"]
    configuration["data_identifier"] = "nnUNetPlans_3d_fullres"
    plans |= {"plans_name": "nnUNetPlans", "experiment_planner_used": "ExperimentPlanner"}
    if change:
        change(plans, configuration)
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))


@pytest.mark.usefixtures("linear_memory")
def test_cases_are_shared_with_the_default_plans_where_they_are_the_same(dataset: Callable) -> None:
    base = dataset(spacing=(1.0, 0.7, 0.7))
    plan("801")
    assert written(base)["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPCTNetPlans_3d_fullres"
    default_plans(base)
    report = plan("801")
    assert written(base)["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPlans_3d_fullres"
    assert "preprocessed cases in nnUNetPlans_3d_fullres" in report and "to preprocess" in report
    (base / "nnUNetPlans_3d_fullres").mkdir()
    assert "to preprocess" not in plan("801")


CHANGES = {
    "spacing": lambda plans, configuration: configuration.update(spacing=[1.0, 0.7, 0.70001]),
    "normalisation": lambda plans, configuration: configuration.update(normalization_schemes=["CTNormalization"]),
    "mask": lambda plans, configuration: configuration.update(use_mask_for_norm=[True]),
    "order": lambda plans, configuration: configuration["resampling_fn_data_kwargs"].update(order=1),
    "preprocessor": lambda plans, configuration: configuration.update(preprocessor_name="Other"),
    "axes": lambda plans, configuration: plans.update(transpose_forward=[1, 0, 2]),
    "intensities": lambda plans, configuration: plans.update(foreground_intensity_properties_per_channel={}),
    "reader": lambda plans, configuration: plans.update(image_reader_writer="NibabelIO"),
    "missing": lambda plans, configuration: plans.update(configurations={"2d": configuration}),
}


@pytest.mark.usefixtures("linear_memory")
@pytest.mark.parametrize("change", CHANGES)
def test_cases_that_differ_from_the_default_plans_get_a_folder_of_their_own(dataset: Callable, change: str) -> None:
    base = dataset(spacing=(1.0, 0.7, 0.7))
    plan("801")
    default_plans(base, CHANGES[change])
    plan("801")
    assert written(base)["configurations"]["3d_fullres"]["data_identifier"] == "nnUNetPCTNetPlans_3d_fullres"


# What is refused


def refused(sentence: str, *arguments: Any) -> None:
    with pytest.raises(MisfmError, match=sentence) as refusal:
        plan(*arguments)
    assert "\n" not in str(refusal.value)


def test_two_dimensional_data_get_a_sentence_and_no_plans(dataset: Callable) -> None:
    base = dataset(shape=(1, 256, 256), spacing=(999.0, 1.0, 1.0))
    refused("PCT-Net is a 3D network, expected 3D images, got a median image of 1 x 256 x 256 voxels in Data", "801")
    dataset(shape=(256, 256, 1))
    refused("got a median image of 256 x 256 x 1 voxels .*: plan it with nnUNetv2_plan_experiment.$", "801")
    assert {path.name for path in base.iterdir()} == {"dataset_fingerprint.json"}


@pytest.mark.usefixtures("linear_memory")
def test_gpu_that_is_too_small_gets_the_size_that_is_needed(dataset: Callable) -> None:
    base = dataset(shape=(10, 12, 9))
    smallest = r"\(smallest patch 16 x 16 x 16, batch 2\)"  # 8 MB, so 0.01 GB with the headroom
    refused(
        f"expected a GPU of at least 0.1 GB for {NAME} {smallest}, got 0.005: raise --gpu-memory-gb.$", "801", 0.005
    )
    plan("801", 0.1)
    assert planned(base)[0] == [16, 16, 16]


@pytest.mark.parametrize("gpu", [0, -8, math.nan, math.inf])
def test_impossible_amount_of_memory_gets_a_sentence(dataset: Callable, gpu: float) -> None:
    dataset()
    refused(f"expected --gpu-memory-gb above 0, got {gpu:g}.$", "801", gpu)


@pytest.mark.parametrize("name", ["", "a b", "a/b", "a__b", "-a"])
def test_name_that_makes_no_results_folder_is_refused(dataset: Callable, name: str) -> None:
    dataset()
    refused(f"expected a --overwrite-plans-name of letters, digits, .* got {name!r}", "801", 8, name)


@pytest.mark.usefixtures("linear_memory")
def test_plans_of_others_are_never_overwritten(dataset: Callable) -> None:
    base = dataset()
    (base / "taken.json").write_text('{"experiment_planner_used": "nnUNetPlannerResEncL"}')
    for name in ("nnUNetPlans", "taken"):
        refused(f"{name} is the name of other plans, which stay as they are: choose another one.$", "801", 8, name)
    assert written(base, "taken") == {"experiment_planner_used": "nnUNetPlannerResEncL"}
    assert not (base / "nnUNetPlans.json").exists()


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_missing_variable_gets_a_sentence(dataset: Callable, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    dataset()
    monkeypatch.delenv(variable)
    refused(f"expected the environment variable {variable} to name a folder, but it is not set.$", "801")


def test_unknown_dataset_gets_a_sentence(dataset: Callable, folders: Path) -> None:
    dataset()
    refused("expected the number or name of a dataset, got '802': Could not find a dataset with the ID 802.$", "802")
    refused("expected the number or name of a dataset, got 'plan': dataset_name_or_id was a string and .*$", "plan")
    (folders / "raw" / NAME / "dataset.json").unlink()
    refused("expected the raw dataset's description at .*Dataset801_Plan/dataset.json, found none: planning n", "801")


@pytest.mark.usefixtures("linear_memory")
def test_plans_that_are_no_json_get_a_sentence(dataset: Callable) -> None:
    base = dataset()
    broken = '{"configurations": '
    (base / "nnUNetPlans.json").write_text(broken)
    refused("nnUNetPlans.json is no JSON .*: mend it or plan again.$", "801")
    assert not (base / "nnUNetPCTNetPlans.json").exists()
    (base / "nnUNetPlans.json").unlink()
    (base / "nnUNetPCTNetPlans.json").write_text(broken)
    refused("nnUNetPCTNetPlans.json is no JSON .*: mend it or plan again.$", "801")
    assert (base / "nnUNetPCTNetPlans.json").read_text() == broken
