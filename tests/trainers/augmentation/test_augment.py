import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_misfm.trainers.augmentation.augment import augment
from nnunetv2_misfm.trainers.augmentation.crops import Crops
from nnunetv2_misfm.trainers.augmentation.distribution import Augmentation, flips, nnunet_augmentation
from nnunetv2_misfm.trainers.augmentation.geometry import Pose, draw_poses
from nnunetv2_misfm.trainers.augmentation.intensity import draw_blur, draw_factors, draw_low_resolution, draw_noise

ROTATION = (-0.5, 0.5)
PATCH = (8, 14, 12)
OFTEN = {
    name: 0.6
    for name in (
        "p_rotation", "p_scaling", "p_noise", "p_blur", "p_brightness", "p_contrast", "p_low_resolution",
        "p_inverted_gamma", "p_gamma",
    )
}  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def augmented(volumes: torch.Tensor, patch_size: Any, ours: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """Draws the poses of a batch [B, C, D', H', W'] from the same generator, and augments it."""
    poses = draw_poses(len(volumes), ours, generator)
    return augment(Crops(list(volumes), poses), patch_size, ours, generator)


def a_batch(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(7))


def nnunets_way(volumes: torch.Tensor, ours: Augmentation, generator: torch.Generator) -> torch.Tensor:
    """Puts the numbers that `augment` draws through nnU-Net's own pipeline, sample by sample and step by step."""
    size = (volumes.shape[0], volumes.shape[1])
    poses = draw_poses(size[0], ours, generator)
    noise_generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, (1,), generator=generator)))
    noise, blur = draw_noise(size[0], ours, generator), draw_blur(size, ours, generator)
    brightness = draw_factors(size, ours.p_brightness, ours.brightness, generator)
    contrast = draw_factors(size, ours.p_contrast, ours.contrast, generator)
    coarse = draw_low_resolution(size, ours, generator)
    inverted = draw_factors(size, ours.p_inverted_gamma, ours.gamma, generator)
    gamma = draw_factors(size, ours.p_gamma, ours.gamma, generator)
    assert all((noise, blur, brightness, contrast, coarse, inverted, gamma))  # the test sees every step
    results = []
    for sample, (volume, pose) in enumerate(zip(volumes, poses, strict=True)):
        steps = nnUNetTrainer.get_training_transforms(PATCH, ROTATION, None, (0, 1, 2), ours.in_plane).transforms
        num_spatial = 3 if ours.in_plane else 1
        fix_pose(steps[num_spatial // 2], pose)
        image = ComposeTransforms(steps[:num_spatial])(image=volume.clone())["image"]
        intensity = [step.transform for step in steps[num_spatial:-2]]
        if sample in noise:
            image = image + torch.empty_like(image).normal_(0, noise[sample], generator=noise_generator)
        for step, drawn in zip(intensity[1:], (blur, brightness, contrast, coarse, inverted, gamma), strict=True):
            for channel in range(size[1]):
                if (sample, channel) in drawn:
                    params = as_nnunet_names(drawn[sample, channel], step, ours.in_plane)
                    image[channel] = step._apply_to_image(image[channel : channel + 1].clone(), **params)[0]
        results.append(steps[-2]._apply_to_image(image, axes=list(pose.mirrored)))
    return torch.stack(results)


def fix_pose(spatial: Any, pose: Pose) -> None:
    spatial.p_rotation, spatial.p_scaling = float(pose.angles is not None), float(pose.scale is not None)
    in_2d = len(spatial.patch_size) == 2
    spatial.rotation = lambda image, dim: (pose.angles or ())[-1 if in_2d else dim]
    spatial.scaling = pose.scale


def as_nnunet_names(number: Any, step: Any, in_plane: bool) -> dict[str, Any]:
    first, name = torch.tensor([0]), type(step).__name__
    if name == "GaussianBlurTransform":
        step.benchmark = False  # its FFT is the same blur, chosen by time
        return {"apply_to_channel": torch.tensor([True]), "sigmas": [number]}
    if name == "SimulateLowResolutionTransform":
        return {"apply_to_channel": first, "scales": torch.tensor([[1.0 if in_plane else number, number, number]])}
    if name == "GammaTransform":
        return {
            "apply_to_channel": first,
            "retain_stats": torch.tensor([step.p_retain_stats == 1]),
            "invert_image": torch.tensor([step.p_invert_image == 1]),
            "gamma": torch.tensor([number]),
        }
    return {"apply_to_channel": first, "multipliers": torch.tensor([number])}


@pytest.mark.parametrize(("in_plane", "crop"), [(False, (13, 20, 17)), (True, (8, 20, 17))])
def test_a_batch_is_what_nnunets_own_pipeline_makes_of_the_same_numbers(in_plane: bool, crop: tuple[int, ...]) -> None:
    ours = replace(nnunet_augmentation(ROTATION, in_plane, (0, 1, 2)), **OFTEN)
    volumes = a_batch(6, 2, *crop)
    before, generator = volumes.clone(), seeded(4)
    result = augmented(volumes, PATCH, ours, generator)
    replayed = seeded(4)
    assert torch.allclose(result, nnunets_way(volumes, ours, replayed), atol=1e-4)
    assert torch.equal(generator.get_state(), replayed.get_state())
    assert torch.equal(volumes, before)


def test_one_generator_state_gives_one_result_bit_for_bit_and_global_states_stay() -> None:
    ours, volumes = replace(Augmentation(), **OFTEN), a_batch(4, 2, 13, 20, 17)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    generator = seeded(5)
    first = augmented(volumes, PATCH, ours, generator)
    state = generator.get_state()
    second = augmented(volumes, PATCH, ours, generator)
    assert torch.equal(first, augmented(volumes, PATCH, ours, seeded(5)))
    generator.set_state(state)
    assert torch.equal(second, augmented(volumes, PATCH, ours, generator))
    assert not torch.equal(first, second)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1], states[2]) == (np.random.get_state()[1].tolist(), random.getstate())


def test_flips_alone_rearrange_the_voxels_of_the_centre() -> None:
    volumes = torch.arange(16 * 2 * 5 * 4 * 6.0).reshape(16, 2, 5, 4, 6)
    before = volumes.clone()
    patches = augmented(volumes, (3, 4, 4), flips((0, 2)), seeded())
    centre = before[:, :, 1:4, :, 1:5]
    ways = {(), (2,), (4,), (2, 4)}
    found = []
    for patch, own in zip(patches, centre, strict=True):
        found += [axes for axes in ways if torch.equal(patch[None], own[None].flip(axes))]
    assert len(found) == 16 and set(found) == ways  # each sample by one way, none along H
    assert torch.equal(volumes, before)


@pytest.mark.parametrize("ours", [flips((0, 1, 2)), replace(Augmentation(), **OFTEN)])
def test_a_patch_as_large_as_its_volume_is_augmented_and_the_volume_unchanged(ours: Augmentation) -> None:
    volumes = a_batch(1, 1, 8, 16, 12)
    before = volumes.clone()
    for seed in range(10):
        patches = augmented(volumes, (8, 16, 12), ours, seeded(seed))
        assert (patches.shape, patches.dtype) == (volumes.shape, torch.float32)
        assert patches.isfinite().all()
        assert torch.equal(volumes, before)


def test_crops_without_a_margin_give_the_same_patches_where_they_are_only_cropped() -> None:
    ours, volumes, patch_size = nnunet_augmentation(ROTATION, False, (0, 1, 2)), a_batch(12, 1, 13, 20, 17), (8, 13, 12)
    poses = draw_poses(len(volumes), ours, seeded())
    tight = [v if p.is_resampled else v[:, 2:10, 4:17, 2:14] for v, p in zip(volumes, poses, strict=True)]
    assert 0 < sum(pose.is_resampled for pose in poses) < len(poses)
    whole = augment(Crops(list(volumes), poses), patch_size, ours, seeded(1))
    assert torch.equal(augment(Crops(tight, poses), patch_size, ours, seeded(1)), whole)


def test_noise_takes_nothing_from_the_generator_but_its_seed() -> None:
    certain = replace(flips(()), p_noise=1.0, noise=(0.1, 0.1))
    generator, silent = seeded(3), seeded(3)
    noisy = augmented(torch.zeros(2, 1, 16, 16, 16), (16, 16, 16), certain, generator)
    assert noisy.std().item() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(noisy[0], noisy[1])
    augmented(torch.zeros(2, 1, 4, 4, 4), (4, 4, 4), flips(()), silent)
    assert torch.equal(generator.get_state(), silent.get_state())


def test_a_volume_smaller_than_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected at least the patch size \(8, 8, 8\), got \(8, 7, 8\)"):
        augmented(torch.zeros(1, 1, 8, 7, 8), (8, 8, 8), flips((0,)), seeded())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_numbers() -> None:
    ours, volumes = replace(Augmentation(), **OFTEN, noise=(0.0, 0.0)), a_batch(6, 2, 13, 20, 17)
    on_cpu = augmented(volumes, PATCH, ours, seeded(4))
    there = volumes.cuda()
    torch.cuda.set_sync_debug_mode("error")  # waiting for the device would raise
    try:
        on_gpu = augmented(there, PATCH, ours, seeded(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-4)


def test_masked_channels_stay_zero_outside_of_the_mask() -> None:
    ours = replace(flips((0,)), p_noise=1.0, noise=(0.5, 0.5), p_brightness=1.0, masked=(1,))
    volumes = torch.zeros(2, 2, 8, 8, 8)
    volumes[:, :, 2:6, 2:6, 2:6] = 1
    patches = augmented(volumes, (8, 8, 8), ours, seeded())
    inside = volumes[0, 0] == 1
    assert (patches[:, 1][:, ~inside] == 0).all() and (patches[:, 1][:, inside] != 0).all()
    assert (patches[:, 0] != 0).all()  # the other channel has its noise everywhere
