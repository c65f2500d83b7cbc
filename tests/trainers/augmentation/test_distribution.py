import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_misfm.trainers.augmentation.distribution import Augmentation, flips, nnunet_augmentation
from nnunetv2_misfm.trainers.augmentation.draws import draw_chosen, draw_two_sided, draw_uniform
from nnunetv2_misfm.trainers.augmentation.geometry import draw_poses
from nnunetv2_misfm.trainers.augmentation.intensity import draw_blur, draw_factors, draw_low_resolution, draw_noise

NUM = 4000
ROTATION = (-0.3, 0.4)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def nnunet_transforms(in_plane: bool) -> list[Any]:
    return nnUNetTrainer.get_training_transforms((8, 16, 16), ROTATION, None, (0, 2), in_plane).transforms


@pytest.mark.parametrize("in_plane", [False, True])
def test_numbers_are_those_of_nnunets_own_transform_objects(in_plane: bool) -> None:
    ours = nnunet_augmentation(ROTATION, in_plane, (0, 2))
    steps = nnunet_transforms(in_plane)
    if in_plane:
        assert [type(step).__name__ for step in (steps.pop(0), steps.pop(1))] == [
            "Convert3DTo2DTransform",
            "Convert2DTo3DTransform",
        ]
    spatial, *intensity, mirror, remove_label = steps
    assert (type(spatial), type(mirror)) == (SpatialTransform, MirrorTransform)
    assert type(remove_label).__name__ == "RemoveLabelTransform"
    assert [type(step.transform) for step in intensity] == [
        GaussianNoiseTransform,
        GaussianBlurTransform,
        MultiplicativeBrightnessTransform,
        ContrastTransform,
        SimulateLowResolutionTransform,
        GammaTransform,
        GammaTransform,
    ]
    assert (ours.rotation, ours.p_rotation) == (tuple(spatial.rotation), spatial.p_rotation)
    assert (ours.scaling, ours.p_scaling) == (spatial.scaling, spatial.p_scaling)
    assert (spatial.p_rot_per_axis, spatial.p_synchronize_scaling_across_axes, spatial.p_elastic_deform) == (1, 1, 0)
    assert (spatial.random_crop, spatial.mode_image, spatial.padding_mode_image) == (False, "bilinear", "zeros")
    assert spatial.align_corners is False
    assert ours.mirror_axes == tuple(mirror.allowed_axes)
    assert [step.apply_probability for step in intensity] == [
        ours.p_noise,
        ours.p_blur,
        ours.p_brightness,
        ours.p_contrast,
        ours.p_low_resolution,
        ours.p_inverted_gamma,
        ours.p_gamma,
    ]
    noise, blur, brightness, contrast, low_resolution, inverted, gamma = (step.transform for step in intensity)
    assert (ours.noise, 1, True) == (noise.noise_variance, noise.p_per_channel, noise.synchronize_channels)
    assert (ours.blur, ours.p_blur_per_channel) == (blur.blur_sigma, blur.p_per_channel)
    assert (blur.synchronize_channels, blur.synchronize_axes) == (False, False)
    two_sided = [(brightness, brightness.multiplier_range), (contrast, contrast.contrast_range)]
    two_sided += [(inverted, inverted.gamma), (gamma, gamma.gamma)]
    for (step, number), bounds in zip(two_sided, (ours.brightness, ours.contrast, ours.gamma, ours.gamma), strict=True):
        assert isinstance(number, BGContrast) and number.contrast_range == bounds
        assert (step.p_per_channel, step.synchronize_channels) == (1, False)
    assert contrast.preserve_range is True
    assert [(step.p_invert_image, step.p_retain_stats) for step in (inverted, gamma)] == [(1, 1), (0, 1)]
    assert (ours.low_resolution, ours.p_low_resolution_per_channel) == (
        low_resolution.scale,
        low_resolution.p_per_channel,
    )
    assert (low_resolution.synchronize_channels, low_resolution.synchronize_axes) == (False, True)
    assert low_resolution.ignore_axes == ((0,) if in_plane else None)


def test_default_rotation_is_nnunets_for_a_patch_that_is_not_anisotropic() -> None:
    trainer: Any = object.__new__(nnUNetTrainer)
    trainer.configuration_manager = type("Configuration", (), {"patch_size": [64, 128, 128]})
    trainer.print_to_log_file = lambda *_: None
    rotation, in_plane, _, mirror_axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    default = Augmentation()
    assert default.rotation == pytest.approx(rotation) == (-math.pi / 6, math.pi / 6)
    assert (default.in_plane, default.mirror_axes) == (in_plane, mirror_axes)


def test_flips_give_every_step_but_mirroring_no_chance() -> None:
    ours = flips([1])
    assert ours.mirror_axes == (1,)
    chances = [field.name for field in fields(ours) if field.name.startswith("p_") and "per_channel" not in field.name]
    assert len(chances) == 9 and all(getattr(ours, name) == 0 for name in chances)


def test_poses_have_nnunets_shares_and_ranges() -> None:
    poses = draw_poses(NUM, nnunet_augmentation(ROTATION, False, (0, 2)), seeded())
    angles = np.array([pose.angles for pose in poses if pose.angles is not None])
    scales = np.array([pose.scale for pose in poses if pose.scale is not None])
    assert len(angles) / NUM == pytest.approx(0.2, abs=0.02)
    assert len(scales) / NUM == pytest.approx(0.2, abs=0.02)
    both = sum(pose.angles is not None and pose.scale is not None for pose in poses)
    assert both / NUM == pytest.approx(0.04, abs=0.01)
    assert angles.min(0) == pytest.approx([-0.3] * 3, abs=0.01) and angles.max(0) == pytest.approx([0.4] * 3, abs=0.01)
    assert angles.mean(0) == pytest.approx([0.05] * 3, abs=0.03)
    assert np.abs(np.corrcoef(angles.T) - np.eye(3)).max() < 0.12
    assert (scales.min(), scales.max(), scales.mean()) == pytest.approx((0.7, 1.4, 1.05), abs=0.03)
    mirrored = [pose.mirrored for pose in poses]
    assert {axes: mirrored.count(axes) / NUM for axes in set(mirrored)} == pytest.approx(
        {(): 0.25, (0,): 0.25, (2,): 0.25, (0, 2): 0.25}, abs=0.03
    )


def test_two_sided_numbers_lie_as_often_below_one_as_above() -> None:
    numbers = draw_two_sided((0.7, 1.5), (NUM,), seeded())
    below, above = numbers[numbers < 1], numbers[numbers >= 1]
    assert len(below) / NUM == pytest.approx(0.5, abs=0.03)
    assert [below.min(), below.max(), below.mean()] == pytest.approx([0.7, 1.0, 0.85], abs=0.01)
    assert [above.min(), above.max(), above.mean()] == pytest.approx([1.0, 1.5, 1.25], abs=0.02)
    one_sided = draw_two_sided((1.2, 1.4), (NUM,), seeded())
    assert [one_sided.min(), one_sided.max(), one_sided.mean()] == pytest.approx([1.2, 1.4, 1.3], abs=0.01)


def test_intensity_steps_have_nnunets_shares_and_ranges() -> None:
    ours, size = nnunet_augmentation(ROTATION, False, (0,)), (NUM, 2)
    noise = np.array(list(draw_noise(NUM, ours, seeded(1)).values()))
    assert len(noise) / NUM == pytest.approx(0.1, abs=0.015)
    assert (noise.min(), noise.max(), noise.mean()) == pytest.approx((0.0, 0.1, 0.05), abs=0.005)
    blur = draw_blur(size, ours, seeded(2))
    sigmas = np.array(list(blur.values()))
    assert len(blur) / NUM == pytest.approx(2 * 0.2 * 0.5, abs=0.02)
    assert len({sample for sample, _ in blur}) / NUM == pytest.approx(0.2 * (1 - 0.5**2), abs=0.02)
    assert sigmas.shape[1] == 3 and np.abs(np.corrcoef(sigmas.T) - np.eye(3)).max() < 0.12
    assert (sigmas.min(), sigmas.max(), sigmas.mean()) == pytest.approx((0.5, 1.0, 0.75), abs=0.01)
    coarse = draw_low_resolution(size, ours, seeded(3))
    assert len(coarse) / NUM == pytest.approx(2 * 0.25 * 0.5, abs=0.02)
    assert len({sample for sample, _ in coarse}) / NUM == pytest.approx(0.25 * (1 - 0.5**2), abs=0.02)
    shares = np.array(list(coarse.values()))
    assert (shares.min(), shares.max(), shares.mean()) == pytest.approx((0.5, 1.0, 0.75), abs=0.01)


def test_factors_take_all_channels_of_a_chosen_sample_each_its_own() -> None:
    factors = draw_factors((NUM, 2), 0.3, (0.75, 1.25), seeded())
    samples = {sample for sample, _ in factors}
    assert len(samples) / NUM == pytest.approx(0.3, abs=0.02)
    assert set(factors) == {(sample, channel) for sample in samples for channel in (0, 1)}
    pairs = np.array([[factors[sample, 0], factors[sample, 1]] for sample in samples])
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.1
    assert (pairs.min(), pairs.max()) == pytest.approx((0.75, 1.25), abs=0.01)


def test_draws_take_the_same_amount_from_the_generator_whatever_is_chosen() -> None:
    one, other = seeded(), seeded()
    for generator, ours in ((one, flips((0,))), (other, Augmentation())):
        draw_poses(3, ours, generator)
        draw_noise(3, ours, generator)
        draw_blur((3, 2), ours, generator)
        draw_low_resolution((3, 2), ours, generator)
        draw_factors((3, 2), ours.p_gamma, ours.gamma, generator)
    assert torch.equal(one.get_state(), other.get_state())


def test_chances_of_none_and_all_are_certain() -> None:
    assert not draw_chosen(0.0, (NUM,), seeded()).any()
    assert draw_chosen(1.0, (NUM,), seeded()).all()
    assert (draw_uniform((2.0, 2.0), (NUM,), seeded()) == 2.0).all()
