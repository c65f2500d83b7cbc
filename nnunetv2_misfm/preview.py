"""A picture of what Volume Fusion shows the network: background, foreground, fused input and label map."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.configure import find_plans
from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.unlabelled_loader import UnlabelledLoader
from nnunetv2_misfm.trainers.volume_fusion import make_task, nnUNetTrainerVFPretrain

PLANES = ("axial", "coronal", "sagittal")  # slices along the first, second and third axis of the array
COLUMNS = ("background", "foreground", "fused input", "levels (the label)")


def preview(
    dataset: str,
    configuration: str,
    output: str | Path,
    plans: str = "nnUNetPlans",
    num_samples: int = 2,
    seed: int = 0,
) -> Path:
    """Writes a PNG of Volume Fusion samples of a preprocessed dataset and returns its path.

    Each sample takes three rows (the planes through the patch's centre) and four columns. The crops and maps are drawn
    as in training, with the configuration's recipe.

    Args:
        dataset: Number or name of a dataset that nnU-Net has preprocessed.
        configuration: Configuration of its plans.
        output: The PNG file to write; its folder is made.
        plans: Name of the plans file without its ending.
        num_samples: Samples to show, at least 1.
        seed: Of cases, crops and maps; the same seed gives the same picture.

    Raises:
        MisfmError: No such plans, or nothing preprocessed, or fewer than two cases, or a number of samples below 1.
    """
    if num_samples < 1:
        raise MisfmError(f"expected at least 1 sample to show, got {num_samples}.")
    plans_file = find_plans(dataset, plans)
    manager = PlansManager(str(plans_file))
    batch, recipe = _draw_batch(manager, plans_file.parent, configuration, max(2, num_samples), seed)
    fused, levels = make_task(batch["data"], recipe, torch.Generator().manual_seed(seed))
    figure = draw(
        batch["data"][:num_samples], batch["data"].roll(1, 0), fused, levels, recipe.num_levels, batch["keys"]
    )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
    return output


def _draw_batch(
    manager: PlansManager, folder: Path, configuration: str, num_samples: int, seed: int
) -> tuple[dict[str, Any], Any]:
    if configuration not in manager.available_configurations:
        raise MisfmError(
            f"expected one of the configurations {', '.join(manager.available_configurations)}, got {configuration!r}."
        )
    resolved = manager.get_configuration(configuration)
    nnUNetTrainerVFPretrain.check_configuration(resolved)
    _, recipe = nnUNetTrainerVFPretrain.read_recipes(resolved)
    assert recipe is not None
    preprocessed = folder / resolved.data_identifier
    if not preprocessed.is_dir():
        raise MisfmError(f"expected preprocessed cases in {preprocessed}, found none: run nnUNetv2_preprocess first.")
    data = infer_dataset_class(str(preprocessed))(str(preprocessed))
    if len(data.identifiers) < 2:
        raise MisfmError(f"expected at least two cases in {preprocessed}, got {len(data.identifiers)}; add scans.")
    np.random.seed(seed)
    loader = UnlabelledLoader(
        in_body=PretextTrainer.labels_are_body_masks(load_json(str(folder / "dataset.json"))),
        data=data,
        batch_size=num_samples,
        patch_size=resolved.patch_size,
        final_patch_size=resolved.patch_size,
        label_manager=nnUNetTrainerVFPretrain.task_label_manager(manager, recipe),
    )
    return loader.generate_train_batch(), recipe


def draw(
    background: torch.Tensor,
    foreground: torch.Tensor,
    fused: torch.Tensor,
    levels: torch.Tensor,
    num_levels: int,
    names: list[str],
) -> Figure:
    """Returns the figure for volumes float [B, C, D, H, W] (channel 0 is shown) and levels int [B, 1, D, H, W].

    Within a sample all grey values share one scale, so that fused intensities can be compared with their sources.
    """
    num_samples = len(background)
    figure = Figure(figsize=(13, 3.1 * len(PLANES) * num_samples + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PLANES) * num_samples, len(COLUMNS), squeeze=False)
    colours = colormaps["viridis"].resampled(num_levels + 1)
    norm = BoundaryNorm(np.arange(-0.5, num_levels + 1), num_levels + 1)
    for sample in range(num_samples):
        volumes = [v[sample, 0].numpy() for v in (background, foreground, fused)]
        low, high = np.percentile(np.stack(volumes[:2]), (0.5, 99.5))
        for plane, plane_name in enumerate(PLANES):
            row = axes[sample * len(PLANES) + plane]
            for axis, volume in zip(row, volumes, strict=False):
                axis.imshow(_middle(volume, plane), cmap="gray", vmin=low, vmax=high, interpolation="nearest")
            image = row[3].imshow(
                _middle(levels[sample, 0].numpy(), plane), cmap=colours, norm=norm, interpolation="nearest"
            )
            row[0].set_ylabel(f"{names[sample]}\n{plane_name}")
            for axis in row:
                axis.set_xticks([])
                axis.set_yticks([])
        for axis, title in zip(axes[sample * len(PLANES)], COLUMNS, strict=True):
            axis.set_title(title)
    bar = figure.colorbar(image, ax=axes[:, 3], ticks=range(num_levels + 1), shrink=0.4)
    bar.set_label(f"level k: share k/{num_levels} of the foreground")
    return figure


def _middle(volume: np.ndarray, axis: int) -> np.ndarray:
    return np.take(volume, volume.shape[axis] // 2, axis)
