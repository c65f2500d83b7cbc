"""Stochastic depth: residual branches that are left out for whole samples of a training batch.

Huang et al., Deep Networks with Stochastic Depth, arXiv:1603.09382; MIS-FM's released code drops with 0.2 in every
block. On the CPU a branch is not computed for the samples that drop it, a fifth of the transformer's work there.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class DropPath(nn.Module):
    """Adds a residual branch: in training none for dropped samples, 1 / (1 - p) times as much for the others.

    Args:
        probability: p in [0, 1).
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"drop_path: expected a probability in [0, 1), got {probability}.")
        self.probability = probability

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], parts: Iterable[nn.Module] = ()) -> Tensor:
        """Maps (B, ...) to x + branch(x) of the same shape.

        Args:
            x: (B, ...).
            branch: maps samples (b, ...), some of the B, to the same shape, each by itself.
            parts: the modules of the branch, whose parameters get a gradient of zero where all samples drop it, as DDP
                and optimisers expect.
        """
        if not self.training or self.probability == 0:
            return x + branch(x)
        scale = 1 / (1 - self.probability)
        if x.device.type != "cpu" or torch.compiler.is_compiling():  # there a choice would wait for the device
            kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.probability)
            return x + branch(x) * (kept * scale)
        draws = torch.rand(x.shape[0])
        samples = [i for i in range(x.shape[0]) if draws[i].item() >= self.probability]
        if len(samples) == x.shape[0]:
            return x + branch(x) * scale
        if not samples:
            return _WithoutBranch.apply(x, *(parameter for part in parts for parameter in part.parameters()))
        chosen = torch.tensor(samples)
        return x.index_add(0, chosen, branch(x[chosen]).to(x.dtype), alpha=scale)


class _WithoutBranch(torch.autograd.Function):
    """The identity, with gradients of zero for the parameters of what was left out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)
