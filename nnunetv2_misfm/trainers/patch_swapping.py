"""Patch swapping, or context restoration: pairs of blocks change places, and the network puts them back.

Chen et al., Medical Image Analysis 58, 101539 (2019): isolated pairs, squared error over all voxels. Number and size of
the blocks in 3D are those of MIS-FM's authors (PyMIC's demo): 20 to 40 pairs of an eighth of the patch per axis.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nnunetv2_misfm.citations import MISFM, NNUNET, PATCH_SWAPPING
from nnunetv2_misfm.trainers.finetune import FinetuneTrainer
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.recipe import require
from nnunetv2_misfm.trainers.reconstruction import ReconstructionRecipe, ReconstructionTrainer


@dataclass(frozen=True)
class PatchSwappingRecipe(ReconstructionRecipe):
    """Numbers of patch swapping.

    Attributes:
        num_pairs: Fewest and most pairs of a sample (inclusive), fewer where the patch has no room for so many.
        block_share: Edge of a block as a share of the patch along each axis, at least one voxel. Theirs: [8, 16, 16]
            voxels of a patch of 64 x 128 x 128.
    """

    method: ClassVar[str] = "patch_swapping"
    num_pairs: tuple[int, int] = (20, 40)
    block_share: float = 0.125

    def __post_init__(self) -> None:
        fewest, most = self.num_pairs
        require(0 <= fewest <= most > 0, f"{self.method}.num_pairs", "two ordered counts, not both 0", self.num_pairs)
        require(0 < self.block_share <= 0.5, f"{self.method}.block_share", "above 0 and at most 0.5", self.block_share)


def draw_pairs(
    shape: tuple[int, ...], recipe: PatchSwappingRecipe, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the flat indices of the voxels that change places, int64 [pairs, voxels of a block] each, on the CPU.

    The blocks are cells of a grid at a random offset in a patch of `shape` (D, H, W), no cell twice: no two overlap.
    """
    edges = torch.tensor([max(1, int(recipe.block_share * size)) for size in shape])
    offsets = (torch.rand(3, generator=generator) * edges.clamp(max=torch.tensor(shape) - edges + 1)).long()
    counts = ((torch.tensor(shape) - offsets) // edges).tolist()
    fewest, most = recipe.num_pairs
    cells = torch.randperm(counts[0] * counts[1] * counts[2], generator=generator)
    num_pairs = min(int(torch.randint(fewest, most + 1, (), generator=generator)), len(cells) // 2)
    strides = torch.tensor([shape[1] * shape[2], shape[2], 1])
    place = torch.stack(torch.unravel_index(cells[: 2 * num_pairs], counts), 1)
    corners = ((place * edges + offsets) * strides).sum(1)
    inside = (torch.cartesian_prod(*(torch.arange(int(edge)) for edge in edges)) * strides).sum(1)
    first, second = (corners[:, None] + inside).reshape(2, num_pairs, len(inside))
    return first, second


def swap(volume: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns the volume [C, D, H, W] with the voxels at two lists of flat indices exchanged, in all channels."""
    swapped = volume.flatten(1).clone()
    to, source = (torch.cat(pair).flatten().to(volume.device) for pair in ((first, second), (second, first)))
    swapped[:, to] = swapped[:, source]
    return swapped.reshape(volume.shape)


def make_task(
    volumes: torch.Tensor, recipe: PatchSwappingRecipe, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the volumes with swapped blocks, and the volumes: float [B, C, D, H, W], on the volumes' device."""
    swapped = [swap(volume, *draw_pairs(tuple(volume.shape[1:]), recipe, generator)) for volume in volumes]
    return torch.stack(swapped), volumes


class nnUNetTrainerPatchSwappingPretrain(ReconstructionTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """Patch swapping with the network that the plans name."""

    method = PatchSwappingRecipe
    make_task = staticmethod(make_task)
    citations: ClassVar[tuple[str, ...]] = (NNUNET, PATCH_SWAPPING, MISFM)


class nnUNetTrainerPCTNetPatchSwappingPretrain(nnUNetTrainerPatchSwappingPretrain, nnUNetTrainerPCTNet):  # noqa: N801
    """Patch swapping with PCT-Net."""


class nnUNetTrainerPatchSwapping(FinetuneTrainer):  # noqa: N801
    """Fine-tunes the network that the plans name from patch swapping."""

    pretrain_trainer = "nnUNetTrainerPatchSwappingPretrain"
    citations = nnUNetTrainerPatchSwappingPretrain.citations


class nnUNetTrainerPCTNetPatchSwapping(FinetuneTrainer, nnUNetTrainerPCTNet):  # noqa: N801
    """Fine-tunes PCT-Net from patch swapping."""

    pretrain_trainer = "nnUNetTrainerPCTNetPatchSwappingPretrain"
    citations = nnUNetTrainerPatchSwappingPretrain.citations
