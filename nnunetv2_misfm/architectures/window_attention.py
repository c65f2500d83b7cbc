"""Shifted-window self-attention over 3D token grids, the transformer branch of PCT-Net.

Papers: Wang et al., MIS-FM, arXiv:2306.16925; its transformer is the shifted-window one of Liu et al., Swin
Transformer, arXiv:2103.14030, section 3.2, in 3D with windows of 6 x 6 x 6 tokens.

Deliberately unlike the code that the MIS-FM authors released (net/transformer.py):

- The relative-position index uses the strides ((2w-1)^2, 2w-1, 1), so that every 3D offset owns a row of the
  bias table. The released code uses (3w-1, 2w-1, 1), which makes offsets share rows; its tables can be
  re-indexed without loss.
- The bias table always has (2w-1)^3 rows. A window longer than the grid is cut along that axis alone and uses the
  part of the table that it needs, so no entry of a state dict depends on the patch size and the other axes still
  shift. `window_shrink="cube"` gives the released rule: the shortest axis sets the window of all.
- Masks are made once per grid, not in every forward pass; the index is made once per module and not saved.
- The attention matrix is not stored: PyTorch's scaled_dot_product_attention on a GPU, where shifted blocks keep one
  masked bias per window for the whole batch, and cpu_attention.py on the CPU.

Kept as released, because its weights were trained so: tokens are padded with zeros after the LayerNorm, at the
far end of each axis, and padded tokens take part in the softmax (unless `mask_padding`).

Shape letters: B batch, D H W the token grid in array order, C channels, h heads, d = C / h, N tokens per window.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_misfm.architectures import cpu_attention
from nnunetv2_misfm.architectures.anisotropy import Size3
from nnunetv2_misfm.architectures.dropout import Dropout

# Added to the logits of token pairs that only the cyclic shift brought together (released code).
MASKED_LOGIT = -100.0
# Standard deviation of the initial bias table (released code).
BIAS_TABLE_STD = 0.02


def padded_grid(grid: Size3, window: Size3) -> Size3:
    """The grid rounded up to a multiple of the window along each axis."""
    (depth, height, width), (wd, wh, ww) = grid, window
    return (depth + wd - 1) // wd * wd, (height + wh - 1) // wh * wh, (width + ww - 1) // ww * ww


def pad_grid(tokens: Tensor, grid: Size3) -> Tensor:
    """Tokens (B, D, H, W, C) with zeros at the far end of each axis, up to a larger grid."""
    _, depth, height, width, _ = tokens.shape
    return functional.pad(tokens, (0, 0, 0, grid[2] - width, 0, grid[1] - height, 0, grid[0] - depth))


def window_partition(tokens: Tensor, window: Size3, num_heads: int) -> Tensor:
    """Tokens grouped by window and head.

    Args:
        tokens: (B, D, H, W, C), each axis of the grid a multiple of the window.
        window: window per axis.
        num_heads: parts into which C is split; the first C / h channels are head 0.

    Returns:
        (B, windows * h, N, d), windows and the tokens in them in row-major order, the head running fastest.
    """
    batch, depth, height, width, channels = tokens.shape
    wd, wh, ww = window
    head_dim = channels // num_heads
    tokens = tokens.view(batch, depth // wd, wd, height // wh, wh, width // ww, ww, num_heads, head_dim)
    windows = depth * height * width // (wd * wh * ww)
    return tokens.permute(0, 1, 3, 5, 7, 2, 4, 6, 8).reshape(batch, windows * num_heads, wd * wh * ww, head_dim)


def window_reverse(windows: Tensor, window: Size3, grid: Size3) -> Tensor:
    """The inverse of `window_partition`: (B, windows * h, N, d) back to (B, D, H, W, C)."""
    (depth, height, width), (wd, wh, ww) = grid, window
    batch, count, tokens_per_window, head_dim = windows.shape
    num_heads = count * tokens_per_window // (depth * height * width)
    windows = windows.reshape(batch, depth // wd, height // wh, width // ww, num_heads, wd, wh, ww, head_dim)
    return windows.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(batch, depth, height, width, num_heads * head_dim)


def relative_position_index(window_size: int) -> Tensor:
    """The row of the bias table for each pair of tokens in a cubic window.

    Args:
        window_size: edge w of the window.

    Returns:
        (w^3, w^3) int64 in [0, (2w-1)^3). Entry (i, j) stands for the offset of token i (query) from token j
        (key): its three parts, plus w - 1, are digits to the base 2w - 1.
    """
    edge = torch.arange(window_size)
    coordinates = torch.stack(torch.meshgrid(edge, edge, edge, indexing="ij")).flatten(1)  # 3, N
    digits = coordinates[:, :, None] - coordinates[:, None, :] + window_size - 1
    base = 2 * window_size - 1
    return digits[0] * base**2 + digits[1] * base + digits[2]


def attention_mask(
    grid: Size3, window: Size3, shift: Size3, device: torch.device, *, hide_beyond: Size3 | None = None
) -> Tensor:
    """What to add to the logits after a cyclic shift, so that tokens attend only to their true neighbours.

    The shift carries the first tokens of an axis behind its last ones. Two tokens of a window may attend to each
    other if, along every axis, both were carried or neither was.

    Args:
        grid: padded grid (D, H, W), each axis a multiple of the window.
        window: window per axis.
        shift: tokens by which each axis was rolled towards its start; 0 where it was not.
        device: where the mask shall live.
        hide_beyond: the grid before padding, to which nobody may attend beyond; None hides nothing.

    Returns:
        (windows, N, N) float32, 0 where the query (second index) may attend to the key (third) and -100 elsewhere.
    """
    region = torch.zeros(grid, device=device)
    for axis in range(3):
        carried = torch.arange(grid[axis], device=device) >= grid[axis] - shift[axis]
        extent = [1, 1, 1]
        extent[axis] = grid[axis]
        region = region + carried.view(extent) * 2.0**axis
    region = window_partition(region[None, ..., None], window, num_heads=1)[0, :, :, 0]  # windows, N
    mask = (region[:, None, :] != region[:, :, None]) * MASKED_LOGIT
    if hide_beyond is None:
        return mask
    shown = torch.ones((1, *hide_beyond, 1), device=device)
    shown = torch.roll(pad_grid(shown, grid), (-shift[0], -shift[1], -shift[2]), dims=(1, 2, 3))
    shown = window_partition(shown, window, num_heads=1)[0, :, None, :, 0]  # windows, 1, N
    return torch.where(shown == 0, MASKED_LOGIT, mask)


@functools.lru_cache(maxsize=64)
def cached_attention_mask(
    grid: Size3, window: Size3, shift: Size3, device: torch.device, *, hide_beyond: Size3 | None = None
) -> Tensor:
    """`attention_mask`, made once; the tensor is shared and must not be altered."""
    # A mask first made while predicting must stay usable in training, which an inference tensor is not.
    with torch.inference_mode(False), torch.no_grad():
        return attention_mask(grid, window, shift, device, hide_beyond=hide_beyond)


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows, with a learned bias per relative position (Swin, equation 4).

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: h.
        window_size: nominal window edge w; the bias table has (2w-1)^3 rows whatever the grid.
        mask_padding: whether the tokens that pad the grid are hidden from attention.
        attention_dropout: dropout of the attention probabilities.
        dropout: dropout behind the output projection.
    """

    relative_position_index: Tensor

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: int,
        mask_padding: bool,
        attention_dropout: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.mask_padding = mask_padding
        self.attention_dropout = attention_dropout
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window_size - 1) ** 3, num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=BIAS_TABLE_STD)
        self.register_buffer("relative_position_index", relative_position_index(window_size), persistent=False)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.proj_dropout = Dropout(dropout)

    def position_bias(self, window: Size3) -> Tensor:
        """The bias (h, N, N) of a window no larger than the nominal one: its token pairs' rows of the table."""
        (wd, wh, ww), full = window, self.window_size
        tokens = wd * wh * ww
        index = self.relative_position_index.view(full, full, full, full, full, full)
        index = index[:wd, :wh, :ww, :wd, :wh, :ww].reshape(-1)
        return self.relative_position_bias_table.index_select(0, index).view(tokens, tokens, -1).permute(2, 0, 1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """Attention within windows, by whatever does not store its matrix; see `cpu_attention.attend`."""
        # PyTorch has a fused CPU kernel, but without gradients of the bias.
        if query.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return cpu_attention.attend(query, key, value, bias, mask, dropout)
        # Unshifted, windows count as samples and share one bias. Shifted, they count as heads, each with a masked bias
        # of its own, of which the batch shares one copy.
        bias = bias.to(query.dtype)
        if mask is not None:
            bias = (mask.to(query.dtype)[:, None] + bias).flatten(0, 1)  # windows * h, N, N
        shape = (-1, bias.shape[0], *query.shape[2:])
        attended = functional.scaled_dot_product_attention(
            query.reshape(shape),
            key.reshape(shape),
            value.reshape(shape),
            attn_mask=bias[None],
            dropout_p=dropout,
        )
        return attended.reshape(query.shape)

    def forward(self, tokens: Tensor, window: Size3, shift: Size3) -> Tensor:
        """Attends within the windows of a shifted grid.

        Args:
            tokens: (B, D, H, W, C), float; any grid.
            window: window per axis, at most the nominal one.
            shift: cyclic shift per axis, in tokens; 0 for none.

        Returns:
            (B, D, H, W, C).
        """
        _, depth, height, width, _ = tokens.shape
        grid = (depth, height, width)
        padded = padded_grid(grid, window)
        tokens = pad_grid(tokens, padded)
        shifted = any(shift)
        if shifted:
            tokens = torch.roll(tokens, (-shift[0], -shift[1], -shift[2]), dims=(1, 2, 3))
        query, key, value = (
            window_partition(part, window, self.num_heads) for part in self.qkv(tokens).chunk(3, dim=-1)
        )
        bias = self.position_bias(window)  # h, N, N
        mask = None
        hide_beyond = grid if self.mask_padding and padded != grid else None
        if shifted or hide_beyond:
            # A compiler fuses the making of the mask into its use and warns of caches.
            make_mask = attention_mask if torch.compiler.is_compiling() else cached_attention_mask
            mask = make_mask(padded, window, shift, tokens.device, hide_beyond=hide_beyond)  # windows, N, N
        dropout = self.attention_dropout if self.training else 0.0
        attended = self.attend(query, key, value, bias, mask, dropout)
        tokens = window_reverse(attended, window, padded)
        if shifted:
            tokens = torch.roll(tokens, shift, dims=(1, 2, 3))
        # The projection acts on each token alone, so padded tokens are dropped before it.
        return self.proj_dropout(self.proj(tokens[:, :depth, :height, :width]))
