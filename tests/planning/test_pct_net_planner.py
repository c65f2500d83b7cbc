import inspect
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.cli import main
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning import pct_net_planner
from nnunetv2_misfm.planning.configure import configure
from nnunetv2_misfm.planning.pct_net_planner import GIB, HEADROOM, patch_candidates
from nnunetv2_misfm.planning.plan import plan
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet

NAME = "Dataset801_Plan"
ISOTROPIC = [[1, 1, 1]] + [[2, 2, 2]] * 4
IN_PLANE = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
BYTES_PER_VOXEL = 1000


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.delenv("nnUNet_results", raising=False)
    return tmp_path


@pytest.fixture
def dataset(folders: Path) -> Callable[..., Path]:
    """Makes a dataset of three cases that has a fingerprint; returns its preprocessed folder."""

    def make(
        shape: tuple[int, ...] = (200, 200, 200),
        spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
        num_training: int = 100000,
        channels: int = 1,
        **entries: Any,
    ) -> Path:
        raw, base = folders / "raw" / NAME, folders / "preprocessed" / NAME
        for folder in (raw / "imagesTr", raw / "labelsTr", base):
            folder.mkdir(parents=True, exist_ok=True)
        image = sitk.GetImageFromArray(np.zeros((4, 4, 4), np.uint8))
        for file in [*(f"imagesTr/a_{channel:04d}" for channel in range(channels)), "labelsTr/a"]:
            sitk.WriteImage(image, str(raw / f"{file}.nii.gz"))
        description = {
            "channel_names": {str(channel): "MRI" for channel in range(channels)},
            "labels": {"background": 0, "organ": 1, "lesion": 2},
            "numTraining": num_training,
            "file_ending": ".nii.gz",
            **entries,
        }
        fingerprint = {
            "spacings": [list(spacing)] * 3,
            "shapes_after_crop": [list(shape)] * 3,
            "median_relative_size_after_cropping": 1.0,
            "foreground_intensity_properties_per_channel": {"0": {"mean": 1.5, "std": 0.5}},
        }
        (raw / "dataset.json").write_text(json.dumps(description))
        (base / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        return base

    return make


@pytest.fixture
def linear_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step takes 1,000 bytes a voxel."""

    def memory(build: Callable, channels: int, patch: tuple[int, ...], batch: int) -> int:
        return BYTES_PER_VOXEL * math.prod(patch) * batch

    monkeypatch.setattr(pct_net_planner, "training_memory", memory)


def gigabytes(*patch: int, batch: int = 2) -> float:
    """A GPU on which this patch and batch just fit, at 1,000 bytes a voxel."""
    return BYTES_PER_VOXEL * math.prod(patch) * batch / GIB / (1 - HEADROOM) + 1e-6


def written(base: Path, name: str = "nnUNetPCTNetPlans") -> dict[str, Any]:
    return json.loads((base / f"{name}.json").read_text())


def planned(base: Path, configuration: str = "3d_fullres") -> tuple[list[int], int, list[list[int]]]:
    """Patch, batch and strides of the written plans."""
    entry = written(base)["configurations"][configuration]
    return entry["patch_size"], entry["batch_size"], entry["architecture"]["arch_kwargs"]["strides"]


# Patch, strides and batch


@pytest.mark.usefixtures("linear_memory")
def test_isotropic_images_get_the_largest_cube_that_fits(dataset: Callable) -> None:
    base = dataset()
    plan("801", gigabytes(128, 128, 128))
    assert planned(base) == ([128, 128, 128], 2, ISOTROPIC)
    plan("801", gigabytes(128, 128, 128) - 1e-5)
    assert planned(base) == ([120, 128, 128], 2, ISOTROPIC)


@pytest.mark.usefixtures("linear_memory")
def test_anisotropic_images_are_pooled_in_plane_first_and_keep_their_aspect(dataset: Callable) -> None:
    base = dataset(shape=(60, 400, 400), spacing=(4.0, 0.8, 0.8))
    plan("801", gigabytes(32, 192, 192))
    patch, batch, strides = planned(base)
    assert (batch, strides) == (2, IN_PLANE)
    assert patch[0] % 2 == patch[1] % 8 == patch[2] % 8 == 0
    # the same share of the image along each axis, to a step of 2 or 8 voxels
    shares = [size / whole for size, whole in zip(patch, (60, 400, 400), strict=True)]
    assert max(shares) - min(shares) <= 2 / 60
    assert 0.85 * 32 * 192 * 192 < math.prod(patch) <= 32 * 192 * 192


@pytest.mark.usefixtures("linear_memory")
def test_short_axis_may_be_any(dataset: Callable) -> None:
    base = dataset(shape=(400, 400, 60), spacing=(0.8, 0.8, 4.0))
    plan("801", gigabytes(32, 192, 192))
    assert written(base)["transpose_forward"] == [2, 0, 1]  # nnU-Net's: the coarse axis comes first
    assert planned(base)[2] == IN_PLANE


@pytest.mark.usefixtures("linear_memory")
@pytest.mark.parametrize(
    ("shape", "spacing", "patch"),
    [
        ((10, 12, 9), (1, 1, 1), [16, 16, 16]),  # three pools of every axis before the deepest level
        ((10, 30, 30), (6, 1, 1), [10, 32, 32]),  # one of the first
        ((2, 40, 40), (9, 1, 1), [2, 40, 40]),
    ],
)
def test_images_smaller_than_the_pools_are_padded(
    dataset: Callable, shape: tuple[int, ...], spacing: tuple[float, ...], patch: list[int]
) -> None:
    base = dataset(shape=shape, spacing=tuple(map(float, spacing)))
    plan("801", gigabytes(*patch))
    assert planned(base)[:2] == (patch, 2)


@pytest.mark.parametrize(
    ("spacing", "shape"),
    [((1, 1, 1), (200, 180, 30)), ((5, 0.8, 0.8), (97, 512, 512)), ((3, 1, 1), (12, 256, 256)), ((1, 1, 1), (9, 9, 9))],
)
def test_every_candidate_divides_by_its_pools_and_keeps_sixteen_voxels_where_there_are(
    spacing: tuple[float, ...], shape: tuple[int, ...]
) -> None:
    candidates = patch_candidates(spacing, shape)
    for patch, strides in candidates:
        divisors = [math.prod(stride[axis] for stride in strides[:-1]) for axis in range(3)]
        assert all(size % divisor == 0 for size, divisor in zip(patch, divisors, strict=True))
        assert all(size >= min(16, whole) for size, whole in zip(patch, shape, strict=True))
        assert strides[0] == [1, 1, 1] and strides[3:] == [[2, 2, 2]] * 2
    volumes = [math.prod(patch) for patch, _ in candidates]
    assert all(larger > smaller for larger, smaller in pairwise(volumes))


@pytest.mark.usefixtures("linear_memory")
@pytest.mark.parametrize("shape", [(200, 200, 200), (24, 320, 320), (40, 56, 40)])
def test_more_memory_never_means_less(dataset: Callable, shape: tuple[int, ...]) -> None:
    base = dataset(shape=shape, spacing=(max(shape) / shape[0], 1.0, 1.0))
    sizes = []
    for gpu in (0.2, 0.3, 0.5, 1, 2, 3, 4, 8, 16, 40):
        plan("801", gpu)
        patch, batch, _ = planned(base)
        assert BYTES_PER_VOXEL * math.prod(patch) * batch <= gpu * GIB * (1 - HEADROOM)
        sizes.append((math.prod(patch), math.prod(patch) * batch))
    assert [patch for patch, _ in sizes] == sorted(patch for patch, _ in sizes)
    assert [batch for _, batch in sizes] == sorted(batch for _, batch in sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.usefixtures("linear_memory")
def test_memory_that_is_left_raises_the_batch_up_to_a_twentieth_of_the_dataset(dataset: Callable) -> None:
    base = dataset(shape=(32, 32, 32))
    plan("801", gigabytes(32, 32, 32, batch=7))
    assert planned(base)[:2] == ([32, 32, 32], 7)
    dataset(shape=(32, 32, 32), num_training=100)
    plan("801", 8)
    assert planned(base)[:2] == ([32, 32, 32], 5)  # 5 % of 100 images of the size of the patch
    dataset(shape=(32, 32, 32), num_training=3)
    plan("801", 8)
    assert planned(base)[:2] == ([32, 32, 32], 2)


def test_trace_decides_where_the_line_is_too_hopeful(dataset: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def memory(build: Callable, channels: int, patch: tuple[int, ...], batch: int) -> int:
        voxels = math.prod(patch) * batch
        return BYTES_PER_VOXEL * voxels * (3 if voxels > 2 * 64**3 else 1)  # steeper beyond the line's two points

    monkeypatch.setattr(pct_net_planner, "training_memory", memory)
    base = dataset()
    plan("801", gigabytes(128, 128, 128))
    patch, batch, _ = planned(base)
    assert 0.8 * 128**3 < 3 * math.prod(patch) <= 128**3 and batch == 2
    base = dataset(shape=(64, 64, 64))
    plan("801", gigabytes(64, 64, 64, batch=9))
    assert planned(base)[:2] == ([64, 64, 64], 3)


def test_estimate_is_that_of_the_planned_network(dataset: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = []

    def memory(build: Callable, channels: int, patch: tuple[int, ...], batch: int) -> int:
        with torch.device("meta"):
            networks.append((build(), channels))
        return BYTES_PER_VOXEL * math.prod(patch) * batch

    monkeypatch.setattr(pct_net_planner, "training_memory", memory)
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "edge": 3, "tip": 2}
    base = dataset(shape=(16, 64, 64), channels=3, labels=regions, regions_class_order=[1, 2, 3, 2])
    plan("801")
    for network, channels in networks:
        assert (network.encoder.stem.in_channels, channels, network.num_classes) == (3, 3, 4)
        assert network.layout.features_per_stage == (24, 48, 128, 256, 512)
    assert [list(s) for s in networks[-1][0].layout.strides] == planned(base)[2]
    assert inspect.signature(pct_net_planner.training_memory).parameters.keys() == {
        "build",
        "channels",
        "patch",
        "batch",
    }


def test_plan_with_the_true_estimate_fills_the_gpu_but_not_more(dataset: Callable) -> None:
    base = dataset(shape=(64, 64, 64), num_training=100000)
    report = plan("801", 3.0)
    patch, batch, _ = planned(base)
    (line,) = (line for line in report.splitlines() if line.startswith("3d_fullres"))
    memory = float(line.split("estimated memory ")[1].split(" of 3 GB")[0])
    assert f"patch {' x '.join(map(str, patch))}, batch {batch}," in line
    assert 0.7 * 3 * (1 - HEADROOM) < memory <= 3 * (1 - HEADROOM) + 0.05


# What is written


@pytest.mark.usefixtures("linear_memory")
def test_plans_name_a_network_that_nnunet_builds_and_every_argument_of_it(dataset: Callable) -> None:
    base = dataset(shape=(60, 400, 400), spacing=(4.0, 0.8, 0.8))
    plan("801")
    manager = PlansManager(str(base / "nnUNetPCTNetPlans.json"))
    assert manager.plans_name == "nnUNetPCTNetPlans" and "2d" not in manager.available_configurations
    configuration = manager.get_configuration("3d_fullres")
    kwargs = configuration.network_arch_init_kwargs
    assert kwargs.keys() == inspect.signature(PCTNet).parameters.keys() - {
        "input_channels", "num_classes", "deep_supervision"
    }  # fmt: skip
    assert kwargs["features_per_stage"] == [24, 48, 128, 256, 512] and kwargs["num_heads"] == [4, 8, 16]
    with torch.device("meta"):
        network = get_network_from_plans(
            configuration.network_arch_class_name, kwargs, configuration.network_arch_init_kwargs_req_import, 1, 3,
            deep_supervision=True,
        )  # fmt: skip
        heads = network(torch.empty(2, 1, *configuration.patch_size))
    sizes = np.array(configuration.patch_size) / np.cumprod(configuration.pool_op_kernel_sizes, axis=0)[:-1]
    assert type(network) is PCTNet
    assert [list(head.shape[2:]) for head in heads] == sizes.tolist()  # what nnU-Net's deep supervision reckons with


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
