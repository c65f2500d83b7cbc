"""Second and later imports into one dataset: what was found before, what moved, what is gone."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scans import ct, mr, report, write, write_series

from nnunetv2_misfm.data.import_dataset import Workers, import_scans
from nnunetv2_misfm.data.outcome import Settings
from nnunetv2_misfm.errors import MisfmError

CT, LINKED = Settings("CT"), Settings("CT", link=True)


def run(*inputs: Path, settings: Settings = CT, **more) -> str:
    return import_scans(inputs, 900, "Pool", settings, Workers(1), **more)


def verdicts(dataset: Path) -> dict[str, str]:
    return {Path(row["path"]).name: row["verdict"] for row in report(dataset)}


def test_slices_of_a_series_that_lie_in_a_folder_named_later_join_the_earlier_ones(raw, tmp_path):
    write_series(tmp_path / "all", ct(0))  # every second slice in "part 1"
    shutil.move(tmp_path / "all/part 1", tmp_path / "later")
    with pytest.raises(MisfmError, match="no scan was accepted"):  # uneven: it has another 2 mm at its end
        run(tmp_path / "all", settings=Settings("CT", min_size=11))
    run(tmp_path / "later", settings=Settings("CT", min_size=11))
    [row] = report(raw / "Dataset900_Pool")
    assert (row["verdict"], row["files"], row["shape"]) == ("accepted", "20", "16x18x20")


def test_a_part_of_a_series_does_not_replace_the_whole(raw, tmp_path):
    write_series(tmp_path / "whole", ct(0))
    run(tmp_path / "whole")
    before = report(raw / "Dataset900_Pool")
    shutil.copytree(tmp_path / "whole/part 0", tmp_path / "part")
    run(tmp_path / "part")
    [row] = report(raw / "Dataset900_Pool")
    assert (row["shape"], row["case"]) == ("16x18x20", before[0]["case"])
    shutil.rmtree(tmp_path / "whole")
    run(tmp_path / "part")
    assert report(raw / "Dataset900_Pool")[0]["case"] == before[0]["case"]


@pytest.mark.parametrize("settings", [CT, LINKED])
def test_scans_that_moved_are_found_where_they_are(raw, tmp_path, settings):
    for number in range(2):
        write(tmp_path / f"a/{number}.nii.gz", ct(number))
    run(tmp_path / "a", settings=settings)
    shutil.move(tmp_path / "a", tmp_path / "b")
    run(tmp_path / "b", settings=settings)
    dataset = raw / "Dataset900_Pool"
    listed = json.loads((dataset / "dataset.json").read_text())["dataset"]
    assert len(listed) == 2
    for files in listed.values():
        assert (dataset / files["images"][0]).is_file() and (dataset / files["label"]).is_file()
    if settings.link:
        assert {files["images"][0] for files in listed.values()} == {str(tmp_path / f"b/{n}.nii.gz") for n in range(2)}


def test_a_series_that_moved_and_grew_is_imported_anew(raw, tmp_path):
    write_series(tmp_path / "whole", ct(0))
    (tmp_path / "held").mkdir()
    for number in (18, 19):  # the last two slices come later
        shutil.move(tmp_path / f"whole/part {number % 2}/IM{number:04d}", tmp_path / "held")
    run(tmp_path / "whole")
    assert report(raw / "Dataset900_Pool")[0]["shape"] == "16x18x18"
    shutil.move(tmp_path / "whole", tmp_path / "moved")
    shutil.move(tmp_path / "held", tmp_path / "moved/more")
    run(tmp_path / "moved")
    [row] = report(raw / "Dataset900_Pool")
    assert (row["shape"], row["files"]) == ("16x18x20", "20") and str(tmp_path / "moved") in row["path"]


def test_an_equal_scan_takes_the_place_of_one_that_is_lost(raw, tmp_path):
    write(tmp_path / "a/a.nii", ct(0))
    write(tmp_path / "b/b.nii", ct(0))
    run(tmp_path / "a", tmp_path / "b")
    dataset = raw / "Dataset900_Pool"
    assert verdicts(dataset) == {"a.nii": "accepted", "b.nii": "duplicate"}
    shutil.rmtree(tmp_path / "a")
    next((dataset / "imagesTr").glob("*")).unlink()
    run(tmp_path / "b")
    assert sorted(verdicts(dataset).values()) == ["accepted", "duplicate"]
    [image] = (dataset / "imagesTr").glob("*")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(image))), ct(0).T)


def test_a_pool_without_usable_ct_still_gives_its_mr(raw, tmp_path):
    write(tmp_path / "pool/flat.nii", ct(0)[:, :, :4])
    write(tmp_path / "pool/mr.nii", mr(1))
    write_series(tmp_path / "pool/scout", ct(1)[:, :, :2])
    said = run(tmp_path / "pool", settings=Settings("auto"), split_by_modality=True)
    assert verdicts(raw / "Dataset901_PoolMR")["mr.nii"] == "accepted"
    assert "accepted          1" in said


def test_a_run_that_took_nothing_binds_no_settings_and_leaves_no_description(raw, tmp_path):
    (tmp_path / "pool").mkdir()
    with pytest.raises(MisfmError, match="no scan was accepted"):
        run(tmp_path / "pool", settings=Settings("auto"))
    write(tmp_path / "pool/a.nii", mr(0))
    run(tmp_path / "pool", settings=Settings("auto"))
    dataset = raw / "Dataset900_Pool"
    assert json.loads((dataset / "dataset.json").read_text())["channel_names"] == {"0": "MR"}
    write(tmp_path / "pool/a.nii", np.zeros((9, 9, 9), np.int16))
    with pytest.raises(MisfmError, match="no scan was accepted"):
        run(tmp_path / "pool", settings=Settings("MR"))
    assert not (dataset / "dataset.json").exists() and not list((dataset / "imagesTr").glob("*"))


def test_the_datasets_own_folders_are_no_input(raw, tmp_path):
    write(tmp_path / "pool/a.nii.gz", ct(0))
    run(tmp_path / "pool", settings=LINKED)
    dataset = raw / "Dataset900_Pool"
    for own in (dataset, dataset / "labelsTr", raw / ".misfm_import"):
        with pytest.raises(MisfmError, match="which belongs to"):
            run(own, settings=LINKED)
    (tmp_path / "pool/link").symlink_to(raw)
    rows = len(report(dataset))
    for _ in range(2):
        run(tmp_path / "pool", settings=LINKED)
        assert len(report(dataset)) == rows


def test_a_refused_file_that_was_removed_is_forgotten_and_one_elsewhere_is_not(raw, tmp_path):
    write(tmp_path / "a/good.nii", ct(0))
    (tmp_path / "a/bad.nii").write_bytes(b"bad")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/bad too.nii").write_bytes(b"bad")
    run(tmp_path / "a", tmp_path / "b")
    (tmp_path / "a/bad.nii").unlink()
    run(tmp_path / "a")
    assert verdicts(raw / "Dataset900_Pool") == {"good.nii": "accepted", "bad too.nii": "rejected"}


def test_records_that_are_damaged_or_of_another_format_are_made_again(raw, tmp_path):
    write(tmp_path / "pool/a.nii", ct(0))
    run(tmp_path / "pool")
    before = report(raw / "Dataset900_Pool")
    records = list((raw / ".misfm_import/Dataset900/imported").glob("*/*.json"))
    records[0].write_text("")
    run(tmp_path / "pool")
    records[0].write_text(records[0].read_text().replace('"format": 1', '"format": 0'))
    run(tmp_path / "pool")
    assert report(raw / "Dataset900_Pool") == before


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "raw").write_text("a file")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    write(tmp_path / "pool/a.nii", ct(0))
    with pytest.raises(MisfmError, match="could not be written .*see to it that it can be"):
        run(tmp_path / "pool")


def test_both_ids_of_a_split_pool_are_held(raw, tmp_path):
    from filelock import FileLock

    write(tmp_path / "pool/a.nii", ct(0))
    held = raw / ".misfm_import/Dataset901/lock"
    held.parent.mkdir(parents=True)
    with FileLock(held), pytest.raises(MisfmError, match="another import"):
        run(tmp_path / "pool", settings=Settings("auto"), split_by_modality=True)
    run(tmp_path / "pool", settings=Settings("auto"), split_by_modality=True)
