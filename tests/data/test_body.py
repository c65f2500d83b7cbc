"""The body mask: against the phantoms' true bodies, hand-made scenes and a slow loop; never empty."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_misfm.data import body
from nnunetv2_misfm.data.body import body_mask
from nnunetv2_misfm.data.phantoms import make_phantom

AIR, TISSUE, LUNG = -1000, 40, -870


def phantom_ijk(spacing_kji: tuple[float, float, float], seed: int = 0):
    phantom = make_phantom(np.random.default_rng(seed), spacing_kji)
    return phantom.image.T, phantom.body.T, spacing_kji[::-1]


def dice(mask: np.ndarray, truth: np.ndarray) -> float:
    return 2 * np.logical_and(mask, truth).sum() / (mask.sum() + truth.sum())


def cylinder(shape: tuple[int, int, int], centre_ij: tuple[float, float], radii_ij: tuple[float, float]) -> np.ndarray:
    i, j, k = np.indices(shape)
    return ((i - centre_ij[0]) / radii_ij[0]) ** 2 + ((j - centre_ij[1]) / radii_ij[1]) ** 2 <= 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "spacing_kji", [(4.0, 2.2, 2.2), (2.5, 1.5, 1.5), (5.0, 0.7, 0.7), (0.8, 1.2, 1.2), (1.4, 1.4, 3.0)]
)
def test_the_mask_is_the_phantoms_body(spacing_kji: tuple[float, float, float], seed: int):
    image, truth, spacing = phantom_ijk(spacing_kji, seed)
    mask = body_mask(image, spacing, "CT")
    assert mask.shape == image.shape and mask.dtype == np.uint8 and mask.flags.f_contiguous
    assert set(np.unique(mask)) == {0, 1}
    assert dice(mask, truth) >= 0.97


@pytest.mark.parametrize("offset", range(3))
def test_the_mask_of_a_fine_grid_is_not_shifted(offset: int):
    shape = (150 + offset, 150, 20)
    truth = cylinder(shape, (75.0, 70.0), (50.0, 40.0))
    mask = body_mask(np.where(truth, TISSUE, AIR).astype(np.int16), (0.5, 0.5, 3.0), "CT")
    centre = [index.mean() for index in np.nonzero(mask)]
    assert centre == pytest.approx([75.0, 70.0, 9.5], abs=1.0)  # a step is 4 voxels: half of it would be 2
    assert dice(mask, truth) >= 0.95


def test_the_order_in_memory_does_not_matter():
    image, _, spacing = phantom_ijk((4.0, 1.5, 1.5))
    expected = body_mask(image, spacing, "CT")
    assert np.array_equal(body_mask(np.ascontiguousarray(image), spacing, "CT"), expected)
    flipped = np.ascontiguousarray(image[::-1])[::-1]
    assert np.array_equal(body_mask(flipped, spacing, "CT"), expected)


def test_a_table_and_an_arm_are_no_body():
    image, truth, spacing = phantom_ijk((4.0, 2.0, 2.0))
    wide = ((25, 25), (0, 15), (0, 0))
    image, truth = np.pad(image, wide, constant_values=AIR), np.pad(truth, wide)
    back = np.nonzero(truth)[1].max()
    table, arm = np.zeros_like(truth), cylinder(image.shape, (10.0, 26.0), (7.0, 7.0))
    table[5:-5, back + 1] = table[5:-5, back + 10] = True  # the upper skin touches the back
    image[table | arm] = 200
    mask = body_mask(image, spacing, "CT")
    assert not mask[arm].any()
    assert mask[table].mean() < 0.15  # no more than where the body rests on it
    assert dice(mask, truth) >= 0.97


def test_both_legs_are_body():
    shape = (80, 50, 20)
    legs = cylinder(shape, (20.0, 25.0), (14.0, 14.0)) | cylinder(shape, (60.0, 25.0), (12.0, 12.0))
    mask = body_mask(np.where(legs, TISSUE, AIR).astype(np.int16), (3.0, 3.0, 5.0), "CT")
    assert dice(mask, legs) >= 0.98


def test_lungs_cut_open_by_the_first_and_the_last_slice_are_filled():
    image, truth, spacing = phantom_ijk((4.0, 2.0, 2.0))
    chest = slice(image.shape[2] * 4 // 5, None)
    image, truth = image[:, :, chest], truth[:, :, chest]
    for k in (0, -1):
        assert (image[:, :, k][truth[:, :, k]] < -600).mean() > 0.1, k
    mask = body_mask(image, spacing, "CT")
    assert mask[(image < -600) & truth].mean() > 0.98
    assert dice(mask, truth) >= 0.97


def test_a_lung_cut_open_by_a_side_of_the_image_is_filled_and_the_air_at_its_corners_is_not():
    image = np.full((64, 64, 20), TISSUE, np.int16)
    image[:20, 16:48] = LUNG
    image[:, :8] = AIR
    mask = body_mask(image, (2.0, 2.0, 3.0), "CT")
    assert mask[:, 8:].all() and not mask[:, :8].any()


def test_a_crop_inside_the_body_is_all_body():
    hounsfield = np.random.default_rng(0).normal(60, 60, (36, 50, 35))
    assert body_mask(hounsfield.astype(np.int16), (1.0, 1.0, 1.0), "CT").all()
    hounsfield[4:8, 4:10, 4:10] = 700  # bone
    assert body_mask(np.abs(hounsfield).astype(np.int16), (1.0, 1.0, 1.0), "CT").all()  # as if without an intercept
    brain = np.random.default_rng(0).normal(100, 30, (36, 50, 35)).clip(0)
    brain[:10, 20:30, 10:20] = 8  # fluid
    assert body_mask(brain.astype(np.float32), (1.0, 1.0, 1.0), "MR").mean() > 0.95
    dark_but_no_air = np.full((36, 50, 35), 150, np.uint8)
    dark_but_no_air[:12, :12] = 20
    assert body_mask(dark_but_no_air, (1.0, 1.0, 1.0), "MR").all()


def test_a_ct_without_its_intercept_has_the_same_mask():
    image, _, spacing = phantom_ijk((4.0, 2.0, 2.0))
    expected = body_mask(image, spacing, "CT")
    assert np.array_equal(body_mask((image + 1024).astype(np.uint16), spacing, "CT"), expected)


def noisy_head(sigma: float, spacing_mm: float) -> tuple[np.ndarray, np.ndarray]:
    """Magnitude of a complex signal with Gaussian noise (Rician): a scalp, a dark skull, a brain with dark fluid."""
    rng = np.random.default_rng(1)
    size = round(120 / spacing_mm)
    grid = (np.indices((size, size, size)) - (size - 1) / 2) * spacing_mm
    radius_mm = np.sqrt((grid[0] / 0.9) ** 2 + grid[1] ** 2 + (grid[2] / 0.8) ** 2)
    signal = np.where(radius_mm < 52, 120.0, 0.0)
    signal[radius_mm < 49] = 0
    signal[radius_mm < 40] = 80
    signal[radius_mm < 12] = 5
    real, imaginary = rng.normal(0, sigma, (2, *signal.shape))
    return np.hypot(signal + real, imaginary).astype(np.float32), radius_mm < 52


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0])
@pytest.mark.parametrize("sigma", [0.0, 2.0, 5.0])
def test_a_head_in_noise_is_found_whole_in_mr(sigma: float, spacing_mm: float):
    image, truth = noisy_head(sigma, spacing_mm)
    assert dice(body_mask(image, (spacing_mm,) * 3, "MR"), truth) >= 0.95


def test_a_head_cut_off_by_the_last_slices_reaches_them_in_mr():
    image, truth = noisy_head(2.0, 2.0)
    mask = body_mask(image[:, :, 20:40], (2.0, 2.0, 2.0), "MR")
    for k in (0, -1):
        assert dice(mask[:, :, k], truth[:, :, 20:40][:, :, k]) >= 0.95


def test_a_scalp_that_the_skull_parts_from_the_brain_is_body_in_mr():
    shape = (60, 60, 20)
    head, skull, brain = (cylinder(shape, (30.0, 30.0), (radius, radius)) for radius in (27.0, 25.0, 20.0))
    image = np.where(brain | (head & ~skull), 100, 0).astype(np.uint8)
    assert dice(body_mask(image, (3.0, 3.0, 3.0), "MR"), head) >= 0.98


def test_a_vial_beside_the_head_is_no_body():
    image, truth = noisy_head(2.0, 2.0)
    image[1:9, 1:9] = 150
    mask = body_mask(image, (2.0, 2.0, 2.0), "MR")
    assert not mask[:9, :9].any()
    assert dice(mask, truth) >= 0.95


def test_a_scan_of_thin_things_only_keeps_them():
    image = np.full((40, 40, 20), AIR, np.int16)
    image[20] = TISSUE
    assert np.array_equal(body_mask(image, (3.0, 3.0, 3.0), "CT"), image == TISSUE)


@pytest.mark.parametrize("modality", ["CT", "MR"])
@pytest.mark.parametrize("value", [-3000, -1000, 0])
def test_a_scan_in_which_nothing_stands_out_is_all_body(value: int, modality: str):
    image = np.full((20, 24, 16), value, np.int16)
    image[0, 0, 0] -= 1
    assert body_mask(image, (1.0, 1.0, 1.0), modality).all()


def test_an_axis_of_few_voxels_and_a_spacing_far_off_do_no_harm():
    image, truth, _ = phantom_ijk((4.0, 2.0, 2.0))
    assert dice(body_mask(image[:, :, :1], (2.0, 2.0, 4.0), "CT"), truth[:, :, :1]) >= 0.97
    for spacing in (1e-4, 1e4):
        assert dice(body_mask(image, (spacing,) * 3, "CT"), truth) >= 0.9


def test_the_reduced_grid_stays_small_and_keeps_sixteen_voxels():
    assert body._steps((300, 512, 512), (1.0, 0.8, 0.8)) == [3, 2, 2]
    assert body._steps((400, 378, 360), (0.6, 0.5, 0.5)) == [5, 4, 4]
    assert body._steps((8, 50, 36), (0.1, 0.1, 0.1)) == [1, 3, 2]
    assert body._steps((512, 512, 512), (9.0, 9.0, 9.0)) == [2, 2, 2]


def test_holes_are_those_that_a_slow_flood_from_the_corners_does_not_reach():
    mask = np.random.default_rng(0).random((6, 14, 15)) < 0.45
    expected = np.ones_like(mask)
    for k, plane in enumerate(mask):
        front = [corner for corner in product((0, 13), (0, 14)) if not plane[corner]]
        for j, i in front:  # grows while it is walked through
            expected[k, j, i] = False
            for near in ((j - 1, i), (j + 1, i), (j, i - 1), (j, i + 1)):
                if 0 <= near[0] < 14 and 0 <= near[1] < 15 and not plane[near] and near not in front:
                    front.append(near)
    filled = body._filled(mask)
    assert (expected & ~mask).any() and not expected.all()
    assert np.array_equal(filled, expected)


@st.composite
def scans(draw: st.DrawFn) -> np.ndarray:
    shape = draw(st.tuples(*[st.integers(8, 40)] * 3))
    dtype = np.dtype(draw(st.sampled_from(["int16", "uint8", "float32"])))
    limits = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    low, high = sorted(draw(st.tuples(*[st.floats(float(limits.min), float(limits.max), width=32)] * 2)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    noise = rng.random(shape)
    if draw(st.booleans()):
        noise = (noise > draw(st.sampled_from([0.01, 0.5, 0.99, 0.9999]))).astype(float)
    return (low * (1 - noise) + high * noise).astype(dtype)


@settings(max_examples=150, deadline=None)
@given(scans(), st.tuples(*[st.floats(0.05, 20)] * 3), st.sampled_from(["CT", "MR"]))
def test_no_mask_is_empty(image: np.ndarray, spacing: tuple[float, float, float], modality: str):
    mask = body_mask(image, spacing, modality)
    assert mask.shape == image.shape and mask.dtype == np.uint8 and mask.flags.f_contiguous
    assert mask.any() and mask.max() == 1
