"""What is done and with what result, one small file per item, so that a run that was cut off goes on where it was.

A record is written when all that it speaks of is in place, and by renaming, so it is there whole or not at all. It
counts only while the files that it was made from are unchanged: their names, sizes and times of change are part of it.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from nnunetv2_misfm.errors import MisfmError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORMAT = 1  # of records; those of another are as good as none
UNFINISHED = "unfinished"  # may be deleted while nothing runs


def fingerprint(files: Iterable[Path], *settings: str) -> str:
    """Returns 64 hexadecimal digits that change when a file is changed, added or taken away, or a setting differs.

    Contents are not read: a file is the same while its name, size, time of change and permissions are.

    Raises:
        OSError: A file is gone.
    """
    digest = hashlib.sha256("\0".join(settings).encode())
    for file in sorted(files):
        status = file.stat()
        facts = f"\0{file}\0{status.st_size}\0{status.st_mtime_ns}\0{status.st_mode}"
        digest.update(facts.encode(errors="surrogateescape"))
    return digest.hexdigest()


class CannotWrite(MisfmError):
    """The disk takes no more: the run must stop, and can go on later."""

    def __init__(self, path: Path, error: OSError):
        remedy = "make room" if error.errno in _DISK_FULL else "see to it that it can be"
        super().__init__(
            f"{path} could not be written ({error.strerror or error}): {remedy}, then start the same command again; "
            "it goes on where it was."
        )
        self.arguments = (path, error)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self.arguments


class Records:
    """Records below one folder, in sub-folders by the first two digits of their key's hash."""

    def __init__(self, folder: Path):
        """Args: folder: made when the first record is put; what is being written lies in `unfinished` beside it."""
        self.folder = folder
        self.unfinished = folder.with_name(UNFINISHED)

    def get(self, key: str, made_from: str) -> Any | None:
        """Returns the record of a key; None where there is none, or one made from other files or settings."""
        stored = self._stored(key)
        return stored["record"] if stored is not None and stored["made_from"] == made_from else None

    def last(self, key: str) -> Any | None:
        """Returns the record of a key, whatever it was made from; None where there is none."""
        stored = self._stored(key)
        return None if stored is None else stored["record"]

    def put(self, key: str, made_from: str, record: Any) -> None:
        """Writes a record of plain data, replacing the one of the same key.

        Raises:
            CannotWrite: The disk is full, say.
        """
        file = self._file(key)
        unfinished = self.unfinished / f"{uuid4().hex}.json"
        try:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            content = {"format": FORMAT, "key": key, "made_from": made_from, "record": record}
            unfinished.write_text(json.dumps(content, sort_keys=True))
            os.replace(unfinished, file)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise CannotWrite(file, error) from error

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Yields (key, record) of all that were ever put and not replaced, in the order of the keys' hashes."""
        for file in sorted(self.folder.glob("*/*.json")):
            stored = _read(file)
            if stored is not None:
                yield stored["key"], stored["record"]

    def _stored(self, key: str) -> dict[str, Any] | None:
        return _read(self._file(key))

    def _file(self, key: str) -> Path:
        name = hashlib.sha256(key.encode(errors="surrogateescape")).hexdigest()
        return self.folder / name[:2] / f"{name}.json"


def _read(file: Path) -> dict[str, Any] | None:
    """Returns what a record's file holds; None where it is missing, damaged (a power cut) or of another format."""
    try:
        stored = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return stored if stored["format"] == FORMAT else None


@dataclass(frozen=True)
class State:
    """Where an import keeps what it knows, beside the datasets in nnUNet_raw.

    Attributes:
        folder: of this dataset's state.
        pool: of what is known of the sources, which datasets made of one pool share.
    """

    folder: Path
    pool: Path

    @property
    def scanned(self) -> Records:
        """What lies in which folder (`sources.scan_folder`)."""
        return Records(self.pool / "scanned")

    @property
    def probed(self) -> Records:
        """The modality of every source, where it had to be found out."""
        return Records(self.pool / "probed")

    @property
    def imported(self) -> Records:
        """The outcomes of every source that is done."""
        return Records(self.folder / "imported")

    @property
    def unfinished(self) -> Path:
        """Files being written."""
        return self.folder / UNFINISHED
