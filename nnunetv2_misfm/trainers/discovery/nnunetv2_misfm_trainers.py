"""The one module that nnU-Net's search meets: point `nnUNet_extTrainer` at this folder.

It only re-exports the trainers of the installed package, so that what nnU-Net finds is the very class that a plain
import gives. A new trainer is one more line here.
"""

from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.fmunet import nnUNetTrainerFMUNet
from nnunetv2_misfm.trainers.monai_networks import nnUNetTrainerSwinUNETR, nnUNetTrainerUNETR
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.volume_fusion import (
    nnUNetTrainerFMUNetVF,
    nnUNetTrainerFMUNetVFPretrain,
    nnUNetTrainerPCTNetVF,
    nnUNetTrainerPCTNetVFPretrain,
    nnUNetTrainerVF,
    nnUNetTrainerVFPretrain,
)

__all__ = [
    "nnUNetTrainerBaseline",
    "nnUNetTrainerFMUNet",
    "nnUNetTrainerFMUNetVF",
    "nnUNetTrainerFMUNetVFPretrain",
    "nnUNetTrainerPCTNet",
    "nnUNetTrainerPCTNetVF",
    "nnUNetTrainerPCTNetVFPretrain",
    "nnUNetTrainerSwinUNETR",
    "nnUNetTrainerUNETR",
    "nnUNetTrainerVF",
    "nnUNetTrainerVFPretrain",
]
