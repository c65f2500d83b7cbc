import json
import os
from pathlib import Path

import pytest
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.universal_join import (
    described,
    description,
    joint_splits,
    keep_splits,
    link_cases,
    missing_cases,
    source_splits,
)
from nnunetv2_misfm.planning.universal_sources import Case, RawSource
from nnunetv2_misfm.planning.universal_tasks import number_tasks

UNIVERSAL = "Dataset950_Universal"
FILES = (".b2nd", "_seg.b2nd", ".pkl")


def source(name: str, num_cases: int, raw: Path = Path("/elsewhere"), channel: str = "MR") -> RawSource:
    folder = raw / name
    cases = tuple(Case(f"c{i}", (f"{folder}/c{i}_0000.nii.gz",), f"{folder}/{i}") for i in range(num_cases))
    return RawSource(name, {"file_ending": ".nii.gz"}, (channel,), {"organ": (1,)}, False, None, "SimpleITKIO", cases)


@pytest.fixture
def brain(folders: Path) -> RawSource:
    (folders / "preprocessed/Dataset004_Brain").mkdir()
    return source("Dataset004_Brain", 6, folders / "raw")


def write_splits(folder: Path, *held_out: str) -> list[dict[str, list[str]]]:
    names = [f"c{i}" for i in range(6)]
    splits = [{"train": [name for name in names if name != out], "val": [out]} for out in held_out]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "splits_final.json").write_text(json.dumps(splits))
    return splits


# dataset.json


def test_description_refers_to_files_below_nnunet_raw_relatively(folders: Path) -> None:
    inside, outside = source("Dataset004_Brain", 1, folders / "raw"), source("Dataset101_Ct", 1, channel="CT")
    written = description(number_tasks(UNIVERSAL, [inside, outside]), [inside, outside])
    assert written["dataset"] == {
        "004_c0": {"images": ["../Dataset004_Brain/c0_0000.nii.gz"], "label": "../Dataset004_Brain/0"},
        "101_c0": {"images": ["/elsewhere/Dataset101_Ct/c0_0000.nii.gz"], "label": "/elsewhere/Dataset101_Ct/0"},
    }
    assert written["labels"] == {"background": 0, "4:organ": 1, "101:organ": 2}
    assert written["numTraining"] == 2 and written["channel_names"] == {"0": "CT/MR"}


def failing(dataset: str) -> None:
    with described(dataset, {"name": "new"}, {"spacings": []}):
        raise KeyboardInterrupt


def test_description_is_written_for_what_follows_and_taken_back_where_that_fails(folders: Path) -> None:
    raw, preprocessed = folders / "raw" / UNIVERSAL, folders / "preprocessed" / UNIVERSAL
    with pytest.raises(KeyboardInterrupt):
        failing(UNIVERSAL)
    assert not raw.exists() and not preprocessed.exists()
    with described(UNIVERSAL, {"name": "first"}, {"spacings": [[1, 1, 1]]}):
        assert json.loads((preprocessed / "dataset_fingerprint.json").read_text()) == {"spacings": [[1, 1, 1]]}
    (preprocessed / "splits_final.json").write_text("[]")
    (preprocessed / "dataset_fingerprint.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        failing(UNIVERSAL)
    assert [json.loads((folder / "dataset.json").read_text()) for folder in (raw, preprocessed)] == [
        {"name": "first"}, {"name": "first"}
    ]  # fmt: skip
    assert {file.name for file in preprocessed.iterdir()} == {"dataset.json", "splits_final.json"}


# Folds


def test_folds_of_the_source_are_taken_as_they_are(brain: RawSource, folders: Path) -> None:
    splits = write_splits(folders / "preprocessed/Dataset004_Brain", "c1", "c2", "c3")
    write_splits(folders / "raw/Dataset004_Brain", "c5")
    assert source_splits(brain) == splits


def test_folds_beside_the_raw_data_come_next_as_in_nnunet(brain: RawSource, folders: Path) -> None:
    splits = write_splits(folders / "raw/Dataset004_Brain", "c5")
    assert source_splits(brain) == splits


def test_else_the_folds_are_those_that_nnunet_would_draw(brain: RawSource, folders: Path) -> None:
    drawn = generate_crossval_split([f"c{i}" for i in range(6)], seed=12345, n_splits=5)
    expected = [{part: list(map(str, fold[part])) for part in ("train", "val")} for fold in drawn]
    assert source_splits(brain) == expected
    assert not (folders / "preprocessed/Dataset004_Brain/splits_final.json").exists()


def test_folds_are_left_for_nnunet_where_the_source_has_none(brain: RawSource, folders: Path) -> None:
    file = folders / "preprocessed/Dataset004_Brain/splits_final.json"
    keep_splits(brain, [{"train": ["c0"], "val": ["c1"]}])
    keep_splits(brain, [{"train": ["c1"], "val": ["c0"]}])
    assert json.loads(file.read_text()) == [{"train": ["c0"], "val": ["c1"]}]


def test_few_cases_are_held_out_in_turn(folders: Path) -> None:
    for name in ("Dataset005_Two", "Dataset006_One"):
        (folders / "preprocessed" / name).mkdir()
    first, second = {"train": ["c1"], "val": ["c0"]}, {"train": ["c0"], "val": ["c1"]}
    assert source_splits(source("Dataset005_Two", 2)) == [first, second, first, second, first]
    assert source_splits(source("Dataset006_One", 1)) == [{"train": ["c0"], "val": []}] * 5


def test_folds_of_unknown_cases_are_refused(brain: RawSource, folders: Path) -> None:
    write_splits(folders / "preprocessed/Dataset004_Brain", "c9")
    with pytest.raises(MisfmError, match=r"splits_final\.json names c9, which Dataset004_Brain does not have: mend it"):
        source_splits(brain)
    write_splits(folders / "preprocessed/Dataset004_Brain")
    with pytest.raises(MisfmError, match=r"splits_final\.json names no folds: mend it"):
        source_splits(brain)


def test_joint_folds_unite_the_sources_and_begin_again_where_one_has_fewer() -> None:
    universe = number_tasks(UNIVERSAL, [source("Dataset004_A", 3), source("Dataset101_B", 7)])
    three = [{"train": [f"a{k}"], "val": [f"b{k}"]} for k in range(3)]
    seven = [{"train": [f"c{k}"], "val": []} for k in range(7)]
    folds = joint_splits(universe, [three, seven])
    assert len(folds) == 7 and folds[4] == {"train": ["004_a1", "101_c4"], "val": ["004_b1"]}
    assert len(joint_splits(universe, [three, three])) == 5


# Preprocessed cases


def write_case(folder: Path, name: str, content: str = "x") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for ending in FILES:
        (folder / f"{name}{ending}").write_text(content)


def test_a_case_is_missing_where_a_file_or_its_label_copy_is_or_the_scan_is_newer(
    brain: RawSource, folders: Path
) -> None:
    base = folders / "preprocessed/Dataset004_Brain"
    (folders / "raw/Dataset004_Brain").mkdir()
    (base / "gt_segmentations").mkdir()
    for i, case in enumerate(brain.cases):
        for file in (*case.images, case.label):
            Path(file).write_text("scan")
            os.utime(file, (1000, 1000))
        write_case(base / "data", case.name)
        (base / "gt_segmentations" / f"{case.name}.nii.gz").write_text("label")
        if i < 3:
            (base / "data" / f"{case.name}{FILES[i]}").unlink()
    (base / "gt_segmentations/c3.nii.gz").unlink()
    later = (base / "data/c4.pkl").stat().st_mtime + 10
    os.utime(brain.cases[4].label, (later, later))
    assert [case.name for case in missing_cases(brain, "data")] == ["c0", "c1", "c2", "c3", "c4"]


@pytest.mark.parametrize("possible", ["symlink", "link", "copy"])
def test_links_hold_the_cases_of_all_sources_and_nothing_else(
    folders: Path, monkeypatch: pytest.MonkeyPatch, possible: str
) -> None:
    def refused(*arguments: object) -> None:
        raise OSError("not here")

    folder = folders / "preprocessed" / UNIVERSAL / "joined"
    (folder / "old").mkdir(parents=True)
    (folder / "x.tmp").write_text("left by a run that was stopped")
    (folder / "004_c1.pkl").symlink_to("nowhere")
    if possible != "symlink":
        monkeypatch.setattr(os, "symlink", refused)
    if possible == "copy":
        monkeypatch.setattr(os, "link", refused)
    sources = [source("Dataset004_A", 2), source("Dataset101_B", 1)]
    for origin in sources:
        for case in origin.cases:
            write_case(folders / "preprocessed" / origin.dataset / "data", case.name, origin.dataset + case.name)
    for _ in range(2):
        link_cases(number_tasks(UNIVERSAL, sources), sources, ["data", "data"], folder)
        assert {file.name: file.read_text() for file in folder.iterdir()} == {
            f"{case}{ending}": content
            for case, content in (
                ("004_c0", "Dataset004_Ac0"), ("004_c1", "Dataset004_Ac1"), ("101_c0", "Dataset101_Bc0")
            )
            for ending in FILES
        }  # fmt: skip
    links = {file.is_symlink() for file in folder.iterdir()}
    assert links == {possible == "symlink"}
    if possible == "symlink":
        assert os.readlink(folder / "101_c0.pkl") == "../../Dataset101_B/data/c0.pkl"
