"""What lies below the given folders: image files, DICOM series wherever their slices are, and what is no scan."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from nnunetv2_misfm.data.dicom import group_series
from nnunetv2_misfm.data.files import COMPANIONS, companions, ending_of
from nnunetv2_misfm.data.records import Records, fingerprint
from nnunetv2_misfm.errors import MisfmError


@dataclass(frozen=True)
class Folder:
    """What one folder holds, sub-folders apart.

    Attributes:
        images: names of files of the formats of `data/files.py`.
        series: DICOM series, by the hash of their UID -> names of their files here.
        others: names of files that are no scans -> why.
    """

    images: list[str] = field(default_factory=list)
    series: dict[str, list[str]] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Source:
    """One item to import: a file, or a DICOM series.

    Attributes:
        path: of the file; of a series' first file.
        series: hash of the series' UID; empty for a file.
        folders: where files of the series lie; empty for a file.
    """

    path: str
    series: str = ""
    folders: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Stays the same when slices are added to a series or files to a folder."""
        return self.series or self.path

    def files(self, scanned: Records) -> list[Path]:
        """Returns all files that the item is read from, sorted by path.

        Args:
            scanned: records of `scan_folder`, by folder.
        """
        if not self.series:
            return [Path(self.path), *companions(Path(self.path))]
        found = []
        for folder in self.folders:
            names = _recorded(scanned, folder).series.get(self.series, [])
            found += [Path(folder, name) for name in names]
        return sorted(found)


def folders_below(inputs: Iterable[Path]) -> Iterator[str]:
    """Yields every folder that is one of `inputs` or lies below, absolute, each once; links to folders are followed.

    Raises:
        MisfmError: An input is not a folder.
    """
    seen: set[str] = set()
    unreadable: list[str] = []
    for top in inputs:
        if not top.is_dir():
            raise MisfmError(f"expected folders after --input, got {top}, which is not one.")
        walk = os.walk(os.path.abspath(top), followlinks=True, onerror=lambda error: unreadable.append(error.filename))
        for folder, below, _ in walk:
            below.sort()
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
            else:
                seen.add(real)
                yield folder
    yield from unreadable  # scanning them gives the reason


def scan_folder(folder: str, scanned: Records) -> None:
    """Sorts the files of one folder and records the result, unless it is recorded and nothing has changed."""
    names = sorted(entry.name for entry in os.scandir(folder) if not os.path.isdir(entry.path))
    files = [Path(folder, name) for name in names]
    present = [file for file in files if os.path.exists(file)]
    gone = [file for file in files if not os.path.exists(file)]
    made_from = fingerprint(present, *map(ascii, names))
    if scanned.get(folder, made_from) is not None:
        return
    images = [file for file in present if ending_of(file) and file.is_file()]
    data_files = {data for image in images if ending_of(image) in COMPANIONS for data in companions(image)}
    candidates = sorted(set(present) - set(images) - data_files)
    series, others = group_series(candidates)
    content = Folder(
        images=[file.name for file in images],
        series={_hash(uid): [file.name for file in slices] for uid, slices in series.items()},
        others={file.name: reason for file, reason in others.items()}
        | {file.name: "a link to nothing" for file in gone},
    )
    scanned.put(folder, made_from, asdict(content))


def sources_in(folders: Iterable[str], scanned: Records) -> list[Source]:
    """Returns the items in scanned folders, sorted by path; slices of one series in several folders are one item."""
    files: list[Source] = []
    first: dict[str, str] = {}
    where: dict[str, list[str]] = {}
    for folder in folders:
        content = _recorded(scanned, folder)
        files += [Source(os.path.join(folder, name)) for name in content.images]
        for uid, names in content.series.items():
            path = os.path.join(folder, min(names))
            first[uid] = min(first.get(uid, path), path)
            where.setdefault(uid, []).append(folder)
    return sorted(files + [Source(first[uid], uid, tuple(sorted(where[uid]))) for uid in first])


def _recorded(scanned: Records, folder: str) -> Folder:
    record = scanned.last(folder)
    return Folder(**record) if record else Folder()


def _hash(uid: str) -> str:
    """A UID leads to the patient in the archive it came from, so it is not stored."""
    return hashlib.sha256(uid.encode()).hexdigest()[:32]
