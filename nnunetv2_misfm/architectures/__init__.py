"""Networks: plain PyTorch, importable by the dotted paths that plans and checkpoints name."""

from nnunetv2_misfm.architectures.context_prior import ContextPriorNetwork
from nnunetv2_misfm.architectures.fmunet import FMUNet
from nnunetv2_misfm.architectures.padded import UNETR, SwinUNETR
from nnunetv2_misfm.architectures.pct_net import PCTNet

__all__ = ["UNETR", "ContextPriorNetwork", "FMUNet", "PCTNet", "SwinUNETR"]
