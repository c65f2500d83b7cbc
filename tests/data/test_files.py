"""Files written here with nibabel, SimpleITK or byte by byte; values and places in the patient by another route."""

import gzip
import os
import struct
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_misfm.data.files import companions, ending_of, itk_affine, read_file
from nnunetv2_misfm.data.volume import Refused, Volume

SHAPE = (11, 12, 13)
VOXELS = np.random.default_rng(7).integers(-2000, 2000, SHAPE).astype(np.int16)
AFFINE = np.array([[-0.7, 0.1, 0, 12], [0.1, 0.7, 0, -30], [0, 0, 2.5, 99], [0, 0, 0, 1]])
NIFTI = [".nii", ".nii.gz", ".hdr", "-2.nii", "-2.nii.gz"]
MGH = [".mgh", ".mgz"]
ITK = [".nrrd", ".gz.nrrd", ".nhdr", ".gz.nhdr", ".mha", ".z.mha", ".mhd", ".z.mhd"]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def write(folder: Path, ending: str, voxels: np.ndarray = VOXELS, affine: np.ndarray = AFFINE) -> Path:
    """Writes a file that nibabel or ITK reads; "-2" stands for NIfTI-2, ".gz" or ".z" before an ITK ending packs it."""
    path = folder / f"scan{ending}"
    if ending in ITK:
        image = sitk.GetImageFromArray(voxels.T.copy())
        sitk.WriteImage(image, str(path), useCompression=ending.startswith((".gz", ".z")))
    elif ending in MGH:
        nibabel.save(nibabel.MGHImage(voxels, affine), path)
    else:
        kinds = {".hdr": nibabel.Nifti1Pair, "-2.nii": nibabel.Nifti2Image, "-2.nii.gz": nibabel.Nifti2Image}
        nibabel.save(kinds.get(ending, nibabel.Nifti1Image)(voxels, affine), path)
    return path


def data_file(path: Path) -> Path:
    """The file of the voxels, found by looking."""
    others = [file for file in path.parent.iterdir() if file != path]
    return others[0] if others else path


def nifti(path: Path, voxels: np.ndarray = VOXELS, **header: Any) -> Path:
    """Writes NIfTI-1 with some fields of its header set."""
    image = nibabel.Nifti1Image(voxels, AFFINE)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def patched(path: Path, offset: int, values: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(values)] = values
    path.write_bytes(content)
    return path


def read(path: Path, **options: Any) -> Volume:
    [volume] = read_file(path, **options)
    return volume


def refusal(path: Path, **options: Any) -> Refused:
    """The reason against a file: one line, and nothing was yielded before."""
    with pytest.raises(Refused) as caught:
        list(read_file(path, **options))
    reason = caught.value.reason
    assert reason and "\n" not in reason and len(reason) < 300
    return caught.value


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


PACKED = [".nii.gz", "-2.nii.gz", ".mgz", ".gz.nrrd", ".gz.nhdr", ".z.mha", ".z.mhd"]
DAMAGES = ["half", "last 100 bytes", "nothing left", "text", "git LFS", "gone", "folder"]


@pytest.mark.parametrize(
    ("ending", "damage"),
    [(ending, damage) for ending in [*NIFTI, *MGH, *ITK] for damage in DAMAGES]
    + [(ending, damage) for ending in PACKED for damage in ("flipped", "checksum")],
)
def test_a_damaged_file_is_refused_in_one_sentence(tmp_path, ending, damage):
    path = write(tmp_path, ending)
    file = data_file(path)
    content, middle = file.read_bytes(), file.stat().st_size * 2 // 3
    checksum = -4 if ".z." in ending else -8
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage != "gone":
        flip = {"flipped": middle, "checksum": len(content) + checksum}.get(damage, 0)
        after = {
            "half": content[: len(content) // 2],
            "last 100 bytes": content[:-100],
            "nothing left": b"",
            "text": b"this is no image\n" * 30,
            "git LFS": LFS_POINTER,
        }
        file.write_bytes(after.get(damage, content[:flip] + bytes([content[flip] ^ 0x55]) + content[flip + 1 :]))
    refused = refusal(path)
    if damage in ("half", "last 100 bytes", "flipped", "checksum") and ending != ".mgz":  # whose header is at both ends
        assert refused.reason.startswith("damaged: the file is cut off or corrupt (")
        assert refused.header.shape == SHAPE and refused.header.dtype == "int16"
    if damage == "git LFS" and file == path:
        assert refused.reason == "a pointer of git LFS, not the file itself: fetch it with git lfs pull"


@pytest.mark.parametrize("ending", [".nii.gz", ".mgz", ".gz.nrrd", ".gz.nhdr", ".z.mha"])
def test_no_flipped_bit_of_a_packed_file_gives_other_voxels(tmp_path, ending):
    path = write(tmp_path, ending)
    file = data_file(path)
    content = file.read_bytes()
    start = 0 if ending.endswith("gz") else len(content) - 2400  # the header of the others is plain text
    refused = 0
    for position in np.linspace(start, len(content) - 1, 60).astype(int):
        file.write_bytes(content[:position] + bytes([content[position] ^ 0x10]) + content[position + 1 :])
        try:
            np.testing.assert_array_equal(read(path).voxels, VOXELS)
        except Refused:
            refused += 1
    assert refused > 45


@pytest.mark.parametrize("ending", [".mhd", ".nhdr"])
def test_packed_data_are_checked_under_the_name_that_the_header_gives(tmp_path, ending):
    """ITK goes on after a wrong checksum, so the data file must be found whatever its name."""
    path = tmp_path / f"my scan{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(VOXELS.T.copy()), str(path), useCompression=True)
    file = data_file(path)
    (tmp_path / "data").mkdir()
    moved = file.rename(tmp_path / "data" / file.name)
    path.write_text(path.read_text().replace(file.name, f"data/{file.name}"))
    np.testing.assert_array_equal(read(path).voxels, VOXELS)
    patched(moved, moved.stat().st_size - 4, b"\0\0\0\0")
    assert refusal(path).reason.startswith("damaged")


@pytest.mark.parametrize("packed", [False, True])
def test_a_header_that_promises_more_than_fits_into_memory_is_refused(tmp_path, packed):
    path = patched(nifti(tmp_path / "a.nii"), 42, struct.pack("<3h", 32767, 32767, 32767))
    if packed:
        path = tmp_path / "a.nii.gz"
        path.write_bytes(gzip.compress((tmp_path / "a.nii").read_bytes()))
    assert refusal(path).reason.startswith("damaged")


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


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.nii")
    assert refusal(tmp_path / "a.nii").reason == "no regular file"


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
