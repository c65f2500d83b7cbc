"""The one module that nnU-Net's search meets: point `nnUNet_extTrainer` at this folder.

It only re-exports the trainers of the installed package, so that what nnU-Net finds is the very class that a plain
import gives. A new trainer is one more line here.
"""

from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.fmunet import nnUNetTrainerFMUNet
from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes
from nnunetv2_misfm.trainers.masked_image_modelling import (
    nnUNetTrainerMIM,
    nnUNetTrainerMIMPretrain,
    nnUNetTrainerPCTNetMIM,
    nnUNetTrainerPCTNetMIMPretrain,
)
from nnunetv2_misfm.trainers.models_genesis import (
    nnUNetTrainerModelsGenesis,
    nnUNetTrainerModelsGenesisPretrain,
    nnUNetTrainerPCTNetModelsGenesis,
    nnUNetTrainerPCTNetModelsGenesisPretrain,
)
from nnunetv2_misfm.trainers.monai_networks import nnUNetTrainerSwinUNETR, nnUNetTrainerUNETR
from nnunetv2_misfm.trainers.patch_swapping import (
    nnUNetTrainerPatchSwapping,
    nnUNetTrainerPatchSwappingPretrain,
    nnUNetTrainerPCTNetPatchSwapping,
    nnUNetTrainerPCTNetPatchSwappingPretrain,
)
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
    "nnUNetTrainerHermes",
    "nnUNetTrainerMIM",
    "nnUNetTrainerMIMPretrain",
    "nnUNetTrainerModelsGenesis",
    "nnUNetTrainerModelsGenesisPretrain",
    "nnUNetTrainerPCTNet",
    "nnUNetTrainerPCTNetMIM",
    "nnUNetTrainerPCTNetMIMPretrain",
    "nnUNetTrainerPCTNetModelsGenesis",
    "nnUNetTrainerPCTNetModelsGenesisPretrain",
    "nnUNetTrainerPCTNetPatchSwapping",
    "nnUNetTrainerPCTNetPatchSwappingPretrain",
    "nnUNetTrainerPCTNetVF",
    "nnUNetTrainerPCTNetVFPretrain",
    "nnUNetTrainerPatchSwapping",
    "nnUNetTrainerPatchSwappingPretrain",
    "nnUNetTrainerSwinUNETR",
    "nnUNetTrainerUNETR",
    "nnUNetTrainerVF",
    "nnUNetTrainerVFPretrain",
]
