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

from nnunetv2_misfm.architectures.dropout import kept, random_bytes, rounded

# Entries of the attention matrix that are made at a time: 2 MB in float32 (measured: docs/performance.md)
CHUNK_ENTRIES = 1 << 19


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
        # Drawn at once: small tensors that live until the backward pass would keep the memory between them from reuse
        draws = random_bytes(torch.Size((*query.shape[:3], query.shape[2])), query.device) if dropout else None
        for sample, rows, windows in _chunks(query, bias):
            weights = _softmax(query[sample, rows], key[sample, rows], bias, mask, windows)
            if draws is not None:
                weights *= kept(draws[sample, rows], dropout, weights.dtype)
            torch.bmm(weights, value[sample, rows], out=out[sample, rows])
        ctx.dropout = dropout
        ctx.save_for_backward(query, key, value, bias, mask, draws)
        return out.mul_(1 / (1 - rounded(dropout)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask, draws = ctx.saved_tensors
        grad = grad * (1 / (1 - rounded(ctx.dropout)))
        grads = [torch.empty_like(tensor) for tensor in (query, key, value)]
        grad_bias = torch.zeros_like(bias, dtype=torch.promote_types(bias.dtype, torch.float32))  # sums many chunks
        for sample, rows, windows in _chunks(query, bias):
            q, k, v, g = (tensor[sample, rows] for tensor in (query, key, value, grad))
            grad_q, grad_k, grad_v = (tensor[sample, rows] for tensor in grads)
            weights = _softmax(q, k, bias, mask, windows)
            grad_weights = torch.bmm(g, v.transpose(1, 2))
            used = weights
            if draws is not None:
                keep = kept(draws[sample, rows], ctx.dropout, weights.dtype)
                grad_weights *= keep
                used = keep.mul_(weights)
            torch.bmm(used.transpose(1, 2), g, out=grad_v)
            grad_logits = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            grad_bias += grad_logits.view(-1, *bias.shape).sum(0, dtype=grad_bias.dtype)
            torch.bmm(grad_logits, k, out=grad_q)
            torch.bmm(grad_logits.transpose(1, 2), q, out=grad_k)
        scale = query.shape[-1] ** -0.5
        return grads[0].mul_(scale), grads[1].mul_(scale), grads[2], grad_bias.to(bias.dtype), None, None


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
    logits = torch.bmm(query * query.shape[-1] ** -0.5, key.transpose(1, 2))
    by_window = logits.view(-1, *bias.shape)  # n, h, N, N
    by_window += bias
    if mask is not None:
        by_window += mask[windows, None]
    return logits.softmax(-1)
