"""How often each augmentation acts and how strongly: the distribution of nnU-Net 2.8's training transforms.

Defaults are those of `nnUNetTrainer.get_training_transforms` for a 3D patch. Numbers are drawn per sample unless a
field says per channel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# nnU-Net's rotation of a patch that is not anisotropic (configure_rotation_dummyDA_mirroring_and_inital_patch_size)
MAX_ANGLE = math.radians(30)
# MirrorTransform of batchgeneratorsv2 flips each allowed axis with this probability
P_MIRROR = 0.5


@dataclass(frozen=True)
class Augmentation:
    """Distribution of the augmentations of a batch [B, C, D, H, W], in the order in which they act, mirroring last.

    A range (low, high) of rotation, scaling, noise, blur and low resolution is uniform. One of brightness, contrast and
    gamma is two-sided, as nnU-Net's `BGContrast`: half of the draws are uniform in (low, 1), half in (1, high).

    Attributes:
        mirror_axes: Spatial axes (0, 1, 2 for D, H, W) that are mirrored, each in half of the samples.
        in_plane: Rotation and scaling in the H-W plane alone, low resolution too (nnU-Net's dummy-2D augmentation).
        rotation: Angle in radians, drawn for each axis by itself (in plane: one angle).
        p_rotation: Share of samples that are rotated.
        scaling: Zoom, the same for all axes; above 1 the objects get smaller.
        p_scaling: Share of samples that are scaled, whether rotated or not.
        noise: Standard deviation of Gaussian noise, in units of intensity and the same for all channels of a sample.
            nnU-Net names it `noise_variance` and uses it as the standard deviation.
        p_noise: Share of samples with noise.
        blur: Standard deviation of a Gaussian in voxels, drawn per channel and axis.
        p_blur: Share of samples in which channels may be blurred.
        p_blur_per_channel: Share of channels blurred in these.
        brightness: Factor of the intensities, per channel.
        p_brightness: Share of samples with all channels made brighter or darker.
        contrast: Factor of the distance from the channel's mean, per channel.
        p_contrast: Share of samples with another contrast in all channels.
        low_resolution: Size per axis of the coarse grid, as a share of the patch's, per channel.
        p_low_resolution: Share of samples in which channels may lose resolution.
        p_low_resolution_per_channel: Share of channels that lose it in these.
        gamma: Exponent of the channel's intensities scaled to 0..1, per channel.
        p_inverted_gamma: Share of samples whose negative goes through gamma.
        p_gamma: Share of samples with gamma, after and independent of the inverted one.
        masked: Channels that are 0 outside of the mask of nnU-Net's masked normalisation, and are so again at the end.
    """

    mirror_axes: tuple[int, ...] = (0, 1, 2)
    in_plane: bool = False
    rotation: tuple[float, float] = (-MAX_ANGLE, MAX_ANGLE)
    p_rotation: float = 0.2
    scaling: tuple[float, float] = (0.7, 1.4)
    p_scaling: float = 0.2
    noise: tuple[float, float] = (0.0, 0.1)
    p_noise: float = 0.1
    blur: tuple[float, float] = (0.5, 1.0)
    p_blur: float = 0.2
    p_blur_per_channel: float = 0.5
    brightness: tuple[float, float] = (0.75, 1.25)
    p_brightness: float = 0.15
    contrast: tuple[float, float] = (0.75, 1.25)
    p_contrast: float = 0.15
    low_resolution: tuple[float, float] = (0.5, 1.0)
    p_low_resolution: float = 0.25
    p_low_resolution_per_channel: float = 0.5
    gamma: tuple[float, float] = (0.7, 1.5)
    p_inverted_gamma: float = 0.1
    p_gamma: float = 0.3
    masked: tuple[int, ...] = ()


def nnunet_augmentation(
    rotation: Sequence[float], in_plane: bool, mirror_axes: Sequence[int], use_mask_for_norm: Sequence[bool] = ()
) -> Augmentation:
    """Returns all of nnU-Net's augmentation.

    Args:
        rotation: Range of angles in radians, as nnU-Net's configure_rotation_dummyDA_mirroring_and_inital_patch_size
            returns it.
        in_plane: Its `do_dummy_2d_data_aug`.
        mirror_axes: Its axes of mirroring.
        use_mask_for_norm: Its configuration's, per channel.
    """
    low, high = rotation
    return Augmentation(
        mirror_axes=tuple(mirror_axes),
        in_plane=in_plane,
        rotation=(float(low), float(high)),
        masked=tuple(channel for channel, masked in enumerate(use_mask_for_norm) if masked),
    )


def flips(mirror_axes: Sequence[int]) -> Augmentation:
    """Returns mirroring alone: nothing else ever acts."""
    return Augmentation(
        mirror_axes=tuple(mirror_axes),
        p_rotation=0.0,
        p_scaling=0.0,
        p_noise=0.0,
        p_blur=0.0,
        p_brightness=0.0,
        p_contrast=0.0,
        p_low_resolution=0.0,
        p_inverted_gamma=0.0,
        p_gamma=0.0,
    )
