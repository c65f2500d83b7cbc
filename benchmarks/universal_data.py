"""The datasets of benchmarks/universal.py: real MR and CT, and phantoms of two modalities with other organs labelled.

- 4: hippocampus MR (Medical Segmentation Decathlon), as it is: a link to the folder that is given.
- 101 and 102: one CT scan each of the labelled scans that are given (vertebrae; the two lumens of a dissected aorta),
  cut into five slabs along the body: the cases of a dataset are then of one patient.
- 103: three MR scans with one tumour each.
- 111: CT phantoms of this package, liver and kidneys labelled; 112: MR-like phantoms, liver and spine labelled.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunetv2_misfm.data.phantoms import LABELS, make_phantom

NUM_SLABS = 5
NUM_PHANTOMS = 20
DATASETS = {
    4: "Dataset004_Hippocampus",
    101: "Dataset101_VertebraeCT",
    102: "Dataset102_AortaCT",
    103: "Dataset103_TumourMR",
    111: "Dataset111_PhantomCT",
    112: "Dataset112_PhantomMR",
}


def make_datasets(raw: Path, hippocampus: Path, labelled: Path) -> None:
    """Writes the datasets into a folder of raw datasets, in place of what has their names there.

    Args:
        raw: The folder.
        hippocampus: Raw dataset 4.
        labelled: Folder with a sub-folder per labelled scan (`image.*`, `label.*`).
    """
    raw.mkdir(parents=True, exist_ok=True)
    for name in DATASETS.values():
        folder = raw / name
        folder.unlink() if folder.is_symlink() else shutil.rmtree(folder, ignore_errors=True)
    (raw / DATASETS[4]).symlink_to(hippocampus.resolve())
    spine, aorta = (
        labelled / name for name in ("totalseg_example_ct_vertebrae", "totalseg_aorta_dissection")
    )  # fmt: skip
    write_slabs(raw / DATASETS[101], spine, {value: 1 for value in range(26, 34)}, {"vertebra": 1})
    write_slabs(raw / DATASETS[102], aorta, {1: 1, 2: 2}, {"true lumen": 1, "false lumen": 2})
    write_tumours(raw / DATASETS[103], labelled)
    write_phantoms(raw / DATASETS[111], "CT", ("liver", "kidneys"))
    write_phantoms(raw / DATASETS[112], "MR", ("liver", "spine"))


def write_case(folder: Path, case: str, image: sitk.Image, labels: sitk.Image) -> None:
    """Writes one training case of one channel."""
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.Cast(image, sitk.sitkFloat32), str(folder / "imagesTr" / f"{case}_0000.nii.gz"))
    sitk.WriteImage(sitk.Cast(labels, sitk.sitkUInt8), str(folder / "labelsTr" / f"{case}.nii.gz"))


def write_description(folder: Path, modality: str, labels: Mapping[str, int], num_cases: int) -> None:
    """Writes dataset.json."""
    content = {
        "channel_names": {"0": modality},
        "labels": {"background": 0, **labels},
        "numTraining": num_cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1) + "\n")


def write_slabs(folder: Path, scan: Path, values: Mapping[int, int], labels: Mapping[str, int]) -> None:
    """Writes a CT scan as slabs along its last axis.

    Args:
        folder: The raw dataset.
        scan: Folder of the scan.
        values: Value of the scan's label map -> that of the dataset; all others are background.
        labels: Of the dataset.
    """
    image = sitk.ReadImage(str(scan / "image.nii.gz"))
    known = sitk.ReadImage(str(scan / "label.nii.gz"))
    renamed = np.zeros(256, np.uint8)
    renamed[list(values)] = list(values.values())
    mapped = sitk.GetImageFromArray(renamed[sitk.GetArrayFromImage(known)])
    mapped.CopyInformation(image)
    edges = np.linspace(0, image.GetSize()[2], NUM_SLABS + 1).astype(int).tolist()
    for i in range(NUM_SLABS):
        part = slice(edges[i], edges[i + 1])
        write_case(folder, f"slab_{i}", image[:, :, part], mapped[:, :, part])
    write_description(folder, "CT", labels, NUM_SLABS)


def write_tumours(folder: Path, labelled: Path) -> None:
    """Writes the three MR scans with one tumour each."""
    names = ("brain1", "brain2", "breast1")
    for name in names:
        image, labels = (
            sitk.ReadImage(str(labelled / f"pyradiomics_mr_{name}" / f"{what}.nrrd")) for what in ("image", "label")
        )
        labels.CopyInformation(image)
        write_case(folder, name, image, labels)
    write_description(folder, "MR", {"tumour": 1}, len(names))


def write_phantoms(folder: Path, modality: str, organs: tuple[str, ...]) -> None:
    """Writes phantoms with some of their organs labelled."""
    for case in range(NUM_PHANTOMS):
        generator = np.random.default_rng((8, NUM_PHANTOMS, case, len(modality) + ord(modality[0])))
        phantom = make_phantom(generator)
        voxels = phantom.image.astype(np.float32)
        if modality == "MR":
            voxels = as_mr(voxels, generator)
        labels = np.zeros_like(phantom.labels)
        for value, organ in enumerate(organs, start=1):
            labels[phantom.labels == LABELS[organ]] = value
        images = [sitk.GetImageFromArray(array) for array in (voxels, labels)]
        for image in images:
            image.SetSpacing(phantom.spacing_mm[::-1])
        write_case(folder, f"phantom_{case:02d}", *images)
    write_description(folder, modality, {organ: i for i, organ in enumerate(organs, start=1)}, NUM_PHANTOMS)


def as_mr(hounsfield: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns a phantom [D, H, W] with contrasts, shading and scale of an MR scan; invented, not of a physical model.

    Fat is bright, muscle grey, bone dark, contrast medium hardly seen; the scale is any, differs between cases.
    """
    density = np.array([-1024, -900, -150, -75, 20, 60, 110, 180, 300, 3071])
    signal = np.array([0, 5, 80, 100, 55, 45, 65, 60, 30, 0])
    shading = [np.linspace(*generator.uniform(0.75, 1.25, 2), length) for length in hounsfield.shape]
    field = shading[0][:, None, None] * shading[1][None, :, None] * shading[2][None, None, :]
    noisy = np.interp(hounsfield, density, signal) * field + generator.normal(0, 3, hounsfield.shape)
    return (generator.uniform(2, 20) * np.abs(noisy)).astype(np.float32)
