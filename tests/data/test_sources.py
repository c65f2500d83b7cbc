import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from nnunetv2_misfm.data import sources
from nnunetv2_misfm.data.records import Records
from nnunetv2_misfm.data.sources import Source, folders_below, scan_folder, sources_in
from nnunetv2_misfm.errors import MisfmError

ONE, TWO = "1.2.826.0.1.3680043.8.498.111", "1.2.826.0.1.3680043.8.498.222"


def slice_of(path: Path, uid: str) -> Path:
    """Writes the header of a DICOM image of a series."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    header.SOPClassUID, header.SOPInstanceUID, header.SeriesInstanceUID = CTImageStorage, generate_uid(), uid
    header.Modality, header.Rows, header.Columns = "CT", 4, 4
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, header, implicit_vr=False, little_endian=True)
    return path


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"something")


def scan(top: Path, scanned: Records) -> list[Source]:
    folders = list(folders_below([top]))
    for folder in folders:
        scan_folder(folder, scanned)
    return sources_in(folders, scanned)


def others(folder: Path, scanned: Records) -> dict[str, str]:
    return scanned.last(str(folder))["others"]


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    (tmp_path / "pool").mkdir()
    return tmp_path / "pool"


@pytest.fixture
def scanned(tmp_path: Path) -> Records:
    return Records(tmp_path / "state")


def below(*tops: Path) -> list[str]:
    return list(folders_below(tops))


def test_all_folders_below_are_listed_once_each_in_order(pool):
    for name in ("b/deep/er", "a", "b/.hidden"):
        (pool / name).mkdir(parents=True)
    expected = [pool, pool / "a", pool / "b", pool / "b/.hidden", pool / "b/deep", pool / "b/deep/er"]
    assert below(pool) == [str(folder) for folder in expected]
    assert below(pool, pool, pool / "b") == below(pool)
    assert sorted(below(pool / "b", pool)) == sorted(below(pool))


def test_relative_folders_are_made_absolute(pool, monkeypatch):
    (pool / "a").mkdir()
    monkeypatch.chdir(pool)
    assert below(Path(), Path("a")) == [str(pool), str(pool / "a")]


def test_links_to_folders_are_followed_once_and_cycles_end(pool, tmp_path):
    (tmp_path / "elsewhere/inner").mkdir(parents=True)
    (pool / "a").mkdir()
    (pool / "a/link").symlink_to(tmp_path / "elsewhere")
    (pool / "b").symlink_to(tmp_path / "elsewhere")
    (pool / "a/up").symlink_to(pool)
    (tmp_path / "elsewhere/back").symlink_to(pool / "a")
    (pool / "itself").symlink_to("itself")
    assert below(pool) == [str(pool / name) for name in ("", "a", "a/link", "a/link/inner")]


@pytest.mark.parametrize("name", ["missing", "file"])
def test_an_input_that_is_no_folder_is_an_error(pool, name):
    (pool / "file").touch()
    with pytest.raises(MisfmError, match=f"expected folders after --input, got .*{name}, which is not one"):
        below(pool / name)


def test_a_folder_that_cannot_be_listed_is_still_named(pool, monkeypatch):
    """Scanning it raises, which gives the reason; root may list all folders, so the system's answer is made up."""
    (pool / "closed/inner").mkdir(parents=True)
    (pool / "open").mkdir()
    listed = os.scandir

    def scandir(folder: str) -> Iterator[os.DirEntry]:
        if str(folder).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    assert below(pool) == [str(pool), str(pool / "open"), str(pool / "closed")]


def test_a_series_over_two_folders_is_one_source_named_by_its_first_file(pool, scanned):
    expected = [slice_of(pool / name, ONE) for name in ("a/2", "a/9", "b/1")]
    [source] = scan(pool, scanned)
    assert source.path == str(pool / "a/2")
    assert source.folders == (str(pool / "a"), str(pool / "b"))
    assert source.files(scanned) == expected


def test_several_series_in_one_folder_are_several_sources(pool, scanned):
    ones = [slice_of(pool / name, ONE) for name in ("IM1", "IM3", "x.dcm")]
    twos = [slice_of(pool / name, TWO) for name in ("IM2", "IM4")]
    found = scan(pool, scanned)
    assert [source.files(scanned) for source in found] == [ones, twos]
    assert len({source.key for source in found}) == 2


def test_a_source_keeps_its_key_when_slices_are_added(pool, scanned):
    slice_of(pool / "b", ONE)
    [before] = scan(pool, scanned)
    added = slice_of(pool / "a/a", ONE)
    [after] = scan(pool, scanned)
    assert before.key == after.key and after.path == str(added)


def test_uids_are_not_stored(pool, scanned, tmp_path):
    slice_of(pool / "a", ONE)
    found = scan(pool, scanned)
    stored = "".join(file.read_text() for file in (tmp_path / "state").rglob("*.json"))
    assert "IM" not in stored and ONE not in stored and ONE not in repr(found) and found[0].series in stored


def test_files_of_voxels_are_no_sources_of_their_own(pool, scanned):
    touch(
        pool, "a.hdr", "a.img", "b.mhd", "b.zraw", "C.HDR", "C.IMG", "d.nhdr", "d.raw.gz", "e.nii.gz", "f.NII", "g.img"
    )
    found = {Path(source.path).name: [file.name for file in source.files(scanned)] for source in scan(pool, scanned)}
    assert found == {
        "C.HDR": ["C.HDR", "C.IMG"],
        "a.hdr": ["a.hdr", "a.img"],
        "b.mhd": ["b.mhd", "b.zraw"],
        "d.nhdr": ["d.nhdr", "d.raw.gz"],
        "e.nii.gz": ["e.nii.gz"],
        "f.NII": ["f.NII"],
    }
    assert set(others(pool, scanned)) == {"g.img"}


def test_sources_are_sorted_by_path(pool, scanned):
    touch(pool, "c.nii", "a.nii")
    slice_of(pool / "b", ONE)
    assert [Path(source.path).name for source in scan(pool, scanned)] == ["a.nii", "b", "c.nii"]


def test_what_is_no_scan_is_listed_with_a_reason(pool, scanned):
    touch(pool, "notes.txt", "Icon\r")
    (pool / "gone").symlink_to(pool / "nowhere")
    (pool / "gone.nii").symlink_to(pool / "nowhere")
    (pool / "itself").symlink_to("itself")
    os.mkfifo(pool / "pipe")
    os.mkfifo(pool / "pipe.nii")
    with socket.socket(socket.AF_UNIX) as server:
        folder = os.open(pool, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{folder}/socket")  # the path itself may be too long for a socket
        os.close(folder)
        assert scan(pool, scanned) == []
    reasons = others(pool, scanned)
    assert set(reasons) == {"notes.txt", "Icon\r", "gone", "gone.nii", "itself", "pipe", "pipe.nii", "socket"}
    assert all(reasons.values())
    assert reasons["gone"] == reasons["gone.nii"] == reasons["itself"] == "a link to nothing"
    assert "no regular file" in reasons["pipe.nii"]


def test_folders_and_links_to_them_are_no_files(pool, scanned, tmp_path):
    """They are walked into instead, even under the name of an image."""
    touch(tmp_path / "elsewhere", "a.nii")
    (pool / "link").symlink_to(tmp_path / "elsewhere")
    touch(pool / "folder.nii.gz", "b.nii")
    assert [source.path for source in scan(pool, scanned)] == [
        str(pool / "folder.nii.gz/b.nii"),
        str(pool / "link/a.nii"),
    ]
    assert others(pool, scanned) == {}


def test_links_to_files_are_sources(pool, scanned, tmp_path):
    touch(tmp_path / "elsewhere", "a.nii")
    (pool / "b.nii").symlink_to(tmp_path / "elsewhere/a.nii")
    assert [source.path for source in scan(pool, scanned)] == [str(pool / "b.nii")]


def test_names_that_are_no_unicode_are_sources_and_others_like_any(pool, scanned):
    folder = pool / os.fsdecode(b"\xe9t\xe9")
    touch(folder, os.fsdecode(b"caf\xe9.nii"), os.fsdecode(b"caf\xe9.txt"))
    dicom = slice_of(folder / "slice", ONE)
    dicom = dicom.rename(folder / os.fsdecode(b"\xff"))
    found = scan(pool, scanned)
    assert {source.path for source in found} == {str(folder / os.fsdecode(b"caf\xe9.nii")), str(dicom)}
    assert list(others(folder, scanned)) == [os.fsdecode(b"caf\xe9.txt")]
    assert [source.files(scanned) for source in found if source.series] == [[dicom]]


def test_an_unchanged_folder_is_not_scanned_again(pool, scanned, monkeypatch):
    slice_of(pool / "a", ONE)
    touch(pool / "sub", "x.nii", "y.txt")
    (pool / "gone").symlink_to(pool / "nowhere")
    before = scan(pool, scanned)
    with monkeypatch.context() as patched:
        patched.setattr(sources, "group_series", lambda _: pytest.fail("scanned again"))
        assert scan(pool, scanned) == before


@pytest.mark.parametrize("change", ["added", "removed", "touched", "renamed", "a link breaks"])
def test_a_changed_folder_is_scanned_again(pool, scanned, monkeypatch, change):
    slice_of(pool / "a", ONE)
    slice_of(pool / "b", ONE)
    (pool / "link").symlink_to(pool / "b")
    scan(pool, scanned)
    if change == "added":
        slice_of(pool / "c", TWO)
    elif change == "removed":
        (pool / "a").unlink()
    elif change == "touched":
        slice_of(pool / "a", TWO)
        os.utime(pool / "a", ns=(0, 0))
    elif change == "renamed":
        (pool / "a").rename(pool / "z")
    else:
        (pool / "b").unlink()
    expected = {
        "added": [["a", "b", "link"], ["c"]],
        "removed": [["b", "link"]],
        "touched": [["a"], ["b", "link"]],
        "renamed": [["b", "link", "z"]],
        "a link breaks": [["a"]],
    }
    found = scan(pool, scanned)
    assert [[file.name for file in source.files(scanned)] for source in found] == expected[change]


def test_a_new_link_to_nothing_is_noticed_in_a_folder_known_already(pool, scanned):
    touch(pool, "a.nii")
    scan(pool, scanned)
    (pool / "gone.nii").symlink_to(pool / "nowhere")
    scan(pool, scanned)
    assert others(pool, scanned) == {"gone.nii": "a link to nothing"}


def test_many_files_of_one_folder_are_each_named_once(pool, scanned):
    for number in range(300):
        slice_of(pool / f"IM{number}", ONE if number % 2 else TWO)
    found = scan(pool, scanned)
    assert sorted(file.name for source in found for file in source.files(scanned)) == sorted(os.listdir(pool))
