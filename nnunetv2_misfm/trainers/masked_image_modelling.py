"""Masked image modelling: blocks of the volume are blanked, and the network fills them in.

Chen et al., WACV 2023 (arXiv:2204.11716): 75 % of blocks of 16^3 voxels are masked, and the error counts on them
alone. It is squared here, as in He et al. (CVPR 2022, arXiv:2111.06377); theirs is `loss: l1`. Blanked means 0, the
mean under nnU-Net's z-score and CT normalisation, and the network is the ordinary dense one, encoder and decoder.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nnunetv2_misfm.citations import MIM, MISFM, NNUNET
from nnunetv2_misfm.trainers.finetune import FinetuneTrainer
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.recipe import require
from nnunetv2_misfm.trainers.reconstruction import ReconstructionRecipe, ReconstructionTrainer


@dataclass(frozen=True)
class MaskedImageModellingRecipe(ReconstructionRecipe):
    """Numbers of masked image modelling.

    Attributes:
        mask_ratio: Share of the voxels that is masked. Chen et al.: 0.75.
        block_size: Edges of a block in voxels (D, H, W). Chen et al.: 16 each.
    """

    method: ClassVar[str] = "masked_image_modelling"
    mask_ratio: float = 0.75
    block_size: tuple[int, int, int] = (16, 16, 16)

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, f"{self.method}.mask_ratio", "above 0 and below 1", self.mask_ratio)
        require(min(self.block_size) >= 1, f"{self.method}.block_size", "at least 1 voxel each", self.block_size)


def draw_mask(
    shape: tuple[int, ...], recipe: MaskedImageModellingRecipe, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Returns which voxels are masked, bool [D, H, W] on the CPU: `mask_ratio` of them to the nearest voxel.

    Blocks lie side by side, cut where the volume ends; the last one masked is so only in part if the share asks for it.
    """
    edges = [
        torch.tensor([min(edge, size - start) for start in range(0, size, edge)])
        for size, edge in zip(shape, recipe.block_size, strict=True)
    ]
    voxels = edges[0][:, None, None] * edges[1][:, None] * edges[2]  # of each block
    order = torch.randperm(voxels.numel(), generator=generator)
    missing = round(recipe.mask_ratio * voxels.sum().item()) - voxels.flatten()[order].cumsum(0)
    num_whole = int((missing >= 0).sum())
    mask = torch.zeros(voxels.shape, dtype=torch.bool)
    mask.view(-1)[order[:num_whole]] = True
    for axis, edge in enumerate(edges):
        mask = mask.repeat_interleave(edge, axis)
    if num_whole < len(order):
        place = torch.unravel_index(order[num_whole], voxels.shape)
        box = tuple(slice(int(i) * edge, int(i + 1) * edge) for i, edge in zip(place, recipe.block_size, strict=True))
        whole = mask[box].numel()
        mask[box] = (torch.arange(whole) < whole + missing[num_whole]).reshape(mask[box].shape)
    return mask


def make_task(
    volumes: torch.Tensor, recipe: MaskedImageModellingRecipe, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the volumes with masked voxels 0, and the volumes with all others NaN: float [B, C, D, H, W] each.

    The channels of a sample share its mask. The generator is on the CPU: the same masks whatever the volumes' device.
    """
    mask = torch.stack([draw_mask(volumes.shape[2:], recipe, generator) for _ in volumes])[:, None].to(volumes.device)
    return volumes.masked_fill(mask, 0.0), volumes.masked_fill(~mask, torch.nan)


class nnUNetTrainerMIMPretrain(ReconstructionTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """Masked image modelling with the network that the plans name."""

    method = MaskedImageModellingRecipe
    make_task = staticmethod(make_task)
    citations: ClassVar[tuple[str, ...]] = (NNUNET, MIM, MISFM)


class nnUNetTrainerPCTNetMIMPretrain(nnUNetTrainerMIMPretrain, nnUNetTrainerPCTNet):  # noqa: N801
    """Masked image modelling with PCT-Net."""


class nnUNetTrainerMIM(FinetuneTrainer):  # noqa: N801
    """Fine-tunes the network that the plans name from masked image modelling."""

    pretrain_trainer = "nnUNetTrainerMIMPretrain"
    citations = nnUNetTrainerMIMPretrain.citations


class nnUNetTrainerPCTNetMIM(FinetuneTrainer, nnUNetTrainerPCTNet):  # noqa: N801
    """Fine-tunes PCT-Net from masked image modelling."""

    pretrain_trainer = "nnUNetTrainerPCTNetMIMPretrain"
    citations = nnUNetTrainerMIMPretrain.citations
