"""The convolution of PCT-Net: keeps the grid, in the memory layout that is fastest for its channels."""

import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures.anisotropy import Size3, as_size3

# oneDNN's blocked layout holds channels in groups of this many (AVX-512) and fills up the last one with zeros
CHANNEL_GROUP = 16


class Convolution(nn.Conv3d):
    """A 3D convolution with bias whose output has the grid of its input.

    On the CPU, inputs whose channels do not fill oneDNN's groups (PCT-Net's 24) go in channels-last; the values are the
    same. Measured: docs/performance.md.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: odd kernel size per axis.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: Size3) -> None:
        super().__init__(in_channels, out_channels, kernel, padding=as_size3([size // 2 for size in kernel]))
        self.channels_last = in_channels > CHANNEL_GROUP and in_channels % CHANNEL_GROUP > 0

    def in_layout(self, x: Tensor) -> Tensor:
        """The same values (B, in_channels, D, H, W) in the memory layout that is fastest here."""
        if self.channels_last and x.device.type == "cpu" and not torch.compiler.is_compiling():
            return x.contiguous(memory_format=torch.channels_last_3d)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, in_channels, D, H, W) to (B, out_channels, D, H, W)."""
        return super().forward(self.in_layout(x))
