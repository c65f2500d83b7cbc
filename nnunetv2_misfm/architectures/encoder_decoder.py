"""The way of an image through an encoder-decoder, stage by stage, with a visit after each.

nnU-Net's U-Nets (PlainConvUNet, ResidualEncoderUNet) and PCT-Net compute all of it within one `forward`. What changes
features between two stages needs the stages themselves, which both kinds name alike: `encoder.stages`, finest first,
`decoder.stages`, `decoder.seg_layers`. Level l is the l-th resolution, 0 the finest.

Shape letters: B batch, C channels, D H W voxels in array order.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from dynamic_network_architectures.building_blocks.unet_decoder import UNetDecoder
from torch import Tensor, nn

from nnunetv2_misfm.architectures.pct_net import Decoder, PCTNet

# Takes side, level and features (B, C, D, H, W); returns features of the same shape
Visit = Callable[[Literal["encoder", "decoder"], int, Tensor], Tensor]


def require_known_stages(network: nn.Module) -> None:
    """Raises a TypeError where this module does not know a network's stages."""
    decoder = getattr(network, "decoder", None)
    if not (isinstance(network, PCTNet) or type(decoder) is UNetDecoder):
        raise TypeError(
            "expected PlainConvUNet, ResidualEncoderUNet or PCT-Net, whose stages are known, got "
            f"{type(network).__name__}: plan with one of these networks."
        )


def stage_widths(network: nn.Module) -> list[int]:
    """Returns the channels of each level, finest first."""
    if isinstance(network, PCTNet):
        return list(network.layout.features_per_stage)
    encoder: Any = network.encoder
    return list(encoder.output_channels)


def last_features(encoder: Any, decoder: Any, x: Tensor, visit: Visit) -> Tensor:
    """Returns what the finest segmentation head of a network would read.

    Args:
        encoder: Of a network with known stages.
        decoder: Of the same network.
        x: Image (B, channels, D, H, W).
        visit: Called after every stage of the encoder, finest first, and of the decoder, coarsest first; what it
            returns takes the place of the features, in the skip connections too.

    Returns:
        Features (B, C of level 0, D, H, W).
    """
    if getattr(encoder, "stem", None) is not None:
        x = encoder.stem(x)
    skips = []
    for level, stage in enumerate(encoder.stages):
        x = visit("encoder", level, stage(x))
        skips.append(x)
    if isinstance(decoder, Decoder):
        for level in reversed(range(len(decoder.stages))):
            x = visit("decoder", level, decoder.stages[level](x, skips[level]))
        return decoder.seg_norms[0](x)
    for level, up, stage in zip(
        reversed(range(len(skips) - 1)), decoder.transpconvs, decoder.stages, strict=True
    ):  # fmt: skip
        x = visit("decoder", level, stage(torch.cat((up(x), skips[level]), 1)))
    return x
