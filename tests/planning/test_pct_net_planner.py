import inspect
import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from pct_net_plans import BYTES_PER_VOXEL, gigabytes, planned, written

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.planning import pct_net_planner
from nnunetv2_misfm.planning.pct_net_planner import GIB, HEADROOM, patch_candidates
from nnunetv2_misfm.planning.plan import plan

ISOTROPIC = [[1, 1, 1]] + [[2, 2, 2]] * 4
IN_PLANE = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]


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
    [
        ((1, 1, 1), (200, 180, 30)),
        ((5, 0.8, 0.8), (97, 512, 512)),
        ((3, 1, 1), (12, 256, 256)),
        ((1, 1, 1), (9, 9, 9)),
        ((9.03, 5.13, 0.89), (8, 293, 2)),  # a shorter second axis is pooled less, and the third padded more
    ],
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
