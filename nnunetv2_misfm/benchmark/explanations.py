"""What a report says of its own numbers: definitions, what to cite, and the versions of the packages."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.citations import NNUNET
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers

SURFACE_DISTANCE = (
    "Nikolov et al., Deep learning to achieve clinically applicable segmentation of head and neck anatomy for "
    "radiotherapy, arXiv:1809.04430 (2018): the surface Dice, and the library surface-distance that measures distances"
)
_PACKAGES = ("nnunetv2-misfm", "nnunetv2", "torch", "numpy", "scipy", "surface-distance", "monai")
KEY_READERS = (
    "nnU-Net's own keys, such as batch_size and patch_size, hold for all trainers, architecture.* for the plans' "
    "network alone; of the block misfm the untouched nnUNetTrainer reads nothing, nnUNetTrainerBaseline reads "
    "num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch and seed, and this package's other trainers "
    "read the rest too, but features_per_stage only where the network is PCT-Net or FMUNet, num_heads and "
    "attention_dropout only where it is PCT-Net."
)
_LINKS = (
    (re.compile(r"arXiv:(\d{4}\.\d{4,5})"), "https://arxiv.org/abs/"),
    (re.compile(r"DOI (10\.\S+[\w)])"), "https://doi.org/"),
)


@dataclass(frozen=True)
class Citation:
    """A work to cite.

    Attributes:
        text: Authors, title, where and when.
        url: Where it is found, of its arXiv number or DOI; None where the text names neither.
    """

    text: str
    url: str | None


def citations(trainers: Sequence[str]) -> list[Citation]:
    """Returns what the trainers are built on, and the library of the metrics; of unknown trainers, nnU-Net."""
    works = [NNUNET]
    for name in trainers:
        works += getattr(getattr(nnunetv2_misfm_trainers, name, None), "citations", ())
    return [Citation(text, _link(text)) for text in dict.fromkeys([*works, SURFACE_DISTANCE])]


def versions() -> str:
    """Returns the installed versions of the packages that the numbers hang on."""
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue  # an extra that is not installed
    return ", ".join(found)


def definitions(results: Results) -> list[tuple[str, str]]:
    """Returns terms and what they mean in this report."""
    tolerance = f"{results.grid.tolerance_mm:g} mm"
    regions = "test cases" if results.compared == "test" else "validation cases of each fold"
    return [
        ("Dice", "Twice the common volume of truth and prediction over the sum of both, in %."),
        ("ASSD", "Average symmetric surface distance: the mean over both surfaces together, weighted by area, in mm."),
        (
            "HD95",
            "Robust Hausdorff distance: the larger of the two directed 95th percentiles of the surface distances, in "
            "mm.",
        ),
        ("Surface Dice", f"Share of both surfaces that lies within {tolerance} of the other one, by area, in %."),
        (
            "Empty masks",
            "Every case counts. Truth and prediction both empty: Dice and surface Dice 1, distances 0. One of them "
            "empty: Dice and surface Dice 0, distances the diagonal of the image. (nnU-Net's own summary leaves out "
            "cases where both are empty.)",
        ),
        (
            "Draw",
            "A fold and a seed. The seed chooses the labelled cases from the fold, and seeds the training of this "
            "package's trainers, nnUNetTrainerBaseline among them; the untouched nnUNetTrainer knows no seed.",
        ),
        (
            "Same cases",
            f"Compared are the {regions}. Trainers stand side by side on the same draws and the same cases; a draw "
            "that one of them has not finished is left out for all.",
        ),
        (
            "Mean ± std",
            "Over cases. A case's score is first averaged over the draws in which it was compared; the average column "
            "is the mean over its classes.",
        ),
        (
            "95 % interval",
            "Bootstrap over cases of the paired difference per case (bias-corrected and accelerated where defined, "
            "else percentiles). It tells how the difference would move with other cases. The variation over seeds, "
            "draws and pretraining runs is not in it: see the spread over runs.",
        ),
        (
            "Better, worse, level",
            "Better and worse: the 95 % interval excludes zero and the corrected p is below 0.05. Level is all else: "
            "no clear difference, which is no proof of equality.",
        ),
        (
            "p",
            "Wilcoxon's signed-rank test on the paired differences, two-sided; corrected by Holm over all pairs and "
            "all numbers of labelled cases, one family per metric.",
        ),
        (
            "Pseudo Dice",
            "nnU-Net's own Dice during training, on validation patches and without the sliding window: good for the "
            "shape of a curve, no substitute for the scores above.",
        ),
    ]


def _link(text: str) -> str | None:
    for pattern, address in _LINKS:
        if match := pattern.search(text):
            return address + match.group(1)
    return None
