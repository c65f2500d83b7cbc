"""Dropout whose random numbers cost little on the CPU.

PyTorch's CPU dropout draws one Bernoulli variable after another in one thread: 15 % of a PCT-Net training step. Here one
draw of 64 random bits decides on four values, ten times as fast, from the same generator (another stream: the same seed
drops other values).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

# Values decided by one draw of a 64-bit number, and the number of outcomes of each one's share
LANES = 4
OUTCOMES = 1 << 16


def keep_mask(x: Tensor, probability: float) -> Tensor:
    """Independent True (keep) or False (drop) per value.

    Args:
        x: tensor of any shape on the CPU.
        probability: of dropping, in [0, 1); rounded to a multiple of 2^-16.

    Returns:
        bool, of the shape of x.
    """
    count = x.numel()
    draws = torch.empty((count + LANES - 1) // LANES, dtype=torch.int64, device=x.device)
    draws.random_(-(1 << 63), None)
    # Signed 16-bit shares, uniform from -2^15 on
    return draws.view(torch.int16)[:count].view(x.shape) >= round(probability * OUTCOMES) - OUTCOMES // 2


class Dropout(nn.Module):
    """Element-wise dropout, in training alone; kept values are scaled by 1 / (1 - p).

    Args:
        probability: p in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Maps a tensor to one of the same shape."""
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # where PyTorch draws in parallel
            return functional.dropout(x, self.probability)
        return x * keep_mask(x, self.probability) * (1 / (1 - self.probability))
