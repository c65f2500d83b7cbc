"""Released PCT-Net weights (MIS-FM, net/pct_net.py) under the names and in the layout of this package's PCTNet.

The released network holds stems and heads of three resolution modes around one shared pyramid; one mode is taken. Its
attention reads the bias tables with the strides (3w-1, 2w-1, 1), which makes offsets share rows; they are re-indexed
without loss to ((2w-1)^2, 2w-1, 1). It shrinks windows, and tables with them, where the patch that it was built for
leaves a grid no longer than a window; such a table is put in the middle of a full one, whose other rows are zero.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nnunetv2_misfm.architectures.anisotropy import NUM_LEVELS
from nnunetv2_misfm.architectures.pct_net import TRANSFORMER_LEVELS, PCTNet, default_num_heads
from nnunetv2_misfm.citations import MISFM, NNUNET
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
from nnunetv2_misfm.weights.released_pct_net_layout import WINDOW, reindexed, released_index, released_names

NAME = "PCT-Net"
# Channels of the authors' configuration files, the default of the trainers too
DEFAULT_FEATURES = (24, 48, 128, 256, 512)
# The mode of the authors' demonstrations
DEMO_MODE = 1
_COUNTER = "num_batches_tracked"
_TABLE = "relative_position_bias_table"
_INDEX = "relative_position_index"
_UNUSED_NORM = ".norm_layer."


@dataclass(frozen=True)
class PCTNetFile:
    """What the tensors of a released PCT-Net say of it.

    Attributes:
        input_channels: Channels of the image.
        num_classes: Outputs of each head.
        features_per_stage: Channels of the five levels.
        num_heads: Attention heads of levels 2, 3, 4.
        windows: Edge of the attention window at levels 2, 3, 4, in tokens.
        batches: Resolution mode -> training batches that its stem has seen (None: not counted).
    """

    input_channels: int
    num_classes: int
    features_per_stage: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[int, ...]
    batches: dict[int, int | None]

    def kwargs(self, resolution_mode: int) -> dict[str, Any]:
        """Returns the arguments of our network for a resolution mode, beside channels and classes."""
        return {
            "features_per_stage": list(self.features_per_stage),
            "strides": STRIDES[resolution_mode],
            "num_heads": list(self.num_heads),
        }


def recognises(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is of a released PCT-Net, whole or in part."""
    return any(key.startswith(("embeddings.", "pyramid_ct.", "pred_heads.")) for key in state)


def convert(
    state: Mapping[str, Tensor], resolution_mode: int | None = None, strides: Sequence[Sequence[int]] | None = None
) -> Conversion:
    """Returns one resolution mode of a released PCT-Net as our network.

    Args:
        state: The released state dict.
        resolution_mode: 0, 1 or 2; None takes the one that was trained (see `choose_mode`).
        strides: Strides of the five levels of the network that the weights are for, if that is known.

    Raises:
        MisfmError: Tensors are missing, unknown, of a wrong shape or not finite, or the mode cannot be told.
    """
    found = inspect(state)
    mode, taken = choose_mode(found.batches, resolution_mode, strides)
    names = released_names(mode)
    weights = {ours: _converted(state, theirs) for ours, theirs in names.items()}
    counted = ", ".join(f"mode {m}: {'not counted' if n is None else n}" for m, n in found.batches.items())
    return Conversion(
        name=NAME,
        trainer="nnUNetTrainerPCTNetVFPretrain",
        description={
            "class": "nnunetv2_misfm.architectures.PCTNet",
            "kwargs": found.kwargs(mode),
            "kwargs_to_import": [],
            "input_channels": found.input_channels,
            "label_channels": 0,
            "num_classes": found.num_classes,
        },
        weights=weights,
        resolution_mode=mode,
        left_out=_left_out(state, set(names.values())),
        found=[
            f"{NAME}: channels {list(found.features_per_stage)}, {found.input_channels} input channel(s), "
            f"{found.num_classes} classes, attention heads {list(found.num_heads)} and windows {list(found.windows)} "
            "at levels 2 to 4",
            f"training batches that the resolution branches have seen: {counted}",
        ],
        taken=f"took resolution mode {mode}, {pools(mode)}: {taken}",
        notes=_notes(found),
        facts={"windows": list(found.windows), "batches_tracked": [found.batches[m] for m in sorted(found.batches)]},
        citations=[NNUNET, MISFM],
    )


def inspect(state: Mapping[str, Tensor]) -> PCTNetFile:
    """Returns what a released state dict holds, all of its tensors' names and shapes checked.

    Raises:
        MisfmError: Tensors are missing, unknown or of a wrong shape, or the position indices are not the released ones.
    """
    names = {mode: released_names(mode) for mode in STRIDES}
    used = list(dict.fromkeys(theirs for mode in names for theirs in names[mode].values()))
    indices = [key.replace(_TABLE, _INDEX) for key in used if key.endswith(_TABLE)]
    unused = [key for key in state if key.startswith("pyramid_ct.") and _UNUSED_NORM in key]
    needed = [key for key in used + indices if not key.endswith(_COUNTER)]
    require_names(state, needed, {*used, *indices, *unused}, NAME)

    stem, head = "embeddings.0.proj.weight", "pred_heads.0.out_conv0.conv.2.weight"
    steps = [
        f"{'embeddings.0' if level <= 2 else 'pyramid_ct'}.down{level}.conv.2.weight" for level in range(1, NUM_LEVELS)
    ]
    tables = [f"pyramid_ct.convtrans_e{level}.trans.blocks.0.attn.{_TABLE}" for level in TRANSFORMER_LEVELS]
    found = PCTNetFile(
        input_channels=size(state, stem, 1, 5),
        num_classes=size(state, head, 0, 5),
        features_per_stage=tuple(size(state, key, 0, 5) for key in (stem, *steps)),
        num_heads=tuple(size(state, key, 1, 2) for key in tables),
        windows=tuple(_window(size(state, key, 0, 2), key) for key in tables),
        batches={mode: _batches(state, f"embeddings.{mode}.conv0.conv_conv.0.{_COUNTER}") for mode in STRIDES},
    )
    _require_layout(state, found)
    return found


def choose_mode(
    batches: Mapping[int, int | None], wanted: int | None, strides: Sequence[Sequence[int]] | None = None
) -> tuple[int, str]:
    """Returns the resolution mode to take, and why.

    The one asked for; else, of those that have seen training batches, the one whose strides are the target's, the one
    that has seen most, or the demonstrations' (mode 1).

    Args:
        batches: Resolution mode -> training batches seen (None: not counted).
        wanted: The mode that the user asked for.
        strides: Strides of the five levels of the target.

    Raises:
        MisfmError: None was asked for and none has seen a batch.
    """
    trained = {mode: number for mode, number in batches.items() if number}
    if wanted is not None:
        if wanted in trained:
            return wanted, "asked for"
        return wanted, "asked for; WARNING: no training batch is counted for it, so its stem and heads may be untrained"
    if not trained:
        raise MisfmError(
            "expected a count of training batches in one resolution branch at least, got none, so the trained one "
            f"cannot be told: choose with --resolution-mode (the authors' demonstrations use {DEMO_MODE})."
        )
    if len(trained) == 1:
        return next(iter(trained)), "the only one that was trained"
    for mode in trained:
        if strides is not None and STRIDES[mode] == [list(stride) for stride in strides]:
            return mode, "the trained one that pools as the target does; --resolution-mode chooses another"
    most = [mode for mode, number in trained.items() if number == max(trained.values())]
    if len(most) == 1:
        return most[0], "trained on the most batches; --resolution-mode chooses another"
    mode = DEMO_MODE if DEMO_MODE in most else most[0]
    alike = " and ".join(map(str, most))
    return mode, f"modes {alike} were trained equally long; --resolution-mode chooses another"


def _window(num_rows: int, key: str) -> int:
    """Returns the edge of the window that a bias table is for."""
    for window in range(1, WINDOW + 1):
        if num_rows == (2 * window - 1) ** 3:
            return window
    raise MisfmError(
        f"expected {key} with (2w-1)^3 rows for a window w of 1 to {WINDOW} tokens, got {num_rows} rows: the file is "
        "damaged or of another version of the network."
    )


def _batches(state: Mapping[str, Tensor], key: str) -> int | None:
    """Returns the number in a BatchNorm's counter, None where the file has no counters."""
    if key not in state:
        return None
    counter = state[key]
    if counter.numel() != 1 or counter.is_floating_point() or counter.is_complex():
        raise MisfmError(f"expected a whole number in {key}, got {counter.dtype} of shape {tuple(counter.shape)}.")
    return int(counter)


def _require_layout(state: Mapping[str, Tensor], found: PCTNetFile) -> None:
    """Raises where a tensor has not the shape that the widths ask for, or an index is not the released one."""
    windows = dict(zip(TRANSFORMER_LEVELS, found.windows, strict=True))
    sizes = {"input_channels": found.input_channels, "num_classes": found.num_classes}
    for mode in STRIDES:
        names = released_names(mode)
        ours = shapes_of(NAME, PCTNet, **sizes, **found.kwargs(mode))
        shapes = {names[name]: shape for name, shape in ours.items()}
        for key in shapes:
            if key.endswith(_TABLE):
                window = windows[_level(key)]
                shapes[key] = ((2 * window - 1) ** 3, shapes[key][1])
        require_shapes(state, shapes, NAME)
    for key in (key for key in state if key.endswith(_INDEX)):
        index = released_index(windows[_level(key)])
        if state[key].shape != index.shape or not (state[key] == index).all():
            raise MisfmError(
                f"expected the released code's index of token pairs in {key}, got another: the bias tables would be "
                "read wrongly; use the authors' file as it is."
            )


def _level(key: str) -> int:
    """Returns the level of a tensor of the pyramid's attention, `pyramid_ct.convtrans_e3.trans...`."""
    return int(key.split(".")[1][-1])


def _converted(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key.endswith(_COUNTER):
        return state[key].to(torch.int64).clone() if key in state else torch.tensor(0)
    tensor = finite_float32(state, key)
    return reindexed(tensor) if key.endswith(_TABLE) else tensor


def _left_out(state: Mapping[str, Tensor], taken: set[str]) -> dict[str, int]:
    others = [key for key in state if key not in taken]
    indices = sum(key.endswith(_INDEX) for key in others)
    norms = sum(_UNUSED_NORM in key for key in others)
    return {
        "of the other resolution branches": len(others) - indices - norms,
        "of LayerNorms that the released network never uses": norms,
        "buffers of position indices, which are computed": indices,
    }


def _notes(found: PCTNetFile) -> list[str]:
    shrunken = {level: w for level, w in zip(TRANSFORMER_LEVELS, found.windows, strict=True) if w < WINDOW}
    notes = [
        f"its patch was so small that windows shrank to {edge}x{edge}x{edge} tokens at level {level}: the table went "
        f'into the middle of a full one; PCTNet(window_shrink="cube") computes as the released network does there'
        for level, edge in shrunken.items()
    ]
    heads = default_num_heads(found.features_per_stage)
    if list(found.num_heads) != heads:
        notes.append(
            f"its attention has {list(found.num_heads)} heads, the trainers' has {heads} by default: bias tables start "
            f"afresh unless the configuration has num_heads={list(found.num_heads)} (nnUNetv2_misfm configure)"
        )
    return notes + width_note(found.features_per_stage, DEFAULT_FEATURES)
