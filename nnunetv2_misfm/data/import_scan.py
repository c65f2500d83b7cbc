"""One scan on its way into a dataset: read, judged, turned, masked and written, with a verdict at the end."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import nibabel
import numpy as np
import SimpleITK as sitk
from isal import igzip

from nnunetv2_misfm.data.body import body_mask
from nnunetv2_misfm.data.dicom import read_series
from nnunetv2_misfm.data.files import itk_affine, read_file, require_utf8
from nnunetv2_misfm.data.judge import check_geometry, check_intensities, stored_form, survey
from nnunetv2_misfm.data.modality import lacks_offset
from nnunetv2_misfm.data.outcome import Outcome, Settings
from nnunetv2_misfm.data.records import CannotWrite, State, fingerprint
from nnunetv2_misfm.data.sources import Source
from nnunetv2_misfm.data.volume import (
    Header,
    Refused,
    Volume,
    canonical,
    is_canonical,
    is_sheared,
    resample_sheared,
    same_place,
)

FILE_ENDING = ".nii.gz"
# What nnU-Net's SimpleITK reader lists and a link may point to
_LINKABLE_ENDINGS = (".nii.gz", ".nrrd", ".mha")
# Of igzip's 0 to 3. On CT within 2 % of the size that zlib's fastest level gives, in a quarter of its time
_COMPRESSION = 2
_CHUNK = 1 << 20


def import_source(source: Source, dataset: Path, state: State, settings: Settings, again: bool = False) -> None:
    """Imports one source and records its outcomes, unless they are recorded and its files have not changed.

    Of a DICOM series the slices are joined that lay in other folders at earlier imports.

    Args:
        source: what to import.
        dataset: the dataset's folder.
        state: of that dataset.
        settings: of that dataset.
        again: import even what is recorded, because its files are gone from the dataset.

    Raises:
        CannotWrite: The disk is full or closed; nothing half-written is left in the dataset.
    """
    earlier = state.imported.last(source.key) or {"folders": [], "outcomes": []}
    gone = [folder for folder in earlier["folders"] if not os.path.isdir(folder)]
    source = replace(source, folders=tuple(sorted({*source.folders, *earlier["folders"]} - set(gone))))
    files = source.files(state.scanned)
    if not files:
        raise FileNotFoundError(f"{source.path} is gone since it was found")
    taken_of = max((outcome["files"] for outcome in earlier["outcomes"] if outcome["case"]), default=0)
    if gone and not again and len(files) < taken_of:
        return  # a part of a series that was imported whole before
    made_from = fingerprint(files)
    if not again and state.imported.get(source.key, made_from) is not None:
        return
    basic = Outcome(source.key, str(files[0]), "rejected", files=len(files), sha256=_sha256(files))
    outcomes, passing = [], False
    for read in _read(source, files, settings):
        try:
            if isinstance(read, Refused):
                raise read
            outcomes.append(_take(read, basic, dataset, state, settings))
        except Refused as refused:
            outcomes.append(_refusal(basic, refused))
            passing = passing or refused.may_pass
    record = {"folders": source.folders, "outcomes": [asdict(outcome) for outcome in outcomes]}
    state.imported.put(source.key, "" if passing else made_from, record)


def _read(source: Source, files: list[Path], settings: Settings) -> Iterator[Volume | Refused]:
    """Reads the volumes of a source; whatever the reader refuses as a whole comes last, as a value."""
    try:
        if source.series:
            yield from read_series(files, split_time_series=settings.split_time_series)
        else:
            yield from read_file(files[0], split_time_series=settings.split_time_series)
    except Refused as refused:
        yield refused


def _take(volume: Volume, basic: Outcome, dataset: Path, state: State, settings: Settings) -> Outcome:
    """Judges and writes one volume."""
    said = volume.header.modality
    if said and said != settings.modality:
        raise Refused(f"{said}, where {settings.modality} is imported", volume.header, volume.part)
    check_geometry(volume, settings.min_size, allow_shear=settings.resample_sheared)
    seen = survey(volume.voxels)
    check_intensities(volume, seen)
    notes = list(volume.notes)
    if settings.modality == "CT" and lacks_offset(volume.voxels, seen):
        notes.append("looks as if counted from 0 instead of in HU; left as it is")
    straight = resample_sheared(volume, seen.lowest) if is_sheared(volume.affine) else volume
    resampled = straight is not volume
    if resampled:
        check_geometry(straight, settings.min_size)
        notes = [*notes, straight.notes[-1]]
        seen = survey(straight.voxels)
    turned = canonical(straight)
    fill = seen.lowest if settings.modality == "CT" else min(max(0.0, seen.lowest), seen.highest)
    voxels = stored_form(turned.voxels, seen, fill)
    if seen.unusable:
        notes.append(f"{seen.unusable} voxels were not finite: set to {fill:g}")
    mask = body_mask(voxels, turned.spacing_mm.tolist(), settings.modality)

    content = _content(voxels)
    case = _case_name(content, turned.affine, f"{basic.path}\0{volume.part}" if settings.keep_duplicates else "")
    changed = resampled or bool(seen.unusable)
    image = f"imagesTr/{case}_0000{FILE_ENDING}"
    if settings.link and not changed and not volume.part and _needs_no_copy(Path(basic.path), volume):
        image = str(Path(basic.path).absolute())
    else:
        _write(voxels, turned.affine, dataset / image, state.unfinished)
    _write(mask, turned.affine, dataset / "labelsTr" / f"{case}{FILE_ENDING}", state.unfinished)
    return _described(
        basic,
        volume.header,
        volume.part,
        verdict="split" if volume.part else "repaired" if changed else "accepted",
        reason="; ".join(notes),
        case=case,
        modality=settings.modality,
        intensity_range=f"{seen.lowest:g}..{seen.highest:g}",
        body_share=f"{mask.mean():.4f}",
        content=content,
        size=list(voxels.shape),
        affine=[float(number) for number in turned.affine.ravel()],
        image=image,
    )


def _refusal(basic: Outcome, refused: Refused) -> Outcome:
    return _described(
        basic, refused.header, refused.part, reason=refused.reason, modality=refused.header.modality or ""
    )


def _described(basic: Outcome, header: Header, part: str, **more: Any) -> Outcome:
    return replace(
        basic,
        part=part,
        shape="x".join(map(str, header.shape)),
        spacing_mm="x".join(f"{size:.3f}" for size in header.spacing_mm),
        orientation=header.orientation,
        dtype=header.dtype,
        **more,
    )


def _needs_no_copy(path: Path, volume: Volume) -> bool:
    """Tells whether nnU-Net's SimpleITK reader would read from the file itself what would be written."""
    if not path.name.endswith(_LINKABLE_ENDINGS) or not is_canonical(volume.affine):
        return False
    reader = sitk.ImageFileReader()
    try:
        require_utf8(path)
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
    except (RuntimeError, UnicodeError):  # NIfTI-2, say
        return False
    same_grid = reader.GetSize() == volume.voxels.shape
    return same_grid and same_place(itk_affine(reader), volume.affine, volume.voxels.shape)


def _content(voxels: np.ndarray) -> str:
    """Returns the sha256 of voxels [I, J, K] in Fortran order with their type and shape."""
    digest = hashlib.sha256(f"{voxels.dtype.name}{voxels.shape}".encode())
    digest.update(voxels.T)
    return digest.hexdigest()


def _case_name(content: str, affine: np.ndarray, name: str) -> str:
    """Returns a name that equal voxels with equal geometry share; 64 bits tell more scans apart than there are."""
    return "scan_" + hashlib.sha256(f"{content}{affine.tolist()}{name}".encode()).hexdigest()[:16]


def _sha256(files: list[Path]) -> str:
    sums = sorted(_sha256_of_file(file) for file in files)
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError:  # reading it will give the reason
        return ""
    return digest.hexdigest()


def _write(voxels: np.ndarray, affine: np.ndarray, target: Path, unfinished: Path) -> None:
    """Writes voxels [I, J, K] as compressed NIfTI-1, and moves the file into place when it is whole."""
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)  # 1: coordinates of the scanner
    image.set_qform(affine, code=1)
    temporary = unfinished / f"{uuid4().hex}{FILE_ENDING}"
    try:
        unfinished.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file, igzip.IGzipFile("", "wb", _COMPRESSION, file, mtime=0) as stream:
            image.to_stream(stream)
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CannotWrite(target, error) from error
