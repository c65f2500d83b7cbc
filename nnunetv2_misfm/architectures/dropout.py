"""Dropout whose random numbers cost little on the CPU.

PyTorch's CPU dropout draws one Bernoulli variable after another in one thread, a seventh of a PCT-Net training step
(docs/performance.md). Here one draw of 64 random bits decides on eight values, from the same generator (another stream:
the same seed drops other values), and a byte per value is all that the backward pass keeps.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

OUTCOMES = 256


def rounded(probability: float) -> float:
    """The probability as a multiple of 1/256, which is what the CPU drops with: 0, or 1/256 to 255/256."""
    return min(max(round(probability * OUTCOMES), 1), OUTCOMES - 1) / OUTCOMES if probability else 0.0


def random_bytes(shape: torch.Size, device: torch.device) -> Tensor:
    """Independent int8 values of a shape, uniform in [-128, 127]."""
    count = shape.numel()
    draws = torch.empty((count + 7) // 8, dtype=torch.int64, device=device).random_(-(1 << 63), None)
    return draws.view(torch.int8)[:count].view(shape)


def kept(draws: Tensor, probability: float, dtype: torch.dtype) -> Tensor:
    """1 for each draw that keeps its value and 0 for the others, a share of `rounded(probability)` of them."""
    threshold = int(rounded(probability) * OUTCOMES) - OUTCOMES // 2
    return torch.ge(draws, threshold, out=torch.empty(draws.shape, dtype=dtype, device=draws.device))


class Dropout(nn.Module):
    """Element-wise dropout, in training alone; kept values are scaled by 1 / (1 - p).

    Args:
        probability: p in [0, 1); on the CPU rounded to a multiple of 1/256, from 1/256 to 255/256.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Maps a tensor to one of the same shape."""
        if not self.training or self.probability == 0:
            return x
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # drawn in parallel there
            return functional.dropout(x, self.probability)
        return _Dropout.apply(x, self.probability)

    def extra_repr(self) -> str:
        """The probability, as PyTorch's own module prints it."""
        return f"p={self.probability}"


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, probability: float) -> Tensor:
        draws = random_bytes(x.shape, x.device)
        ctx.save_for_backward(draws)
        ctx.probability = probability
        return kept(draws, probability, x.dtype).mul_(x).mul_(1 / (1 - rounded(probability)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (draws,) = ctx.saved_tensors
        scale = 1 / (1 - rounded(ctx.probability))
        return kept(draws, ctx.probability, grad.dtype).mul_(grad).mul_(scale), None
