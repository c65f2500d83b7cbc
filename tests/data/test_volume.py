from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from scans import ORIENTATIONS, affine_of, rotation

from nnunetv2_misfm.data.volume import (
    LARGEST_USABLE,
    Header,
    Volume,
    canonical,
    corner_distance_mm,
    is_canonical,
    is_sheared,
    orientation_of,
    resample_sheared,
    same_place,
)


def volume_of(affine: np.ndarray, shape=(4, 5, 6)) -> Volume:
    voxels = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    return Volume(voxels, affine, Header(shape))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_canonical_points_left_posterior_superior_and_keeps_every_voxel_in_its_place(orientation):
    volume = volume_of(rotation(12) @ affine_of(orientation, (0.7, 1.1, 2.5)))
    turned = canonical(volume)
    assert orientation_of(turned.affine) == "LPS"
    places = {int(value): volume.affine @ [*index, 1] for index, value in np.ndenumerate(volume.voxels)}
    for index, value in np.ndenumerate(turned.voxels):
        np.testing.assert_allclose(turned.affine @ [*index, 1], places[int(value)], atol=1e-4)


def test_all_orientations_of_one_image_become_the_same_array_and_affine():
    first = canonical(volume_of(affine_of("RAS", (1.0, 2.0, 3.0))))
    for orientation in ORIENTATIONS:
        # the same image stored in another order: index the first one's voxels through the world
        axes = ["LRPASI".index(letter) // 2 for letter in orientation]
        flips = [letter in "RAI" for letter in orientation]  # LPS is stored forwards
        voxels = np.transpose(first.voxels, axes)
        voxels = voxels[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]
        affine = affine_of(orientation, tuple((1.0, 2.0, 3.0)[axis] for axis in axes))
        corner = [0 if not flip else first.voxels.shape[axis] - 1 for axis, flip in zip(axes, flips, strict=True)]
        index = np.zeros(4)
        index[3] = 1
        for axis, place in zip(axes, corner, strict=True):
            index[axis] = place
        affine[:3, 3] = (first.affine @ index)[:3]
        other = canonical(Volume(voxels, affine, Header()))
        np.testing.assert_array_equal(other.voxels, first.voxels)
        np.testing.assert_array_equal(other.affine, first.affine)


@settings(max_examples=30, deadline=None)
@given(
    degrees=st.floats(0, 40),
    spacing=st.tuples(*[st.floats(0.1, 10)] * 3),
    origin=st.tuples(*[st.floats(-2000, 2000)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
)
def test_canonical_of_any_geometry_keeps_the_first_and_last_voxel_where_they_are(degrees, spacing, origin, orientation):
    volume = volume_of(rotation(degrees) @ affine_of(orientation, spacing, origin))
    turned = canonical(volume)
    for value in (0, volume.voxels.size - 1):
        before = volume.affine @ [*np.argwhere(volume.voxels == value)[0], 1]
        after = turned.affine @ [*np.argwhere(turned.voxels == value)[0], 1]
        np.testing.assert_allclose(after, before, atol=1e-3)


def test_float_noise_in_the_header_gives_the_same_affine():
    affine = rotation(20) @ affine_of("LPS", (0.71, 0.71, 1.3))
    noisy = affine.astype(np.float32).astype(float)
    np.testing.assert_allclose(canonical(volume_of(noisy)).affine, canonical(volume_of(affine)).affine, atol=2e-5)


@pytest.mark.parametrize(("tilt_degrees", "sheared"), [(0.0, False), (0.03, False), (0.5, True), (18.5, True)])
def test_gantry_tilt_is_shear_and_rounding_is_not(tilt_degrees, sheared):
    affine = affine_of("LPS", (0.5, 0.5, 5.0))
    affine[1, 2] = 5 * np.tan(np.radians(tilt_degrees))
    assert is_sheared(affine) is sheared
    assert is_canonical(affine) is not sheared


def test_a_turned_image_is_not_canonical():
    assert not is_canonical(affine_of("RAS", (1, 1, 1)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("affine", "orientation"),
    [
        (np.full((4, 4), np.nan), ""),
        (np.diag([1.0, np.inf, 1, 1]), ""),
        (np.diag([1.0, 1e300, 1, 1]), ""),
        (np.diag([1.0, -1, np.nan, 1]), ""),
        (np.zeros((4, 4)), "???"),
        (np.diag([1.0, 0, -1, 1]), "R?I"),
    ],
)
def test_the_orientation_of_odd_axes_is_told_as_far_as_it_goes(affine, orientation):
    assert orientation_of(affine) == orientation


def lattice(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """World positions of all voxels, one by one."""
    return np.array([(affine @ [*index, 1])[:3] for index in np.ndindex(*shape)])


@settings(max_examples=30, deadline=None)
@given(entries=st.lists(st.floats(-2, 2), min_size=24, max_size=24), shape=st.tuples(*[st.integers(1, 5)] * 3))
def test_no_voxel_is_farther_apart_than_the_farthest_corner(entries, shape):
    one, other = np.eye(4), np.eye(4)
    one[:3], other[:3] = np.reshape(entries[:12], (3, 4)), np.reshape(entries[12:], (3, 4))
    apart = np.linalg.norm(lattice(one, shape) - lattice(other, shape), axis=1).max()
    assert corner_distance_mm(one, other, shape) == pytest.approx(apart, abs=1e-12)


def test_a_header_in_float32_is_in_the_same_place():
    affine = rotation(20) @ affine_of("LPS", (2.0, 2.0, 2.0), (2000.0, -2000.0, 1999.9))
    assert not np.array_equal(affine.astype(np.float32), affine)
    assert same_place(affine, affine.astype(np.float32).astype(float), (512, 512, 512))
    assert same_place(affine, affine.round(6), (512, 512, 512))


@pytest.mark.parametrize(
    ("other", "shape", "same"),
    [
        (affine_of("LPS", (1, 1, 1.0009)), (20, 20, 200), False),  # 0.18 mm at the last of 200 slices
        (affine_of("LPS", (1, 1, 1.0009)), (20, 20, 12), True),  # 0.0099 mm
        (affine_of("LPS", (1, 1, 1.0009)), (20, 20, 13), False),  # 0.0108 mm
        (affine_of("LPS", (1, 1, 1), (10.009, -20.0, 30.0)), (20, 20, 20), True),
        (affine_of("LPS", (1, 1, 1), (10.011, -20.0, 30.0)), (20, 20, 20), False),
        (affine_of("LPS", (1, 1, 1), (10.009, -20.009, 30.0)), (20, 20, 20), False),  # 0.0127 mm
        (affine_of("RPS", (1, 1, 1)), (20, 20, 20), False),
        (affine_of("LPS", (1, 1, 1), (10.0, -20.0, np.nan)), (20, 20, 20), False),
    ],
)
def test_what_is_off_by_more_than_a_hundredth_of_a_millimetre_somewhere_is_elsewhere(other, shape, same):
    affine = affine_of("LPS", (1.0, 1.0, 1.0))
    assert same_place(affine, other, shape) is same
    assert same_place(other, affine, shape) is same


@pytest.mark.parametrize("tilt", [0.3, -0.3])
def test_resampling_a_tilted_scan_gives_perpendicular_axes_and_the_same_intensities_in_the_same_places(tilt):
    affine = rotation(7) @ affine_of("LPS", (1.0, 1.2, 3.0))
    affine[:3, 2] += tilt * affine[:3, 1]
    grid = np.stack(np.meshgrid(*[np.arange(size) for size in (12, 14, 9)], indexing="ij"))
    # an intensity that is linear in the world: linear interpolation gives it back exactly
    world = np.tensordot(affine[:3, :3], grid, 1) + affine[:3, 3][:, None, None, None]
    slope = np.array([1.0, -2.0, 3.0])
    volume = Volume(np.tensordot(slope, world, 1), affine, Header())
    straight = resample_sheared(volume, -9999.0)
    assert not is_sheared(straight.affine)
    np.testing.assert_allclose(straight.spacing_mm[:2], (1.0, 1.2), atol=1e-6)
    assert all(new >= old for new, old in zip(straight.voxels.shape, volume.voxels.shape, strict=True))
    inside = 0
    for index, value in np.ndenumerate(straight.voxels):
        place = straight.affine @ [*index, 1]
        old = np.linalg.solve(affine, place)[:3]
        if ((old >= 0) & (old <= np.array(volume.voxels.shape) - 1)).all():
            np.testing.assert_allclose(value, slope @ place[:3], atol=1e-3)
            inside += 1
        elif ((old < -0.51) | (old > np.array(volume.voxels.shape) - 0.49)).any():  # half a voxel belongs to it
            assert value == -9999
    assert inside > 0.7 * volume.voxels.size
    assert "resampled" in straight.notes[-1]


def test_resampling_covers_the_whole_old_grid():
    affine = affine_of("LPS", (1.0, 1.0, 2.0))
    affine[:3, 2] += 0.5 * affine[:3, 1]
    volume = volume_of(affine)
    straight = resample_sheared(volume, 0.0)
    for corner in product(*[(0, size - 1) for size in volume.voxels.shape]):
        new = np.linalg.solve(straight.affine, affine @ [*corner, 1])[:3]
        assert (new > -1e-6).all() and (new < np.array(straight.voxels.shape) - 1 + 1e-6).all()


def test_resampling_agrees_with_itk_on_a_scan_without_shear():
    volume = volume_of(affine_of("LPS", (1.0, 1.0, 2.0)))
    straight = resample_sheared(replace(volume, voxels=volume.voxels.astype(np.float32)), 0.0)
    np.testing.assert_array_equal(straight.voxels, volume.voxels)
    image = sitk.GetImageFromArray(straight.voxels.T)
    assert image.GetSize() == volume.voxels.shape


@settings(max_examples=20, deadline=None)
@given(
    tilt=st.tuples(st.floats(-0.7, 0.7), st.floats(-0.7, 0.7)),
    skew=st.floats(-1e-3, 1e-3),
    shape=st.tuples(*[st.integers(2, 20)] * 3),
)
def test_resampling_keeps_the_slices_and_loses_neither_row_nor_column(tilt, skew, shape):
    affine = affine_of("LPS", (0.7, 0.9, 2.5))
    affine[:3, 2] += 2.5 * (tilt[0] * affine[:3, 0] / 0.7 + tilt[1] * affine[:3, 1] / 0.9)
    affine[:3, 1] += skew * affine[:3, 0]
    new = resample_sheared(volume_of(affine, shape), 0.0)
    assert new.voxels.shape[2] == shape[2] and new.voxels.shape[0] >= shape[0] and new.voxels.shape[1] >= shape[1]
    assert new.spacing_mm[2] == pytest.approx(2.5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf, 1e300, -3e38, 2 * LARGEST_USABLE])
def test_an_unusable_voxel_spoils_only_what_is_interpolated_from_it(odd):
    affine = rotation(7) @ affine_of("LPS", (1.0, 1.2, 3.0))
    affine[:3, 2] += 0.3 * affine[:3, 1]
    voxels = np.random.default_rng(0).normal(size=(12, 14, 9))
    spoilt = voxels.copy()
    spoilt[5, 6, 4] = odd
    clean = resample_sheared(Volume(voxels, affine, Header()), -7.0)
    straight = resample_sheared(Volume(spoilt, affine, Header()), -7.0)
    differing = np.argwhere(straight.voxels != clean.voxels)
    assert len(differing) > 0 and np.isnan(straight.voxels[tuple(differing.T)]).all()
    for index in differing:
        old = np.linalg.solve(affine, straight.affine @ [*index, 1])[:3]
        assert (np.abs(old - [5, 6, 4]) < 1 + 1e-9).all()
