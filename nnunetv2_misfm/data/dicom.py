"""DICOM series as volumes: pydicom reads the headers, GDCM (through SimpleITK) the pixels.

GDCM decodes every transfer syntax that scanners use, masks overlay bits and applies the rescale of a file, but not all
that it gives is right. What is done otherwise here, and why (each tried with SimpleITK 2.5):

- ITK takes the voxel type of a series from its first slice and wraps the others into it. Slices are read one by one,
  into float32 where their rescales differ or are not in whole numbers.
- Pixel data shorter than their header promises are read in silence. Their length is checked first.
- RLE data cut short are read in silence. pydicom decodes them, and checks.
- Of the rescales of an enhanced multi-frame file the first is applied to all frames. pydicom reads the stored values of
  such files, and each frame gets its own; a file that only GDCM can decode must have one rescale.
- Pixels of MONOCHROME1, a term that concerns the display alone, are inverted. pydicom leaves them as they are stored;
  what only GDCM can decode is refused.
- A lookup table in place of the rescale (Modality LUT) is ignored. Such slices are refused.
- Files without a preamble and unknown SOP classes are refused. pydicom reads them, unless they are compressed.

No name, identifier, date, UID or description from a header enters a reason, a note or a volume.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset, FileDataset
from pydicom.filereader import data_element_generator
from pydicom.pixels import iter_pixels
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
)

from nnunetv2_misfm.data.dicom_geometry import (
    FRAME_TAGS,
    Frame,
    NoSlice,
    affine_of,
    check_even,
    frames_of,
    header_of,
    split_stacks,
    split_time_points,
    whole_copy,
)
from nnunetv2_misfm.data.files import require_utf8
from nnunetv2_misfm.data.volume import Header, Refused, Volume

# Odd values are what hospitals hold: pydicom shall neither warn of every one nor refuse it. This switches off its
# checks on reading, and its warnings, in this process; nothing else of ours reads DICOM
pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
warnings.filterwarnings("ignore", module=r"pydicom\.")

# What pydicom decodes without the help of a codec
_UNCOMPRESSED = {ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian}
# First two bytes of a data set without preamble: group 0002 or 0008, little or big endian (PS3.5, 7.1)
_FIRST_GROUPS = {b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08"}
# Modalities (PS3.3, C.7.3.1.1.1) that come with voxels and are no scan
_NO_SCAN = {"SEG": "a label map (SEG)", "RTDOSE": "a map of dose (RTDOSE)"}
# What the files of a series share. A series' UID is unique by the standard; archives that were anonymised badly use one
# for several patients or studies
_SERIES_TAGS = ["SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID", "PatientID"]
_GROUP_TAGS = [*_SERIES_TAGS, "SOPClassUID", "Modality", "Rows", "Columns"]


def group_series(files: Sequence[Path]) -> tuple[dict[str, list[Path]], dict[Path, str]]:
    """Sorts files into DICOM series by their headers; nothing is raised for a bad file.

    Returns:
        Series -> its files that hold an image, sorted by path; and every other file -> why it is none. A series is
        named by the UIDs of itself, its study and its frame of reference and by the patient's ID: to be hashed, not
        stored.
    """
    series: dict[str, list[Path]] = {}
    others: dict[Path, str] = {}
    for file in sorted(set(files)):
        try:
            series.setdefault(_series_of(file), []).append(file)
        except Refused as refused:
            others[file] = refused.reason
    return series, others


def modality_of(files: Sequence[Path]) -> str | None:
    """Returns the Modality, "CT", "MR", "PT" ..., of the first readable file that names one, or None."""
    for file in files:
        try:
            with file.open("rb") as stream:
                modality = _modality(_parse(stream, ["Modality"]))
        except Exception:  # no file, or a header of random bytes: pydicom raises nearly anything
            continue
        if modality:
            return modality
    return None


def read_series(files: Sequence[Path], *, split_time_series: bool = False) -> Iterator[Volume | Refused]:
    """Reads the files of one series.

    Args:
        files: all of one series of `group_series`, in any order.
        split_time_series: yield the volumes of a time series (of echoes, of b-values) one after the other, and a
            series that is one time point of several; otherwise they are refused.

    Yields:
        One volume per stack of slices, or the reason against it. Voxels [columns, rows, slices], slices in ascending
        order along the cross product of row and column direction; a tilted gantry gives an affine with shear. Of the
        copies of a slice (same SOPInstanceUID, same place, same numbers) one that is whole is read.
    """
    note = ""
    try:
        held, unusable = _slices_in(files)
        copies = sum(len(same) - 1 for same in held)
        if copies:
            note = f"{copies} {'copy of a slice' if copies == 1 else 'copies of slices'} left out"
        stacks = split_stacks([frame for same in held for frame in whole_copy(same)])
    except Refused as refused:
        yield _noted(refused, note)
        return
    parts = len(stacks) + len(unusable)
    for number, stack in enumerate(stacks, 1):
        part = f"stack {number} of {parts}" if parts > 1 else ""
        # map keeps no volume in memory while the next one is read
        yield from map(partial(_noted, note=note), _read_stack(stack, part, split_time_series))
    for number, other in enumerate(unusable.values(), len(stacks) + 1):
        yield other.of(other.header, f"stack {number} of {parts}" if parts > 1 else "")


def _slices_in(files: Sequence[Path]) -> tuple[list[list[tuple[list[Frame], Refused | None]]], dict[str, Refused]]:
    """Returns the slices of files, copies together, each with the flaw of its file; and reasons against other images.

    Raises:
        Refused: A file cannot be read far enough to tell what it is a copy of.
    """
    held: dict[tuple[object, ...], list[tuple[list[Frame], Refused | None]]] = {}
    unusable: dict[str, Refused] = {}
    for file in sorted(files):
        header, flaw = _read_header(file)
        try:
            frames = _slices_of(header, file)
        except NoSlice as refused:
            unusable.setdefault(refused.reason, refused)
        else:
            uid = str(header.get("SOPInstanceUID") or file)
            held.setdefault((uid, *(frame.identity for frame in frames)), []).append((frames, flaw))
    return list(held.values()), unusable


def _noted(result: Volume | Refused, note: str) -> Volume | Refused:
    if note and isinstance(result, Volume):
        return replace(result, notes=(*result.notes, note))
    if note and isinstance(result, Refused):
        result.reason = f"{result.reason}; {note}"
    return result


def _read_stack(stack: list[Frame], part: str, split: bool) -> Iterator[Volume | Refused]:
    """Yields the volumes of one sorted stack, or the reasons against them."""
    volumes = [stack]
    try:
        volumes = split_time_points(stack)
        if len(volumes) > 1 and not split:
            raise Refused(
                f"time series of {len(volumes)} volumes (or echoes, or b-values): --split-time-series takes them apart"
            )
        time_point = {frame.temporal for frame in stack} if len(volumes) == 1 else set()
        alone = time_point.pop() if len(time_point) == 1 else None
        if alone and alone > 1 and not split:
            raise Refused(f"time point {alone} of a time series: --split-time-series takes it as a volume")
    except Refused as refused:
        yield refused.of(header_of(volumes[0]), part)
        return
    for number, volume in enumerate(volumes, 1):
        which = f"volume {number} of {len(volumes)}" if len(volumes) > 1 else ""
        which = f"time point {alone}" if alone and alone > 1 else which
        whole_part = ", ".join(filter(None, (part, which)))
        try:
            check_even(volume)
            voxels = _read_voxels(volume)
        except Refused as refused:
            yield refused.of(header_of(volume), whole_part)
            continue
        yield Volume(voxels, affine_of(volume), header_of(volume), whole_part)
        del voxels  # else it would stay in memory while the next one is read


def _series_of(file: Path) -> str:
    """Returns what names the series of a file with an image; refuses any other file."""
    try:
        if not file.is_file():
            raise Refused("not a scan: no regular file")
        with file.open("rb") as stream:
            if not _looks_like_dicom(stream):
                raise Refused("not a scan: no DICOM file, and no other image by its name")
            header = _parse(stream, _GROUP_TAGS)
            modality, sop_class = _modality(header), UID(str(header.get("SOPClassUID") or ""))
            directory = header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage
            uid, *origin = (str(header.get(tag) or "").strip() for tag in _SERIES_TAGS)
            has_size = bool(header.get("Rows") and header.get("Columns"))
    except OSError as error:
        raise Refused(f"not a scan: cannot be read ({error.strerror or type(error).__name__})") from None
    except Refused:
        raise
    except Exception as error:  # a header of random bytes makes pydicom raise nearly anything
        raise Refused(f"unreadable DICOM header: {type(error).__name__}") from None
    if directory:
        raise Refused("DICOM, but no image: a DICOMDIR index")
    if not sop_class and not uid:
        raise Refused("unreadable DICOM header: neither class nor series is named")
    if not has_size and "Image Storage" not in sop_class.name:
        raise Refused(f"DICOM, but no image: {modality or 'of an unknown kind'}")
    if not has_size:
        raise Refused("unreadable DICOM header: it tells no size of the image")
    if not uid:
        raise Refused("unreadable DICOM header: it names no series")
    return "\n".join([uid, *origin])


def _looks_like_dicom(stream: BinaryIO) -> bool:
    start = stream.read(132)
    stream.seek(0)
    return start[128:] == b"DICM" or start[:2] in _FIRST_GROUPS


def _parse(stream: BinaryIO, tags: list[str]) -> FileDataset:
    """Returns the named tags; leaves the stream before the pixel data."""
    return pydicom.dcmread(stream, stop_before_pixels=True, force=True, specific_tags=tags)


def _modality(header: Dataset) -> str | None:
    """Returns the modality where it is a term of the standard in form, so that no free text gets through."""
    modality = str(header.get("Modality") or "")
    return modality if re.fullmatch("[A-Z]{2,16}", modality) else None


def _transfer_syntax(header: FileDataset) -> UID:
    """Returns how the file is encoded: what it says, or, without a meta header, what it was found to be."""
    named = header.file_meta.get("TransferSyntaxUID")
    implicit, little = header.original_encoding
    found = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    return UID(named) if named else found


def _read_header(file: Path) -> tuple[FileDataset, Refused | None]:
    """Returns what describes the slices of a file, and the reason against pixel data shorter than that promises."""
    try:
        with file.open("rb") as stream:
            header = _parse(stream, FRAME_TAGS)
            missing = _missing_bytes(stream, header)
    except OSError as error:
        raise Refused(f"{file.name} cannot be read: {error.strerror or type(error).__name__}") from error
    except Exception as error:  # a header of random bytes makes pydicom raise nearly anything
        raise Refused(f"unreadable DICOM header of {file.name}: {type(error).__name__}") from None
    if missing > 0:
        return header, Refused(f"truncated: {missing} bytes of pixel data are missing in {file.name}")
    return header, None


def _missing_bytes(stream: BinaryIO, header: FileDataset) -> int:
    """Returns by how many bytes the pixel data, next in the stream, are too short; 0 for compressed ones or colours."""
    syntax = _transfer_syntax(header)
    coded = syntax not in _UNCOMPRESSED or syntax == DeflatedExplicitVRLittleEndian
    if coded or (header.get("SamplesPerPixel") or 1) > 1:  # colours may share samples, and are refused anyway
        return 0
    promised = int(header.get("NumberOfFrames") or 1) * header.Rows * header.Columns * header.BitsAllocated // 8
    implicit, little = map(bool, header.original_encoding)
    element = next(data_element_generator(stream, implicit, little, defer_size=1), None)
    if not isinstance(element, RawDataElement):
        return promised
    return promised - min(element.length, stream.seek(0, 2) - element.value_tell)


def _slices_of(header: FileDataset, file: Path) -> list[Frame]:
    """Describes the slices of one file; raises `NoSlice` for an image that is none of a scan."""
    modality = _modality(header)
    try:
        if modality in _NO_SCAN:
            raise NoSlice(f"{_NO_SCAN[modality]}, not a scan")
        palette = str(header.get("PhotometricInterpretation") or "").startswith("PALETTE")
        if palette or (header.get("SamplesPerPixel") or 1) > 1:
            raise NoSlice("colour (RGB) image")
        frames = frames_of(header, file, modality, _transfer_syntax(header))
    except Refused as refused:
        refused.header = Header(modality=modality)
        raise
    except Exception as error:  # odd values: numbers that are none, sequences that are texts, ...
        raise Refused(f"unreadable DICOM header of {file.name}: {type(error).__name__}") from None
    if len({frame.rescale for frame in frames}) > 1 and not _pydicom_decodes(frames[0]):
        raise Refused("compressed multi-frame image whose frames differ in their rescale: write it uncompressed")
    return frames


def _pydicom_decodes(frame: Frame) -> bool:
    return frame.transfer_syntax in _UNCOMPRESSED or frame.transfer_syntax == RLELossless


def _read_voxels(volume: Sequence[Frame]) -> np.ndarray:
    """Returns the intensities [columns, rows, slices] of the slices of one volume, in their order.

    In the integers that GDCM takes for them where all slices share one rescale of whole numbers, else in float32.
    """
    rescale = volume[0].rescale
    alike = len({(frame.rescale, frame.dtype) for frame in volume}) == 1 and all(n.is_integer() for n in rescale)
    voxels: np.ndarray | None = None
    for k, pixels in enumerate(_decode(volume)):
        if pixels.shape != volume[k].shape[::-1]:
            raise Refused(f"pixels of another size than the header promises in {volume[k].file.name}")
        if voxels is None:
            voxels = np.empty((len(volume), *pixels.shape), pixels.dtype if alike else np.float32)
        elif voxels.dtype != np.float32 and not np.can_cast(pixels.dtype, voxels.dtype):
            voxels = voxels.astype(np.float32)
        voxels[k] = pixels
    assert voxels is not None
    return voxels.T


def _decode(volume: Sequence[Frame]) -> Iterator[np.ndarray]:
    """Yields the intensities [rows, columns] of slice after slice; refuses a file that cannot be decoded."""
    for _, group in groupby(volume, key=lambda frame: frame.file):
        frames = list(group)
        spares = [frame.spare for frame in frames if frame.spare]
        if not spares:
            yield from _decode_file(frames)
            continue
        try:
            pixels = [slice_.copy() for slice_ in _decode_file(frames)]  # views, of what goes with the decoder
        except Refused:
            yield from _decode(spares)
        else:
            yield from pixels


def _decode_file(frames: list[Frame]) -> Iterator[np.ndarray]:
    """Yields the intensities [rows, columns] of some frames of one file; refuses what cannot be decoded."""
    file = frames[0].file
    if frames[0].lookup_table:
        raise Refused("a lookup table instead of a rescale (Modality LUT): write the intensities themselves")
    if frames[0].monochrome1 and not _pydicom_decodes(frames[0]):
        raise Refused("compressed MONOCHROME1 image, which the decoder would invert: write it uncompressed")
    try:
        file.stat()
        yield from _intensities(file, frames)
    except OSError as error:
        raise Refused(f"{file.name} cannot be read: {error.strerror or type(error).__name__}") from error
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # decoders raise whatever they meet in broken data
        raise Refused(f"truncated or corrupt pixel data in {file.name} ({type(error).__name__})") from None


def _intensities(file: Path, frames: list[Frame]) -> Iterator[np.ndarray]:
    """Yields the intensities [rows, columns] of some frames of one file, by the decoder that can be trusted with it."""
    first = frames[0]
    by_pydicom = first.index is not None or first.monochrome1 or first.transfer_syntax == RLELossless
    if not (by_pydicom and _pydicom_decodes(first)):
        try:
            require_utf8(file)
            image = sitk.ReadImage(str(file), imageIO="GDCMImageIO")
        except (RuntimeError, UnicodeError):
            if not _pydicom_decodes(frames[0]):
                raise
        else:
            pixels = sitk.GetArrayViewFromImage(image).reshape(-1, *image.GetSize()[1::-1])
            yield from (pixels[frame.index or 0] for frame in frames)
            return
    for frame, stored in zip(frames, _stored_values(file, [frame.index or 0 for frame in frames]), strict=True):
        yield _rescaled(stored, *frame.rescale)


def _stored_values(file: Path, indices: list[int]) -> Iterator[np.ndarray]:
    """Yields frames [rows, columns] as pydicom decodes them: sign-extended, without bits beyond the stored ones."""
    source: Path | FileDataset = file
    with file.open("rb") as stream:
        header = _parse(stream, ["Rows"])
    if "TransferSyntaxUID" not in header.file_meta:  # pydicom does not decode straight from such a file
        source = pydicom.dcmread(file, force=True)
        source.file_meta.TransferSyntaxUID = _transfer_syntax(header)
    yield from iter_pixels(source, indices=indices, raw=True)


def _rescaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Returns stored values [rows, columns] as intensities: as they are, in int32 where that holds all, or float32."""
    if (slope, intercept) == (1.0, 0.0):
        return stored
    highest = abs(slope) * 2.0 ** (8 * stored.itemsize) + abs(intercept)
    exact = stored.dtype.kind in "iu" and slope.is_integer() and intercept.is_integer() and highest < 2**31
    return (stored * np.float64(slope) + intercept).astype(np.int32 if exact else np.float32)
