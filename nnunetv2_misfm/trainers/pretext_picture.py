"""Pictures of a pretext task: a batch's volumes, its inputs and targets, and a network's answers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from matplotlib import style
from torch import nn

from nnunetv2_misfm.trainers.pretext_figure import (
    Column,
    Sample,
    as_viewed,
    axis_directions,
    draw,
    spacing_as_viewed,
)
from nnunetv2_misfm.trainers.recipe import MethodRecipe

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.pretext import PretextTrainer


def samples_of(
    trainer: "type[PretextTrainer]",
    recipe: MethodRecipe,
    batch: dict[str, Any],
    generator: torch.Generator,
    data: Any,
    transpose_forward: list[int],
    spacing: Sequence[float],
    network: nn.Module | None = None,
) -> list[Sample]:
    """Returns a batch with its task and a network's answers, turned as a radiologist looks at it.

    Args:
        trainer: The method.
        recipe: Its numbers.
        batch: `data` float32 [B, C, D, H, W] on the CPU, at least two samples, and their `keys`.
        generator: Draws the task.
        data: nnU-Net's dataset of the cases.
        transpose_forward: nnU-Net's order of the images' axes in preprocessed arrays.
        spacing: Edges of a voxel in that order, mm.
        network: Evaluating, with its finest output alone, on any device; None shows no answer.
    """
    task_input, target = trainer.make_task(batch["data"], recipe, generator)
    columns = _columns(batch, trainer.preview_sources(batch["data"]), task_input, target, network)
    samples = []
    for i, name in enumerate(batch["keys"]):
        axes = axis_directions(data.load_case(name)[3], transpose_forward)
        viewed = [column._replace(volume=as_viewed(column.volume, axes)) for column in columns[i]]
        samples.append(Sample(viewed, spacing_as_viewed(spacing, axes)))
    return samples


def write_picture(
    samples: Sequence[Sample], trainer: "type[PretextTrainer]", recipe: MethodRecipe, output: Path
) -> None:
    """Writes the picture of samples as a PNG.

    Raises:
        OSError: The file cannot be written.
    """
    with style.context("default"):  # nnU-Net's progress plot leaves huge fonts behind in its process
        name, num_levels = recipe.method.replace("_", " "), trainer.num_task_classes(recipe) - 1
        draw(samples, name, trainer.preview_caption(recipe), num_levels).savefig(output, format="png")


def _columns(
    batch: dict[str, Any],
    sources: dict[str, torch.Tensor],
    task_input: torch.Tensor,
    target: torch.Tensor,
    network: nn.Module | None,
) -> list[list[Column]]:
    """Returns the columns of every sample of a batch, in the orientation of the arrays.

    A target of whole numbers holds the levels of a segmentation task, any other a volume to restore, NaN where nothing
    is asked; there the restoration is NaN too.
    """
    volumes, names = batch["data"], batch["keys"]
    has_levels = not target.is_floating_point()
    columns: list[list[Column]] = []
    for i in range(len(names)):
        shown = []
        for what, source in sources.items():
            case = next((name for name, volume in zip(names, volumes, strict=True) if volume.equal(source[i])), "")
            title = f"{what} (target)" if source.equal(target) else what
            shown.append(Column(f"{title}\n{case}", source[i, 0].numpy(), True))
        shown.append(Column("fused\n(input)" if len(sources) > 1 else "input", task_input[i, 0].numpy()))
        if has_levels:
            shown.append(Column("levels\n(label)", target[i, 0].int().numpy()))
        elif not any(source.equal(target) for source in sources.values()):
            shown.append(Column("target", target[i, 0].numpy(), True))
        if network is not None:
            device = next(network.parameters()).device
            with torch.no_grad():
                answer = network(task_input[i : i + 1].to(device))[0].float().cpu()
            if has_levels:
                shown.append(Column("predicted levels\n(network's answer)", answer.argmax(0).numpy()))
            else:
                asked = answer[0].masked_fill(target[i, 0].isnan(), torch.nan)
                shown.append(Column("restoration\n(network's answer)", asked.numpy()))
        columns.append(shown)
    return columns
