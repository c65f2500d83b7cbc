"""What the methods share that corrupt a volume and learn to restore it: as many outputs as channels, and the error.

What is replaced here, on top of `PretextTrainer`'s hooks: `_build_loss` (the mean error, in nnU-Net's own wrapper for
deep supervision), `evaluation_step` and `log_validation` (a reconstruction has no Dice: minus the validation loss
stands in its place, so that the best checkpoint is the best).
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from nnunetv2.utilities.collate_outputs import collate_outputs
from torch import distributed as dist
from torch import nn
from torch.nn.functional import interpolate

from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.recipe import MethodRecipe

# Weight of heads that do not count under DDP, which must see every parameter used (nnU-Net's own number for it)
UNUSED_HEAD_WEIGHT = 1e-6


@dataclass(frozen=True)
class ReconstructionRecipe(MethodRecipe):
    """Numbers of every method that restores volumes.

    Attributes:
        loss: `mse` is the mean squared error, `l1` the mean absolute error, over the voxels that the task asks for.
        deep_supervision: Whether all heads of the network learn, as in the trainings that follow, or the finest alone,
            as in the publications of these methods.
    """

    loss: Literal["mse", "l1"] = "mse"
    deep_supervision: bool = True


class ReconstructionLoss(nn.Module):
    """Mean error over the voxels that are asked for.

    Args:
        kind: `mse` or `l1`.
    """

    def __init__(self, kind: Literal["mse", "l1"]) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Returns the error, a float32 scalar.

        Args:
            restored: float [B, C, D, H, W].
            target: float [B, C, D, H, W], NaN where nothing is asked; 0 is returned if nothing is asked anywhere.
        """
        asked = ~target.isnan()
        restored = restored.float()
        error = torch.where(asked, restored - target, 0.0 * restored)  # a NaN in the output shows wherever it is
        total = error.square().sum() if self.kind == "mse" else error.abs().sum()
        return total / asked.sum().clamp(min=1)


class ReconstructionTrainer(PretextTrainer):
    """Base of the `...Pretrain` trainers whose target is the volume itself, in nnU-Net's normalised intensities."""

    method_recipe: ReconstructionRecipe

    @classmethod
    def num_outputs(cls, recipe: MethodRecipe, num_input_channels: int) -> int:
        """Returns one output per channel of the volumes."""
        return num_input_channels

    @staticmethod
    def resize_target(target: torch.Tensor, size: list[int]) -> torch.Tensor:
        """Returns the mean of the voxels under each voxel of a coarser head, NaN where one of them is not asked for."""
        return interpolate(target, size, mode="area")

    def _build_loss(self) -> nn.Module:
        """Returns the error in nnU-Net's wrapper for deep supervision, with its weights or the finest head's alone."""
        loss = super()._build_loss()
        error = ReconstructionLoss(self.method_recipe.loss)
        if not self.enable_deep_supervision:
            return error
        loss.loss = error
        if not self.method_recipe.deep_supervision:
            rest = UNUSED_HEAD_WEIGHT if self.is_ddp else 0.0
            loss.weight_factors = (1.0, *[rest] * (len(loss.weight_factors) - 1))
        return loss

    def evaluation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the loss on a batch's task; the network is in evaluation mode and gradients are off."""
        with torch.autocast(self.device.type, enabled=self.device.type == "cuda"):  # as nnU-Net's steps
            loss = self.loss(self.network(batch["data"]), batch["target"])
        return {"loss": loss.detach().cpu().numpy()}

    def log_validation(self, val_outputs: list[dict[str, Any]]) -> None:
        """Logs the mean validation loss of all ranks, and minus it where nnU-Net's log has a Dice."""
        losses = collate_outputs(val_outputs)["loss"]
        if self.is_ddp:
            of_ranks: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_ranks, losses)
            losses = np.concatenate(of_ranks)
        loss = float(np.mean(losses))
        self.logger.log("mean_fg_dice", -loss, self.current_epoch)
        self.logger.log("dice_per_class_or_region", [-loss], self.current_epoch)
        self.logger.log("val_losses", loss, self.current_epoch)

    def on_train_start(self) -> None:
        """Starts as usual and says how to read nnU-Net's log."""
        super().on_train_start()
        self.print_to_log_file("A reconstruction has no Dice: 'Pseudo dice' below is minus the validation loss.")
