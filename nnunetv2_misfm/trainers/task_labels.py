"""Label maps of many datasets as masks of tasks, on the device; and mirroring that respects left and right.

On disk every source keeps its own label values. A batch mixes sources, so what a value means depends on the case.

Shape letters: B batch, D H W voxels in array order, T tasks of a sample (padded), P pairs of a sample and a task that
its dataset labels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nnunetv2_misfm.architectures.context_prior import Context
from nnunetv2_misfm.universe import Source


class TaskLabels(NamedTuple):
    """What a batch should be answered with; `to` moves it, as nnU-Net's training step wants.

    Attributes:
        masks: bool (B, T, D, H, W), where each task's structure is; false where a task is not present.
        present: bool (B, T), the tasks that a sample's dataset labels.
        labelled: bool (B, D, H, W), voxels that somebody labelled (all without an ignore label).
        modality: int64 (B,), number of the sample's modality.
    """

    masks: Tensor
    present: Tensor
    labelled: Tensor
    modality: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "TaskLabels":
        """Returns the same on a device."""
        return TaskLabels(*(tensor.to(device, non_blocking=non_blocking) for tensor in self))


def contexts(sources: Sequence[Source], num_slots: int, device: torch.device) -> Context:
    """Returns what is asked of samples: the tasks that their datasets label, padded to `num_slots` tasks.

    Args:
        sources: Of each sample.
        num_slots: T, the same for every batch, so that shapes never change.
        device: Where the tensors go.
    """
    rows = [[*source.tasks, *[0] * (num_slots - len(source.tasks))] for source in sources]
    present = [[slot < len(source.tasks) for slot in range(num_slots)] for source in sources]
    return Context(
        torch.tensor(rows, device=device),
        torch.tensor(present, device=device),
        torch.tensor([source.modality for source in sources], device=device),
    )


def task_labels(segmentation: Tensor, sources: Sequence[Source], context: Context) -> TaskLabels:
    """Returns the masks of each sample's tasks.

    Args:
        segmentation: Whole numbers (B, 1, D, H, W) in the values of each sample's own dataset; what is below zero
            lies outside the image and counts as background.
        sources: Of each sample.
        context: What `contexts` made of them.
    """
    device, num_slots = segmentation.device, context.labelled.shape[1]
    values = segmentation[:, 0].long().clamp(min=0)
    num_values = 1 + max(
        max([source.ignore_label or 0, *(v for group in source.values for v in group)]) for source in sources
    )
    belongs = torch.zeros(len(sources), num_slots, num_values + 1, dtype=torch.bool)  # the last: any unknown value
    ignored = torch.zeros(len(sources), num_values + 1, dtype=torch.bool)
    for row, source in enumerate(sources):
        for slot, group in enumerate(source.values):
            belongs[row, slot, list(group)] = True
        if source.ignore_label is not None:
            ignored[row, source.ignore_label] = True
    belongs, ignored = belongs.to(device), ignored.to(device)
    values.clamp_(max=num_values)
    return TaskLabels(
        torch.stack([table[:, sample] for table, sample in zip(belongs, values, strict=True)]),
        context.present,
        torch.stack([~table[sample] for table, sample in zip(ignored, values, strict=True)]),
        context.modality,
    )


def mirrored(image: Tensor, segmentation: Tensor, sources: Sequence[Source]) -> tuple[Tensor, Tensor]:
    """Returns a batch with each sample flipped, with probability 1/2, along each axis that its source allows.

    nnU-Net's own mirroring has one set of axes for all cases of a dataset. The draws are PyTorch's on the CPU.

    Args:
        image: (B, channels, D, H, W).
        segmentation: (B, 1, D, H, W).
        sources: Of each sample.
    """
    image, segmentation = image.clone(), segmentation.clone()
    for i, source in enumerate(sources):
        axes = [1 + axis for axis in source.mirror_axes if torch.rand(()) < 0.5]
        if axes:
            image[i], segmentation[i] = image[i].flip(axes), segmentation[i].flip(axes)
    return image, segmentation
