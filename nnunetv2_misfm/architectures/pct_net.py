"""PCT-Net, a U-Net whose three deepest levels run convolutions and shifted-window attention side by side.

Paper: Wang et al., MIS-FM, arXiv:2306.16925 (pyramid parallel convolution and transformer network). Where it
leaves a detail open, the released code (openmedlab/MIS-FM, net/pct_net.py) decides; in evaluation this network
computes what that code computes from the same weights.

Deliberately unlike the released code:

- One network for every anisotropy and patch size. The released one is built for one patch size and holds stems
  and heads of three "resolution modes", two of which are never used; here nnU-Net's strides say along which
  axes the first two levels pool, and any axis may be the short one. Modes 0, 1, 2 are strides[1], strides[2] =
  (2,2,2), (2,2,2); (1,2,2), (2,2,2); and (1,2,2), (1,2,2).
- Grids that do not divide are rounded up when pooled and cropped at the far end when upsampled; the released
  code fails on them.
- No parameter is unused, so DDP needs no search for unused ones: a LayerNorm per transformer block that the
  released code never calls does not exist.
- Of a segmentation head, only the class-dependent convolution is called `seg_layers`, the name that nnU-Net
  skips when it loads pretrained weights; the normalisation before it is `seg_norms` and is loaded.
- Window attention: see window_attention.py and swin.py.

Shape letters: B batch, C channels, D H W voxels in array order. Level l is the l-th resolution, 0 the finest.
"""

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast, get_args

import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures.anisotropy import NUM_LEVELS, Size3, as_size3, grid_sizes, kernel_sizes
from nnunetv2_misfm.architectures.convolution import Convolution
from nnunetv2_misfm.architectures.dropout import Dropout
from nnunetv2_misfm.architectures.norm_act import NormAct
from nnunetv2_misfm.architectures.swin import SwinLayer, WindowShrink

# Levels with a transformer branch; levels 0 and 1 are convolutions alone (released code, net/pct_net.py).
TRANSFORMER_LEVELS = (2, 3, 4)
# Attention heads of these levels (released code)
NUM_HEADS = (4, 8, 16)


def default_num_heads(features_per_stage: Sequence[int]) -> list[int]:
    """Attention heads of levels 2, 3 and 4: the released 4, 8 and 16, or the most below that divide the channels."""
    widths = features_per_stage[TRANSFORMER_LEVELS[0] :]
    return [
        max(heads for heads in range(1, most + 1) if channels % heads == 0)
        for channels, most in zip(widths, NUM_HEADS, strict=True)
    ]


@dataclass(frozen=True)
class PCTLayout:
    """What the parts of the network must agree on; the fields are arguments of `PCTNet`, checked."""

    features_per_stage: tuple[int, ...]
    strides: tuple[Size3, ...]
    num_heads: tuple[int, ...]
    window_size: int
    window_shrink: WindowShrink
    mask_padding: bool
    dropout_per_stage: tuple[float, ...]
    attention_dropout: float
    drop_path: float

    def __post_init__(self) -> None:
        """Raises a ValueError that names the argument which does not fit."""
        levels, transformers = NUM_LEVELS, len(TRANSFORMER_LEVELS)
        lengths = {"features_per_stage": levels, "strides": levels, "dropout_per_stage": levels}
        for name, expected in (lengths | {"num_heads": transformers}).items():
            values = getattr(self, name)
            if len(values) != expected:
                raise ValueError(f"{name}: PCT-Net needs {expected} entries, got {len(values)}: {values}.")
        if self.strides[0] != (1, 1, 1):
            raise ValueError(f"strides: the first entry must be (1, 1, 1), got {self.strides[0]}.")
        if any(step not in (1, 2) for stride in self.strides for step in stride):
            raise ValueError(f"strides: PCT-Net pools by 1 or 2 along an axis, got {self.strides}.")
        for level, heads in zip(TRANSFORMER_LEVELS, self.num_heads, strict=True):
            channels = self.features_per_stage[level]
            if heads < 1 or channels % heads:
                raise ValueError(
                    f"num_heads: {heads} heads do not divide the {channels} channels of level {level} "
                    f"(features_per_stage {self.features_per_stage}, num_heads {self.num_heads})."
                )
        if self.window_size < 1:
            raise ValueError(f"window_size: expected at least 1 token, got {self.window_size}.")
        if self.window_shrink not in get_args(WindowShrink):
            known = get_args(WindowShrink)
            raise ValueError(f"window_shrink: expected one of {known}, got {self.window_shrink!r}.")
        dropouts = {"attention_dropout": (self.attention_dropout,), "drop_path": (self.drop_path,)}
        for name, values in (dropouts | {"dropout_per_stage": self.dropout_per_stage}).items():
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"{name}: expected probabilities in [0, 1), got {values}.")


class ConvBlock(nn.Module):
    """Two convolutions in pre-activation order, without residual, with dropout before the second."""

    def __init__(self, layout: PCTLayout, level: int) -> None:
        super().__init__()
        channels, kernel = layout.features_per_stage[level], kernel_sizes(layout.strides)[level]
        self.norm_act1 = NormAct(channels)
        self.conv1 = Convolution(channels, channels, kernel)
        self.norm_act2 = NormAct(channels)
        self.dropout = Dropout(layout.dropout_per_stage[level])
        self.conv2 = Convolution(channels, channels, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, D, H, W) to the same shape."""
        x = self.norm_act1.convolve(x, self.conv1)
        if self.dropout.probability == 0:
            return self.norm_act2.convolve(x, self.conv2)
        return self.conv2(self.dropout(self.norm_act2(x)))


class PCTBlock(nn.Module):
    """A `ConvBlock` and a `SwinLayer` side by side, summed; only the latter has an identity path."""

    def __init__(self, layout: PCTLayout, level: int) -> None:
        super().__init__()
        dropout = layout.dropout_per_stage[level]
        self.conv = ConvBlock(layout, level)
        self.token_dropout = Dropout(dropout)
        self.swin = SwinLayer(
            layout.features_per_stage[level],
            layout.num_heads[TRANSFORMER_LEVELS.index(level)],
            window_size=layout.window_size,
            window_shrink=layout.window_shrink,
            mask_padding=layout.mask_padding,
            dropout=dropout,
            attention_dropout=layout.attention_dropout,
            drop_path=layout.drop_path,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, D, H, W) to the same shape."""
        tokens = self.token_dropout(x.permute(0, 2, 3, 4, 1).contiguous())  # B, D, H, W, C
        return self.conv(x) + self.swin(tokens).permute(0, 4, 1, 2, 3)


def level_block(layout: PCTLayout, level: int) -> ConvBlock | PCTBlock:
    """A new block of a level, for the encoder or the decoder."""
    return PCTBlock(layout, level) if level in TRANSFORMER_LEVELS else ConvBlock(layout, level)


class DownSample(nn.Module):
    """The step down to a level: max-pooling, BatchNorm, PReLU, convolution."""

    def __init__(self, layout: PCTLayout, level: int) -> None:
        super().__init__()
        in_channels, out_channels = layout.features_per_stage[level - 1 : level + 1]
        self.pool = nn.MaxPool3d(layout.strides[level], ceil_mode=True)
        self.norm_act = NormAct(in_channels)
        self.conv = Convolution(in_channels, out_channels, kernel_sizes(layout.strides)[level])

    def forward(self, x: Tensor) -> Tensor:
        """Maps the finer level (B, C, D, H, W) to this one, each axis divided by its stride and rounded up."""
        return self.norm_act.convolve(self.pool(x), self.conv)


class UpCat(nn.Module):
    """The step up to a level: transposed convolution, concatenation with the skip, convolution of both."""

    def __init__(self, layout: PCTLayout, level: int) -> None:
        super().__init__()
        channels, low_channels = layout.features_per_stage[level : level + 2]
        stride = layout.strides[level + 1]
        self.norm_act_up = NormAct(low_channels)
        self.up = nn.ConvTranspose3d(low_channels, channels, stride, stride)
        self.norm_act_cat = NormAct(2 * channels)
        self.conv = Convolution(2 * channels, channels, kernel_sizes(layout.strides)[level])

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        """Maps the coarser level and the encoder's (B, C, D, H, W) of this one to (B, C, D, H, W)."""
        depth, height, width = skip.shape[2:]
        up = self.norm_act_up.convolve(low, self.up)[:, :, :depth, :height, :width]
        return self.norm_act_cat.convolve(torch.cat((skip, up), dim=1), self.conv)


class Encoder(nn.Module):
    """The stem, then per level the step down to it and its block; `stages` is indexed by level."""

    def __init__(self, input_channels: int, layout: PCTLayout) -> None:
        super().__init__()
        self.stem = Convolution(input_channels, layout.features_per_stage[0], kernel_sizes(layout.strides)[0])
        self.stages = nn.ModuleList([nn.Sequential(OrderedDict(block=level_block(layout, 0)))])
        for level in range(1, NUM_LEVELS):
            down, block = DownSample(layout, level), level_block(layout, level)
            self.stages.append(nn.Sequential(OrderedDict[str, nn.Module](down=down, block=block)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps the image (B, input_channels, D, H, W) to each level's features (B, C, ...), finest first."""
        x = self.stem(x)
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


class DecoderStage(nn.Module):
    """The step up to a level and its block."""

    def __init__(self, layout: PCTLayout, level: int) -> None:
        super().__init__()
        self.up = UpCat(layout, level)
        self.block = level_block(layout, level)

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        """Maps the coarser level and the encoder's (B, C, D, H, W) of this one to (B, C, D, H, W)."""
        return self.block(self.up(low, skip))


class Decoder(nn.Module):
    """The way up and a segmentation head on each level but the deepest; every ModuleList is indexed by level.

    `deep_supervision` is a plain attribute that nnU-Net switches; the heads exist either way.
    """

    def __init__(self, num_classes: int, layout: PCTLayout, *, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        features = layout.features_per_stage[:-1]
        self.stages = nn.ModuleList(DecoderStage(layout, level) for level in range(len(features)))
        self.seg_norms = nn.ModuleList(NormAct(channels) for channels in features)
        self.seg_layers = nn.ModuleList(nn.Conv3d(channels, num_classes, 1) for channels in features)

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Maps the encoder's features, finest first, to logits.

        Returns:
            Logits (B, num_classes, D, H, W) of level 0 or, under deep supervision, of all, finest first.
        """
        x = features[-1]
        logits: list[Tensor] = []
        for level in reversed(range(len(self.stages))):
            x = self.stages[level](x, features[level])
            if self.deep_supervision or level == 0:
                seg_norm, seg_layer = cast(NormAct, self.seg_norms[level]), cast(nn.Conv3d, self.seg_layers[level])
                logits.insert(0, seg_norm.convolve(x, seg_layer))
        return logits if self.deep_supervision else logits[0]


class PCTNet(nn.Module):
    """PCT-Net. All arguments are plain data, fit for nnU-Net's `arch_kwargs` and for a checkpoint.

    Args:
        input_channels: channels of the image.
        num_classes: outputs of each segmentation head.
        features_per_stage: channels of the five levels; the default is the released configuration.
        strides: nnU-Net's strides, five triples, the first (1, 1, 1); the default is resolution mode 0.
        num_heads: attention heads of levels 2, 3 and 4.
        window_size: edge of the attention window, in tokens.
        window_shrink: "per_axis" cuts a window along the axes where the grid is shorter than it; "cube" is the
            released rule, see `swin.window_and_shift`.
        mask_padding: whether the tokens that fill up a grid to whole windows are hidden from attention. The released
            network lets them take part, and its weights were trained so.
        dropout_per_stage: dropout of each level (convolutions, tokens, projection and MLP), element-wise.
        attention_dropout: dropout of the attention probabilities.
        drop_path: probability of dropping a residual branch of a transformer block for a sample.
        deep_supervision: whether `forward` returns the logits of levels 0 to 3 or those of level 0 alone.

    Raises:
        ValueError: a value does not fit a network of five levels.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        features_per_stage: Sequence[int] = (24, 48, 128, 256, 512),
        strides: Sequence[Sequence[int]] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        num_heads: Sequence[int] = NUM_HEADS,
        window_size: int = 6,
        window_shrink: WindowShrink = "per_axis",
        mask_padding: bool = False,
        dropout_per_stage: Sequence[float] = (0.0, 0.0, 0.2, 0.2, 0.2),
        attention_dropout: float = 0.2,
        drop_path: float = 0.2,
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layout = PCTLayout(
            features_per_stage=tuple(features_per_stage),
            strides=tuple(as_size3(stride) for stride in strides),
            num_heads=tuple(num_heads),
            window_size=window_size,
            window_shrink=window_shrink,
            mask_padding=mask_padding,
            dropout_per_stage=tuple(dropout_per_stage),
            attention_dropout=attention_dropout,
            drop_path=drop_path,
        )
        self.encoder = Encoder(input_channels, self.layout)
        self.decoder = Decoder(num_classes, self.layout, deep_supervision=deep_supervision)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Maps an image to logits.

        Args:
            x: (B, input_channels, D, H, W), float, of any size from one voxel per axis.

        Returns:
            Logits (B, num_classes, D, H, W) or, if `decoder.deep_supervision`, the list of those of levels 0 to
            3, whose sizes `grid_sizes` gives.

        Raises:
            ValueError: x is not a batch of 3D images or, in training, leaves BatchNorm a single voxel.
        """
        if x.ndim != 5:
            raise ValueError(f"PCT-Net is a 3D network: expected (B, C, D, H, W), got shape {tuple(x.shape)}.")
        if self.training and x.shape[0] * math.prod(grid_sizes(x.shape[2:], self.layout.strides)[-1]) == 1:
            raise ValueError(
                "PCT-Net's BatchNorm cannot train on one voxel, which is what an input of shape "
                f"{tuple(x.shape)} leaves at the deepest level: use a larger patch or batch size."
            )
        return self.decoder(self.encoder(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """What the convolutions of a forward pass put out per sample, nnU-Net's measure of memory need.

        Args:
            input_size: voxels per axis (D, H, W), without batch and channels.

        Returns:
            The sum over convolutions, transposed ones included, of output channels x voxels; not attention.
        """
        features, strides = self.layout.features_per_stage, self.layout.strides
        voxels = [math.prod(grid) for grid in grid_sizes(input_size, strides)]
        total = 0
        for level, (channels, size) in enumerate(zip(features, voxels, strict=True)):
            total += 3 * channels * size  # stem or step down, block
            if level == NUM_LEVELS - 1:
                continue
            total += channels * voxels[level + 1] * math.prod(strides[level + 1])  # transposed, before the crop
            total += 3 * channels * size  # concatenation, block
            if self.decoder.deep_supervision or level == 0:
                total += self.num_classes * size
        return total
