"""Rotation, scaling, centre crop and mirroring of volumes, as nnU-Net's SpatialTransform and MirrorTransform do them.

Scaling without rotation is separable: D first, then H and W of all slices at once. It equals sampling a 3D grid but for
rounding, and a CPU does it four times as fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from batchgeneratorsv2.transforms.spatial.spatial import create_affine_matrix_2d, create_affine_matrix_3d
from torch import Tensor
from torch.nn.functional import grid_sample

from nnunetv2_misfm.trainers.augmentation.distribution import P_MIRROR, Augmentation
from nnunetv2_misfm.trainers.augmentation.draws import draw_chosen, draw_uniform


@dataclass(frozen=True)
class Pose:
    """How one sample lies in its patch.

    Attributes:
        angles: Radians about D, H and W; None without rotation. In plane the last one is used, as in nnU-Net.
        scale: Step of the patch's grid in voxels of the volume; None without scaling.
        mirrored: Spatial axes (0, 1, 2) that are mirrored.
    """

    angles: tuple[float, float, float] | None
    scale: float | None
    mirrored: tuple[int, ...]

    @property
    def is_resampled(self) -> bool:
        """Whether the patch is interpolated, and not only cropped."""
        return self.angles is not None or self.scale is not None


def draw_poses(batch: int, augmentation: Augmentation, generator: torch.Generator) -> list[Pose]:
    """Returns one pose per sample."""
    rotated = draw_chosen(augmentation.p_rotation, (batch,), generator)
    angles = draw_uniform(augmentation.rotation, (batch, 3), generator)
    scaled = draw_chosen(augmentation.p_scaling, (batch,), generator)
    scales = draw_uniform(augmentation.scaling, (batch,), generator)
    mirrored = draw_chosen(P_MIRROR, (batch, 3), generator)
    return [
        Pose(
            tuple(angles[i].tolist()) if rotated[i] else None,
            float(scales[i]) if scaled[i] else None,
            tuple(axis for axis in augmentation.mirror_axes if mirrored[i, axis]),
        )
        for i in range(batch)
    ]


def centre_crop(volume: Tensor, size: Sequence[int]) -> Tensor:
    """Returns a view [C, *size] of the centre of a volume [C, ...] that is at least as large.

    Where the margins differ the crop starts at floor(n / 2) - floor(size / 2) of an axis, as nnU-Net's.
    """
    for axis, (n, m) in enumerate(zip(volume.shape[1:], size, strict=True), start=1):
        volume = volume.narrow(axis, n // 2 - m // 2, m)
    return volume


def place(volume: Tensor, patch_size: Sequence[int], pose: Pose, in_plane: bool) -> Tensor:
    """Returns the patch of a volume in a pose, not yet mirrored; voxels from outside the volume are 0.

    Args:
        volume: float32 [C, D', H', W'], at least as large as the patch.
        patch_size: D, H, W.
        pose: Its rotation about and scaling from the volume's centre.
        in_plane: Rotate and scale in the H-W plane only, and crop D.

    Returns:
        float32 [C, D, H, W], a view of the volume where it is only cropped.
    """
    if not pose.is_resampled:
        return centre_crop(volume, patch_size)
    scale = 1.0 if pose.scale is None else pose.scale
    if pose.angles is not None and not in_plane:
        return resample(volume, patch_size, create_affine_matrix_3d(pose.angles, [scale] * 3))
    depth = patch_size[0]
    slices = centre_crop(volume, (depth, *volume.shape[2:])) if in_plane else rescale_depth(volume, depth, scale)
    matrix = create_affine_matrix_2d(0.0 if pose.angles is None else pose.angles[-1], [scale] * 2)
    return resample(slices.flatten(0, 1), patch_size[1:], matrix).unflatten(0, slices.shape[:2])


def resample(volume: Tensor, size: Sequence[int], matrix: np.ndarray) -> Tensor:
    """Returns [C, *size] interpolated linearly where a matrix takes the grid of that size, both centres together.

    Args:
        volume: float32 [C, ...] with two or three spatial axes.
        size: Spatial size of the result.
        matrix: Acts on column vectors of voxel offsets from the centre, in array order.
    """
    grid = sampling_grid(size, volume.shape[1:], matrix, volume.device)
    return grid_sample(volume[None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)[0]


def sampling_grid(size: Sequence[int], volume_size: Sequence[int], matrix: np.ndarray, device: torch.device) -> Tensor:
    """Returns the grid [*size, axes] float32 for `grid_sample` (align_corners False: last axis first, edges at ±1)."""
    num_axes = len(size)
    offsets = [_offsets(n, device).reshape(-1, *[1] * (num_axes - 1 - axis)) for axis, n in enumerate(size)]
    grid = torch.empty(*size, num_axes, device=device)
    for axis, n in enumerate(volume_size):
        first, *others = [line * (2 * float(matrix[axis, j]) / n) for j, line in enumerate(offsets)]
        torch.add(first, sum(others[1:], others[0]), out=grid[..., num_axes - 1 - axis])
    return grid


def rescale_depth(volume: Tensor, depth: int, scale: float) -> Tensor:
    """Returns [C, depth, H', W'] of a volume [C, D', H', W'], interpolated linearly along D at steps of a scale."""
    last = volume.shape[1] - 1
    positions = _offsets(depth, volume.device) * scale + last / 2
    below = positions.floor()
    share = positions - below
    index = below.long()
    weight_below = (1 - share) * ((index >= 0) & (index <= last))
    weight_above = share * ((index >= -1) & (index < last))
    result = volume.index_select(1, index.clamp(0, last)).mul_(weight_below[:, None, None])
    return result.addcmul_(volume.index_select(1, (index + 1).clamp(0, last)), weight_above[:, None, None])


def _offsets(size: int, device: torch.device) -> Tensor:
    """Returns the voxels' offsets [size] from the centre of an axis."""
    return torch.linspace((1 - size) / 2, (size - 1) / 2, size, device=device)
