"""The transformer branch of PCT-Net: two blocks of window attention, the second with shifted windows.

Papers: Wang et al., MIS-FM, arXiv:2306.16925; Liu et al., Swin Transformer, arXiv:2103.14030, section 3.2, in 3D with
windows of 6 x 6 x 6 tokens. The attention itself is in window_attention.py.

Shape letters: B batch, D H W the token grid in array order, C channels.
"""

from typing import Literal

from torch import Tensor, nn

from nnunetv2_misfm.architectures.anisotropy import Size3
from nnunetv2_misfm.architectures.drop_path import DropPath
from nnunetv2_misfm.architectures.dropout import Dropout
from nnunetv2_misfm.architectures.window_attention import WindowAttention

WindowShrink = Literal["per_axis", "cube"]

# Hidden width of the MLP over C (released code).
MLP_RATIO = 4


def window_and_shift(grid: Size3, window_size: int, *, shifted: bool, shrink: WindowShrink) -> tuple[Size3, Size3]:
    """The window and the cyclic shift that a block uses on a grid.

    Args:
        grid: tokens per axis (D, H, W).
        window_size: nominal window edge, in tokens.
        shifted: True for the second block of a layer.
        shrink: "per_axis" cuts the window along the axes that are shorter than it and shifts those that are
            longer; "cube" is the released rule: if the shortest axis is no longer than the window, it becomes the
            window of all axes and nothing shifts.

    Returns:
        Window and shift per axis, in tokens.
    """
    if shrink == "cube" and min(grid) <= window_size:
        edge = min(grid)
        return (edge, edge, edge), (0, 0, 0)
    half = window_size // 2 if shifted else 0
    depth, height, width = grid
    window = (min(window_size, depth), min(window_size, height), min(window_size, width))
    shift = (
        half if depth > window_size else 0,
        half if height > window_size else 0,
        half if width > window_size else 0,
    )
    return window, shift


class Mlp(nn.Module):
    """Linear, GELU, dropout, linear, dropout on each token.

    Args:
        channels: C.
        dropout: dropout behind each linear layer.
    """

    def __init__(self, channels: int, *, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, MLP_RATIO * channels)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(MLP_RATIO * channels, channels)
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (..., C) to (..., C)."""
        return self.dropout(self.fc2(self.dropout(self.act(self.fc1(tokens)))))


class SwinBlock(nn.Module):
    """LayerNorm, window attention, residual; LayerNorm, MLP, residual (Swin Transformer, equation 3).

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: h.
        shifted: whether the windows are shifted by half a window.
        window_size: nominal window edge.
        window_shrink: what happens to windows larger than the grid; see `window_and_shift`.
        mask_padding: whether the tokens that pad the grid are hidden from attention.
        dropout: dropout behind the projection and in the MLP.
        attention_dropout: dropout of the attention probabilities.
        drop_path: probability of dropping either residual branch for a sample.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        shifted: bool,
        window_size: int,
        window_shrink: WindowShrink,
        mask_padding: bool,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.window_size = window_size
        self.window_shrink: WindowShrink = window_shrink
        self.norm1 = nn.LayerNorm(channels)
        self.attn = WindowAttention(
            channels,
            num_heads,
            window_size=window_size,
            mask_padding=mask_padding,
            attention_dropout=attention_dropout,
            dropout=dropout,
        )
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, dropout=dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (B, D, H, W, C) of any grid to the same shape."""
        _, depth, height, width, _ = tokens.shape
        window, shift = window_and_shift(
            (depth, height, width), self.window_size, shifted=self.shifted, shrink=self.window_shrink
        )

        def attention(some: Tensor) -> Tensor:
            return self.attn(self.norm1(some), window, shift)

        def mlp(some: Tensor) -> Tensor:
            return self.mlp(self.norm2(some))

        tokens = self.drop_path(tokens, attention, (self.norm1, self.attn))
        return self.drop_path(tokens, mlp, (self.norm2, self.mlp))


class SwinLayer(nn.Module):
    """Two blocks, the second with shifted windows; the arguments are those of `SwinBlock`."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        *,
        window_size: int,
        window_shrink: WindowShrink,
        mask_padding: bool,
        dropout: float,
        attention_dropout: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            SwinBlock(
                channels,
                num_heads,
                shifted=shifted,
                window_size=window_size,
                window_shrink=window_shrink,
                mask_padding=mask_padding,
                dropout=dropout,
                attention_dropout=attention_dropout,
                drop_path=drop_path,
            )
            for shifted in (False, True)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps tokens (B, D, H, W, C) of any grid to the same shape."""
        for block in self.blocks:
            tokens = block(tokens)
        return tokens
