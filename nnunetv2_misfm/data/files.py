"""Reading one file of the formats that research archives use: NIfTI-1 and -2, MGH, NRRD and MetaImage.

nibabel reads the first two, SimpleITK the others. What these libraries let pass is checked here: a gzip stream that
ends early or whose checksum fails, and a compressed MetaImage that does not unpack.
"""

import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
import SimpleITK as sitk

from nnunetv2_misfm.data.volume import Header, Refused, Volume, orientation_of

NIBABEL_ENDINGS = (".nii", ".nii.gz", ".hdr", ".mgz", ".mgh")
ITK_ENDINGS = {".nrrd": "NrrdImageIO", ".nhdr": "NrrdImageIO", ".mha": "MetaImageIO", ".mhd": "MetaImageIO"}
ENDINGS = (*NIBABEL_ENDINGS, *ITK_ENDINGS)
# Files that hold the voxels of a header beside them, of the same stem
COMPANIONS = {
    ".hdr": (".img", ".img.gz"),
    ".mhd": (".raw", ".zraw"),
    ".nhdr": (".raw", ".raw.gz", ".raw.bz2"),
}

# Intents of the NIfTI-1 standard (nifti1.h) whose last axis is the components of one voxel, not time
_VECTOR_INTENTS = {1004, 1005, 1006, 1007, 1011, 2003, 2004}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)
_RAS_FROM_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_CHUNK = 1 << 20  # bytes read at a time where only the checksum is wanted


def ending_of(path: Path) -> str:
    """Returns which of `ENDINGS` a file's name has, whatever its case; empty for none."""
    name = path.name.lower()
    return next((ending for ending in sorted(ENDINGS, key=len, reverse=True) if name.endswith(ending)), "")


def companions(path: Path) -> list[Path]:
    """Returns the files that hold the voxels of a header file, by name, those that exist."""
    ending = ending_of(path)
    stem = path.name[: -len(ending)]
    return [file for data in COMPANIONS.get(ending, ()) if (file := path.with_name(stem + data)).is_file()]


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
        if ending_of(path) in ITK_ENDINGS:
            yield from _read_itk(path, split_time_series)
        else:
            yield from _read_nibabel(path, split_time_series)
    except (Refused, MemoryError):
        raise
    except _DAMAGED as error:
        raise Refused(_damaged(error)) from error
    except Exception as error:  # the readers raise whatever they like at a damaged file
        raise Refused(f"unreadable: {_last_line(error)}") from error


def _read_nibabel(path: Path, split_time_series: bool) -> Iterator[Volume]:
    image = nibabel.load(path, mmap=False)
    if ending_of(path) == ".hdr" and not Path(str(image.file_map["image"].filename)).is_file():
        raise Refused("a header without the file of its voxels (.img)")
    if not isinstance(image, nibabel.Nifti1Pair | nibabel.MGHImage):
        raise Refused("Analyze 7.5, which states no orientation; convert it to NIfTI")
    _refuse_by_header(image, split_time_series)
    try:
        stored, slope, intercept = _stored(image, path)
    except (*_DAMAGED, OSError, ValueError) as error:
        raise Refused(_damaged(error), _nibabel_header(image)) from error
    if (slope, intercept) != (1.0, 0.0):
        stored = stored.astype(np.float32)
        stored *= np.float32(slope)
        stored += np.float32(intercept)
    stored = stored.reshape(_without_trailing_ones(stored.shape), order="F")
    yield from _volumes(stored, image.affine, _nibabel_header(image), _notes(image))


def _stored(image: Any, path: Path) -> tuple[np.ndarray, float, float]:
    """Returns the stored voxels, slope and intercept; reads a compressed stream to the checksum at its end."""
    if path.suffix.lower() not in (".gz", ".mgz"):
        return image.dataobj.get_unscaled(), image.dataobj.slope, image.dataobj.inter
    with gzip.open(path) as stream:
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
    dtype = image.get_data_dtype()
    return Header(
        shape=tuple(int(size) for size in image.shape),
        spacing_mm=tuple(float(size) for size in image.header.get_zooms()[:3]),
        orientation=orientation_of(image.affine),
        dtype="".join(dtype.names) if dtype.names else dtype.newbyteorder("=").name,
    )


def _notes(image: Any) -> tuple[str, ...]:
    header = image.header
    if isinstance(image, nibabel.Nifti1Pair) and header["qform_code"] == 0 and header["sform_code"] == 0:
        return (f"the header states no orientation, taken as {orientation_of(image.affine)}",)
    return ()


def _read_itk(path: Path, split_time_series: bool) -> Iterator[Volume]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO(ITK_ENDINGS[ending_of(path)])
    reader.ReadImageInformation()
    header = _itk_header(reader)
    shape = _without_trailing_ones(header.shape)
    if reader.GetNumberOfComponents() > 1:
        raise Refused("vectors or colours at every voxel, not intensities", header)
    if "complex" in sitk.GetPixelIDValueAsString(reader.GetPixelID()):
        raise Refused("complex voxels, not intensities", header)
    if len(shape) > 4:
        raise Refused("vectors or tensors at every voxel, not intensities", header)
    if len(shape) == 4 and not split_time_series:
        raise Refused(_time_series(shape[3]), header)
    if ITK_ENDINGS[ending_of(path)] == "MetaImageIO":
        _check_metaimage_stream(path)
    voxels = sitk.GetArrayFromImage(reader.Execute()).T  # a view would outlive its image
    yield from _volumes(voxels.reshape(shape, order="F"), itk_affine(reader), header)


def _itk_header(reader: sitk.ImageFileReader) -> Header:
    size = reader.GetSize()
    one_voxel = sitk.Image([1] * len(size), reader.GetPixelID(), reader.GetNumberOfComponents())
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


def _check_metaimage_stream(path: Path) -> None:
    """Unpacks the compressed data of a MetaImage to its end: ITK itself goes on with zeros where that fails."""
    with open(path, "rb") as file:
        start = file.read(1 << 16)
        data = re.search(rb"^ElementDataFile\s*=\s*(\S+)\s*?\r?\n", start, re.MULTILINE)
        if data is None or not re.search(rb"^CompressedData\s*=\s*True", start, re.MULTILINE | re.IGNORECASE):
            return
        name = data[1].decode()
        if name.upper() == "LOCAL":
            file.seek(data.end())
            _unpack(file)
            return
    with open(path.with_name(name), "rb") as file:
        _unpack(file)


def _unpack(file: BinaryIO) -> None:
    stream = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # 32: zlib or gzip, by its first bytes
    while not stream.eof and (chunk := file.read(_CHUNK)):
        while chunk and not stream.eof:
            stream.decompress(chunk, _CHUNK)
            chunk = stream.unconsumed_tail
    if not stream.eof:
        raise EOFError("the stream ends early")


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


def _damaged(error: Exception) -> str:
    return f"damaged: the file is cut off or corrupt ({_last_line(error)})"


def _last_line(error: Exception) -> str:
    """In a message of ITK the last line holds the sense; others have one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
