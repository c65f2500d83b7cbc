"""CT-like phantoms of known shape, and nnU-Net raw datasets made of them, for the demo and for tests.

A phantom is a trunk of a newborn's size (girth about 0.27 m), so that plausible spacings give small arrays.
Its organs are ellipsoids and elliptic cylinders, jittered in place, size and density. Densities are those of the
portal venous phase, in which some structures share their range of Hounsfield units: kidneys and blood, liver and
spleen. So these organs cannot be told from the rest by intensity alone.
"""

import json
import shutil
from dataclasses import dataclass
from math import pi
from pathlib import Path
from typing import Literal

import numpy as np
import SimpleITK as sitk

from nnunetv2_misfm.errors import MisfmError

LABELS = {"background": 0, "liver": 1, "kidneys": 2, "spine": 3}
BODY_LABELS = {"background": 0, "body": 1}

Vector = tuple[float, float, float]
Shape = Literal["ellipsoid", "cylinder"]
_Part = tuple[str, Shape, Vector, Vector]

# Field of view in mm (z, y, x); with the spacings below 25-40 x 48-71 x 48-71 voxels, which a CPU trains on
# in minutes. Slices as thick as in body CT; in-plane spacing coarser than usual, to the same end.
FIELD_OF_VIEW_MM: Vector = (100.0, 106.0, 106.0)
SLICE_SPACING_MM = (2.5, 4.0)
IN_PLANE_SPACING_MM = (1.5, 2.2)

AIR_HU = -1000.0  # by definition of the Hounsfield scale
# Range of the mean density of a tissue in HU. Unenhanced values: Buzug, Computed Tomography, Springer 2008, p. 475,
# as tabulated by radclass.mudr.org (fat, lung; liver 45-65, kidney 20-40, blood 45-65), and radgray.com (spongy bone
# 50-200, compact bone 250-1000; a vertebra has both, ours lies between). Added for contrast medium: liver 50 to 60
# (J. Pers. Med. 2021, 11, 1255: 50 is adequate; the spleen then hardly differs, Kreul et al., In Vivo 2021, 35, 3277),
# kidney 145 to 165 (medulla 145 and cortex less than 30 above it, Eur. J. Radiol. 2007, 63, 420); blood 100 to 120,
# muscle and bowel 20: ours.
TISSUE_HU = {
    "fat": (-100.0, -50.0),
    "muscle": (30.0, 60.0),
    "lung": (-910.0, -850.0),
    "blood": (145.0, 185.0),
    "bowel": (30.0, 60.0),  # wall and contents together
    "liver": (95.0, 125.0),
    "spleen": (95.0, 125.0),
    "kidneys": (165.0, 205.0),
    "spine": (240.0, 320.0),
}
NOISE_HU = 15.0  # standard deviation of the white Gaussian noise: ours, of the order of a body scan's
SUBVOXELS = 2  # per axis: a voxel's density is the mean of 2 x 2 x 2 points, its partial volume
STORED_HU = (-1024, 3071)  # the range of 12-bit CT

# Layout: ours, roughly that of an anatomical atlas; the kidneys' 42 x 23 x 22 mm are a newborn's mean (Revista de
# nefrologia, dialisis y trasplante, revistarenal.org.ar, article 80). (tissue, shape, centre, semi-axes), mm (z, y, x)
# from the middle of the field of view; z grows upwards, y to the back, x to the patient's left. Later ones are painted
# over earlier ones.
_BEYOND_MM = 200.0  # half length of a cylinder that leaves the field of view at both ends
_TRUNK: tuple[_Part, ...] = (
    ("fat", "cylinder", (0.0, 0.0, 0.0), (_BEYOND_MM, 38.0, 47.0)),
    ("muscle", "cylinder", (0.0, 0.0, 0.0), (_BEYOND_MM, 34.0, 43.0)),
    ("fat", "cylinder", (0.0, 0.0, 0.0), (_BEYOND_MM, 30.0, 39.0)),
)
_ORGANS: tuple[_Part, ...] = (
    ("muscle", "cylinder", (0.0, 25.0, -14.0), (_BEYOND_MM, 7.0, 9.0)),
    ("muscle", "cylinder", (0.0, 25.0, 14.0), (_BEYOND_MM, 7.0, 9.0)),
    ("lung", "ellipsoid", (48.0, 0.0, -19.0), (26.0, 22.0, 14.0)),
    ("lung", "ellipsoid", (48.0, 1.0, 20.0), (26.0, 22.0, 13.0)),
    ("blood", "ellipsoid", (40.0, -8.0, 6.0), (15.0, 12.0, 12.0)),
    ("liver", "ellipsoid", (5.0, -4.0, -15.0), (27.0, 19.0, 20.0)),
    ("spleen", "ellipsoid", (10.0, 8.0, 26.0), (14.0, 10.0, 8.0)),
    ("blood", "cylinder", (0.0, 9.0, 4.0), (_BEYOND_MM, 3.5, 3.5)),
    ("spine", "cylinder", (0.0, 21.0, 0.0), (_BEYOND_MM, 7.5, 8.0)),
    ("kidneys", "ellipsoid", (-20.0, 11.0, -22.0), (21.0, 11.5, 11.0)),
    ("kidneys", "ellipsoid", (-16.0, 11.0, 22.0), (21.0, 11.5, 11.0)),
)
# Loops of bowel lie anywhere in this box (lowest and highest centre, mm) in front of the kidneys, and are
# painted before the organs. Number and semi-axes: ours.
_BOWEL_LOOPS = 5
_BOWEL_CENTRE_MM = ((-48.0, -18.0, -22.0), (-8.0, -2.0, 22.0))
_BOWEL_SEMI_AXES_MM = (7.0, 6.0, 9.0)

# Jitter: ours. One size per patient; then every organ by itself.
_PATIENT_SCALE = (0.93, 1.03)
_ORGAN_SCALE = (0.88, 1.12)
_ORGAN_SHIFT_MM = 2.5


@dataclass(frozen=True)
class Solid:
    """A solid of one tissue.

    Attributes:
        tissue: key of `TISSUE_HU`.
        shape: ellipsoid, or elliptic cylinder along z whose semi-axis along z is half its length.
        centre_mm: (z, y, x) from the middle of the field of view.
        semi_axes_mm: (z, y, x).
    """

    tissue: str
    shape: Shape
    centre_mm: Vector
    semi_axes_mm: Vector

    @property
    def volume_mm3(self) -> float:
        """Volume in mm^3: 4/3 pi abc of an ellipsoid, 2 pi abc of a cylinder with half length a."""
        a, b, c = self.semi_axes_mm
        return (4 / 3 if self.shape == "ellipsoid" else 2) * pi * a * b * c

    def contains(self, z_mm: np.ndarray, y_mm: np.ndarray, x_mm: np.ndarray) -> np.ndarray:
        """Tell which points lie inside (border included).

        Args:
            z_mm: coordinates of the D planes, shape [D], mm.
            y_mm: shape [H], mm.
            x_mm: shape [W], mm.

        Returns:
            bool [D, H, W].
        """
        z, y, x = (
            (((axis - centre) / semi) ** 2).astype(np.float32)
            for axis, centre, semi in zip((z_mm, y_mm, x_mm), self.centre_mm, self.semi_axes_mm, strict=True)
        )
        in_plane = y[:, None] + x[None, :]
        if self.shape == "ellipsoid":
            return z[:, None, None] + in_plane <= 1
        return (z <= 1)[:, None, None] & (in_plane <= 1)


@dataclass(frozen=True, eq=False)
class Phantom:
    """One phantom.

    Attributes:
        image: int16 [D, H, W], HU.
        labels: uint8 [D, H, W], values of `LABELS`.
        body: bool [D, H, W], True inside the skin.
        spacing_mm: (z, y, x).
    """

    image: np.ndarray
    labels: np.ndarray
    body: np.ndarray
    spacing_mm: Vector


def draw_anatomy(generator: np.random.Generator) -> tuple[Solid, ...]:
    """Draw the solids of one patient in the order in which they are painted; the first is the whole body.

    Args:
        generator: source of the jitter of place and size; advanced.
    """
    patient = generator.uniform(*_PATIENT_SCALE)
    bowel: list[_Part] = [
        ("bowel", "ellipsoid", _vector(generator.uniform(*_BOWEL_CENTRE_MM)), _BOWEL_SEMI_AXES_MM)
        for _ in range(_BOWEL_LOOPS)
    ]
    solids = [
        Solid(tissue, shape, _vector(patient * np.array(centre)), _vector(patient * np.array(semi_axes)))
        for tissue, shape, centre, semi_axes in _TRUNK
    ]
    for tissue, shape, centre, semi_axes in [*bowel, *_ORGANS]:
        place = patient * np.array(centre) + generator.uniform(-_ORGAN_SHIFT_MM, _ORGAN_SHIFT_MM, 3)
        size = patient * np.array(semi_axes) * generator.uniform(*_ORGAN_SCALE, 3)
        solids.append(Solid(tissue, shape, _vector(place), _vector(size)))
    return tuple(solids)


def make_phantom(generator: np.random.Generator, spacing_mm: Vector | None = None) -> Phantom:
    """Make one phantom: anatomy, spacing, density of every tissue, noise, drawn in this order.

    Args:
        generator: source of all randomness; advanced. The same state gives the same voxels, and its anatomy
            is the one that `draw_anatomy` gives for that state.
        spacing_mm: (z, y, x); drawn from `SLICE_SPACING_MM` and `IN_PLANE_SPACING_MM` where None.
    """
    solids = draw_anatomy(generator)
    drawn_z, drawn_in_plane = generator.uniform(*SLICE_SPACING_MM), generator.uniform(*IN_PLANE_SPACING_MM)
    spacing_mm = spacing_mm or (round(drawn_z, 2), round(drawn_in_plane, 2), round(drawn_in_plane, 2))
    density_hu = {tissue: generator.uniform(*range_hu) for tissue, range_hu in TISSUE_HU.items()}

    centres = voxel_centres_mm(spacing_mm)
    labels = np.zeros([len(axis) for axis in centres], np.uint8)
    for solid in solids:
        labels[solid.contains(*centres)] = LABELS.get(solid.tissue, 0)

    points = voxel_centres_mm(spacing_mm, SUBVOXELS)
    fine_hu = np.full([len(axis) for axis in points], AIR_HU, np.float32)
    for solid in solids:
        fine_hu[solid.contains(*points)] = density_hu[solid.tissue]
    depth, height, width = labels.shape
    blocks = fine_hu.reshape(depth, SUBVOXELS, height, SUBVOXELS, width, SUBVOXELS)
    noisy_hu = blocks.mean(axis=(1, 3, 5)) + generator.normal(0, NOISE_HU, labels.shape)
    image = np.clip(np.rint(noisy_hu), *STORED_HU).astype(np.int16)
    return Phantom(image, labels, solids[0].contains(*centres), spacing_mm)


def voxel_centres_mm(spacing_mm: Vector, parts: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coordinates (z, y, x) in mm, from the middle of the array, of the points at which a phantom is sampled.

    Args:
        spacing_mm: (z, y, x) of the voxels; their number per axis comes nearest to `FIELD_OF_VIEW_MM`.
        parts: points per voxel and axis, evenly spread; 1 gives the centres.
    """
    z, y, x = (
        (np.arange(count * parts) - (count * parts - 1) / 2) * spacing / parts
        for spacing, count in zip(spacing_mm, _grid_shape(spacing_mm), strict=True)
    )
    return z, y, x


def write_phantom_dataset(
    nnunet_raw: Path,
    dataset_id: int,
    name: str,
    *,
    num_training: int,
    num_test: int = 0,
    seed: int,
    labelled: bool,
) -> Path:
    """Write phantoms as an nnU-Net raw dataset `DatasetXXX_Name`, replacing one that this function wrote.

    Every case has a generator of its own, seeded with (seed, dataset, case): no case recurs in another
    dataset or in the test set, and the first cases stay the same when more are asked for.

    Args:
        nnunet_raw: the folder that the variable nnUNet_raw names; made if absent.
        dataset_id: 1 to 999.
        name: what follows the underscore of the folder's name.
        num_training: cases in imagesTr and labelsTr.
        num_test: cases in imagesTs and labelsTs.
        seed: non-negative.
        labelled: True writes the organs as labels (`LABELS`); False the body mask (`BODY_LABELS`),
            declared as `"misfm": {"labels": "body_mask"}` in dataset.json: an unlabelled set, in our form.

    Returns:
        The dataset's folder.

    Raises:
        MisfmError: the id is taken by a dataset that this function did not write.
    """
    folder = nnunet_raw / f"Dataset{dataset_id:03d}_{name}"
    for taken in sorted(nnunet_raw.glob(f"Dataset{dataset_id:03d}_*")):
        if taken != folder or not _is_phantom_dataset(taken):
            raise MisfmError(
                f"dataset {dataset_id}: expected no other dataset of this id in {nnunet_raw}, found "
                f"{taken.name}, which does not hold phantoms of this name; choose another id or folder."
            )
        shutil.rmtree(taken)
    folder.mkdir(parents=True)
    dataset_json = {
        "channel_names": {"0": "CT"},
        "labels": LABELS if labelled else BODY_LABELS,
        "numTraining": num_training,
        "file_ending": ".nii.gz",
        "misfm": {"labels": "organs" if labelled else "body_mask", "source": "phantoms"},
    }
    (folder / "dataset.json").write_text(json.dumps(dataset_json, indent=2) + "\n")
    for case in range(num_training + num_test):
        phantom = make_phantom(np.random.default_rng((seed, dataset_id, case)))
        part = "Tr" if case < num_training else "Ts"
        labels = phantom.labels if labelled else phantom.body.astype(np.uint8)
        stem = f"phantom_{case:03d}"
        _write_volume(phantom.image, phantom.spacing_mm, folder / f"images{part}" / f"{stem}_0000.nii.gz")
        _write_volume(labels, phantom.spacing_mm, folder / f"labels{part}" / f"{stem}.nii.gz")
    return folder


def _vector(values: np.ndarray) -> Vector:
    z, y, x = (float(value) for value in values)
    return z, y, x


def _grid_shape(spacing_mm: Vector) -> tuple[int, int, int]:
    depth, height, width = (
        round(extent / spacing) for extent, spacing in zip(FIELD_OF_VIEW_MM, spacing_mm, strict=True)
    )
    return depth, height, width


def _is_phantom_dataset(folder: Path) -> bool:
    try:
        dataset_json = json.loads((folder / "dataset.json").read_text())
        return dataset_json["misfm"]["source"] == "phantoms"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write_volume(array: np.ndarray, spacing_mm: Vector, file: Path) -> None:
    """Write [D, H, W] with the middle of the field of view at the origin of the patient's coordinates."""
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing(spacing_mm[::-1])
    volume.SetOrigin([float(axis[0]) for axis in voxel_centres_mm(spacing_mm)[::-1]])
    file.parent.mkdir(exist_ok=True)
    sitk.WriteImage(volume, str(file), useCompression=True)
