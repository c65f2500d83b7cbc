import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scans import LPS, affine_of, ct, mr, report, tree, write, write_series

from nnunetv2_misfm.data.import_dataset import Workers, import_scans
from nnunetv2_misfm.data.outcome import Settings
from nnunetv2_misfm.errors import MisfmError

CT = Settings("CT")
ONE = Workers(1)


@pytest.fixture
def pool(tmp_path) -> Path:
    folder = tmp_path / "pool"
    for number in range(3):
        write(folder / f"scan {number}.nii.gz", ct(number))
    return folder


def verdicts(dataset: Path) -> dict[str, str]:
    return {Path(row["path"]).name: row["verdict"] for row in report(dataset)}


def images(dataset: Path) -> set[str]:
    return {file.name for file in (dataset / "imagesTr").glob("*")}


def test_a_pool_becomes_a_dataset_with_every_file_in_its_report(raw, pool):
    write(pool / "deep/er/broken.nii.gz", ct(7)).write_bytes(b"no gzip")
    (pool / "deep/README.txt").write_text("a readme")
    said = import_scans([pool], 900, "CTPool", CT, ONE)
    dataset = raw / "Dataset900_CTPool"
    rows = report(dataset)
    assert [Path(row["path"]).name for row in rows] == [
        "README.txt",
        "broken.nii.gz",
        "scan 0.nii.gz",
        "scan 1.nii.gz",
        "scan 2.nii.gz",
    ]
    assert [row["verdict"] for row in rows] == ["rejected"] * 2 + ["accepted"] * 3
    assert all(row["reason"] for row in rows[:2])
    described = json.loads((dataset / "dataset.json").read_text())
    assert described["channel_names"] == {"0": "CT"}
    assert described["labels"] == {"background": 0, "body": 1}
    assert described["numTraining"] == 3
    assert described["misfm"]["labels"] == "body_mask"
    assert described["misfm"]["verdicts"] == {"accepted": 3, "rejected": 2}
    cases = {row["case"] for row in rows if row["case"]}
    assert set(described["dataset"]) == cases and len(cases) == 3
    assert images(dataset) == {f"{case}_0000.nii.gz" for case in cases}
    for case, files in described["dataset"].items():
        assert files == {"images": [f"imagesTr/{case}_0000.nii.gz"], "label": f"labelsTr/{case}.nii.gz"}
        assert (dataset / files["label"]).is_file()
    assert "accepted          3" in said and "rejected          2" in said
    assert "nnUNetv2_plan_and_preprocess -d 900 -c 3d_fullres" in said


def test_the_first_of_equal_scans_by_path_counts_whoever_came_first(raw, pool):
    turned = affine_of("RAS", (1, 1, 2), (-15, -17, 0))  # the same places as LPS, stored back to front
    write(pool / "b.nii", ct(1)[::-1, ::-1], turned)
    import_scans([pool], 900, "CTPool", CT, ONE)
    dataset = raw / "Dataset900_CTPool"
    rows = {Path(row["path"]).name: row for row in report(dataset)}
    assert rows["b.nii"]["verdict"] == "accepted"
    assert rows["scan 1.nii.gz"]["verdict"] == "duplicate"
    assert str(pool / "b.nii") in rows["scan 1.nii.gz"]["reason"]
    assert rows["scan 1.nii.gz"]["case"] == rows["b.nii"]["case"]
    assert len(images(dataset)) == 3
    write(pool / "a.nii", ct(1))  # added later, but before it by path
    import_scans([pool], 900, "CTPool", CT, ONE)
    assert verdicts(dataset)["a.nii"] == "accepted" and verdicts(dataset)["b.nii"] == "duplicate"
    assert len(images(dataset)) == 3


def test_the_check_for_duplicates_can_be_switched_off(raw, pool):
    shutil.copy(pool / "scan 0.nii.gz", pool / "copy.nii.gz")
    import_scans([pool], 900, "CTPool", Settings("CT", keep_duplicates=True), ONE)
    dataset = raw / "Dataset900_CTPool"
    assert set(verdicts(dataset).values()) == {"accepted"}
    arrays = [sitk.GetArrayFromImage(sitk.ReadImage(str(dataset / "imagesTr" / name))) for name in images(dataset)]
    assert len(arrays) == 4 and sum((array == ct(0).T).all() for array in arrays) == 2


def test_starting_again_changes_nothing_and_reads_nothing(raw, pool):
    import_scans([pool], 900, "CTPool", CT, ONE)
    before = tree(raw)
    times = {file: file.stat().st_mtime_ns for file in (raw / "Dataset900_CTPool").rglob("*_0000.nii.gz")}
    import_scans([pool], 900, "CTPool", CT, ONE)
    assert tree(raw) == before
    assert times == {file: file.stat().st_mtime_ns for file in times}


def test_files_added_later_are_imported_alone_and_give_what_one_import_gives(raw, pool, tmp_path, monkeypatch):
    for number in (3, 4):
        write(tmp_path / f"later/scan {number}.nii", ct(number))
    import_scans([pool], 900, "CTPool", CT, ONE)
    first = {file: file.stat().st_mtime_ns for file in (raw / "Dataset900_CTPool/imagesTr").glob("*")}
    import_scans([tmp_path / "later"], 900, "CTPool", CT, ONE)
    assert {file: file.stat().st_mtime_ns for file in first} == first
    together = tmp_path / "together"
    together.mkdir()
    monkeypatch.setenv("nnUNet_raw", str(together))
    import_scans([tmp_path / "later", pool], 900, "CTPool", CT, Workers(2))
    assert tree(together / "Dataset900_CTPool") == tree(raw / "Dataset900_CTPool")


def test_a_changed_file_replaces_its_case(raw, pool):
    import_scans([pool], 900, "CTPool", CT, ONE)
    dataset = raw / "Dataset900_CTPool"
    before = images(dataset)
    write(pool / "scan 0.nii.gz", ct(50))
    import_scans([pool], 900, "CTPool", CT, ONE)
    assert len(images(dataset)) == 3 and len(images(dataset) & before) == 2
    assert len(list((dataset / "labelsTr").glob("*"))) == 3


def test_a_case_deleted_from_the_dataset_is_imported_again(raw, pool):
    import_scans([pool], 900, "CTPool", CT, ONE)
    dataset = raw / "Dataset900_CTPool"
    before = tree(dataset)
    next((dataset / "imagesTr").glob("*")).unlink()
    import_scans([pool], 900, "CTPool", CT, ONE)
    assert tree(dataset) == before


def test_a_lost_case_whose_source_is_gone_is_reported_and_comes_back_with_its_folder(raw, pool, tmp_path):
    import_scans([pool], 900, "CTPool", CT, ONE)
    dataset = raw / "Dataset900_CTPool"
    before = tree(dataset)
    next((dataset / "labelsTr").glob("*")).unlink()
    write(tmp_path / "other/a.nii", ct(9))
    import_scans([tmp_path / "other"], 900, "CTPool", CT, ONE)
    assert sorted(verdicts(dataset).values()) == ["accepted"] * 3 + ["rejected"]
    assert any("with its folder at --input it comes back" in row["reason"] for row in report(dataset))
    (tmp_path / "other/a.nii").unlink()
    import_scans([pool], 900, "CTPool", CT, ONE)
    assert len(images(dataset)) == 4 and before.items() - tree(dataset).items() <= {
        (name, before[name]) for name in ("dataset.json", "import_report.csv")
    }


def test_a_deleted_dataset_starts_anew(raw, pool, tmp_path):
    import_scans([pool], 900, "CTPool", CT, ONE)
    shutil.rmtree(raw / "Dataset900_CTPool")
    write(tmp_path / "other/a.nii", ct(9))
    import_scans([tmp_path / "other"], 900, "CTPool", CT, ONE)
    assert verdicts(raw / "Dataset900_CTPool") == {"a.nii": "accepted"}


def test_links_point_to_the_files_themselves(raw, pool):
    import_scans([pool], 900, "CTPool", Settings("CT", link=True), ONE)
    dataset = raw / "Dataset900_CTPool"
    described = json.loads((dataset / "dataset.json").read_text())["dataset"]
    assert {files["images"][0] for files in described.values()} == {str(file) for file in pool.glob("*.nii.gz")}
    assert not (dataset / "imagesTr").exists()


def test_a_mixed_pool_stops_with_the_counts_before_anything_is_written(raw, pool):
    for number in range(2):
        write(pool / f"mr {number}.nii", mr(number))
    with pytest.raises(MisfmError, match="got 3 of CT and 2 of MR: .*--split-by-modality"):
        import_scans([pool], 900, "Pool", Settings("auto"), ONE)
    assert list(raw.glob("Dataset*")) == []


def test_a_mixed_pool_becomes_one_dataset_of_each_modality_where_asked(raw, pool):
    for number in range(2):
        write(pool / f"mr {number}.nii", mr(number))
    (pool / "notes.txt").write_text("no scan")
    import_scans([pool], 900, "Pool", Settings("auto"), ONE, split_by_modality=True)
    first, second = raw / "Dataset900_PoolCT", raw / "Dataset901_PoolMR"
    assert set(verdicts(first)) == {"scan 0.nii.gz", "scan 1.nii.gz", "scan 2.nii.gz", "notes.txt"}
    assert verdicts(second) == {"mr 0.nii": "accepted", "mr 1.nii": "accepted"}
    for dataset, modality in ((first, "CT"), (second, "MR")):
        assert json.loads((dataset / "dataset.json").read_text())["channel_names"] == {"0": modality}


def test_series_of_both_modalities_are_split_too(raw, tmp_path):
    write_series(tmp_path / "pool/a", ct(0))
    write_series(tmp_path / "pool/b", ct(1), "MR")
    import_scans([tmp_path / "pool"], 900, "Pool", Settings("auto"), ONE, split_by_modality=True)
    for dataset in ("Dataset900_PoolCT", "Dataset901_PoolMR"):
        assert [(row["verdict"], row["files"]) for row in report(raw / dataset)] == [("accepted", "20")]


def test_auto_takes_the_one_modality_of_the_pool(raw, tmp_path):
    write(tmp_path / "pool/a.nii", mr(0))
    import_scans([tmp_path / "pool"], 900, "Pool", Settings("auto"), ONE)
    assert json.loads((raw / "Dataset900_Pool/dataset.json").read_text())["channel_names"] == {"0": "MR"}


def test_nothing_accepted_is_an_error_that_leaves_the_report(raw, tmp_path):
    write(tmp_path / "pool/a.nii", np.zeros((9, 9, 9), np.int16))
    with pytest.raises(MisfmError, match=r"(?s)no scan was accepted.*constant.*import_report\.csv"):
        import_scans([tmp_path / "pool"], 900, "Pool", CT, ONE)
    assert verdicts(raw / "Dataset900_Pool") == {"a.nii": "rejected"}
    assert not (raw / "Dataset900_Pool/dataset.json").exists()


def test_clear_sentences_for_what_cannot_be_done(raw, pool, tmp_path, monkeypatch):
    def sentence(inputs=(pool,), number=900, name="Pool", settings=CT, split=False) -> str:
        with pytest.raises(MisfmError) as caught:
            import_scans(list(inputs), number, name, settings, ONE, split_by_modality=split)
        return str(caught.value)

    assert "expected folders after --input" in sentence([tmp_path / "nowhere"])
    assert "expected a dataset id from 1 to 999, got 1000" in sentence(number=1000)
    assert "expected a name of letters" in sentence(name="a b")
    assert "which holds it" in sentence([tmp_path])
    (raw / "Dataset900_Theirs").mkdir()
    assert "dataset id 900 is taken by Dataset900_Theirs" in sentence()
    assert "was not made by import" in sentence(name="Theirs")
    shutil.rmtree(raw / "Dataset900_Theirs")
    import_scans([pool], 900, "Pool", CT, ONE)
    assert "was made with min_size=8" in sentence(settings=Settings("CT", min_size=9))
    assert "leave one out" in sentence(settings=CT, split=True)
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw" in sentence()


def test_two_imports_into_one_dataset_do_not_run_at_once(raw, pool):
    from filelock import FileLock

    held = raw / ".misfm_import/Dataset900/lock"
    held.parent.mkdir(parents=True)
    with FileLock(held), pytest.raises(MisfmError, match="another import into the same dataset id is running"):
        import_scans([pool], 900, "Pool", CT, ONE)


def test_an_unreadable_folder_and_a_dangling_link_are_reported(raw, pool):
    (pool / "link.nii.gz").symlink_to(pool / "gone.nii.gz")
    import_scans([pool], 900, "Pool", CT, ONE)
    assert verdicts(raw / "Dataset900_Pool")["link.nii.gz"] == "rejected"


def test_a_dicom_series_over_two_folders_is_one_scan_and_no_identity_reaches_the_output(raw, tmp_path):
    voxels = ct(0)
    secrets = write_series(tmp_path / "pool", voxels)
    import_scans([tmp_path / "pool"], 900, "Pool", CT, ONE)
    dataset = raw / "Dataset900_Pool"
    [row] = report(dataset)
    assert (row["verdict"], row["files"], row["shape"]) == ("accepted", "20", "16x18x20")
    [image] = (dataset / "imagesTr").glob("*")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(image))), voxels.T)
    import gzip

    for name, content in tree(raw).items():
        content = gzip.decompress(content) if name.endswith(".gz") else content
        for secret in secrets:
            assert secret.encode() not in content, (name, secret)


def test_a_scan_found_both_as_dicom_and_as_nifti_is_a_duplicate(raw, tmp_path):
    write_series(tmp_path / "pool", ct(0))
    write(tmp_path / "pool/z.nii.gz", ct(0), LPS)
    import_scans([tmp_path / "pool"], 900, "Pool", CT, ONE)
    assert sorted(verdicts(raw / "Dataset900_Pool").values()) == ["accepted", "duplicate"]


@pytest.mark.parametrize("link", [False, True])
def test_paths_that_are_no_unicode_are_imported_and_reported(raw, tmp_path, link):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path / f"pool/{name}.nii.gz", ct(0))
    write_series(tmp_path / "pool" / name, ct(1))
    import_scans([tmp_path / "pool"], 900, "Pool", Settings("CT", link=link), ONE)
    rows = report(raw / "Dataset900_Pool")
    assert [row["verdict"] for row in rows] == ["accepted"] * 2, rows
    assert rows[0]["path"].startswith(str(tmp_path / "pool" / name))
