"""BatchNorm followed by PReLU and a convolution: the pre-activated convolution of which PCT-Net is made.

Training on the CPU in float32 keeps nothing but the input of the three (of the first two, where dropout lies before the
convolution) and makes the rest anew in the backward pass. PyTorch's modules one by one keep three tensors. Elsewhere
they are used, and a compiler fuses them by itself.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from nnunetv2_misfm.architectures.convolution import Convolution


class NormAct(nn.Module):
    """BatchNorm, then a PReLU with one weight for all channels.

    Hooks of `norm`, `act` and the convolution are not called where the three are one function.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(channels)
        self.act = nn.PReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, D, H, W) to the same shape."""
        if not self.is_fused(x):
            return self.act(self.norm(x))
        return _NormAct.apply(x, self.norm.weight, self.norm.bias, self.act.weight, self.counted(), None)

    def convolve(self, x: Tensor, conv: nn.Conv3d | nn.ConvTranspose3d) -> Tensor:
        """Maps (B, C, D, H, W) to conv(self(x))."""
        if not self.is_fused(x) or torch.is_autocast_enabled("cpu"):
            return conv(self(x))
        norm = self.norm
        return _NormAct.apply(x, norm.weight, norm.bias, self.act.weight, self.counted(), conv, conv.weight, conv.bias)

    def is_fused(self, x: Tensor) -> bool:
        """Whether the input goes through one function."""
        # What is uncommon is left to PyTorch, its errors too
        common = self.norm.momentum is not None and self.norm.track_running_stats and x.numel() > x.shape[1]
        on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
        return self.norm.training and common and on_cpu and not torch.compiler.is_compiling()

    def counted(self) -> nn.BatchNorm3d:
        """The BatchNorm, one more batch counted."""
        assert self.norm.num_batches_tracked is not None
        self.norm.num_batches_tracked.add_(1)
        return self.norm


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        slope: Tensor,
        norm: nn.BatchNorm3d,
        conv: nn.Conv3d | nn.ConvTranspose3d | None,
        *kernel_and_bias: Tensor,
    ) -> Tensor:
        assert norm.momentum is not None
        normed, mean, inverse_std = torch.native_batch_norm(
            x, weight, bias, norm.running_mean, norm.running_var, True, norm.momentum, norm.eps
        )
        ctx.save_for_backward(x, weight, bias, slope, mean, inverse_std, *kernel_and_bias)
        ctx.eps, ctx.conv = norm.eps, conv
        activated = functional.leaky_relu_(normed, slope.item())
        if conv is None:
            return activated
        kernel, kernel_bias = kernel_and_bias
        return torch.ops.aten.convolution(_in_layout(activated, conv), kernel, kernel_bias, *_geometry(conv))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, slope, mean, inverse_std, *kernel_and_bias = ctx.saved_tensors
        var = inverse_std**-2 - ctx.eps
        normed = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, ctx.eps)[0]
        grad_kernel_and_bias: list[Tensor] = []
        if ctx.conv is not None:
            activated = _in_layout(functional.leaky_relu(normed, slope.item()), ctx.conv)
            kernel, kernel_bias = kernel_and_bias
            geometry = (list(kernel_bias.shape), *_geometry(ctx.conv), [True, True, True])
            grad, *grad_kernel_and_bias = torch.ops.aten.convolution_backward(grad, activated, kernel, *geometry)
            del activated  # the largest tensors of a step: none stays longer than it is needed
        grad_slope = normed.clamp(max=0).mul_(grad).sum().view(1)
        grad = torch.ops.aten.leaky_relu_backward(grad, normed, slope.item(), False)
        del normed
        grad_x, grad_weight, grad_bias = torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse_std, True, ctx.eps, [True, True, True]
        )
        return grad_x, grad_weight, grad_bias, grad_slope, None, None, *grad_kernel_and_bias


def _in_layout(x: Tensor, conv: nn.Module) -> Tensor:
    """The tensor in the memory layout that a convolution is fastest with."""
    return conv.in_layout(x) if isinstance(conv, Convolution) else x


def _geometry(conv: nn.Conv3d | nn.ConvTranspose3d) -> tuple[Any, ...]:
    """Stride, padding, dilation, whether transposed, output padding, and groups."""
    return conv.stride, conv.padding, conv.dilation, conv.transposed, conv.output_padding, conv.groups
