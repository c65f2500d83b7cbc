"""Files written here with nibabel, SimpleITK or byte by byte; values and places in the patient by another route."""

import gzip
import os
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import AFFINE, ITK, MGH, NIFTI, SHAPE, VOXELS, nifti, patched, read, refusal, write

from nnunetv2_misfm.data.files import companions, ending_of, itk_affine, read_file


@pytest.mark.parametrize("upper_case", [False, True])
@pytest.mark.parametrize("ending", [*NIFTI, *MGH, *ITK])
def test_every_format_is_read_whatever_the_case_of_its_ending(tmp_path, ending, upper_case):
    path = write(tmp_path, ending)
    if upper_case and ending not in (".nhdr", ".gz.nhdr", ".mhd", ".z.mhd"):  # these name their data file
        for file in list(tmp_path.iterdir()):
            file.rename(file.with_name(file.name.upper()))
        path = tmp_path / path.name.upper()
    volume = read(path)
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert volume.header.shape == SHAPE and volume.header.dtype == "int16" and volume.part == ""
    if ending in ITK:
        assert volume.header.orientation == "LPS"
    else:
        np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
        np.testing.assert_allclose(volume.header.spacing_mm, [0.5**0.5, 0.5**0.5, 2.5], atol=1e-5)
        assert volume.header.orientation == "LAS" and not volume.notes


@settings(max_examples=40, deadline=None)
@given(data=st.data(), kind=st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"]))
def test_voxels_of_every_type_survive(tmp_path_factory, data, kind):
    known = [".nii", ".nii.gz", "-2.nii", ".hdr", *ITK] + (MGH if kind in ("u1", "i2", "i4", "f4") else [])
    ending = data.draw(st.sampled_from(known))
    shape = data.draw(st.tuples(*[st.integers(2, 6)] * 3))
    limits = np.iinfo(kind) if kind[0] in "iu" else np.finfo(kind)
    drawn = np.random.default_rng(data.draw(st.integers(0, 99))).random(shape)
    voxels = (limits.min / 2 + drawn * (limits.max / 2 - limits.min / 2)).astype(kind)
    voxels[0, 0, 0], voxels[-1, -1, -1] = limits.min, limits.max
    volume = read(write(tmp_path_factory.mktemp("types"), ending, voxels))
    np.testing.assert_array_equal(volume.voxels, voxels)
    assert volume.voxels.dtype.newbyteorder("=") == voxels.dtype
    assert volume.header.dtype == voxels.dtype.name


@settings(max_examples=25, deadline=None)
@given(
    angles=st.tuples(*[st.floats(-180, 180)] * 3),
    mirrored=st.booleans(),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    ending=st.sampled_from([".nrrd", ".mha", ".mhd", ".nhdr", ".nii", ".nii.gz"]),
)
def test_itk_and_we_agree_where_each_voxel_lies(tmp_path_factory, angles, mirrored, spacing, origin, ending):
    path = tmp_path_factory.mktemp("itk") / f"scan{ending}"
    turn = sitk.Euler3DTransform((0, 0, 0), *np.radians(angles)).GetMatrix()
    direction = np.reshape(turn, (3, 3)) @ np.diag([1, 1, -1 if mirrored else 1])
    voxels = np.arange(2 * 3 * 4, dtype=np.float32).reshape(4, 3, 2)
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction.ravel())
    sitk.WriteImage(image, str(path))
    volume = read(path)
    for index in np.ndindex(2, 3, 4):
        left, back, up = image.TransformIndexToPhysicalPoint([int(i) for i in index])
        np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], [-left, -back, up], atol=2e-3)
        assert volume.voxels[index] == image[index]


@settings(max_examples=25, deadline=None)
@given(entries=st.lists(st.floats(-3, 3), min_size=12, max_size=12), ending=st.sampled_from(NIFTI))
def test_any_affine_of_a_nifti_file_is_taken_as_nibabel_gives_it(tmp_path_factory, entries, ending):
    affine = np.eye(4)
    affine[:3] += np.reshape(entries, (3, 4)) * [[0.3, 0.3, 0.3, 100]]
    path = write(tmp_path_factory.mktemp("affine"), ending, affine=affine)
    volume = read(path)
    np.testing.assert_array_equal(volume.affine, nibabel.load(path).affine)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-4)


def test_the_affine_of_a_four_dimensional_itk_image_is_that_of_its_first_three_axes(tmp_path):
    frame = sitk.GetImageFromArray(VOXELS.T.copy())
    frame.SetSpacing((0.5, 0.6, 3.0))
    frame.SetOrigin((1, 2, 3))
    frame.SetDirection((0, 0, 1, 1, 0, 0, 0, 1, 0))
    path = str(tmp_path / "series.nrrd")
    sitk.WriteImage(sitk.JoinSeries([frame, frame]), path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(path)
    reader.ReadImageInformation()
    left, back, up = frame.TransformIndexToPhysicalPoint((5, 7, 9))
    np.testing.assert_allclose(itk_affine(reader) @ [5, 7, 9, 1], [-left, -back, up, 1])


@pytest.mark.parametrize(("space", "first_row"), [("right-anterior-superior", -1.5), ("left-posterior-superior", 1.5)])
def test_a_big_endian_nrrd_of_either_space_is_taken_by_its_words(tmp_path, space, first_row):
    path = tmp_path / "hand.nrrd"
    header = (
        f"NRRD0004\ntype: int16\ndimension: 3\nspace: {space}\nsizes: 2 3 4\nendian: big\nencoding: raw\n"
        "space directions: (-1.5,0,0) (0,2,0) (0,0,3)\nspace origin: (10,20,30)\n\n"
    )
    path.write_bytes(header.encode() + np.arange(24, dtype=">i2").tobytes())
    volume = read(path)
    assert volume.voxels[1, 0, 0] == 1 and volume.voxels[0, 1, 0] == 2 and volume.voxels[1, 2, 3] == 23
    sign = first_row / -1.5  # the world of an LPS header is ours with two axes turned
    expected = np.diag([sign * -1.5, sign * 2, 3, 1])
    expected[:3, 3] = [sign * 10, sign * 20, 30]
    np.testing.assert_allclose(volume.affine, expected)


def test_a_big_endian_nifti_is_read(tmp_path):
    image = nibabel.Nifti1Image(VOXELS.astype(">i2"), AFFINE, nibabel.Nifti1Header(endianness=">"))
    image.set_data_dtype(">i2")
    nibabel.save(image, tmp_path / "big.nii")
    assert (tmp_path / "big.nii").read_bytes()[:4] == b"\0\0\x01\x5c"  # 348
    volume = read(tmp_path / "big.nii")
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert volume.header.dtype == "int16"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("slope", "intercept", "expected"),
    [
        (1, -1024, {0: -1024, 7: -1017, -3: -1027}),
        (2, 0, {0: 0, 7: 14, -3: -6}),
        (0.25, 1.5, {0: 1.5, 7: 3.25, -3: 0.75}),
        (0, 99, {0: 0, 7: 7, -3: -3}),  # a slope of 0 means that none is given
    ],
)
def test_slope_and_intercept_are_applied(tmp_path, slope, intercept, expected, packed):
    stored = np.array([0, 7, -3, 0, 7, -3, 7, 7], np.int16).reshape(2, 2, 2)
    path = patched(nifti(tmp_path / "a.nii", stored), 112, struct.pack("<2f", slope, intercept))
    if packed:
        path = tmp_path / "a.nii.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    voxels = read(path).voxels
    assert voxels.tolist() == [[[expected[int(v)] for v in row] for row in plane] for plane in stored]
    assert voxels.dtype == (np.int16 if slope == 0 else np.float32)


@pytest.mark.parametrize(("code", "mm", "name"), [(1, 1000.0, "metres"), (3, 0.001, "micrometres"), (2, 1.0, "")])
def test_lengths_in_other_units_are_brought_to_mm_as_itk_does(tmp_path, code, mm, name):
    path = nifti(tmp_path / "a.nii", xyzt_units=code)
    volume = read(path)
    image = sitk.ReadImage(str(path))
    np.testing.assert_allclose(volume.spacing_mm, np.array([0.5**0.5, 0.5**0.5, 2.5]) * mm, rtol=1e-5)
    np.testing.assert_allclose(volume.spacing_mm, image.GetSpacing(), rtol=1e-5)
    np.testing.assert_allclose(volume.header.spacing_mm, image.GetSpacing(), rtol=1e-5)
    assert (name in volume.notes[0]) if name else not volume.notes


@pytest.mark.parametrize("ones", [1, 2, 3])
def test_axes_of_one_at_the_end_do_not_count(tmp_path, ones):
    volume = read(nifti(tmp_path / "a.nii", VOXELS.reshape(SHAPE + (1,) * ones)))
    np.testing.assert_array_equal(volume.voxels, VOXELS)
    assert volume.header.shape == SHAPE + (1,) * ones


def test_a_header_without_orientation_is_noted(tmp_path):
    image = nibabel.Nifti1Image(VOXELS, None)
    nibabel.save(image, tmp_path / "a.nii")
    volume = read(tmp_path / "a.nii")
    assert volume.notes == ("the header states no orientation, taken as LAS",)


def with_forms(path: Path, qform: np.ndarray, sform: np.ndarray, codes: tuple[int, int] = (1, 1)) -> Path:
    """Writes NIfTI-1 whose sform is set byte by byte: nibabel puts odd ones right on saving."""
    image = nibabel.Nifti1Image(VOXELS, qform)
    image.set_qform(qform, codes[0])
    nibabel.save(image, path)
    patched(path, 254, struct.pack("<h", codes[1]))  # sform_code and srow_x of nifti1.h
    return patched(path, 280, sform[:3].astype("<f4").tobytes())


PLAIN = np.diag([-1.0, 2, 3, 1])
ODD_FORMS = {
    "zero": np.zeros((4, 4)),
    "NaN": np.full((4, 4), np.nan),
    "one NaN": np.where(np.eye(4) * [1, 0, 0, 0] > 0, np.nan, PLAIN),
    "infinite": np.where(np.eye(4) * [0, 1, 0, 0] > 0, np.inf, PLAIN),
    "no origin": PLAIN + np.array([[0, 0, 0, np.nan]] * 3 + [[0, 0, 0, 0]]),
    "an axis of no length": np.diag([-1.0, 2, 0, 1]),
    "axes in one plane": np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]),
    "too large to square": np.diag([-3e38, 2, 3, 1]),
}


@pytest.mark.parametrize("name", [name for name in ODD_FORMS if name != "too large to square"])
def test_the_qform_stands_in_for_a_sform_that_spans_no_space(tmp_path, name):
    volume = read(with_forms(tmp_path / "a.nii", PLAIN, ODD_FORMS[name]))
    np.testing.assert_allclose(volume.affine, PLAIN)
    assert volume.header.spacing_mm == (1.0, 2.0, 3.0) and volume.header.orientation == "LAS"
    assert volume.notes == ("the sform gives no usable size or direction; the qform was taken",)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ODD_FORMS)
@pytest.mark.parametrize("quaternion", [None, (np.nan, 0.0, 0.0), (5.0, 5.0, 5.0)])
def test_a_header_of_which_no_form_can_be_used_is_read_for_the_judge_to_refuse(tmp_path, name, quaternion):
    path = with_forms(tmp_path / "a.nii", PLAIN, ODD_FORMS[name], (0, 1) if quaternion is None else (1, 1))
    if quaternion is not None:
        patched(path, 256, struct.pack("<3f", *quaternion))
    volume = read(path)
    np.testing.assert_array_equal(volume.affine, np.vstack([ODD_FORMS[name].astype(np.float32)[:3], [0, 0, 0, 1]]))
    np.testing.assert_array_equal(volume.voxels, VOXELS)


@pytest.mark.parametrize(
    ("sform", "notes"),
    [
        (PLAIN, ()),
        (np.diag([-1.08, 2, 3, 1]), ()),  # 0.8 mm over 10 steps
        (np.diag([-1.15, 2, 3, 1]), ("qform and sform differ by up to 1.5 mm; the sform was taken",)),
        (np.diag([1.0, 2, 3, 1]), ("qform and sform differ by up to 20.0 mm; the sform was taken",)),
    ],
)
@pytest.mark.parametrize("codes", [(1, 1), (1, 4), (2, 2), (0, 1), (1, 0)])
def test_qform_and_sform_that_differ_are_noted(tmp_path, sform, notes, codes):
    volume = read(with_forms(tmp_path / "a.nii", PLAIN, sform, codes))
    np.testing.assert_allclose(volume.affine, sform if codes[1] else PLAIN, rtol=1e-6)
    assert volume.notes == (notes if all(codes) else ())


def test_the_header_tells_the_spacing_that_the_affine_has(tmp_path):
    path = with_forms(tmp_path / "a.nii", PLAIN, np.diag([-0.5, 0.25, 4, 1]), (0, 1))
    assert nibabel.load(path).header.get_zooms() == (1.0, 2.0, 3.0)
    volume = read(path)
    assert volume.header.spacing_mm == (0.5, 0.25, 4.0) == tuple(volume.spacing_mm)


def time_series(folder: Path, ending: str) -> Path:
    path = folder / f"series{ending}"
    frames = [VOXELS + 5000 * number for number in range(3)]
    if ending in (".nrrd", ".mha"):
        sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(frame.T.copy()) for frame in frames]), str(path))
    else:
        kind = nibabel.MGHImage if ending == ".mgz" else nibabel.Nifti1Image
        nibabel.save(kind(np.stack(frames, -1), AFFINE), path)
    return path


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".nrrd", ".mha"])
def test_a_time_series_is_refused_or_taken_apart(tmp_path, ending):
    path = time_series(tmp_path, ending)
    refused = refusal(path)
    assert refused.reason == "time series of 3 volumes; --split-time-series takes them apart"
    assert refused.header.shape == (*SHAPE, 3)
    volumes = list(read_file(path, split_time_series=True))
    assert [volume.part for volume in volumes] == ["volume 1 of 3", "volume 2 of 3", "volume 3 of 3"]
    for number, volume in enumerate(volumes):
        np.testing.assert_array_equal(volume.voxels, VOXELS + 5000 * number)
        assert volume.affine.shape == (4, 4)


def no_scalars(folder: Path, what: str) -> Path:
    """Writes a file that holds more than one number per voxel, or less than three axes."""
    field = np.zeros((*SHAPE, 3), np.float32)
    if what.startswith("intent"):
        return nifti(folder / "a.nii", field, intent_code=int(what.split()[1]))
    if what == "5D":
        return nifti(folder / "a.nii.gz", field[:, :, :, None])
    if what in ("RGB", "RGBA"):
        return nifti(folder / "a.nii", np.zeros(SHAPE, [(letter, "u1") for letter in what]))
    if what == "complex":
        return nifti(folder / "a.nii.gz", np.zeros(SHAPE, np.complex64))
    if what == "2D":
        return nifti(folder / "a.nii", VOXELS[:, :, 0])
    if what == "one slice":
        return nifti(folder / "a.nii", VOXELS[:, :, :1])
    kind, ending = what.split()
    array = {"vectors": field, "complex": field[..., 0].astype(np.complex64), "flat": VOXELS[0], "slice": VOXELS[:1]}
    path = folder / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(array[kind], isVector=kind == "vectors"), str(path))
    return path


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        *[(f"intent {code}", "vectors or tensors") for code in (1004, 1005, 1006, 1007, 1011, 2003, 2004)],
        ("5D", "vectors or tensors"),
        ("RGB", "colour"),
        ("RGBA", "colour"),
        ("complex", "complex"),
        ("2D", "2D: a single slice"),
        ("one slice", "2D: a single slice"),
        ("vectors .nrrd", "vectors or colours"),
        ("vectors .mha", "vectors or colours"),
        ("complex .nrrd", "complex"),
        ("complex .mha", "vectors"),  # a MetaImage holds them as two components
        ("flat .mha", "2D: a single slice"),
        ("slice .nrrd", "2D: a single slice"),
    ],
)
def test_what_holds_no_single_scalar_volume_is_refused_with_its_header(tmp_path, what, reason):
    path = no_scalars(tmp_path, what)
    refused = refusal(path, split_time_series=True)
    assert refused.reason.startswith(reason)
    assert refused.header.shape and refused.header.dtype


def test_analyze_is_refused_with_the_way_out(tmp_path):
    image = nibabel.AnalyzeImage(VOXELS, np.eye(4))
    nibabel.save(image, tmp_path / "a.hdr")
    assert refusal(tmp_path / "a.hdr").reason.endswith("convert it to NIfTI")


@pytest.mark.parametrize("ending", [".nii.gz", ".mha"])
def test_a_name_that_is_no_unicode_is_read_or_refused_and_ends_no_process(tmp_path, ending):
    path = write(tmp_path, ending)
    path = path.rename(tmp_path / os.fsdecode(b"caf\xe9" + ending.encode()))
    if ending == ".mha":
        assert refusal(path).reason == "a path that is no UTF-8, which ITK cannot open: rename it"
    else:
        np.testing.assert_array_equal(read(path).voxels, VOXELS)


@pytest.mark.parametrize(
    ("name", "ending"),
    [("a.nii", ".nii"), ("a.b.NII.GZ", ".nii.gz"), ("a.Nrrd", ".nrrd"), ("a.gz", ""), ("nii", "")],
)
def test_the_ending_is_told_from_the_name(name, ending):
    assert ending_of(Path(name)) == ending


def test_companions_are_the_files_of_the_same_stem(tmp_path):
    for name in ("a.hdr", "a.img", "b.hdr", "b.img.gz", "C.HDR", "C.IMG", "d.mhd", "d.raw", "d.zraw", "e.nii", "e.img"):
        (tmp_path / name).touch()
    (tmp_path / "f.hdr").touch()
    (tmp_path / "f.img").mkdir()
    found = {path.name: [file.name for file in companions(path)] for path in tmp_path.iterdir()}
    assert {name: files for name, files in found.items() if files} == {
        "a.hdr": ["a.img"],
        "b.hdr": ["b.img.gz"],
        "C.HDR": ["C.IMG"],
        "d.mhd": ["d.raw", "d.zraw"],
    }


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("header", "line", "expected"),
    [
        ("d.mhd", "ElementDataFile = voxels.bin", ["voxels.bin"]),
        ("d.mhd", "ElementDataFile=my voxels.bin", ["my voxels.bin"]),
        ("d.MHD", "ElementDataFile : voxels.bin", ["voxels.bin"]),
        ("d.nhdr", "data file: voxels.bin", ["voxels.bin"]),
        ("d.nhdr", "DataFile:  ./voxels.bin", ["voxels.bin"]),
        ("d.nhdr", "data file: below/voxels.bin", ["below/voxels.bin"]),
        ("d.mhd", "ElementDataFile = gone.bin", ["d.raw"]),
        ("d.mhd", "ElementDataFile = LOCAL", ["d.raw"]),
        ("d.mhd", "ElementDataFile = LIST", ["d.raw"]),
        ("d.mhd", "ElementDataFile = d.mhd", ["d.raw"]),
        ("d.mhd", "ElementDataFile = below", ["d.raw"]),
        ("d.mhd", "ElementDataFile = slice%03d.bin 1 9 1", ["d.raw"]),
        ("d.mhd", "ElementDataFile = a\0b", ["d.raw"]),
        ("d.mhd", "ElementDataFile = " + 999 * "x", ["d.raw"]),
        ("d.mhd", "ElementDataFile =", ["d.raw"]),
        ("d.nhdr", "# data file: voxels.bin", ["d.raw"]),
        ("d.nhdr", "", ["d.raw"]),
        ("d.mha", "ElementDataFile = voxels.bin", []),
    ],
)
def test_the_companion_is_the_file_that_a_header_names_else_that_of_its_stem(tmp_path, header, line, expected, end):
    (tmp_path / "below").mkdir()
    for name in ("voxels.bin", "my voxels.bin", "LIST", "LOCAL", "d.raw", "below/voxels.bin"):
        (tmp_path / name).touch()
    (tmp_path / header).write_bytes(f"NRRD0004{end}NDims = 3{end}{line}{end}".encode())
    assert companions(tmp_path / header) == [tmp_path / name for name in expected]


def test_a_header_that_cannot_be_read_has_the_companions_of_its_stem(tmp_path):
    (tmp_path / "d.raw").touch()
    assert companions(tmp_path / "d.mhd") == [tmp_path / "d.raw"]
    (tmp_path / "d.mhd").mkdir()
    assert companions(tmp_path / "d.mhd") == [tmp_path / "d.raw"]
