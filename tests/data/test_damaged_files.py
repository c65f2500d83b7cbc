"""Files cut off, flipped or padded: every one is read as it was written, or refused in one sentence."""

import gzip
import os
import struct

import numpy as np
import pytest
import SimpleITK as sitk
from image_files import ITK, MGH, NIFTI, SHAPE, VOXELS, data_file, nifti, patched, read, refusal, write

from nnunetv2_misfm.data.volume import Refused

LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
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


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.nii")
    assert refusal(tmp_path / "a.nii").reason == "no regular file"


FOREIGN = "its gzip stream is whole, but other bytes follow: unpack it with gzip -d, which leaves them out"


@pytest.mark.parametrize("ending", [".nii.gz", "-2.nii.gz", ".mgz"])
@pytest.mark.parametrize(
    ("tail", "reason"),
    [
        (bytes(1), ""),
        (bytes(700), ""),
        (bytes(3 << 20), ""),
        (gzip.compress(b"more", mtime=0), ""),  # RFC 1952, 2.2: a file is a series of streams
        (b"x", FOREIGN),
        (b"this belongs to no stream" * 99, FOREIGN),
        (b"\xff" * 4096, FOREIGN),
        (bytes(700) + b"x", FOREIGN),
        (bytes(3 << 20) + b"x", FOREIGN),
        (gzip.compress(b"more", mtime=0) + b"x", FOREIGN),
        (gzip.compress(b"more", mtime=0)[:-3], "damaged: "),
        (bytes(700) + gzip.compress(b"more", mtime=0)[:-3], "damaged: "),
        (b"\x1f\x8b and no stream", "damaged: "),
    ],
)
def test_after_a_gzip_stream_padding_and_streams_may_follow(tmp_path, ending, tail, reason):
    path = write(tmp_path, ending)
    path.write_bytes(path.read_bytes() + tail)
    if reason:
        assert refusal(path).reason.startswith(reason)
    else:
        np.testing.assert_array_equal(read(path).voxels, VOXELS)
