"""Released FMUNet weights (FMUNetV3 / GRUNet of the Volume Fusion follow-up) under the names of this package's FMUNet.

The released network is built for one resolution mode, whose kernels tell which; its tensors move as they are.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nnunetv2_misfm.architectures.anisotropy import NUM_LEVELS
from nnunetv2_misfm.architectures.fmunet import FMUNet
from nnunetv2_misfm.citations import FMUNET, MISFM, NNUNET
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights.released import (
    STRIDES,
    Conversion,
    finite_float32,
    pools,
    require_names,
    require_shapes,
    shapes_of,
    size,
    width_note,
)

NAME = "FMUNet"
# The released code's own defaults, those of the trainers too
DEFAULT_FEATURES, DEFAULT_DEPTH = (32, 64, 128, 256, 512), 2
_DEPTH_NOTE = "its blocks have {} convolutions, the trainers' have 2: let the plans name FMUNet with that depth"
_BLOCK = re.compile(r"encoder\.en_conv0\.conv_list\.\d+\.0\.weight")


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of a released FMUNet, whole or in part."""
    ours = any(key.startswith(("encoder.project.", "decoder.seg_layers.")) for key in state)
    return not ours and any(key.startswith(("encoder.en_conv", "decoder.de_conv", "out_layers.")) for key in state)


def convert(
    state: Mapping[str, Tensor], resolution_mode: int | None = None, strides: Sequence[Sequence[int]] | None = None
) -> Conversion:
    """Returns a released FMUNet as our network.

    Args:
        state: The released state dict.
        resolution_mode: Must be None: there is nothing to choose.
        strides: Not looked at, for the same reason.

    Raises:
        MisfmError: Tensors are missing, unknown, of a wrong shape or not finite, or a mode was asked for.
    """
    if resolution_mode is not None:
        raise MisfmError(
            f"expected no --resolution-mode with {NAME}, got {resolution_mode}: its file holds one resolution mode "
            "alone; leave the option out."
        )
    depth = max(1, sum(bool(_BLOCK.fullmatch(key)) for key in state))
    with torch.device("meta"):
        names = {ours: released_name(ours) for ours in FMUNet(1, 1, depth=depth).state_dict()}
    require_names(state, list(names.values()), set(names.values()), NAME)

    steps = [f"encoder.down{level}.down.2.weight" for level in range(NUM_LEVELS - 1)]
    features = [size(state, key, 0, 5) for key in ("project.weight", *steps)]
    num_channels, num_classes = size(state, "project.weight", 1, 5), size(state, "out_layers.0.2.weight", 0, 5)
    mode = _resolution_mode(state)
    kwargs: dict[str, Any] = {"features_per_stage": features, "strides": STRIDES[mode], "depth": depth}
    shapes = shapes_of(NAME, FMUNet, input_channels=num_channels, num_classes=num_classes, **kwargs)
    require_shapes(state, {names[ours]: shape for ours, shape in shapes.items()}, NAME)
    return Conversion(
        name=NAME,
        trainer="nnUNetTrainerFMUNetVFPretrain",
        description={
            "class": "nnunetv2_misfm.architectures.FMUNet",
            "kwargs": kwargs,
            "kwargs_to_import": [],
            "input_channels": num_channels,
            "label_channels": 0,
            "num_classes": num_classes,
        },
        weights={ours: finite_float32(state, theirs) for ours, theirs in names.items()},
        resolution_mode=mode,
        left_out={},
        found=[f"{NAME}: channels {features}, {num_channels} input channel(s), {num_classes} classes, depth {depth}"],
        taken=f"took resolution mode {mode}, {pools(mode)}: the one that its kernels are made for",
        notes=width_note(features, DEFAULT_FEATURES) + [_DEPTH_NOTE.format(depth)] * (depth != DEFAULT_DEPTH),
        facts={},
        citations=[NNUNET, MISFM, FMUNET],
    )


def released_name(ours: str) -> str:
    """Returns the released name of one of our tensors: all are the same but for the stem and the heads."""
    for pattern, released in (
        (r"encoder\.project\.", "project."),
        (r"decoder\.seg_norms\.(\d)\.", r"out_layers.\1.0."),
        (r"decoder\.seg_layers\.(\d)\.", r"out_layers.\1.2."),
    ):
        ours = re.sub(f"^{pattern}", released, ours)
    return ours


def _resolution_mode(state: Mapping[str, Tensor]) -> int:
    """Returns the mode whose levels 0 and 1 have the file's kernels along the first axis."""
    flat = [size(state, key, 2, 5) == 1 for key in ("project.weight", "encoder.en_conv1.conv_list.0.3.weight")]
    return sum(flat)
