"""MONAI's transformer U-Nets for any patch size: the input is padded inside to what they need, the output cropped.

Papers: Hatamizadeh et al., UNETR, WACV 2022, arXiv:2103.10504; Hatamizadeh et al., Swin UNETR, BrainLes 2021,
arXiv:2201.01266. The networks are MONAI's own (`pip install 'nnunetv2-misfm[monai]'`), imported only when one is built,
with random weights; nothing of MONAI's pretrained ones is used. They stand beside PCT-Net as comparators, so they have
one output and none of the parts that nnU-Net's deep supervision looks for.

Shape letters: B batch, C channels, D H W voxels in array order.
"""

import importlib
import math
from collections.abc import Sequence
from types import ModuleType

from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_misfm.errors import MisfmError

# Swin UNETR halves every axis five times (MONAI's SwinUNETR, "Spatial Shape Constraints")
SWIN_DIVISOR = 32
# UNETR's tokens are cubes of 16 voxels (paper and MONAI)
UNETR_DIVISOR = 16


def monai_nets() -> ModuleType:
    """Returns `monai.networks.nets`.

    Raises:
        MisfmError: MONAI is not installed.
    """
    try:
        return importlib.import_module("monai.networks.nets")
    except ImportError as error:
        raise MisfmError(
            f"expected MONAI for its networks SwinUNETR and UNETR, but it cannot be imported ({error}): "
            "pip install 'nnunetv2-misfm[monai]'."
        ) from error


def multiple_above(size: Sequence[int], divisor: int) -> tuple[int, ...]:
    """Returns a size (D, H, W) rounded up to a multiple of `divisor` along each axis."""
    return tuple(math.ceil(n / divisor) * divisor for n in size)


class PaddedNetwork(nn.Module):
    """A 3D network of one output that sees its input padded with zeros at the far end of each axis.

    Args:
        name: what errors call the network.
        network: maps (B, C, D, H, W) to logits of the same grid.
        deep_supervision: must be false; nnU-Net passes it to every network.

    Raises:
        ValueError: deep supervision is asked for.
    """

    def __init__(self, name: str, network: nn.Module, *, deep_supervision: bool) -> None:
        super().__init__()
        if deep_supervision:
            raise ValueError(
                f"{name} has one output: expected deep_supervision=False, got True; train it with nnUNetTrainer{name}."
            )
        self.name = name
        self.network = network

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the size (D, H, W) that the inner network gets for an input of this size."""
        raise NotImplementedError(f"{type(self).__name__} must say to which size it pads")

    def forward(self, x: Tensor) -> Tensor:
        """Maps an image to logits.

        Args:
            x: (B, input_channels, D, H, W), float.

        Returns:
            (B, num_classes, D, H, W).

        Raises:
            ValueError: x is not a batch of 3D images.
        """
        if x.ndim != 5:
            raise ValueError(f"{self.name} is a 3D network: expected (B, C, D, H, W), got shape {tuple(x.shape)}.")
        depth, height, width = x.shape[2:]
        padded = self.padded_size((depth, height, width))
        x = functional.pad(x, (0, padded[2] - width, 0, padded[1] - height, 0, padded[0] - depth))
        return self.network(x)[:, :, :depth, :height, :width]


class SwinUNETR(PaddedNetwork):
    """MONAI's Swin UNETR. All arguments are plain data, fit for a checkpoint.

    Every axis is padded to a multiple of 32, and the last one to 64 where all would be 32: MONAI's InstanceNorm cannot
    normalise the one voxel that 32 x 32 x 32 leaves at the deepest level.

    Args:
        input_channels: channels of the image.
        num_classes: channels of the output.
        feature_size: channels of the finest level, a multiple of 12; the default is that of MONAI's BTCV example
            (research-contributions, SwinUNETR/BTCV; the class's own default is 24).
        deep_supervision: must be false.

    Raises:
        MisfmError: MONAI is not installed.
        ValueError: deep supervision is asked for, or MONAI refuses the widths.
    """

    def __init__(
        self, input_channels: int, num_classes: int, *, feature_size: int = 48, deep_supervision: bool = False
    ) -> None:
        network = monai_nets().SwinUNETR(
            in_channels=input_channels, out_channels=num_classes, feature_size=feature_size
        )
        super().__init__("SwinUNETR", network, deep_supervision=deep_supervision)

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the next multiple of 32 per axis, with two voxels or more at the deepest level."""
        padded = multiple_above(size, SWIN_DIVISOR)
        alone = math.prod(padded) == SWIN_DIVISOR ** len(padded)
        return (*padded[:-1], 2 * SWIN_DIVISOR) if alone else padded


class UNETR(PaddedNetwork):
    """MONAI's UNETR, made for one patch size. All arguments are plain data, fit for a checkpoint.

    Its position embedding has an entry per token, so every input is padded to the same size: the patch's next multiple
    of 16. What MONAI's transformer blocks hold for cross-attention, which UNETR never uses, is left out.

    Args:
        input_channels: channels of the image.
        num_classes: channels of the output.
        patch_size: voxels per axis (D, H, W) of the largest input.
        feature_size: channels of the finest level; this and the next three defaults are MONAI's own.
        hidden_size: channels of a token, a multiple of `num_heads`.
        mlp_dim: channels within a transformer block's MLP.
        num_heads: attention heads.
        deep_supervision: must be false.

    Raises:
        MisfmError: MONAI is not installed.
        ValueError: deep supervision is asked for, or MONAI refuses the widths.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        *,
        patch_size: Sequence[int],
        feature_size: int = 16,
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_heads: int = 12,
        deep_supervision: bool = False,
    ) -> None:
        img_size = multiple_above(patch_size, UNETR_DIVISOR)
        network = monai_nets().UNETR(
            in_channels=input_channels,
            out_channels=num_classes,
            img_size=img_size,
            feature_size=feature_size,
            hidden_size=hidden_size,
            mlp_dim=mlp_dim,
            num_heads=num_heads,
        )
        for block in network.vit.blocks:  # parameters without gradients, which DDP does not accept
            block.norm_cross_attn, block.cross_attn = nn.Identity(), nn.Identity()
        super().__init__("UNETR", network, deep_supervision=deep_supervision)
        self.img_size = img_size

    def padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the one size that the network takes.

        Raises:
            ValueError: The input is larger.
        """
        if any(n > most for n, most in zip(size, self.img_size, strict=True)):
            raise ValueError(f"UNETR was made for inputs of at most {self.img_size} voxels, got {size}.")
        return self.img_size
