"""Models Genesis: grey values, texture and context of a volume are destroyed, and the network restores them.

Zhou et al., Medical Image Analysis 67, 101840 (2021), arXiv:2004.07882. Local shuffling, non-linear intensity, and in-
or out-painting, in this order, each at its published probability; squared error over all voxels. The published code
works on [0, 1]: here that is the range between robust percentiles of the patch, in which curves and noise are drawn,
while input and target keep the normalised intensities that the network meets at fine-tuning. Flips, theirs too, are
part of the augmentation of all methods.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from nnunetv2_misfm.citations import MISFM, MODELS_GENESIS, NNUNET
from nnunetv2_misfm.trainers.corruptions import intensity_curve, intensity_range, local_shuffling, painting
from nnunetv2_misfm.trainers.finetune import FinetuneTrainer
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.recipe import require
from nnunetv2_misfm.trainers.reconstruction import ReconstructionRecipe, ReconstructionTrainer


@dataclass(frozen=True)
class ModelsGenesisRecipe(ReconstructionRecipe):
    """Numbers of Models Genesis, each a probability or a share (0..1); the first four are published.

    Attributes:
        shuffling: How often voxels are shuffled locally. Theirs: 0.5.
        intensity: How often a curve is applied. Theirs: 0.9.
        painting: How often there is in- or out-painting. Theirs: 0.9.
        inpainting: How often the painting is an in-painting; else it is an out-painting. Theirs: 0.2.
        shuffled_blocks: Share of the blocks that a shuffling permutes. Their 10,000 boxes change 79 % of the voxels of
            their 64 x 64 x 32 cubes; so do 81 % of these blocks, and at other sizes up to a tenth more or less.
    """

    method: ClassVar[str] = "models_genesis"
    shuffling: float = 0.5
    intensity: float = 0.9
    painting: float = 0.9
    inpainting: float = 0.2
    shuffled_blocks: float = 0.81

    def __post_init__(self) -> None:
        for key in ("shuffling", "intensity", "painting", "inpainting", "shuffled_blocks"):
            require(0 <= getattr(self, key) <= 1, f"{self.method}.{key}", "from 0 to 1", getattr(self, key))


def corrupt(
    volume: torch.Tensor, recipe: ModelsGenesisRecipe, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Returns a corrupted volume, float [C, D, H, W]; blocks, curve, boxes and noise are shared by the channels."""
    low, high = intensity_range.percentiles(volume)
    shuffled, remapped, painted, inwards = torch.rand(4, generator=generator).tolist()
    if shuffled < recipe.shuffling:
        volume = local_shuffling.shuffle_locally(volume, recipe.shuffled_blocks, generator)
    if remapped < recipe.intensity:
        volume = intensity_curve.apply_curve(volume, intensity_curve.draw_curve(generator), low, high)
    if painted < recipe.painting:
        paint = painting.paint_in if inwards < recipe.inpainting else painting.paint_out
        volume = paint(volume, low, high, generator)
    return volume


def make_task(
    volumes: torch.Tensor, recipe: ModelsGenesisRecipe, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns corrupted volumes and the volumes, float [B, C, D, H, W], on the volumes' device.

    The generator is on the CPU; None uses PyTorch's global one. The same seed draws the same blocks, curves and boxes
    on any device, and the same noise on devices of one kind.
    """
    return torch.stack([corrupt(volume, recipe, generator) for volume in volumes]), volumes


class nnUNetTrainerModelsGenesisPretrain(ReconstructionTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """Models Genesis with the network that the plans name."""

    method = ModelsGenesisRecipe
    make_task = staticmethod(make_task)
    citations: ClassVar[tuple[str, ...]] = (NNUNET, MODELS_GENESIS, MISFM)


class nnUNetTrainerPCTNetModelsGenesisPretrain(nnUNetTrainerModelsGenesisPretrain, nnUNetTrainerPCTNet):  # noqa: N801
    """Models Genesis with PCT-Net."""


class nnUNetTrainerModelsGenesis(FinetuneTrainer):  # noqa: N801
    """Fine-tunes the network that the plans name from Models Genesis."""

    pretrain_trainer = "nnUNetTrainerModelsGenesisPretrain"
    citations = nnUNetTrainerModelsGenesisPretrain.citations


class nnUNetTrainerPCTNetModelsGenesis(FinetuneTrainer, nnUNetTrainerPCTNet):  # noqa: N801
    """Fine-tunes PCT-Net from Models Genesis."""

    pretrain_trainer = "nnUNetTrainerPCTNetModelsGenesisPretrain"
    citations = nnUNetTrainerModelsGenesisPretrain.citations
