"""FMUNet, a residual 3D U-Net: the network of the Volume Fusion follow-up.

Paper: Wang et al., IEEE Transactions on Image Processing 34, 6041-6052, 2025, DOI 10.1109/TIP.2025.3610249. Where it
leaves a detail open, the released code (FMUNet in openmedlab/MIS-FM; FMUNetV3, today GRUNet, in PyMIC) decides; this
network computes what that code computes from the same weights.

Keys of the state dict are the released ones, but for two moves:

- `project.*` is `encoder.project.*`, so that the encoder is all of `encoder.` when it alone is transferred.
- `out_layers.{l}.0.*` is `decoder.seg_norms.{l}.*`, and `out_layers.{l}.2.*` is `decoder.seg_layers.{l}.*`: the name
  that nnU-Net skips when it loads pretrained weights, here for the class-dependent convolution alone.

Deliberately unlike the released code:

- nnU-Net's strides say along which axes the first two levels pool, and any axis may be the short one. The released
  "resolution modes" 0, 1, 2 are strides[1], strides[2] = (2,2,2), (2,2,2); (1,2,2), (2,2,2); and (1,2,2), (1,2,2).
- Grids that do not divide are rounded up on the way down, and on the way up resampled to the size of the skip; the
  released code doubles them and fails.
- `decoder.deep_supervision` decides whether all heads answer, not the stage of training.

Shape letters: B batch, C channels, D H W voxels in array order. Level l is the l-th resolution, 0 the finest.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, leaky_relu

from nnunetv2_misfm.architectures.anisotropy import NUM_LEVELS, Size3, as_size3, grid_sizes, kernel_sizes
from nnunetv2_misfm.architectures.dropout import Dropout

# Slope of every LeakyReLU below zero, and what the initialisation reckons with (released code)
NEGATIVE_SLOPE = 0.01


@dataclass(frozen=True)
class FMULayout:
    """What the parts of the network must agree on; the fields are arguments of `FMUNet`, checked."""

    features_per_stage: tuple[int, ...]
    strides: tuple[Size3, ...]
    depth: int
    dropout_per_stage: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises a ValueError that names the argument which does not fit."""
        for name in ("features_per_stage", "strides", "dropout_per_stage"):
            values = getattr(self, name)
            if len(values) != NUM_LEVELS:
                raise ValueError(f"{name}: FMUNet needs {NUM_LEVELS} entries, got {len(values)}: {values}.")
        if min(self.features_per_stage) < 1:
            raise ValueError(f"features_per_stage: expected at least 1 channel, got {self.features_per_stage}.")
        if self.strides[0] != (1, 1, 1):
            raise ValueError(f"strides: the first entry must be (1, 1, 1), got {self.strides[0]}.")
        if any(step not in (1, 2) for stride in self.strides for step in stride):
            raise ValueError(f"strides: FMUNet pools by 1 or 2 along an axis, got {self.strides}.")
        if self.depth < 1:
            raise ValueError(f"depth: expected at least 1 convolution per block, got {self.depth}.")
        if not all(0 <= value < 1 for value in self.dropout_per_stage):
            raise ValueError(f"dropout_per_stage: expected probabilities in [0, 1), got {self.dropout_per_stage}.")

    @property
    def kernels(self) -> list[Size3]:
        """The convolution kernel of each level; the step down from a level has that level's, too."""
        return kernel_sizes(self.strides)


def convolution(in_channels: int, out_channels: int, kernel: Size3, stride: Size3 = (1, 1, 1)) -> nn.Conv3d:
    """A convolution with bias whose output grid is the input's divided by the stride and rounded up."""
    padding = as_size3([size // 2 for size in kernel])
    return nn.Conv3d(in_channels, out_channels, kernel, stride, padding)


def normalisation(channels: int) -> nn.InstanceNorm3d:
    """InstanceNorm with weight and bias, without running statistics."""
    return nn.InstanceNorm3d(channels, affine=True)


def norm_act_conv(channels: int, conv: nn.Conv3d, dropout: float | None = None) -> nn.Sequential:
    """A convolution in pre-activation order; the activation overwrites the normalised tensor, which is its own."""
    between = [] if dropout is None else [Dropout(dropout)]
    return nn.Sequential(normalisation(channels), nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True), *between, conv)


class ResConv(nn.Module):
    """The block of a level: `depth` pre-activated convolutions, each with a residual of its own."""

    def __init__(self, layout: FMULayout, level: int) -> None:
        super().__init__()
        channels, kernel = layout.features_per_stage[level], layout.kernels[level]
        self.conv_list = nn.ModuleList(
            norm_act_conv(channels, convolution(channels, channels, kernel), layout.dropout_per_stage[level])
            for _ in range(layout.depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, D, H, W) to the same shape."""
        for conv in self.conv_list:
            x = conv(x) + x
        return x


class Down(nn.Module):
    """The step down from a level: a strided convolution."""

    def __init__(self, layout: FMULayout, level: int) -> None:
        super().__init__()
        channels, low_channels = layout.features_per_stage[level : level + 2]
        conv = convolution(channels, low_channels, layout.kernels[level], layout.strides[level + 1])
        self.down = norm_act_conv(channels, conv)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, D, H, W) to the coarser level, each axis divided by its stride and rounded up."""
        return self.down(x)


class UpCat(nn.Module):
    """The step up to a level: 1x1x1 convolution, trilinear resampling, convolution of skip and result together."""

    def __init__(self, layout: FMULayout, level: int) -> None:
        super().__init__()
        channels, low_channels = layout.features_per_stage[level : level + 2]
        self.up = norm_act_conv(low_channels, convolution(low_channels, channels, (1, 1, 1)))
        self.conv = norm_act_conv(2 * channels, convolution(2 * channels, channels, layout.kernels[level]))

    def forward(self, low: Tensor, skip: Tensor) -> Tensor:
        """Maps the coarser level and the encoder's (B, C, D, H, W) of this one to (B, C, D, H, W)."""
        up = interpolate(self.up(low), size=skip.shape[2:], mode="trilinear", align_corners=True)
        return self.conv(torch.cat((skip, up), dim=1))


class Encoder(nn.Module):
    """The stem `project`, then each level's block `en_conv{level}` and the step `down{level}` from it."""

    def __init__(self, input_channels: int, layout: FMULayout) -> None:
        super().__init__()
        self.project = convolution(input_channels, layout.features_per_stage[0], layout.kernels[0])
        for level in range(NUM_LEVELS):
            self.add_module(f"en_conv{level}", ResConv(layout, level))
            if level < NUM_LEVELS - 1:
                self.add_module(f"down{level}", Down(layout, level))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps the image (B, input_channels, D, H, W) to each level's features (B, C, ...), finest first."""
        x = self.project(x)
        features: list[Tensor] = []
        for level in range(NUM_LEVELS):
            if level > 0:
                x = getattr(self, f"down{level - 1}")(x)
            x = getattr(self, f"en_conv{level}")(x)
            features.append(x)
        return features


class Decoder(nn.Module):
    """A block `de_conv4` on the deepest level, then per level the step up `upcat{level}`, block `de_conv{level}`, head.

    `deep_supervision` is a plain attribute that nnU-Net switches; the four heads exist either way.
    """

    def __init__(self, num_classes: int, layout: FMULayout, *, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        for level in reversed(range(NUM_LEVELS)):
            if level < NUM_LEVELS - 1:
                self.add_module(f"upcat{level}", UpCat(layout, level))
            self.add_module(f"de_conv{level}", ResConv(layout, level))
        heads = list(zip(layout.features_per_stage, layout.kernels, strict=True))[:-1]
        self.seg_norms = nn.ModuleList(normalisation(channels) for channels, _ in heads)
        self.seg_layers = nn.ModuleList(convolution(channels, num_classes, kernel) for channels, kernel in heads)

    def forward(self, features: Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Maps the encoder's features, finest first, to logits.

        Returns:
            Logits (B, num_classes, D, H, W) of level 0 or, under deep supervision, of all heads, finest first.
        """
        x = getattr(self, f"de_conv{NUM_LEVELS - 1}")(features[-1])
        logits: list[Tensor] = []
        for level in reversed(range(NUM_LEVELS - 1)):
            x = getattr(self, f"upcat{level}")(x, features[level])
            x = getattr(self, f"de_conv{level}")(x)
            if self.deep_supervision or level == 0:
                activated = leaky_relu(self.seg_norms[level](x), NEGATIVE_SLOPE, inplace=True)
                logits.insert(0, self.seg_layers[level](activated))
        return logits if self.deep_supervision else logits[0]


def initialise_(module: nn.Module) -> None:
    """Draws a convolution's weight from He's normal distribution and zeroes its bias, in place (released code)."""
    if isinstance(module, nn.Conv3d):
        nn.init.kaiming_normal_(module.weight, a=NEGATIVE_SLOPE)
        assert module.bias is not None
        nn.init.zeros_(module.bias)


class FMUNet(nn.Module):
    """FMUNet. All arguments are plain data, fit for nnU-Net's `arch_kwargs` and for a checkpoint.

    Args:
        input_channels: channels of the image.
        num_classes: outputs of each segmentation head.
        features_per_stage: channels of the five levels; the default is the released configuration.
        strides: nnU-Net's strides, five triples, the first (1, 1, 1); the default is resolution mode 0.
        depth: convolutions of a block.
        dropout_per_stage: element-wise dropout before each convolution of a level's blocks.
        deep_supervision: whether `forward` returns the logits of levels 0 to 3 or those of level 0 alone.

    Raises:
        ValueError: a value does not fit a network of five levels.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        features_per_stage: Sequence[int] = (32, 64, 128, 256, 512),
        strides: Sequence[Sequence[int]] = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
        depth: int = 2,
        dropout_per_stage: Sequence[float] = (0.0, 0.0, 0.2, 0.2, 0.2),
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.layout = FMULayout(
            features_per_stage=tuple(features_per_stage),
            strides=tuple(as_size3(stride) for stride in strides),
            depth=depth,
            dropout_per_stage=tuple(dropout_per_stage),
        )
        self.encoder = Encoder(input_channels, self.layout)
        self.decoder = Decoder(num_classes, self.layout, deep_supervision=deep_supervision)
        self.apply(initialise_)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Maps an image to logits.

        Args:
            x: (B, input_channels, D, H, W), float, of any size that leaves two voxels or more at the deepest level.

        Returns:
            Logits (B, num_classes, D, H, W) or, if `decoder.deep_supervision`, the list of those of levels 0 to
            3, whose sizes `grid_sizes` gives.

        Raises:
            ValueError: x is not a batch of 3D images, or leaves InstanceNorm a single voxel; in evaluation, too, since
                its statistics are always those of the sample.
        """
        if x.ndim != 5:
            raise ValueError(f"FMUNet is a 3D network: expected (B, C, D, H, W), got shape {tuple(x.shape)}.")
        if math.prod(grid_sizes(x.shape[2:], self.layout.strides)[-1]) == 1:
            raise ValueError(
                "FMUNet's InstanceNorm cannot normalise one voxel, which is what an input of shape "
                f"{tuple(x.shape)} leaves at the deepest level: use a larger patch."
            )
        return self.decoder(self.encoder(x))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """What the convolutions of a forward pass put out per sample, nnU-Net's measure of memory need.

        Args:
            input_size: voxels per axis (D, H, W), without batch and channels.

        Returns:
            The sum over convolutions of output channels x voxels; not what the resampling puts out.
        """
        features, depth = self.layout.features_per_stage, self.layout.depth
        voxels = [math.prod(grid) for grid in grid_sizes(input_size, self.layout.strides)]
        total = 0
        for level, (channels, size) in enumerate(zip(features, voxels, strict=True)):
            total += (1 + 2 * depth) * channels * size  # stem or step down, blocks of encoder and decoder
            if level == NUM_LEVELS - 1:
                continue
            total += channels * (voxels[level + 1] + size)  # 1x1x1 before the resampling, concatenation
            if self.decoder.deep_supervision or level == 0:
                total += self.num_classes * size
        return total
