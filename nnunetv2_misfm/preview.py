"""A picture of what Volume Fusion shows the network: background, foreground, fused input and label map."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from matplotlib import colormaps, patheffects, style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure, SubFigure
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import find_plans
from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.unlabelled_loader import UnlabelledLoader
from nnunetv2_misfm.trainers.volume_fusion import VolumeFusionRecipe, make_task, nnUNetTrainerVFPretrain

# The ends of the three axes of the body, in ITK's order x, y, z, the far end (L, P, S) last
_ENDS = ("RL", "AP", "IS")
# Array axes towards which a radiologist looks: down, backwards, and to the patient's left, which is right in a picture
_VIEW = "IPL"
# Planes of an array in that orientation, by the axis across them, and the ends at left, right, top and bottom
_PLANES = (("axial", "RLAP"), ("coronal", "RLSI"), ("sagittal", "APSI"))
_COLUMN_INCHES = 2.9
_LEAST_ROW_INCHES = 0.9
_TITLE_INCHES = 1.1
_LEGEND_INCHES = 0.9
_DOTS_PER_INCH = 110
_MOST_TICKS = 9


class Sample(NamedTuple):
    """What the picture shows of one sample, all in the radiologist's orientation of its background (axes to I, P, L).

    Attributes:
        background: float [D, H, W], the first channel.
        foreground: float [D, H, W].
        fused: float [D, H, W].
        levels: int [D, H, W] in 0..K.
        names: Cases of the background and the foreground.
        spacing: Edges of a voxel, mm.
    """

    background: np.ndarray
    foreground: np.ndarray
    fused: np.ndarray
    levels: np.ndarray
    names: tuple[str, str]
    spacing: tuple[float, ...]


def preview(
    dataset: str,
    configuration: str,
    output: str | Path,
    plans: str = "nnUNetPlans",
    num_samples: int = 2,
    seed: int = 0,
) -> Path:
    """Writes a PNG of Volume Fusion samples of a preprocessed dataset and returns its path.

    Each sample takes three rows (the planes through the patch's centre, all at one scale) and four columns. The crops
    and maps are drawn as in training, with the configuration's recipe.

    Args:
        dataset: Number or name of a dataset that nnU-Net has preprocessed.
        configuration: Configuration of its plans.
        output: The PNG file to write; its folder is made.
        plans: Name of the plans file without its ending.
        num_samples: Samples to show, at least 1.
        seed: Of cases, crops and maps; the same seed gives the same picture.

    Raises:
        MisfmError: No such plans, or nothing preprocessed, or fewer than two cases, or a number of samples below 1, or
            a file that cannot be written.
        NotImplementedError: A 2D configuration.
    """
    if num_samples < 1:
        raise MisfmError(f"expected at least 1 sample to show, got {num_samples}.")
    plans_file = find_plans(dataset, plans)
    manager = PlansManager(str(plans_file))
    if configuration not in manager.available_configurations:
        known = ", ".join(manager.available_configurations)
        raise MisfmError(f"expected one of the configurations {known} of {plans_file}, got {configuration!r}.")
    resolved = manager.get_configuration(configuration)
    nnUNetTrainerVFPretrain.check_configuration(resolved)
    _, recipe = nnUNetTrainerVFPretrain.read_recipes(resolved)
    assert isinstance(recipe, VolumeFusionRecipe)
    samples = _draw_samples(manager, resolved, recipe, plans_file.parent, max(2, num_samples), seed)
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with style.context("default"):  # nnU-Net's progress plot leaves huge fonts behind in its process
            draw(samples[:num_samples], recipe.num_levels).savefig(output, format="png")
    except OSError as error:
        raise MisfmError(f"{output} could not be written ({error}): choose another file.") from error
    return output


def _draw_samples(
    manager: PlansManager,
    resolved: ConfigurationManager,
    recipe: VolumeFusionRecipe,
    folder: Path,
    num_samples: int,
    seed: int,
) -> list[Sample]:
    """Returns a batch with its task, as training would draw them."""
    preprocessed = folder / resolved.data_identifier
    if not any(preprocessed.glob("*.pkl")):
        raise MisfmError(
            f"expected preprocessed cases in {preprocessed}, found none: run nnUNetv2_preprocess "
            f"-d {manager.dataset_name} -plans_name {manager.plans_name} first."
        )
    data = infer_dataset_class(str(preprocessed))(str(preprocessed))
    if len(data.identifiers) < 2:
        raise MisfmError(f"expected at least two cases in {preprocessed}, got {len(data.identifiers)}; add scans.")
    np.random.seed(seed)  # the loader seeds itself from NumPy's global generator
    loader = UnlabelledLoader(
        in_body=PretextTrainer.labels_are_body_masks(load_json(str(folder / "dataset.json"))),
        data=data,
        batch_size=num_samples,
        patch_size=resolved.patch_size,
        final_patch_size=resolved.patch_size,
        label_manager=nnUNetTrainerVFPretrain.task_label_manager(manager, recipe),
    )
    batch = loader.generate_train_batch()
    fused, levels = make_task(batch["data"], recipe, torch.Generator().manual_seed(seed))
    samples = []
    for i, name in enumerate(batch["keys"]):
        axes = axis_directions(data.load_case(name)[3], manager.transpose_forward)
        spacing = tuple(float(resolved.spacing[_axis_along(end, axes)]) for end in _VIEW)
        background, foreground, mixture, label = (
            as_viewed(volume[0].numpy(), axes)
            for volume in (batch["data"][i], batch["data"][i - 1], fused[i], levels[i])
        )
        names = (name, batch["keys"][i - 1])
        samples.append(Sample(background, foreground, mixture, label, names, spacing))
    return samples


def axis_directions(properties: dict[str, Any], transpose_forward: list[int]) -> str:
    """Returns the end of the body to which each axis of a preprocessed array runs, such as SAR.

    Args:
        properties: nnU-Net's of a case, with the geometry of its SimpleITK or nibabel reader; without one, or with one
            of which two axes run to the same end, the array is taken for ITK's default (SPL).
        transpose_forward: nnU-Net's order of the image's array axes in preprocessed ones.
    """
    columns = np.eye(3)  # directions of the image's axes x, y, z in ITK's world, which runs to L, P and S
    if "sitk_stuff" in properties:
        columns = np.reshape(properties["sitk_stuff"]["direction"], (3, 3))
    elif "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = stuff.get("reoriented_affine", stuff["original_affine"])
        columns = np.diag([-1, -1, 1]) @ np.asarray(affine)[:3, :3]  # nibabel's world runs to R, A and S
    world = np.abs(columns).argmax(0)
    if len(set(world)) < 3:
        columns, world = np.eye(3), np.arange(3)
    ends = [_ENDS[w][int(columns[w, i] > 0)] for i, w in enumerate(world)][::-1]  # array axes are z, y, x
    return "".join(ends[i] for i in transpose_forward)


def as_viewed(volume: np.ndarray, axes: str) -> np.ndarray:
    """Returns a volume [D, H, W] whose axes run to the ends `axes`, turned so that they run to I, P and L."""
    turned = volume.transpose([_axis_along(end, axes) for end in _VIEW])
    return turned[tuple(slice(None, None, 1 if end in axes else -1) for end in _VIEW)]


def _axis_along(end: str, axes: str) -> int:
    """Returns the index of the axis that runs to an end of the body or to the opposite one."""
    (pair,) = (pair for pair in _ENDS if end in pair)
    return next(i for i, other in enumerate(axes) if other in pair)


def draw(samples: list[Sample], num_levels: int) -> Figure:
    """Returns the figure of samples.

    Within a sample all grey values share one scale, so that fused intensities can be compared with their sources.
    """
    extents = np.multiply(samples[0].levels.shape, samples[0].spacing)  # mm down, backwards, to the left
    inches = _COLUMN_INCHES / max(extents[1:])
    rows = [max(_LEAST_ROW_INCHES, inches * extents[i]) for i in (1, 0, 0)]
    heights = [sum(rows) + _TITLE_INCHES] * len(samples) + [_LEGEND_INCHES]
    figure = Figure((4 * _COLUMN_INCHES + 0.6, sum(heights)), _DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    *parts, legend = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    colours = colormaps["viridis"].resampled(num_levels + 1)
    norm = BoundaryNorm(np.arange(-0.5, num_levels + 1), num_levels + 1)
    for number, (part, sample) in enumerate(zip(parts, samples, strict=True), start=1):
        part.suptitle(f"sample {number}", weight="bold")
        image = _draw_sample(part, sample, rows, {"cmap": colours, "norm": norm})
    axis = legend.add_subplot()
    ticks = range(0, num_levels + 1, -(-num_levels // (_MOST_TICKS - 1)))
    bar = figure.colorbar(image, cax=axis, orientation="horizontal", ticks=ticks)
    bar.minorticks_off()
    bar.set_label(f"level k of a voxel, which the network is to tell: k/{num_levels} foreground, the rest background")
    axis.set_box_aspect(0.03)
    return figure


def _draw_sample(part: SubFigure, sample: Sample, rows: list[float], map_style: dict[str, Any]) -> Any:
    """Fills the part of a figure that belongs to a sample and returns the image of a map of levels."""
    axes = part.subplots(len(_PLANES), 4, squeeze=False, height_ratios=rows)
    greys = (sample.background, sample.foreground, sample.fused)
    low, high = np.percentile(np.stack(greys[:2]), (0.5, 99.5))
    titles = (f"background\n{sample.names[0]}", f"foreground\n{sample.names[1]}", "fused\n(input)", "levels\n(label)")
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize="medium")
    for plane, ((name, ends), row) in enumerate(zip(_PLANES, axes, strict=True)):
        down, across = (sample.spacing[i] for i in range(3) if i != plane)
        for axis, volume in zip(row, (*greys, sample.levels), strict=True):
            style = map_style if volume is sample.levels else {"cmap": "gray", "vmin": low, "vmax": high}
            middle = np.take(volume, volume.shape[plane] // 2, plane)
            image = axis.imshow(middle, aspect=down / across, interpolation="nearest", **style)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name)
        _mark_ends(row[0], ends)
    return image


def _mark_ends(axis: Axes, ends: str) -> None:
    """Writes the ends of the body at the left, right, top and bottom edge of a panel."""
    for end, (x, y) in zip(ends, ((0.05, 0.5), (0.95, 0.5), (0.5, 0.94), (0.5, 0.06)), strict=True):
        text = axis.text(x, y, end, transform=axis.transAxes, ha="center", va="center", color="white", fontsize="small")
        text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])
