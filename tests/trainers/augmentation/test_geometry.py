import math

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.cropping import center_crop
from batchgeneratorsv2.transforms.utils.pseudo2d import Convert2DTo3DTransform, Convert3DTo2DTransform

from nnunetv2_misfm.trainers.augmentation.geometry import Pose, centre_crop, place, rescale_depth

ANGLES = (0.4, -0.3, 0.5)


def a_volume(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def nnunet_spatial(patch_size: tuple[int, ...], pose: Pose) -> SpatialTransform:
    def angle(image: torch.Tensor, dim: int) -> float:
        assert pose.angles is not None
        return pose.angles[-1] if len(patch_size) == 2 else pose.angles[dim]

    return SpatialTransform(
        patch_size, 0, False,
        p_rotation=float(pose.angles is not None), rotation=angle,
        p_scaling=float(pose.scale is not None), scaling=pose.scale, p_synchronize_scaling_across_axes=1,
    )  # fmt: skip


POSES = [Pose(ANGLES, 1.3, ()), Pose(ANGLES, None, ()), Pose(None, 0.7, ()), Pose(None, 1.4, ()), Pose(None, None, ())]
# crop and patch: with a margin, equal, one voxel larger, odd against even both ways, anisotropic
SIZES = [
    ((18, 25, 21), (10, 16, 14)),
    ((12, 16, 14), (12, 16, 14)),
    ((9, 13, 17), (8, 12, 16)),
    ((10, 14, 16), (9, 13, 15)),
    ((6, 30, 27), (4, 22, 20)),
]


@pytest.mark.parametrize("pose", POSES, ids=str)
@pytest.mark.parametrize(("crop", "patch"), SIZES, ids=str)
def test_a_posed_patch_is_what_nnunets_spatial_transform_gives(
    crop: tuple[int, ...], patch: tuple[int, ...], pose: Pose
) -> None:
    volume = a_volume(2, *crop)
    expected = nnunet_spatial(patch, pose)(image=volume.clone())["image"]
    assert torch.allclose(place(volume, patch, pose, in_plane=False), expected, atol=2e-5)


@pytest.mark.parametrize("pose", [*POSES, Pose((0.0, 0.0, math.pi), None, ())], ids=str)
def test_a_patch_posed_in_plane_is_what_nnunets_dummy_2d_gives(pose: Pose) -> None:
    volume, patch = a_volume(2, 6, 21, 18), (6, 14, 13)
    steps = [Convert3DTo2DTransform(), nnunet_spatial(patch[1:], pose), Convert2DTo3DTransform()]
    expected = ComposeTransforms(steps)(image=volume.clone())["image"]
    assert torch.allclose(place(volume, patch, pose, in_plane=True), expected, atol=2e-5)


def test_in_plane_crops_the_depth_and_never_mixes_slices() -> None:
    volume = torch.arange(7.0).reshape(1, 7, 1, 1).expand(1, 7, 20, 20).clone()
    patch = place(volume, (4, 8, 8), Pose(ANGLES, 1.2, ()), in_plane=True)
    assert torch.allclose(patch, torch.arange(1.0, 5.0).reshape(1, 4, 1, 1).expand(1, 4, 8, 8))


def test_a_quarter_turn_about_the_depth_moves_voxels_as_reckoned_by_hand() -> None:
    volume = torch.zeros(1, 3, 3, 3)
    volume[0, 1, 0, 1] = 1.0  # above the centre
    turned = place(volume, (3, 3, 3), Pose((math.pi / 2, 0.0, 0.0), None, ()), in_plane=False)
    # the patch's offset (0, h, w) reads the volume at (0, -w, h): h = 0 and w = 1 read (0, -1, 0)
    assert turned[0, 1, 1, 2] == pytest.approx(1.0, abs=1e-6)
    assert turned.sum() == pytest.approx(1.0, abs=1e-5)


def test_rescaled_depth_is_the_hand_computed_line_and_zero_outside() -> None:
    volume = torch.tensor([10.0, 20.0, 40.0]).reshape(1, 3, 1, 1)
    assert rescale_depth(volume, 3, 0.5).flatten().tolist() == [15.0, 20.0, 30.0]
    assert rescale_depth(volume, 5, 0.75).flatten().tolist() == pytest.approx([5.0, 12.5, 20.0, 35.0, 20.0])


@pytest.mark.parametrize(("crop", "patch"), SIZES, ids=str)
def test_the_centre_crop_is_nnunets_and_a_view(crop: tuple[int, ...], patch: tuple[int, ...]) -> None:
    volume = a_volume(2, *crop)
    ours = centre_crop(volume, patch)
    assert torch.equal(ours, center_crop(volume, patch))
    assert ours.untyped_storage().data_ptr() == volume.untyped_storage().data_ptr()
