"""The verdict on a scan, and what decides it."""

from dataclasses import dataclass, field

from nnunetv2_misfm.data.judge import MIN_SIZE


@dataclass(frozen=True)
class Settings:
    """What decides how a scan is judged and written; the same for all scans of a dataset.

    Attributes:
        modality: "CT" or "MR".
        min_size: smallest number of voxels along any axis.
        split_time_series: take time series apart instead of refusing them.
        resample_sheared: bring sheared axes to perpendicular ones instead of refusing the scan.
        keep_duplicates: take scans of equal content too.
        link: refer to files that need no change instead of copying them.
    """

    modality: str
    min_size: int = MIN_SIZE
    split_time_series: bool = False
    resample_sheared: bool = False
    keep_duplicates: bool = False
    link: bool = False


@dataclass(frozen=True)
class Outcome:
    """The verdict on one scan, or on one volume of a time series or stack of a series: a row of the report.

    Attributes:
        key: of the source (`Source.key`).
        path: the file; a series' first file.
        part: which part of it; empty for the whole.
        verdict: accepted, repaired, split, duplicate or rejected.
        reason: why, or what was done.
        case: name in the dataset; of a duplicate the case that it equals.
        modality: of the dataset it went to, or what the header says of a refused one.
        files: number of files read.
        shape: voxels per axis as stored, e.g. "512x512x300".
        spacing_mm: size of a voxel as stored, e.g. "0.700x0.700x1.250".
        orientation: where the stored axes point to, e.g. "LPS".
        dtype: stored type.
        intensity_range: lowest and highest written intensity, e.g. "-1024..3071".
        body_share: share of the voxels in the body mask.
        sha256: of the file's bytes; of several files, of their sorted sums.
        content: sha256 of the written voxels, their type and shape; empty where nothing was written.
        size: voxels along i, j and k as written.
        affine: geometry written, 16 numbers, row by row, mm in RAS+.
        image: file of the image, relative to the dataset's folder, absolute for a link.
    """

    key: str
    path: str
    verdict: str
    reason: str = ""
    part: str = ""
    case: str = ""
    modality: str = ""
    files: int = 1
    shape: str = ""
    spacing_mm: str = ""
    orientation: str = ""
    dtype: str = ""
    intensity_range: str = ""
    body_share: str = ""
    sha256: str = ""
    content: str = ""
    size: list[int] = field(default_factory=list)
    affine: list[float] = field(default_factory=list)
    image: str = ""
