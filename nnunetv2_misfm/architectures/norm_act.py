"""BatchNorm followed by PReLU, the pre-activation of every convolution of PCT-Net."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class NormAct(nn.Module):
    """BatchNorm, then a PReLU with one weight for all channels.

    Training on the CPU in float32 goes through one function that keeps nothing but its input and makes the normalised
    values anew in the backward pass; hooks of `norm` and `act` are not called then. The rest is left to the two
    modules, which a compiler fuses by itself.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, D, H, W) to the same shape."""
        norm = self.norm
        counter = norm.num_batches_tracked
        common = norm.momentum is not None and x.numel() > x.shape[1]  # else PyTorch decides
        fused = norm.training and x.device.type == "cpu" and x.dtype == torch.float32
        if counter is None or not common or not fused or torch.compiler.is_compiling():
            return self.act(norm(x))
        counter.add_(1)
        buffers = (norm.running_mean, norm.running_var, norm.momentum, norm.eps)
        return _NormAct.apply(x, norm.weight, norm.bias, self.act.weight, *buffers)


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        slope: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        normed, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, running_mean, running_var, True, momentum, eps
        )
        ctx.save_for_backward(x, weight, bias, slope, mean, inverse_std)
        ctx.eps = eps
        return functional.leaky_relu_(normed, slope.item())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, slope, mean, inverse_std = ctx.saved_tensors
        var = inverse_std**-2 - ctx.eps
        normed = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, ctx.eps)[0]
        grad_normed = torch.ops.aten.leaky_relu_backward(grad, normed, slope.item(), False)
        grad_slope = normed.clamp_(max=0).mul_(grad).sum().view(1)
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad_normed, x, weight, None, None, mean, inverse_std, True, ctx.eps, [True, True, True]
        )
        return grad_x, grad_weight, grad_bias, grad_slope, None, None, None, None
