"""State dicts in the layout that the MIS-FM authors release, of any width, with random values.

Written out name by name, without the package's own mapping; tests with official fixtures compare them with what the
official code saved.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

WIDTHS = (4, 4, 8, 16, 32)
# Mode -> whether levels 0 and 1 are 3D there
LEVELS_3D = {0: (True, True), 1: (False, True), 2: (False, False)}


def released_row(offset: Sequence[int], window: int) -> int:
    """The row of the bias table for an offset of two tokens, each part from 1 - w to w - 1."""
    z, y, x = (part + window - 1 for part in offset)
    return z * (3 * window - 1) + y * (2 * window - 1) + x


@functools.lru_cache
def released_index(window: int) -> Tensor:
    """The buffer `relative_position_index`, token pair by token pair."""
    tokens = list(itertools.product(range(window), repeat=3))
    return torch.tensor(
        [[released_row([a - b for a, b in zip(i, j, strict=True)], window) for j in tokens] for i in tokens]
    )


class Builder:
    """Collects tensors of random values under their names."""

    def __init__(self, seed: int, batches: int = 0) -> None:
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self.batches = batches

    def add(self, key: str, *shape: int) -> None:
        self.state[key] = 0.2 * torch.randn(shape, generator=self.generator)

    def layer(self, key: str, *shape: int, bias: int | None = None) -> None:
        self.add(f"{key}.weight", *shape)
        self.add(f"{key}.bias", shape[0] if bias is None else bias)

    def norm_act(self, key: str, channels: int, first: int = 0) -> None:
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.add(f"{key}.{first}.{name}", channels)
        self.state[f"{key}.{first}.running_var"] = self.state[f"{key}.{first}.running_var"].abs() + 0.5
        self.state[f"{key}.{first}.num_batches_tracked"] = torch.tensor(self.batches)
        self.add(f"{key}.{first + 1}.weight", 1)

    def norm_act_conv(self, key: str, channels: int, *shape: int, first: int = 0, bias: int | None = None) -> None:
        self.norm_act(key, channels, first)
        self.layer(f"{key}.{first + (2 if first == 0 else 3)}", *shape, bias=bias)

    def conv_block(self, key: str, channels: int, kernel: Sequence[int]) -> None:
        for first in (0, 3):  # the second convolution is number 6: a dropout is in between
            self.norm_act_conv(key, channels, channels, channels, *kernel, first=first)

    def transformer(self, key: str, channels: int, heads: int, window: int) -> None:
        for block in (0, 1):
            part = f"{key}.trans.blocks.{block}"
            self.layer(f"{part}.norm1", channels)
            self.layer(f"{part}.norm2", channels)
            self.add(f"{part}.attn.relative_position_bias_table", (2 * window - 1) ** 3, heads)
            self.state[f"{part}.attn.relative_position_index"] = released_index(window)
            self.layer(f"{part}.attn.qkv", 3 * channels, channels)
            self.layer(f"{part}.attn.proj", channels, channels)
            self.layer(f"{part}.mlp.fc1", 4 * channels, channels)
            self.layer(f"{part}.mlp.fc2", channels, 4 * channels)
        self.layer(f"{key}.norm_layer", channels)


def released_pct_net(
    widths: Sequence[int] = WIDTHS,
    classes: int = 3,
    channels: int = 1,
    heads: Sequence[int] = (1, 1, 1),
    windows: Sequence[int] = (6, 6, 6),
    batches: Mapping[int, int] = {1: 100},  # noqa: B006 - read only
    seed: int = 0,
) -> dict[str, Tensor]:
    """A released PCT-Net whose branches have seen `batches` (mode -> number, 0 where not named)."""
    build = Builder(seed)
    c0, c1, c2, c3, c4 = widths
    cube, flat = (3, 3, 3), (1, 3, 3)
    for mode, dims in LEVELS_3D.items():
        build.batches = batches.get(mode, 0)
        k0, k1 = (cube if thick else flat for thick in dims)
        s0, s1 = ((2, 2, 2) if thick else (1, 2, 2) for thick in dims)
        embedding, head = f"embeddings.{mode}", f"pred_heads.{mode}"
        build.layer(f"{embedding}.proj", c0, channels, *k0)
        for part in (embedding, head):
            build.conv_block(f"{part}.conv0.conv_conv", c0, k0)
            build.conv_block(f"{part}.conv1.conv_conv", c1, k1)
        build.norm_act_conv(f"{embedding}.down1.conv", c0, c1, c0, *k1)
        build.norm_act_conv(f"{embedding}.down2.conv", c1, c2, c1, *cube)
        build.norm_act_conv(f"{head}.up1.up", c1, c1, c0, *s0, bias=c0)
        build.norm_act_conv(f"{head}.up1.conv", 2 * c0, c0, 2 * c0, *k0)
        build.norm_act_conv(f"{head}.up2.up", c2, c2, c1, *s1, bias=c1)
        build.norm_act_conv(f"{head}.up2.conv", 2 * c1, c1, 2 * c1, *k1)
        build.norm_act_conv(f"{head}.out_conv0.conv", c0, classes, c0, 1, 1, 1)
        build.norm_act_conv(f"{head}.out_conv1.conv", c1, classes, c1, 1, 1, 1)
    build.batches = sum(batches.values())
    build.norm_act_conv("pyramid_ct.down3.conv", c2, c3, c2, *cube)
    build.norm_act_conv("pyramid_ct.down4.conv", c3, c4, c3, *cube)
    for level, low, high in ((3, c2, c3), (4, c3, c4)):
        build.norm_act_conv(f"pyramid_ct.up{level}.up", high, high, low, 2, 2, 2, bias=low)
        build.norm_act_conv(f"pyramid_ct.up{level}.conv", 2 * low, low, 2 * low, *cube)
    for name, level in (("e2", 0), ("d2", 0), ("e3", 1), ("d3", 1), ("e4", 2)):
        key, width = f"pyramid_ct.convtrans_{name}", (c2, c3, c4)[level]
        build.conv_block(f"{key}.conv.conv_conv", width, cube)
        build.transformer(key, width, heads[level], windows[level])
    build.norm_act_conv("pyramid_ct.out_conv2.conv", c2, classes, c2, 1, 1, 1)
    build.norm_act_conv("pyramid_ct.out_conv3.conv", c3, classes, c3, 1, 1, 1)
    return build.state


def released_fmunet(
    widths: Sequence[int] = WIDTHS, classes: int = 3, channels: int = 1, mode: int = 0, depth: int = 2, seed: int = 0
) -> dict[str, Tensor]:
    """A released FMUNet of a resolution mode."""
    build = Builder(seed)
    kernels = [(3, 3, 3) if thick else (1, 3, 3) for thick in (*LEVELS_3D[mode], True, True, True)]
    build.layer("project", widths[0], channels, *kernels[0])
    for level, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        for side in ("encoder.en", "decoder.de"):
            for i in range(depth):
                key = f"{side}_conv{level}.conv_list.{i}"
                build.layer(f"{key}.0", width)
                build.layer(f"{key}.3", width, width, *kernel)
    for level, (width, low) in enumerate(itertools.pairwise(widths)):
        kernel = kernels[level]
        build.layer(f"encoder.down{level}.down.0", width)
        build.layer(f"encoder.down{level}.down.2", low, width, *kernel)
        build.layer(f"decoder.upcat{level}.up.0", low)
        build.layer(f"decoder.upcat{level}.up.2", width, low, 1, 1, 1)
        build.layer(f"decoder.upcat{level}.conv.0", 2 * width)
        build.layer(f"decoder.upcat{level}.conv.2", width, 2 * width, *kernel)
        build.layer(f"out_layers.{level}.0", width)
        build.layer(f"out_layers.{level}.2", classes, width, *kernel)
    return build.state
