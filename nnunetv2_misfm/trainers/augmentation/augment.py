"""The augmentation of a batch on its device: nnU-Net's steps, in nnU-Net's order, on the samples drawn for them.

Written with PyTorch's own operations because neither library that was considered fits: none of kornia's transforms
takes a generator, and those of intensity in 3D are motion blur and equalisation alone; MONAI's work sample by sample,
with NumPy's random numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from nnunetv2_misfm.trainers.augmentation import intensity
from nnunetv2_misfm.trainers.augmentation.crops import Crops
from nnunetv2_misfm.trainers.augmentation.distribution import Augmentation
from nnunetv2_misfm.trainers.augmentation.geometry import place


def augment(crops: Crops, patch_size: Sequence[int], augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Returns an augmented batch of patches, each from the centre of its crop.

    Every number but the poses' is drawn from the generator, save the voxels' noise, which is drawn on the device from a
    seed that is. The host never waits for the device.

    Args:
        crops: Volumes at least as large as the patch, on one device, and their poses; unchanged.
        patch_size: D, H, W in voxels.
        augmentation: What to draw from.
        generator: On the CPU.

    Returns:
        float32 [B, C, D, H, W], a new tensor on the volumes' device.

    Raises:
        ValueError: A volume smaller than the patch.
    """
    first = crops.volumes[0]
    patches = first.new_empty(len(crops.volumes), len(first), *patch_size)
    for patch, volume, pose in zip(patches, crops.volumes, crops.poses, strict=True):
        if any(n < m for n, m in zip(volume.shape[1:], patch_size, strict=True)):
            raise ValueError(
                f"volumes: expected at least the patch size {tuple(patch_size)}, got {tuple(volume.shape[1:])}."
            )
        patch.copy_(place(volume, patch_size, pose, augmentation.in_plane))
    outside = (patches == 0).all(dim=1) if augmentation.masked else None
    change_intensities_(patches, augmentation, generator)
    if outside is not None:
        for channel in augmentation.masked:
            patches[:, channel].masked_fill_(outside, 0)
    for patch, pose in zip(patches, crops.poses, strict=True):
        if pose.mirrored:
            patch.copy_(patch.flip([axis + 1 for axis in pose.mirrored]))
    return patches


def change_intensities_(patches: Tensor, augmentation: Augmentation, generator: torch.Generator) -> None:
    """Adds noise to patches [B, C, D, H, W], then blurs, changes brightness, contrast, resolution and gamma."""
    size = (patches.shape[0], patches.shape[1])
    seed = int(torch.randint(2**63 - 1, (1,), generator=generator))
    noise_generator = torch.Generator(patches.device).manual_seed(seed)
    for sample, sigma in intensity.draw_noise(size[0], augmentation, generator).items():
        intensity.add_noise_(patches[sample], sigma, noise_generator)
    for at, sigmas in intensity.draw_blur(size, augmentation, generator).items():
        intensity.blur_(patches[at], sigmas)
    for at, factor in intensity.draw_factors(
        size, augmentation.p_brightness, augmentation.brightness, generator
    ).items():
        intensity.change_brightness_(patches[at], factor)
    for at, factor in intensity.draw_factors(size, augmentation.p_contrast, augmentation.contrast, generator).items():
        intensity.change_contrast_(patches[at], factor)
    for at, share in intensity.draw_low_resolution(size, augmentation, generator).items():
        intensity.lower_resolution_(patches[at], share, augmentation.in_plane)
    for inverted, probability in ((True, augmentation.p_inverted_gamma), (False, augmentation.p_gamma)):
        for at, gamma in intensity.draw_factors(size, probability, augmentation.gamma, generator).items():
            intensity.change_gamma_(patches[at], gamma, inverted)
