"""Reading one file of the formats that research archives use: NIfTI-1 and -2, MGH, NRRD and MetaImage.

nibabel reads the first two, SimpleITK the others. What these libraries let pass is checked here: a gzip stream that
ends early or whose checksum fails, and a compressed NRRD or MetaImage that does not unpack.
"""

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
import SimpleITK as sitk
from isal import igzip
from isal.isal_zlib import IsalError
from nibabel.affines import voxel_sizes
from nibabel.spatialimages import HeaderDataError

from nnunetv2_misfm.data.volume import Header, Refused, Volume, corner_distance_mm, orientation_of, spans_space

NIBABEL_ENDINGS = (".nii", ".nii.gz", ".hdr", ".mgz", ".mgh")
ITK_ENDINGS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
ENDINGS = (*NIBABEL_ENDINGS, *ITK_ENDINGS)
# Files that hold the voxels of a header beside them, of the same stem, where the header names no other
COMPANIONS = {
    ".hdr": (".img", ".img.gz"),
    ".mhd": (".raw", ".zraw"),
    ".nhdr": (".raw", ".raw.gz", ".raw.bz2"),
}

# Intents of the NIfTI-1 standard (nifti1.h) whose last axis is the components of one voxel, not time
_VECTOR_INTENTS = {1004, 1005, 1006, 1007, 1011, 2003, 2004}
# isal declares its error as an instance
_DAMAGED: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error, IsalError)  # type: ignore[assignment]
_AT_THE_VOXELS: tuple[type[Exception], ...] = (*_DAMAGED, OSError, ValueError, RuntimeError)
_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_CHUNK = 1 << 20  # bytes read at a time where only the checksum is wanted
_GZIP_AT_MOST = 1032  # bytes that deflate makes of one at most (zlib.net/zlib_tech.html)
_UNITS_MM = {1: ("metres", 1e3), 3: ("micrometres", 1e-3)}  # NIFTI_UNITS_METER and _MICRON of nifti1.h
# How headers say where they end, that the voxels are packed, and which file holds them where it is another
_PACKED = {
    "MetaImageIO": (
        rb"^ElementDataFile.*(\n|\Z)",
        rb"^CompressedData *[=:] *[Tt1]",
        rb"^ElementDataFile *[=:] *(.*\S)",
    ),
    "NrrdImageIO": (rb"\n\r?\n", rb"(?i)^encoding: *gz(ip)?\s*$", rb"(?i)^data ?file: *(.*\S)"),
}
_GZIP_MAGIC = b"\x1f\x8b"  # RFC 1952, 2.3.1
_FORMS_DIFFER_MM = 1.0  # between qform and sform, from where on it is noted: a voxel of usual scans. Ours
_LFS_POINTER = b"version https://git-lfs.github.com/"


def ending_of(path: Path) -> str:
    """Returns which of `ENDINGS` a file's name has, whatever its case; empty for none."""
    name = path.name.lower()
    return next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if name.endswith(ending)), "")


def companions(path: Path) -> list[Path]:
    """Returns the files that hold the voxels of a header file (`COMPANIONS`), those that exist.

    The file that a MetaImage or NRRD header names; where it names none that exists, or a list or pattern of files,
    those of the same stem. Data files of .mha and .nrrd, which hold their own voxels as a rule, are not looked for.
    """
    ending = ending_of(path)
    if ending not in COMPANIONS:
        return []
    if ending in ITK_ENDINGS:
        try:
            named = _named_data(path, _text_header(path))
        except OSError:  # reading it will give the reason
            named = None
        if named is not None:
            return [named]
    stem = path.name[: -len(ending)]
    names = [name for data in COMPANIONS[ending] for name in (stem + data, stem + data.upper())]
    return [file for name in names if (file := path.with_name(name)).is_file()]


def require_utf8(path: Path) -> None:
    """Raises UnicodeError for a path that is no UTF-8: given one, SimpleITK aborts the whole process."""
    str(path).encode()


def read_file(path: Path, *, split_time_series: bool = False) -> Iterator[Volume]:
    """Reads the volumes of one file, one of `ENDINGS`.

    Args:
        path: the file; a header's data file lies beside it.
        split_time_series: yield the volumes of a time series one after the other; else it is refused.

    Yields:
        One volume; several of a time series, each with its `part`. Scaled by the file's slope and intercept, otherwise
        of the stored type.

    Raises:
        Refused: The file is damaged, or holds no single scalar volume.
    """
    try:
        _check_start(path)
        if ending_of(path) in ITK_ENDINGS:
            yield from _read_itk(path, split_time_series)
        else:
            yield from _read_nibabel(path, split_time_series)
    except (Refused, MemoryError):
        raise
    except _DAMAGED as error:
        raise Refused(_damaged(error, path)) from error
    except OSError as error:
        raise Refused(f"cannot be read: {error.strerror or _in_one_line(error)}") from error
    except Exception as error:  # the readers raise whatever they like at a damaged file
        raise Refused(f"unreadable: damaged, or not what its name says ({_in_one_line(error)})") from error


def _check_start(path: Path) -> None:
    if path.exists() and not path.is_file():
        raise Refused("no regular file")
    with open(path, "rb") as file:
        start = file.read(len(_LFS_POINTER))
    if not start:
        raise Refused("an empty file")
    if start == _LFS_POINTER:
        raise Refused("a pointer of git LFS, not the file itself: fetch it with git lfs pull")


def _read_nibabel(path: Path, split_time_series: bool) -> Iterator[Volume]:
    image = nibabel.load(path, mmap=False)
    if ending_of(path) == ".hdr" and not Path(str(image.file_map["image"].filename)).is_file():
        raise Refused("a header without the file of its voxels (.img)", _nibabel_header(image))
    if not isinstance(image, nibabel.Nifti1Pair | nibabel.MGHImage):
        raise Refused("Analyze 7.5, which states no orientation; convert it to NIfTI")
    _refuse_by_header(image, split_time_series)
    try:
        _check_size(image)
        stored, slope, intercept = _stored(image, path)
    except _AT_THE_VOXELS as error:
        raise Refused(_damaged(error, path), _nibabel_header(image)) from error
    if (slope, intercept) != (1.0, 0.0):
        stored = stored.astype(np.float32)
        stored *= np.float32(slope)
        stored += np.float32(intercept)
    stored = stored.reshape(_without_trailing_ones(stored.shape), order="F")
    yield from _volumes(stored, _nibabel_affine(image), _nibabel_header(image), _notes(image))


def _check_size(image: Any) -> None:
    """Refuses to make room for more voxels than a file can hold: a damaged header may promise any number."""
    file = Path(str(image.file_map["image"].filename))
    most = file.stat().st_size * (_GZIP_AT_MOST if file.suffix.lower() in (".gz", ".mgz") else 1)
    promised = math.prod(image.shape) * image.get_data_dtype().itemsize
    if promised > most:
        raise EOFError(f"{promised} bytes of voxels are promised, at most {most} are there")


def _stored(image: Any, path: Path) -> tuple[np.ndarray, float, float]:
    """Returns the stored voxels, slope and intercept; reads a compressed stream to the checksum at its end."""
    if path.suffix.lower() not in (".gz", ".mgz"):
        return image.dataobj.get_unscaled(), image.dataobj.slope, image.dataobj.inter
    with igzip.open(path) as stream:
        streamed = type(image).from_stream(stream).dataobj
        voxels = streamed.get_unscaled()
        while stream.read(_CHUNK):
            pass
    return voxels, streamed.slope, streamed.inter


def _refuse_by_header(image: Any, split_time_series: bool) -> None:
    header = _nibabel_header(image)
    dtype = image.get_data_dtype()
    shape = _without_trailing_ones(image.shape)
    intent = int(image.header["intent_code"]) if "intent_code" in image.header else 0
    if dtype.names:
        raise Refused("colour (RGB) voxels, not intensities", header)
    if dtype.kind == "c":
        raise Refused("complex voxels, not intensities", header)
    if len(shape) > 4 or (len(shape) == 4 and intent in _VECTOR_INTENTS):
        raise Refused("vectors or tensors at every voxel, not intensities", header)
    if len(shape) == 4 and not split_time_series:
        raise Refused(_time_series(shape[3]), header)


def _nibabel_header(image: Any) -> Header:
    dtype, affine = image.get_data_dtype(), _nibabel_affine(image)
    with np.errstate(all="ignore"):  # an odd affine is refused later
        volume = len(image.shape) >= 3
        sizes = voxel_sizes(affine) if volume else np.multiply(image.header.get_zooms(), _units(image)[1])
    return Header(
        shape=tuple(int(size) for size in image.shape),
        spacing_mm=tuple(float(size) for size in sizes),
        orientation=orientation_of(affine),
        dtype="".join(dtype.names) if dtype.names else dtype.newbyteorder("=").name,
    )


def _units(image: Any) -> tuple[str, float]:
    """Returns the unit of length of a header, and its size in mm; mm where it states none."""
    code = int(image.header["xyzt_units"]) & 7 if "xyzt_units" in image.header else 0
    return _UNITS_MM.get(code, ("mm", 1.0))


def _nibabel_affine(image: Any) -> np.ndarray:
    """Returns voxel index -> mm: as nibabel by the sform, but by the qform where the sform spans no space."""
    qform = _qform_beside_sform(image)
    affine = np.array(image.affine if qform is None or spans_space(image.affine) else qform)
    affine[:3] *= _units(image)[1]
    return affine


def _qform_beside_sform(image: Any) -> np.ndarray | None:
    """Returns the qform [4, 4], in the file's unit, of a NIfTI that has a sform too; None where it spans no space."""
    if not isinstance(image, nibabel.Nifti1Pair) or image.header["sform_code"] == 0:
        return None
    try:
        qform = image.header.get_qform(coded=True)[0]
    except (ValueError, HeaderDataError):  # a quaternion longer than 1, say
        return None
    return qform if qform is not None and spans_space(qform) else None


def _notes(image: Any) -> tuple[str, ...]:
    header, (unit, size_mm) = image.header, _units(image)
    notes = [f"lengths in {unit}, brought to mm"] if size_mm != 1 else []
    qform = _qform_beside_sform(image)
    if qform is not None and not spans_space(image.affine):
        notes.append("the sform gives no usable size or direction; the qform was taken")
    elif qform is not None:
        apart = size_mm * corner_distance_mm(qform, image.affine, (*image.shape, 1, 1, 1)[:3])
        if apart > _FORMS_DIFFER_MM:
            notes.append(f"qform and sform differ by up to {apart:.1f} mm; the sform was taken")
    if isinstance(image, nibabel.Nifti1Pair) and header["qform_code"] == 0 and header["sform_code"] == 0:
        notes.append(f"the header states no orientation, taken as {orientation_of(image.affine)}")
    return tuple(notes)


def _read_itk(path: Path, split_time_series: bool) -> Iterator[Volume]:
    try:
        require_utf8(path)
    except UnicodeError as error:
        raise Refused("a path that is no UTF-8, which ITK cannot open: rename it") from error
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(ITK_ENDINGS[ending_of(path)])
    reader.ReadImageInformation()
    header = _itk_header(reader)
    shape = _without_trailing_ones(header.shape)
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise Refused("complex voxels, not intensities", header)
    if reader.GetNumberOfComponents() > 1:
        raise Refused("vectors or colours at every voxel, not intensities", header)
    if len(shape) > 4:
        raise Refused("vectors or tensors at every voxel, not intensities", header)
    if len(shape) == 4 and not split_time_series:
        raise Refused(_time_series(shape[3]), header)
    try:
        _check_stream(path)
        voxels = sitk.GetArrayFromImage(reader.Execute()).T  # a view would outlive its image
    except _AT_THE_VOXELS as error:
        raise Refused(_damaged(error, path), header) from error
    yield from _volumes(voxels.reshape(shape, order="F"), itk_affine(reader), header)


def _itk_header(reader: sitk.ImageFileReader) -> Header:
    size, kind = reader.GetSize(), reader.GetPixelID()
    components = reader.GetNumberOfComponents() if "vector" in sitk.GetPixelIDValueAsString(kind) else 1
    one_voxel = sitk.Image([1] * len(size), kind, components)
    return Header(
        shape=tuple(size),
        spacing_mm=tuple(reader.GetSpacing()[:3]),
        orientation=orientation_of(itk_affine(reader)) if len(size) >= 3 else "",
        dtype=sitk.GetArrayViewFromImage(one_voxel).dtype.name,
    )


def itk_affine(reader: sitk.ImageFileReader) -> np.ndarray:
    """Returns voxel index -> mm in RAS+, float64 [4, 4], of the first three axes of an image whose header was read."""
    axes = reader.GetDimension()
    affine = np.eye(4)
    if axes >= 3:
        direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3]
        affine[:3, :3] = direction * np.array(reader.GetSpacing()[:3])
        affine[:3, 3] = reader.GetOrigin()[:3]
    return _RAS_FROM_LPS @ affine


def _check_stream(path: Path) -> None:
    """Unpacks compressed data to their end: ITK itself goes on with zeros or noise where that fails."""
    header = _text_header(path)
    _, packed, names_data = _PACKED[ITK_ENDINGS[ending_of(path)]]
    if not re.search(packed, header, re.MULTILINE):
        return
    name = re.search(names_data, header, re.MULTILINE)
    if name is None or name[1].upper() == b"LOCAL":
        with open(path, "rb") as file:
            file.seek(len(header))
            _unpack(file)
    elif (data := _named_data(path, header)) is not None:  # else missing, or several, which ITK knows
        with open(data, "rb") as file:
            _unpack(file)


def _text_header(path: Path) -> bytes:
    """Returns the text at the start of a NRRD or MetaImage, up to where its voxels may begin."""
    with open(path, "rb") as file:
        start = file.read(_CHUNK)
    end = re.search(_PACKED[ITK_ENDINGS[ending_of(path)]][0], start, re.MULTILINE)
    return start[: end.end()] if end else start


def _named_data(path: Path, header: bytes) -> Path | None:
    """Returns the one other file that a header names as that of its voxels, if it exists."""
    name = re.search(_PACKED[ITK_ENDINGS[ending_of(path)]][2], header, re.MULTILINE)
    if name is None or name[1].upper() in (b"LOCAL", b"LIST"):
        return None
    data = path.parent / os.fsdecode(name[1])
    return data if data != path and os.path.isfile(data) else None


def _unpack(file: BinaryIO) -> None:
    """Unpacks one stream and leaves the file at its end."""
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: zlib or gzip, by its first bytes
    while not stream.eof and (chunk := file.read(_CHUNK)):
        while chunk and not stream.eof:
            stream.decompress(chunk, _CHUNK)
            chunk = stream.unconsumed_tail
    if not stream.eof:
        raise EOFError("the stream ends early")
    file.seek(-len(stream.unused_data), os.SEEK_CUR)


def _goes_on_after_its_end(path: Path) -> bool:
    """Tells whether whole gzip streams are followed by what is neither another stream nor padding with zeros."""
    try:
        with open(path, "rb") as file:
            rest = _GZIP_MAGIC
            while rest.startswith(_GZIP_MAGIC):
                _unpack(file)
                while (rest := file.read(_CHUNK)) and not (rest := rest.lstrip(b"\0")):
                    pass
                file.seek(-len(rest), os.SEEK_CUR)
    except (EOFError, zlib.error, OSError):
        return False
    return bool(rest)


def _volumes(voxels: np.ndarray, affine: np.ndarray, header: Header, notes: tuple[str, ...] = ()) -> Iterator[Volume]:
    """Yields [I, J, K] as one volume and [I, J, K, T] as T volumes."""
    if voxels.ndim < 3:
        raise Refused("2D: a single slice", header)
    if voxels.ndim == 3:
        yield Volume(voxels, affine, header, notes=notes)
        return
    count = voxels.shape[3]
    for number in range(count):
        whole = Volume(voxels[..., number], affine, header, notes=notes)
        yield replace(whole, part=f"volume {number + 1} of {count}")


def _time_series(count: int) -> str:
    return f"time series of {count} volumes; --split-time-series takes them apart"


def _without_trailing_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return tuple(int(size) for size in shape)


def _damaged(error: Exception, path: Path) -> str:
    if path.suffix.lower() in (".gz", ".mgz") and _goes_on_after_its_end(path):
        return "its gzip stream is whole, but other bytes follow: unpack it with gzip -d, which leaves them out"
    return f"damaged: the file is cut off or corrupt ({_in_one_line(error)})"


def _in_one_line(error: Exception) -> str:
    """What an error says, in the line that holds the sense: of ITK's the last but for its "Reason", else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.startswith("Reason: ")]
    if not lines:
        return type(error).__name__
    if isinstance(error, RuntimeError):
        return re.sub(r"^(ITK|sitk::)\s?ERROR: (\w+\(0x\w+\): )?", "", lines[-1])
    return f"{type(error).__name__}: {lines[0]}"
