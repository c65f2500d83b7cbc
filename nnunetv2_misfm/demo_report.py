"""What the demo leaves to look at: a table of Dice scores with what was run, and one picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nnunetv2_misfm.data.phantoms import LABELS

# Soft-tissue window of abdominal CT, the usual one: level 40, width 400 HU
WINDOW_HU = (-160, 240)
# Between air and fat, far from the noise of both
SKIN_HU = -400
# Okabe and Ito's colours for the colour-blind: orange, sky blue, reddish purple
COLOURS = {"liver": "#E69F00", "kidneys": "#56B4E9", "spine": "#CC79A7"}
NETWORKS = {
    "nnUNetTrainerBaseline": "stock nnU-Net",
    "nnUNetTrainerPCTNet": "PCT-Net from scratch",
    "nnUNetTrainerPCTNetVF": "PCT-Net from Volume Fusion",
}
WARNING = (
    "**A demo this short says nothing about the methods**: it shows that all parts work together. The scans are "
    "phantoms, the networks narrow, and some hundred steps stand for nnU-Net's 250,000 of training and for the "
    "100,000 and more of pretraining that Volume Fusion's paper took; so little pretraining need not help at all. "
    "`nnUNetTrainerBaseline` is stock `nnUNetTrainer` but for its length and seed, which it reads from the "
    "configuration; `nnUNetTrainer` itself has a fixed length of 1000 epochs."
)


@dataclass(frozen=True)
class Run:
    """A command that was run.

    Attributes:
        title: what it did.
        command: its command line.
        seconds: wall time.
    """

    title: str
    command: str
    seconds: float


def read_dice(summary: Path) -> tuple[dict[str, float], int]:
    """Read what nnUNetv2_evaluate_folder wrote.

    Args:
        summary: summary.json.

    Returns:
        Mean Dice of every organ of `LABELS`, by name, and the number n of cases. A class that is neither in the
        truth nor in the prediction of any case is nan.
    """
    content = json.loads(summary.read_text())
    means = content["mean"]
    dice = {name: float(means[str(label)]["Dice"]) for name, label in LABELS.items() if label != 0}
    return dice, len(content["metric_per_case"])


def dice_table(summaries: Mapping[str, Path]) -> str:
    """Return a Markdown table of mean Dice, one row per trainer.

    Args:
        summaries: summary.json of each trainer, by its name.
    """
    organs = [name for name, label in LABELS.items() if label != 0]
    rows = [["trainer", "network", *organs, "mean", "n"], ["---"] * (len(organs) + 4)]
    for trainer, summary in summaries.items():
        dice, num_cases = read_dice(summary)
        scores = [*dice.values(), float(np.mean(list(dice.values())))]
        rows.append([trainer, NETWORKS[trainer], *(f"{score:.3f}" for score in scores), str(num_cases)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_results(
    file: Path, table: str, conditions: Sequence[str], runs: Sequence[Run], variables: Mapping[str, str]
) -> None:
    """Write the table, what it means, and what was run with times, as Markdown.

    Args:
        file: the Markdown file; its folder is written as `.` in commands and as $PWD in variables.
        table: of `dice_table`.
        conditions: sentences on what was run and where.
        runs: the commands, in order.
        variables: what the commands' environment had set for them.
    """
    folder = str(file.parent)
    exports = [f'export {name}="{value.replace(folder, "$PWD")}"' for name, value in variables.items()]
    lines = [
        "# Demo on phantoms",
        "",
        "Mean Dice over the n held-out scans, one training run each.",
        "",
        *table.splitlines(),
        "",
        WARNING,
        "",
        *(f"- {condition}" for condition in conditions),
        "",
        "## What was run",
        "",
        "To run any of it again, in this folder, set what the demo had set:",
        "",
        "```sh",
        *exports,
        "```",
        "",
        "| step | seconds | command |",
        "| --- | --- | --- |",
        *(f"| {run.title} | {run.seconds:.0f} | `{run.command.replace(folder, '.')}` |" for run in runs),
    ]
    file.write_text("\n".join(lines) + "\n")


def draw_picture(file: Path, dataset: Path, predictions: Mapping[str, Path]) -> None:
    """Draw one held-out scan: input, truth and every prediction on the axial plane that shows most of all organs.

    Args:
        file: PNG to write.
        dataset: raw dataset with imagesTs and labelsTs; its first test case is drawn.
        predictions: folder with predictions and summary.json of each trainer, by its name.
    """
    truth_file = sorted((dataset / "labelsTs").glob("*.nii.gz"))[0]
    case = truth_file.name.removesuffix(".nii.gz")
    image, truth = _read(dataset / "imagesTs" / f"{case}_0000.nii.gz"), _read(truth_file)
    plane = best_plane(truth)
    panels: list[tuple[str, np.ndarray | None]] = [(f"Input\n{case}, slice {plane}", None), ("Truth\n", truth)]
    for trainer, folder in predictions.items():
        dice = _case_dice(folder / "summary.json", case)
        panels.append((f"{NETWORKS[trainer]}\nDice {dice:.2f}", _read(folder / truth_file.name)))

    figure = Figure(figsize=(3 * len(panels), 3.5), facecolor="white")
    FigureCanvasAgg(figure)
    grid = {"left": 0.005, "right": 0.995, "bottom": 0.12, "top": 0.84, "wspace": 0.03}
    body = body_box(image[plane])
    for axes, (title, labels) in zip(figure.subplots(1, len(panels), gridspec_kw=grid), panels, strict=True):
        axes.imshow(image[plane][body], cmap="gray", vmin=WINDOW_HU[0], vmax=WINDOW_HU[1])
        if labels is not None:
            axes.imshow(_overlay(labels[plane][body]), interpolation="nearest")
        axes.set_title(title, fontsize=13)
        axes.axis("off")
    patches = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=patches, loc="lower center", ncols=len(patches), fontsize=13, frameon=False)
    figure.text(
        0.995, 0.04, "Dice of this scan; a demo, no comparison of methods", ha="right", fontsize=11, style="italic"
    )
    figure.savefig(file, dpi=110)


def best_plane(labels: np.ndarray) -> int:
    """Return the index of the axial plane on which the organ that shows least shows most.

    Args:
        labels: [D, H, W], values of `LABELS`.
    """
    areas = [(labels == label).sum(axis=(1, 2)) / (labels == label).sum() for label in LABELS.values() if label != 0]
    return int(np.min(areas, axis=0).argmax())


def body_box(plane_hu: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of the body, with a margin of two voxels.

    Args:
        plane_hu: [H, W], HU.
    """
    rows, columns = np.nonzero(plane_hu > SKIN_HU)
    return slice(max(rows.min() - 2, 0), rows.max() + 3), slice(max(columns.min() - 2, 0), columns.max() + 3)


def _case_dice(summary: Path, case: str) -> float:
    """Return the mean Dice of all organs in one case."""
    (metrics,) = (
        entry["metrics"]
        for entry in json.loads(summary.read_text())["metric_per_case"]
        if Path(entry["prediction_file"]).name == f"{case}.nii.gz"
    )
    return float(np.nanmean([float(of_organ["Dice"]) for of_organ in metrics.values()]))


def _overlay(labels: np.ndarray) -> np.ndarray:
    """Return [H, W, 4] in 0..1: an organ's colour, half transparent, and nothing elsewhere."""
    overlay = np.zeros((*labels.shape, 4))
    for name, colour in COLOURS.items():
        overlay[labels == LABELS[name]] = to_rgba(colour, 0.65)
    return overlay


def _read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
