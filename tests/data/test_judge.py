from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter, zoom

from nnunetv2_misfm.data.files import read_file
from nnunetv2_misfm.data.judge import Intensities, check_geometry, check_intensities, stored_form, survey
from nnunetv2_misfm.data.phantoms import make_phantom
from nnunetv2_misfm.data.volume import Header, Refused, Volume

HEADER = Header((16, 16, 16), (1.0, 1.0, 1.0), "LPS", "int16")
TOO_LARGE = 3.4e38  # what some warps hold where nothing is known: finite, but its square is not
LARGEST = 1.8446742e19  # the square root of the largest float32, 3.4028235e38


def volume_of(voxels: np.ndarray, affine: np.ndarray | None = None) -> Volume:
    return Volume(voxels, np.diag([-1.0, -1, 2, 1]) if affine is None else affine, HEADER, part="volume 2 of 3")


def verdict(voxels: np.ndarray) -> str:
    """What is said against the intensities; empty for an image."""
    try:
        check_intensities(volume_of(voxels), survey(voxels))
    except Refused as refused:
        assert refused.header == HEADER and refused.part == "volume 2 of 3"
        return refused.reason
    return ""


def shape_verdict(shape: tuple[int, ...], affine: np.ndarray | None = None, **options) -> str:
    try:
        check_geometry(volume_of(np.zeros(shape, np.uint8), affine), **options)
    except Refused as refused:
        assert refused.header == HEADER and refused.part == "volume 2 of 3"
        return refused.reason
    return ""


@pytest.mark.parametrize(
    ("shape", "options", "reason"),
    [
        ((8, 8, 8), {}, ""),
        ((512, 8, 9), {}, ""),
        ((8, 7, 8), {}, "smaller than 8 voxels along an axis"),
        ((8, 8, 0), {}, "smaller than 8 voxels along an axis"),
        ((64, 64, 1), {}, "2D: a single slice"),
        ((1, 64, 64), {"min_size": 1}, "2D: a single slice"),
        ((5, 6, 7), {"min_size": 5}, ""),
        ((5, 6, 7), {"min_size": 6}, "smaller than 6 voxels along an axis"),
    ],
)
def test_volumes_below_the_smallest_size_are_refused(shape, options, reason):
    assert shape_verdict(shape, **options) == reason


def at(*origin: float) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, 3] = origin
    return affine


NOT_FINITE = "voxel size or direction: not all its numbers are finite"
IN_ONE_PLANE = "direction: the three axes lie in one plane"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("affine", "reason"),
    [
        (np.diag([1.0, np.nan, 1, 1]), NOT_FINITE),
        (np.diag([1.0, np.inf, 1, 1]), NOT_FINITE),
        (at(np.nan, 0, 0), NOT_FINITE),
        (np.diag([1.0, 0, 2, 1]), "voxel size: 1 x 0 x 2 mm, where 0.001 to 100 can be"),
        (np.diag([1.0, -9e-4, 2, 1]), "voxel size: 1 x 0.0009 x 2 mm, where 0.001 to 100 can be"),
        (np.diag([1.0, 1e-320, 2, 1]), "voxel size: 1 x 0 x 2 mm, where 0.001 to 100 can be"),
        (np.diag([1.0, 101, 2, 1]), "voxel size: 1 x 101 x 2 mm, where 0.001 to 100 can be"),
        (np.diag([1.0, 1e300, 2, 1]), "voxel size: 1 x inf x 2 mm, where 0.001 to 100 can be"),
        (at(5, -2e6, 5), "place: 2e+06 mm from the origin"),
        (np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), IN_ONE_PLANE),
        (np.array([[1, 0, 1, 0], [0, 1, 1, 0], [0, 0, 1e-4, 0], [0, 0, 0, 1.0]]), IN_ONE_PLANE),
        (np.diag([-0.0011, 99, 1, 1]), ""),
        (at(-9e5, 9e5, 0), ""),
    ],
)
@pytest.mark.parametrize("allow_shear", [False, True])
def test_axes_that_no_scan_has_are_refused(affine, reason, allow_shear):
    said = shape_verdict((9, 9, 9), affine, allow_shear=allow_shear)
    assert said == (f"the header gives no usable {reason}" if reason else "")


@pytest.mark.parametrize(("tilt", "sheared"), [(0.0, False), (0.0005, False), (0.01, True), (0.3, True)])
def test_sheared_axes_are_refused_unless_allowed(tilt, sheared):
    affine = np.diag([-0.5, -0.5, 5.0, 1])
    affine[1, 2] = 5 * tilt
    assert shape_verdict((9, 9, 9), affine, allow_shear=True) == ""
    said = "sheared axes (gantry tilt); --resample-sheared brings it to perpendicular ones"
    assert shape_verdict((9, 9, 9), affine) == (said if sheared else "")


def tilted(degrees: float, axis: int, towards: int) -> np.ndarray:
    """Axes of 2 mm, one of which leans by an angle towards another."""
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, axis] = 0
    affine[axis, axis], affine[towards, axis] = 2 * np.cos(np.radians(degrees)), 2 * np.sin(np.radians(degrees))
    return affine


@pytest.mark.parametrize(
    ("degrees", "axis", "towards", "passes"),
    [
        (30, 2, 1, True),
        (-44.9, 2, 1, True),
        (44.9, 2, 0, True),
        (45.1, 2, 1, False),
        (-80, 2, 0, False),
        (1, 0, 1, False),  # shear within the slices
        (1, 1, 0, False),
        (89, 0, 1, False),
        (30, 1, 2, True),  # the angle between the second and the third axis is the same, whichever leans
    ],
)
@pytest.mark.parametrize("allow_shear", [False, True])
def test_only_shear_as_by_a_gantry_tilt_is_brought_right(degrees, axis, towards, passes, allow_shear):
    said = shape_verdict((9, 9, 9), tilted(degrees, axis, towards), allow_shear=allow_shear)
    if not passes:
        assert said == "sheared axes, and by no gantry tilt (of the third axis alone, up to 45 degrees)"
    else:
        assert ("--resample-sheared" in said) is not allow_shear


def test_a_tilt_towards_two_axes_at_once_counts_as_a_whole():
    affine = np.eye(4)
    affine[:3, 2] = (0.8, 0.8, 1)  # 48.5 degrees from the normal, 38.7 in either direction
    assert shape_verdict((9, 9, 9), affine, allow_shear=True).startswith("sheared axes, and by no gantry tilt")
    affine[:3, 2] = (0.6, 0.6, 1)  # 40.3 degrees
    assert shape_verdict((9, 9, 9), affine, allow_shear=True) == ""


@settings(max_examples=100, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "?", "f4", "f8"]))
def test_the_survey_agrees_with_numpy_on_the_whole_array(data, kind):
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3))
    odd = [np.nan, np.inf, -np.inf, TOO_LARGE, -TOO_LARGE, 0.5, 1e19]
    number = st.integers(-300, 300) | st.sampled_from(odd) if kind[0] == "f" else st.integers(0, 1)
    if kind[0] in "iu":
        number = st.integers(int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    size = int(np.prod(shape))
    values = data.draw(st.lists(number, min_size=size, max_size=size))
    with np.errstate(over="ignore"):
        voxels = np.array(values, dtype=kind).reshape(shape)
    voxels = np.asarray(voxels, order=data.draw(st.sampled_from("CF")))
    kept = [float(v) for v in voxels.ravel() if np.isfinite(v) and abs(float(v)) <= LARGEST]
    seen = survey(voxels)
    assert seen.unusable == size - len(kept)
    assert seen.lowest == min(kept, default=np.inf) and seen.highest == max(kept, default=-np.inf)
    assert seen.integral == all(v == int(v) for v in kept)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, TOO_LARGE])
def test_a_volume_without_a_usable_voxel_is_refused(bad):
    assert verdict(np.full((9, 9, 9), bad)) == "no finite voxel"


@pytest.mark.parametrize(("value", "kind"), [(0, "u1"), (-1024, "i2"), (0.5, "f4")])
def test_a_constant_volume_is_refused(value, kind):
    voxels = np.full((9, 9, 9), value, kind)
    assert verdict(voxels) == f"constant: every voxel is {value}"
    if kind == "f4":
        voxels[3, 3, 3] = np.nan
        assert verdict(voxels) == f"constant: every voxel is {value}"


def blocks(values: np.ndarray, size: int = 6) -> np.ndarray:
    """A map of [A, B, C] boxes of `size` voxels."""
    return np.kron(values, np.ones((size,) * 3, values.dtype))


@cache
def label_maps() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    tiny = np.zeros((128, 128, 60), np.uint8)
    tiny[70:73, 41:44, 33] = 1
    organs = blocks(draw.integers(1, 41, (8, 8, 8)).astype(np.uint8))
    ball = np.linalg.norm(np.indices(organs.shape) - 24, axis=0) < 23
    freesurfer = np.array([0, 2, 3, 41, 42, *range(1000, 1036), *range(2000, 2036), *range(11101, 11176), 14175])
    cortex = blocks(draw.choice(freesurfer, (8, 8, 8)).astype(np.int32), 5)
    unknown = np.where(ball, organs, np.nan)
    return {
        "binary": (draw.random((32, 32, 32)) < 0.5).astype(np.uint8),
        "boolean": ball,
        "tiny object": tiny,
        "two values in float": np.where(ball, 255.0, 0.0),
        "a half": np.where(ball, 0.5, 0.0).astype(np.float32),
        "slope 1/255": (organs % 3 * ball).astype(np.float32) * np.float32(1 / 255),
        "tiny object of a tenth": tiny * np.float32(0.1),
        "16 fractions, NaN elsewhere": np.where(ball, organs % 16 / 16, np.nan),
        "40 labels": organs * ball,
        "40 labels in float": (organs * ball).astype(np.float32),
        "40 labels, NaN elsewhere": unknown,
        "40 labels, huge numbers elsewhere": np.where(ball, organs, TOO_LARGE),
        "16 noisy values": draw.integers(0, 16, (20, 20, 20)).astype(np.int16),
        "numbers of FreeSurfer": cortex,
        "numbers of FreeSurfer, large": zoom(cortex, 4, order=0),
    }


@pytest.mark.parametrize("name", label_maps())
def test_label_maps_are_refused(name):
    assert verdict(label_maps()[name]) == "a label map, not an image"


def organs_of(number: int) -> np.ndarray:
    return blocks(np.random.default_rng(3).integers(1, number + 1, (8, 8, 8)))


@cache
def images() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    smooth = gaussian_filter(draw.normal(size=(96, 80, 64)), 6)
    smooth = (smooth - smooth.min()) / np.ptp(smooth)
    ct = make_phantom(draw, (2.5, 1.5, 1.5)).image.T
    window = np.clip((ct + 160) * (255 / 400), 0, 255).round().astype(np.uint8)
    masked = np.where(ct > -500, ct, 0)
    return {
        "noise of 17 values": draw.integers(0, 17, (24, 24, 24)).astype(np.uint8),
        "noise": draw.integers(-1000, 1000, (24, 24, 24)).astype(np.int16),
        "smooth, 8 bit": (smooth * 255).round().astype(np.uint8),
        "smooth, 8 bit in float": (smooth * 255).round(),
        "smooth, not integral": smooth,
        "noise of 17 fractions": draw.integers(0, 17, (24, 24, 24)) / 17,
        "40 fractions": organs_of(40) / 41,
        "CT": ct,
        "CT with NaN around": np.where(ct > -500, ct, np.nan),
        "windowed CT": window,
        "CT in a narrow window": np.clip((ct + 200) * (255 / 140), 0, 255).round().astype(np.uint8),
        "windowed CT, turned": np.transpose(window, (2, 0, 1)),
        "CT without its background": masked,
    }


@pytest.mark.parametrize("name", images())
def test_images_are_no_label_maps(name):
    assert verdict(images()[name]) == ""


def test_a_windowed_ct_has_plateaus_that_could_mislead():
    """The case above is one: off the background most neighbours are equal, and only those off both plateaus tell."""
    window = images()["CT in a narrow window"]
    foreground = (window[1:] > 0) | (window[:-1] > 0)
    assert (window[1:] == window[:-1])[foreground].mean() > 0.5


def scans(folder: Path, *patterns: str) -> list[Path]:
    return sorted(file for pattern in patterns for file in folder.glob(pattern))


def test_images_and_label_maps_of_real_data_are_told_apart(shared):
    folder = shared / "data" / "ct_labelled"
    images, labels = scans(folder, "*/image.*"), scans(folder, "*/label.*")
    assert len(images) >= 8 and len(labels) >= 8
    said = {file: verdict(next(read_file(file)).voxels) for file in images + labels}
    assert {file for file in images if said[file]} == set()
    assert {file for file in labels if said[file] != "a label map, not an image"} == set()


def test_all_real_unlabelled_scans_pass(shared):
    files = scans(shared / "data" / "unannotated", "ct/*", "mr/*")
    assert len(files) > 100
    for file in files:
        [volume] = read_file(file)
        check_geometry(volume)
        check_intensities(volume, survey(volume.voxels))


def stored(voxels: np.ndarray, fill: float = 0.0) -> np.ndarray:
    return stored_form(voxels, survey(voxels), fill)


@pytest.mark.parametrize(
    ("kind", "lowest", "highest", "expected"),
    [
        ("u1", 0, 255, "int16"),
        ("f4", -1024, 3071, "int16"),
        ("i4", -32768, 32767, "int16"),
        ("i4", 0, 32768, "uint16"),
        ("f8", 0, 65535, "uint16"),
        ("i4", 0, 65536, "int32"),
        ("i2", -1, 32767, "int16"),
        ("i4", -1, 32768, "int32"),
        ("i4", -(2**31), 2**31 - 1, "int32"),
        ("f8", -(2**31), 2**31 - 1, "int32"),
        ("u4", 0, 2**31, "float32"),
        ("f4", 0, 0.5, "float32"),
        ("f8", -1e10, 1e10, "float32"),
        (">i2", -5, 5, "int16"),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_the_smallest_exact_type_is_chosen(kind, lowest, highest, expected, order):
    voxels = np.zeros((3, 4, 5), kind, order=order)
    voxels[0, 1, 2], voxels[2, 3, 4] = lowest, highest
    written = stored(voxels)
    assert written.dtype == expected and written.dtype.isnative and written.flags.f_contiguous
    np.testing.assert_array_equal(written, voxels)


@pytest.mark.parametrize("kind", [np.int16, np.uint16, np.int32, np.float32])
def test_nothing_is_copied_where_nothing_changes(kind):
    voxels = np.zeros((3, 4, 5), kind, order="F")
    voxels[0, 0, 0] = {np.int16: 7, np.uint16: 40000, np.int32: 70000, np.float32: 0.5}[kind]
    assert stored(voxels) is voxels


@settings(max_examples=50, deadline=None)
@given(data=st.data(), fill=st.integers(-1000, 1000), integral=st.booleans())
def test_unusable_voxels_alone_are_filled(data, fill, integral):
    draw = np.random.default_rng(data.draw(st.integers(0, 99)))
    voxels = draw.normal(0, 500, (3, 4, 5)).astype(data.draw(st.sampled_from(["f4", "f8"])))
    voxels = voxels.round() if integral else voxels
    bad = draw.random(voxels.shape) < 0.3
    bad[0, 0, 0] = True
    damaged = voxels.copy()
    damaged[bad] = draw.choice([np.nan, np.inf, -np.inf, TOO_LARGE], bad.sum())
    written = stored(damaged, float(fill))
    assert (written[bad] == fill).all() and written.flags.f_contiguous
    np.testing.assert_array_equal(written[~bad], voxels[~bad].astype(np.float32))
    assert written.dtype == (np.int16 if integral else np.float32)


def test_the_survey_names_what_it_found():
    voxels = np.array([1.0, np.nan, -3, np.inf, TOO_LARGE, 2.5, 0, 0]).reshape(2, 2, 2)
    assert survey(voxels) == Intensities(lowest=-3.0, highest=2.5, unusable=3, integral=False)
