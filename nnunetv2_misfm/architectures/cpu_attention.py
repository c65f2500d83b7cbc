"""Attention on the CPU that never stores its matrix: a few windows at a time, made anew in the backward pass.

PyTorch's `scaled_dot_product_attention` has no fused CPU kernel for a bias that is learned; it stores the matrix of all
windows several times over (softmax, dropout, and their products). Here that of a few windows fits the processor's cache
(docs/performance.md has the numbers).

Shape letters: B samples, W windows of a sample, h heads, N tokens of a window, d channels of a head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nnunetv2_misfm.architectures.dropout import keep_mask

# Entries of the attention matrix that are made at a time: 4 MB in float32 (measured: docs/performance.md)
CHUNK_ENTRIES = 1 << 20


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Multi-head attention within windows: softmax(query key^T / sqrt(d) + bias + mask) value.

    Args:
        query: (B, W * h, N, d), the head running fastest; key and value likewise.
        key: keys.
        value: values.
        bias: (h, N, N), added to the logits of every window.
        mask: (W, N, N), added to the logits of every head, or None.
        dropout: probability of dropping an attention weight; 0 outside training.

    Returns:
        (B, W * h, N, d).
    """
    return _Attend.apply(query, key, value, bias.to(query.dtype), mask, dropout)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        out = torch.empty_like(query)
        keeps = []
        for sample, rows, windows in _chunks(query, bias):
            weights = _softmax(query[sample, rows], key[sample, rows], bias, mask, windows)
            if dropout:
                keeps.append(keep_mask(weights, dropout))
                weights *= keeps[-1]
            torch.bmm(weights, value[sample, rows], out=out[sample, rows])
        ctx.dropout = dropout
        ctx.save_for_backward(query, key, value, bias, mask, *keeps)
        return out.mul_(1 / (1 - dropout))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask, *keeps = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        grad = grad * (1 / (1 - ctx.dropout))
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        grad_bias = torch.zeros_like(bias)
        for chunk, (sample, rows, windows) in enumerate(_chunks(query, bias)):
            q, k, v, g = (tensor[sample, rows] for tensor in (query, key, value, grad))
            grad_q, grad_k, grad_v = (tensor[sample, rows] for tensor in grads)
            weights = _softmax(q, k, bias, mask, windows)
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            if keeps:
                grad_weights *= keeps[chunk]
                torch.bmm((weights * keeps[chunk]).transpose(1, 2), g, out=grad_v)
            else:
                torch.bmm(weights.transpose(1, 2), g, out=grad_v)
            grad_logits = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_bias += grad_logits.view(-1, *bias.shape).sum(0)
            grad_logits *= scale
            torch.bmm(grad_logits, k, out=grad_q)
            torch.bmm(grad_logits.transpose(1, 2), q, out=grad_k)
        return *grads, grad_bias, None, None


def _chunks(query: Tensor, bias: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """The sample, rows (window and head) and windows of every chunk."""
    num_heads = bias.shape[0]
    num_windows = query.shape[1] // num_heads
    step = max(1, CHUNK_ENTRIES // bias.numel())
    for sample in range(query.shape[0]):
        for first in range(0, num_windows, step):
            last = min(first + step, num_windows)
            yield sample, slice(first * num_heads, last * num_heads), slice(first, last)


def _softmax(query: Tensor, key: Tensor, bias: Tensor, mask: Tensor | None, windows: slice) -> Tensor:
    """The attention weights (n * h, N, N) of n windows, from their queries and keys (n * h, N, d)."""
    added = bias.expand(windows.stop - windows.start, *bias.shape) if mask is None else mask[windows, None] + bias
    logits = torch.baddbmm(
        added.reshape(-1, *bias.shape[1:]).to(query.dtype), query, key.transpose(1, 2), alpha=query.shape[-1] ** -0.5
    )
    return logits.softmax(-1)
