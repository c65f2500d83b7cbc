"""CT or MR? Told by the header of a DICOM series, else by the intensities."""

from pathlib import Path

import numpy as np

from nnunetv2_misfm.data.dicom import modality_of, read_series
from nnunetv2_misfm.data.files import read_file
from nnunetv2_misfm.data.judge import SAMPLE, Intensities, check_geometry, check_intensities, survey
from nnunetv2_misfm.data.outcome import Settings
from nnunetv2_misfm.data.records import State, fingerprint
from nnunetv2_misfm.data.sources import Source
from nnunetv2_misfm.data.volume import Refused, Volume

MODALITIES = ("CT", "MR")
# In HU: air is -1000, fat -150 to -50 (Buzug, Computed Tomography, Springer 2008, p. 475), so a lung or a rim of air
# goes below -200; MR has no negative intensities, but for phase images and noise
_CT_HAS_BELOW_HU = -200.0
# Nearly all that is not padding lies between air with its noise and dense bone; a phase image spreads evenly over
# -4096..4095. Ours
_CT_RANGE_HU = (-1200.0, 2000.0)
_CT_SHARE = 0.9
# CT stored as counts from 0 instead of HU: water is at 1024, so soft tissue and fat lie in 900..1200. Of the voxels
# above 300 (no air, little lung) these are 57 % to 90 % in 15 CT scans counted so, at most 44 % in the 150 brightest MR
_SOFT_TISSUE_COUNTS = (900.0, 1200.0)
_ABOVE_AIR_COUNTS = 300.0
_SOFT_TISSUE_SHARE = 0.5


def probe_modality(source: Source, state: State, settings: Settings) -> str | None:
    """Returns "CT", "MR" or another DICOM modality, None for what the import refuses; remembers the answer.

    The header of a DICOM series counts, unread its slices; where it does not tell, and of other files, the intensities
    of the first volume.

    Args:
        source: what to look at.
        state: where answers are remembered, as long as neither files nor settings change.
        settings: by which the volume is judged, its modality aside.
    """
    files = source.files(state.scanned)
    made_from = fingerprint(files, repr(settings))
    known = state.probed.get(source.key, made_from)
    if known is not None:
        return known["modality"]
    modality, passing = None, False
    try:
        modality = modality_of(files) if source.series else None
        volume = None if modality else _first_volume(source, files, settings)
        if volume is not None:
            check_geometry(volume, settings.min_size, allow_shear=settings.resample_sheared)
            seen = survey(volume.voxels)
            check_intensities(volume, seen)
            modality = modality_by_intensity(volume.voxels, seen)
    except Refused as refused:
        passing = refused.may_pass
    state.probed.put(source.key, "" if passing else made_from, {"modality": modality})
    return modality


def _first_volume(source: Source, files: list[Path], settings: Settings) -> Volume | None:
    if source.series:
        read = read_series(files, split_time_series=settings.split_time_series)
        return next((volume for volume in read if isinstance(volume, Volume)), None)
    return next(read_file(files[0], split_time_series=settings.split_time_series), None)


def modality_by_intensity(voxels: np.ndarray, seen: Intensities) -> str:
    """Returns "CT" for intensities [I, J, K] that look like Hounsfield units, with or without their offset, else "MR".

    A crop of soft tissue without air is taken for MR: name the modality then.
    """
    if lacks_offset(voxels, seen):
        return "CT"
    if seen.lowest >= _CT_HAS_BELOW_HU:
        return "MR"
    sample = _sample(voxels)
    sample = sample[sample > seen.lowest]  # the lowest is often padding, such as -2000 or -3024 outside a round field
    return "CT" if _share(sample, _CT_RANGE_HU) >= _CT_SHARE else "MR"


def lacks_offset(voxels: np.ndarray, seen: Intensities) -> bool:
    """Tells whether intensities [I, J, K] look like CT counted from 0, with air at 0 and water at 1024."""
    if not seen.integral or seen.lowest < 0 or seen.highest <= _SOFT_TISSUE_COUNTS[1]:
        return False
    sample = _sample(voxels)
    return _share(sample[sample > _ABOVE_AIR_COUNTS], _SOFT_TISSUE_COUNTS) >= _SOFT_TISSUE_SHARE


def _sample(voxels: np.ndarray) -> np.ndarray:
    step = max(1, round((voxels.size / SAMPLE) ** (1 / 3)))
    return voxels[::step, ::step, ::step]


def _share(values: np.ndarray, bounds: tuple[float, float]) -> float:
    return float(((values >= bounds[0]) & (values <= bounds[1])).mean()) if values.size else 0.0
