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
        series: DICOM series, by the hash of what tells them apart -> name of their first file here.
        others: names of files that are no scans -> why.
    """

    images: list[str] = field(default_factory=list)
    series: dict[str, str] = field(default_factory=dict)
    others: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, order=True)
class Source:
    """One item to import: a file, or a DICOM series.

    Attributes:
        path: of the file; of a series' first file.
        series: hash of what tells the series from others; empty for a file.
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
        """Returns all files that the item is read from, sorted by path; of a series those that are there.

        Args:
            scanned: records of `scan_folder`.
        """
        if not self.series:
            return [Path(self.path), *companions(Path(self.path))]
        found = []
        for folder in self.folders:
            if self.series in _recorded(scanned, folder).series:
                names = scanned.last(_series_key(folder, self.series)) or []
                found += [Path(folder, name) for name in names if os.path.exists(os.path.join(folder, name))]
        return sorted(found)


def folders_below(inputs: Iterable[Path], without: Iterable[Path] = ()) -> Iterator[str]:
    """Yields every folder that is one of `inputs` or lies below, absolute, each once; links to folders are followed.

    Args:
        inputs: folders.
        without: folders that are left out with all below them.

    Raises:
        MisfmError: An input is not a folder, or lies in one of those left out.
    """
    seen = {os.path.realpath(folder) for folder in without}
    unreadable: list[str] = []
    for top in inputs:
        if not top.is_dir():
            raise MisfmError(f"expected folders after --input, got {top}, which is not one.")
        inside = [folder for folder in without if top.resolve().is_relative_to(folder.resolve())]
        if inside:
            raise MisfmError(f"expected folders of scans after --input, got {top}, which belongs to {inside[0]}.")
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
    by_hash = {_hash(what): [file.name for file in slices] for what, slices in series.items()}
    for key, slices in by_hash.items():
        scanned.put(_series_key(folder, key), made_from, slices)
    content = Folder(
        images=[file.name for file in images],
        series={key: slices[0] for key, slices in by_hash.items()},
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
        for uid, name in content.series.items():
            path = os.path.join(folder, name)
            first[uid] = min(first.get(uid, path), path)
            where.setdefault(uid, []).append(folder)
    return sorted(files + [Source(first[uid], uid, tuple(sorted(where[uid]))) for uid in first])


def _recorded(scanned: Records, folder: str) -> Folder:
    record = scanned.last(folder)
    return Folder(**record) if record else Folder()


def _series_key(folder: str, series: str) -> str:
    return f"{folder}\0{series}"


def _hash(what: str) -> str:
    """UIDs lead to the patient in the archive they came from, so they are not stored."""
    return hashlib.sha256(what.encode(errors="surrogateescape")).hexdigest()[:32]
