"""Nested low-label splits behind the user's folds."""

import hashlib
import json
from pathlib import Path

import pytest

from nnunetv2_misfm.benchmark.grid import Draw
from nnunetv2_misfm.benchmark.splits import (
    append_splits,
    nested_cases,
    preprocessed_cases,
    read_splits,
    split_of,
    splits_sha256,
    with_splits,
)
from nnunetv2_misfm.errors import MisfmError

CASES = [f"case_{i:02d}" for i in range(12)]
FOLDS = [{"train": CASES[:9], "val": CASES[9:]}, {"train": CASES[3:], "val": CASES[:3]}]


def draws(*args: tuple) -> dict:
    return {Draw(*a): split_of(Draw(*a), FOLDS, CASES) for a in args}


@pytest.mark.parametrize("seed", range(5))
def test_fewer_cases_are_among_more(seed: int) -> None:
    for few, many in [(1, 2), (2, 5), (5, 9)]:
        assert {*nested_cases(CASES, few, seed)} < {*nested_cases(CASES, many, seed)}


def test_cases_are_those_of_the_smallest_hashes() -> None:
    by_hash = {hashlib.sha256(f"7 {case}".encode()).hexdigest(): case for case in CASES}
    expected = sorted(by_hash[digest] for digest in sorted(by_hash)[:4])
    assert nested_cases(CASES, 4, seed=7) == expected
    assert nested_cases(CASES[::-1], 4, seed=7) == expected


def test_seeds_draw_other_cases() -> None:
    assert len({tuple(nested_cases(CASES, 5, seed)) for seed in range(6)}) > 3


def test_a_draw_takes_from_its_fold_and_validates_on_all_of_it() -> None:
    split = split_of(Draw(4, 1, 0), FOLDS, CASES)
    assert len(split["train"]) == 4
    assert {*split["train"]} <= {*FOLDS[1]["train"]}
    assert split["val"] == FOLDS[1]["val"]


def test_all_cases_of_a_fold_are_the_users_own_entry() -> None:
    assert split_of(Draw("all", 0, 3), FOLDS, CASES) == FOLDS[0]
    assert with_splits(FOLDS, draws(("all", 0, 3), ("all", "all", 1))) == (
        FOLDS,
        {Draw("all", 0, 3): 0, Draw("all", "all", 1): "all"},
    )


def test_few_of_all_cases_validate_on_the_others() -> None:
    split = split_of(Draw(5, "all", 0), FOLDS, CASES)
    assert sorted(split["train"] + split["val"]) == CASES
    assert split["train"] == nested_cases(CASES, 5, 0)


def test_splits_are_appended_once_and_the_users_stay(tmp_path: Path) -> None:
    file = tmp_path / "splits_final.json"
    file.write_text(json.dumps(FOLDS))
    wanted = draws((2, 0, 0), (2, 0, 1), (5, 1, 0))
    assert list(append_splits(tmp_path, CASES, wanted).values()) == [2, 3, 4]
    written = file.read_bytes()
    assert json.loads(written)[:2] == FOLDS
    assert json.loads(written)[4] == split_of(Draw(5, 1, 0), FOLDS, CASES)
    assert list(append_splits(tmp_path, CASES, wanted).values()) == [2, 3, 4]
    assert file.read_bytes() == written


def test_without_a_file_the_folds_are_nnunets_own(tmp_path: Path) -> None:
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    expected = [{k: [str(c) for c in v] for k, v in s.items()} for s in generate_crossval_split(CASES, seed=12345)]
    assert read_splits(tmp_path, CASES) == expected
    append_splits(tmp_path, CASES, {})
    assert json.loads((tmp_path / "splits_final.json").read_text()) == expected


def test_a_fold_past_the_end_is_an_error() -> None:
    with pytest.raises(MisfmError, match="expected one of the folds 0 to 1 or 'all', got 2"):
        split_of(Draw("all", 2, 0), FOLDS, CASES)


def test_more_cases_than_the_fold_has_are_an_error() -> None:
    with pytest.raises(MisfmError, match="at most the 9 training cases of fold 0, got --train-cases 10"):
        split_of(Draw(10, 0, 0), FOLDS, CASES)


def test_cases_that_are_not_preprocessed_are_named() -> None:
    with pytest.raises(MisfmError, match="preprocessed cases alone, got case_11"):
        split_of(Draw(2, 0, 0), FOLDS, CASES[:-1])


def test_a_damaged_splits_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "splits_final.json").write_text('[{"train": []}]')
    with pytest.raises(MisfmError, match="expected a list of folds with 'train' and 'val'"):
        read_splits(tmp_path, CASES)


def test_missing_preprocessed_cases_are_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(MisfmError, match="found none: run nnUNetv2_preprocess first"):
            preprocessed_cases(folder)


def test_hashes_tell_splits_apart_and_not_orders() -> None:
    assert splits_sha256(FOLDS[0]) == splits_sha256({k: v[::-1] for k, v in FOLDS[0].items()})
    moved = {"train": CASES[:10], "val": CASES[10:]}
    assert splits_sha256(FOLDS[0]) != splits_sha256(moved)
