"""Crops on their way to the device, each as large as its pose needs."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nnunetv2_misfm.trainers.augmentation.geometry import Pose


@dataclass(frozen=True)
class Crops:
    """What a batch of patches is made of.

    Attributes:
        volumes: float32 [C, D', H', W'] of each sample: of the patch's size where it is only cropped, else with the
            margin that its pose needs.
        poses: How each lies in its patch.
    """

    volumes: Sequence[Tensor]
    poses: Sequence[Pose]

    def pin_memory(self) -> "Crops":
        """Returns the same in page-locked memory; PyTorch's DataLoader asks for it by this name."""
        return Crops([volume.pin_memory() for volume in self.volumes], self.poses)

    def to(self, device: torch.device) -> "Crops":
        """Returns the same on a device."""
        return Crops([volume.to(device, non_blocking=True) for volume in self.volumes], self.poses)
