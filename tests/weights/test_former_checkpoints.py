import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights.checkpoint import read_checkpoint, write_checkpoint


def no_room(*arguments: Any, **named: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def no_hard_links(*arguments: Any) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def write(folder: Path, number: int, num_former: int) -> None:
    former = [folder / f"earlier_{i}.pth" for i in range(1, num_former + 1)]
    write_checkpoint({"number": number, "w": torch.full((1000,), float(number))}, folder / "newest.pth", former)


def held(folder: Path) -> dict[str, int]:
    """Which checkpoint lies in which file; all of a file is read."""
    found = {}
    for path in folder.iterdir():
        content = read_checkpoint(path)
        assert content["w"].tolist() == [content["number"]] * 1000
        found[path.name] = content["number"]
    return found


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("num_former", [0, 1, 3])
def test_the_last_few_checkpoints_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_former: int, hard_links: bool
) -> None:
    if not hard_links:
        monkeypatch.setattr(os, "link", no_hard_links)
    for number in range(1, 7):
        write(tmp_path, number, num_former)
        kept = {f"earlier_{i}.pth": number - i for i in range(1, num_former + 1) if number - i > 0}
        assert held(tmp_path) == {"newest.pth": number, **kept}


def test_a_gap_among_the_former_files_is_filled_from_the_newest(tmp_path: Path) -> None:
    for number in range(1, 5):
        write(tmp_path, number, 3)
    (tmp_path / "earlier_1.pth").unlink()
    write(tmp_path, 5, 3)
    assert held(tmp_path) == {"newest.pth": 5, "earlier_1.pth": 4, "earlier_3.pth": 2}


def test_after_a_newest_file_was_deleted_the_former_ones_stay(tmp_path: Path) -> None:
    for number in range(1, 4):
        write(tmp_path, number, 1)
    (tmp_path / "newest.pth").unlink()
    write(tmp_path, 4, 1)
    assert held(tmp_path) == {"newest.pth": 4, "earlier_1.pth": 2}


@pytest.mark.parametrize("num_former", [1, 3])
@pytest.mark.parametrize("fails", ["save", "content", "copy"])
def test_a_failed_write_leaves_newest_and_former_files_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_former: int, fails: str
) -> None:
    for number in range(1, 6):
        write(tmp_path, number, num_former)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    content: dict[str, Any] = {"number": 6}
    with monkeypatch.context() as patch:
        if fails == "save":
            patch.setattr(torch, "save", no_room)
        elif fails == "content":
            content["code"] = torch.nn.Linear(1, 1)
        else:
            patch.setattr(os, "link", no_hard_links)
            patch.setattr(shutil, "copyfile", no_room)
        former = [tmp_path / f"earlier_{i}.pth" for i in range(1, num_former + 1)]
        with pytest.raises(MisfmError, match=r"newest.pth could not be written \(.*\); the former checkpoint, if any"):
            write_checkpoint(content, tmp_path / "newest.pth", former)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write(tmp_path, 7, num_former)
    assert held(tmp_path)["earlier_1.pth"] == 5


@pytest.mark.parametrize("num_former", [1, 3])
def test_a_failed_renaming_leaves_the_newest_file_and_may_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_former: int
) -> None:
    for number in (1, 2):
        write(tmp_path, number, num_former)
    replace = os.replace

    def refuse(source: Any, target: Any) -> None:
        if Path(target).name == "newest.pth":
            no_room()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", refuse)
        for _ in range(2):
            with pytest.raises(MisfmError, match="No space left on device"):
                write(tmp_path, 3, num_former)
            assert held(tmp_path)["newest.pth"] == 2
    write(tmp_path, 4, num_former)
    assert (held(tmp_path)["newest.pth"], held(tmp_path)["earlier_1.pth"]) == (4, 2)
    assert not list(tmp_path.glob("*.tmp"))
