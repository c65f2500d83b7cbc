"""The files of a universal dataset that refer to its sources: dataset.json, folds, and links to preprocessed cases."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_preprocessed, nnUNet_raw
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.universal_sources import UNIVERSAL, Case, RawSource
from nnunetv2_misfm.plans_file import read_json, write_json
from nnunetv2_misfm.trainers.base import NUM_DEFAULT_FOLDS
from nnunetv2_misfm.universe import Universe

# nnU-Net's own split (nnUNetTrainer.do_split)
_SEED = 12345
# What a preprocessed case consists of (nnUNetDatasetBlosc2); the image last: it is the sign that a case is there
_CASE_FILES = (".pkl", "_seg.b2nd", ".b2nd")

Splits = list[dict[str, list[str]]]


def description(universe: Universe, sources: Sequence[RawSource]) -> dict[str, Any]:
    """Returns the dataset.json of a universal dataset, in nnU-Net's form that lists its cases by file.

    Its labels are the tasks, task n as n + 1; the label files hold the values of their own datasets.

    Args:
        universe: Its tasks.
        sources: The datasets that it trains.
    """
    first = sources[0]
    channels = [sorted({source.channels[i] for source in sources}) for i in range(len(first.channels))]
    folder = Path(str(nnUNet_raw)).absolute() / universe.dataset
    return {
        "name": universe.dataset,
        "channel_names": {str(i): "/".join(names) for i, names in enumerate(channels)},
        "labels": {"background": 0, **{task: number + 1 for number, task in enumerate(universe.tasks)}},
        "numTraining": sum(len(source.cases) for source in sources),
        "file_ending": first.file_ending,
        "overwrite_image_reader_writer": first.reader,
        "misfm": {UNIVERSAL: {"sources": [source.dataset for source in sources], "extends": universe.extends}},
        "dataset": {
            named.prefix + case.name: {
                "images": [_reference(image, folder) for image in case.images],
                "label": _reference(case.label, folder),
            }
            for named, source in zip(universe.sources, sources, strict=True)
            for case in source.cases
        },
    }


def _reference(file: str, folder: Path) -> str:
    """Returns a path as seen from a raw dataset's folder; absolute where the file lies elsewhere."""
    path = Path(os.path.abspath(file))
    return os.path.relpath(path, folder) if folder.parent in path.parents else str(path)


@contextlib.contextmanager
def described(dataset: str, content: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> Iterator[None]:
    """Writes the dataset.json and fingerprint of a universal dataset, which nnU-Net's planner reads.

    Where the block that follows fails, they are as they were before, and a dataset that was not there is gone again.

    Args:
        dataset: Full name of the universal dataset.
        content: Its dataset.json (`description`).
        fingerprint: Its dataset_fingerprint.json.
    """
    raw, preprocessed = (Path(str(variable)) / dataset for variable in (nnUNet_raw, nnUNet_preprocessed))
    wanted = {
        raw / "dataset.json": content,
        preprocessed / "dataset.json": content,
        preprocessed / "dataset_fingerprint.json": fingerprint,
    }
    former = {file: file.read_bytes() if file.is_file() else None for file in wanted}
    new_folders = [folder for folder in (raw, preprocessed) if not folder.exists()]
    try:
        for file, entries in wanted.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(dict(entries), file)
        yield
    except BaseException:
        for file, before in former.items():
            if before is None:
                file.unlink(missing_ok=True)
            else:
                file.write_bytes(before)
        for folder in new_folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise


def source_splits(source: RawSource) -> Splits:
    """Returns a source's folds: its splits_final.json, else nnU-Net's own.

    Where it has fewer cases than folds, fold k holds out case k modulo their number; one case alone is never held out.

    Raises:
        MisfmError: The file names a case that there is not.
    """
    names = [case.name for case in source.cases]
    file = Path(str(nnUNet_preprocessed)) / source.dataset / "splits_final.json"
    beside_raw = Path(str(nnUNet_raw)) / source.dataset / "splits_final.json"
    for present in (file, beside_raw):
        if present.is_file():
            splits: Any = read_json(present)
            unknown = sorted({name for fold in splits for part in fold.values() for name in part} - set(names))
            if unknown or not splits:
                what = f"{unknown[0]}, which {source.dataset} does not have" if unknown else "no folds"
                raise MisfmError(f"{present} names {what}: mend it, or remove it for nnU-Net's own folds.")
            break
    else:
        splits = _own_splits(names)
    return splits


def keep_splits(source: RawSource, splits: Splits) -> None:
    """Writes a source's folds as its splits_final.json, where it has none."""
    file = Path(str(nnUNet_preprocessed)) / source.dataset / "splits_final.json"
    if not file.is_file():
        write_json(splits, file)


def _own_splits(names: Sequence[str]) -> Splits:
    if len(names) >= NUM_DEFAULT_FOLDS:
        folds = generate_crossval_split(sorted(names), seed=_SEED, n_splits=NUM_DEFAULT_FOLDS)
        return [{part: [str(name) for name in fold[part]] for part in ("train", "val")} for fold in folds]
    held_out = [names[k % len(names)] if len(names) > 1 else None for k in range(NUM_DEFAULT_FOLDS)]
    return [{"train": [name for name in names if name != out], "val": [] if out is None else [out]} for out in held_out]


def joint_splits(universe: Universe, splits: Sequence[Splits]) -> Splits:
    """Returns the folds of a universal dataset: fold k unites the sources' folds k, modulo how many each has.

    Args:
        universe: Its sources.
        splits: Of each of them.
    """
    num_folds = max(NUM_DEFAULT_FOLDS, *(len(own) for own in splits))
    return [
        {
            part: [
                source.prefix + name
                for source, own in zip(universe.sources, splits, strict=True)
                for name in own[k % len(own)][part]
            ]
            for part in ("train", "val")
        }
        for k in range(num_folds)
    ]


def missing_cases(source: RawSource, data_identifier: str) -> list[Case]:
    """Returns the cases of a source that are not preprocessed, are older than their files, or lack a label copy."""
    base = Path(str(nnUNet_preprocessed)) / source.dataset
    return [case for case in source.cases if not _is_there(base, data_identifier, source.file_ending, case)]


def _is_there(base: Path, data_identifier: str, file_ending: str, case: Case) -> bool:
    written = [base / data_identifier / (case.name + ending) for ending in _CASE_FILES]
    if not all(file.is_file() for file in [*written, base / "gt_segmentations" / (case.name + file_ending)]):
        return False
    changed = max(os.stat(file).st_mtime for file in (*case.images, case.label))
    return min(file.stat().st_mtime for file in written) >= changed


def link_cases(universe: Universe, sources: Sequence[RawSource], origins: Sequence[str], folder: Path) -> None:
    """Makes a folder hold links to the preprocessed cases of all sources, and nothing else.

    Links are relative and symbolic; hard where the file system has no such links, copies where it has neither.

    Args:
        universe: Whose sources' prefixes name the cases.
        sources: In the same order.
        origins: Name of the folder of preprocessed cases (`data_identifier`) of each.
        folder: The universal dataset's own folder of preprocessed cases.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {}
    for named, source, origin in zip(universe.sources, sources, origins, strict=True):
        base = Path(str(nnUNet_preprocessed)) / source.dataset / origin
        for case in source.cases:
            wanted.update({named.prefix + case.name + end: base / (case.name + end) for end in _CASE_FILES})
    for entry in folder.iterdir():
        if entry.name not in wanted:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for name, origin_file in wanted.items():
        _link(origin_file, folder / name)


def _link(origin: Path, link: Path) -> None:
    target = os.path.relpath(origin, link.parent)
    if _leads_to(link, target, origin):
        return
    unfinished = link.with_name(link.name + ".tmp")
    unfinished.unlink(missing_ok=True)
    try:
        os.symlink(target, unfinished)
    except OSError:
        try:
            os.link(origin, unfinished)
        except OSError:
            shutil.copy2(origin, unfinished)
    os.replace(unfinished, link)


def _leads_to(link: Path, target: str, origin: Path) -> bool:
    """Returns whether a link (or copy, which keeps size and time) is as it should be."""
    if link.is_symlink():
        return os.readlink(link) == target
    if not link.exists():
        return False
    there, wanted = link.stat(), origin.stat()
    same = os.path.samestat(there, wanted)
    return same or (there.st_size, there.st_mtime_ns) == (wanted.st_size, wanted.st_mtime_ns)
