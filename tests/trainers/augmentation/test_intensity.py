import math

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform

from nnunetv2_misfm.trainers.augmentation.intensity import (
    add_noise_,
    blur_,
    change_brightness_,
    change_contrast_,
    change_gamma_,
    gaussian_kernel,
    lower_resolution_,
)


def a_channel(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (9, 14, 12)), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("sigmas", [(0.5, 0.58, 0.6), (0.75, 0.74, 0.9), (0.92, 1.0, 0.51)])
def test_blur_is_nnunets(sigmas: tuple[float, ...]) -> None:
    channel = a_channel()
    nnunet = GaussianBlurTransform(benchmark=False)
    expected = nnunet._apply_to_image(channel.clone()[None], apply_to_channel=torch.tensor([True]), sigmas=[sigmas])[0]
    blur_(channel, sigmas)
    assert torch.allclose(channel, expected, atol=1e-6)


def test_kernel_has_the_odd_number_of_weights_nearest_to_six_sigma_and_a_half() -> None:
    assert [len(gaussian_kernel(sigma)) for sigma in (0.5, 0.58, 0.59, 0.91, 0.92, 1.0)] == [3, 3, 5, 5, 7, 7]
    side = math.exp(-2)  # exp(-1 / (2 * 0.25))
    assert gaussian_kernel(0.5) == pytest.approx([side / (1 + 2 * side), 1 / (1 + 2 * side), side / (1 + 2 * side)])


@pytest.mark.parametrize("factor", [0.75, 1.25])
def test_contrast_is_nnunets_and_keeps_the_range(factor: float) -> None:
    channel = a_channel()
    expected = ContrastTransform(1.0, True, False)._apply_to_image(
        channel.clone()[None], apply_to_channel=torch.tensor([0]), multipliers=torch.tensor([factor])
    )[0]
    before = channel.clone()
    change_contrast_(channel, factor)
    assert torch.allclose(channel, expected, atol=1e-6)
    assert channel.min() >= before.min() and channel.max() <= before.max()


@pytest.mark.parametrize("in_plane", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.61, 0.83, 0.999])
def test_low_resolution_is_nnunets(share: float, in_plane: bool) -> None:
    channel = a_channel()
    scales = torch.tensor([[1.0 if in_plane else share, share, share]])
    nnunet = SimulateLowResolutionTransform(1.0, False, True, (0,) if in_plane else None)
    expected = nnunet._apply_to_image(channel.clone()[None], apply_to_channel=torch.tensor([0]), scales=scales)[0]
    lower_resolution_(channel, share, in_plane)
    assert torch.equal(channel, expected)


@pytest.mark.parametrize("inverted", [False, True])
@pytest.mark.parametrize("gamma", [0.7, 1.0, 1.5])
def test_gamma_is_nnunets_and_retains_the_statistics(gamma: float, inverted: bool) -> None:
    channel = 3 * a_channel() - 40
    expected = nnunet_gamma(channel, gamma, inverted)
    before = channel.clone()
    change_gamma_(channel, gamma, inverted)
    assert torch.allclose(channel, expected, atol=5e-5)  # of values at -40, whose rounding is 4e-6
    assert channel.mean().item() == pytest.approx(before.mean().item(), rel=1e-6)
    assert channel.std().item() == pytest.approx(before.std().item(), rel=1e-5)


@pytest.mark.parametrize("inverted", [False, True])
def test_gamma_of_a_constant_channel_changes_nothing(inverted: bool) -> None:
    channel = torch.full((4, 4, 4), 2.5)
    assert torch.equal(nnunet_gamma(channel, 0.8, inverted), channel)
    changed = channel.clone()
    change_gamma_(changed, 0.8, inverted)
    assert torch.equal(changed, channel)


def nnunet_gamma(channel: torch.Tensor, gamma: float, inverted: bool) -> torch.Tensor:
    return GammaTransform(1.0, 0, False, 1, 1)._apply_to_image(
        channel.clone()[None], apply_to_channel=torch.tensor([0]), retain_stats=torch.tensor([True]),
        invert_image=torch.tensor([inverted]), gamma=torch.tensor([gamma]),
    )[0]  # fmt: skip


def test_brightness_is_a_factor() -> None:
    channel = torch.tensor([-2.0, 4.0])
    change_brightness_(channel, 1.25)
    assert channel.tolist() == [-2.5, 5.0]


def test_noise_has_the_standard_deviation_that_nnunet_gives_it() -> None:
    sample, nnunet = torch.zeros(2, 24, 24, 24), torch.zeros(2, 24, 24, 24)
    add_noise_(sample, 0.1, torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    GaussianNoiseTransform(0.1, 1, True)(image=nnunet)
    for noise in (sample, nnunet):  # a standard deviation of 0.1, not a variance
        assert noise.std().item() == pytest.approx(0.1, rel=0.03) and abs(noise.mean().item()) < 0.003
    assert abs(np.corrcoef(sample.flatten(1).numpy())[0, 1]) < 0.05  # each channel has its own
