"""How the released PCT-Net (MIS-FM, net/pct_net.py and net/transformer.py) names and orders its tensors.

Of the three resolution modes that a released network holds, one is named here; what it never uses has no name in ours.
"""

import functools

import torch
from torch import Tensor

from nnunetv2_misfm.architectures.anisotropy import NUM_LEVELS
from nnunetv2_misfm.architectures.pct_net import TRANSFORMER_LEVELS, PCTNet

# Edge of a window that was not shrunk (released code)
WINDOW = 6


@functools.lru_cache
def released_names(resolution_mode: int) -> dict[str, str]:
    """Returns our name -> released name for every tensor of our network in a resolution mode."""
    modules = _released_modules(resolution_mode)
    with torch.device("meta"):
        ours = [name.rpartition(".") for name in PCTNet(1, 1).state_dict()]
    return {f"{module}.{leaf}": f"{modules[module]}.{leaf}" for module, _, leaf in ours}


def reindexed(table: Tensor) -> Tensor:
    """Returns a bias table of the released index for ours, in which each 3D offset owns a row.

    Args:
        table: [(2w-1)^3, h] for a window edge w of 1 to 6.

    Returns:
        [11^3, h]: the row of an offset (z, y, x) of two tokens, each from -5 to 5, is its digits z + 5, y + 5, x + 5 to
        the base 11. Offsets that do not occur in a window of edge w are zero.
    """
    base = round(table.shape[0] ** (1 / 3))
    digit = torch.arange(base)
    rows = _released_row(digit[:, None, None], digit[:, None], digit, (base + 1) // 2)
    full = 2 * WINDOW - 1
    margin = (full - base) // 2
    middle = slice(margin, margin + base)
    cube = table.new_zeros(full, full, full, table.shape[1])
    cube[middle, middle, middle] = table[rows]
    return cube.flatten(0, 2)


def _released_row(z: Tensor, y: Tensor, x: Tensor, window: int) -> Tensor:
    """Returns the released row of an offset whose parts, plus w - 1, are z, y, x (net/transformer.py)."""
    return z * (3 * window - 1) + y * (2 * window - 1) + x


def released_index(window: int) -> Tensor:
    """Returns the released row for each pair of tokens of a window, int64 [w^3, w^3]."""
    edge = torch.arange(window)
    tokens = torch.cartesian_prod(edge, edge, edge)  # D, H, W in row-major order
    z, y, x = (tokens[:, None] - tokens[None] + window - 1).unbind(-1)
    return _released_row(z, y, x, window)


def _released_modules(mode: int) -> dict[str, str]:
    """Returns our module -> the released one, for all that hold tensors which a resolution mode uses."""
    embedding, head, pyramid = f"embeddings.{mode}", f"pred_heads.{mode}", "pyramid_ct"
    modules = {"encoder.stem": f"{embedding}.proj"}
    for level in range(NUM_LEVELS):
        encoder, decoder = f"encoder.stages.{level}.block", f"decoder.stages.{level}.block"
        if level in TRANSFORMER_LEVELS:
            modules |= _pct_block(encoder, f"{pyramid}.convtrans_e{level}")
            modules |= _pct_block(decoder, f"{pyramid}.convtrans_d{level}") if level < NUM_LEVELS - 1 else {}
        else:
            modules |= _conv_block(encoder, f"{embedding}.conv{level}.conv_conv")
            modules |= _conv_block(decoder, f"{head}.conv{level}.conv_conv")
    for level in range(1, NUM_LEVELS):  # down{l} leads to level l, up{l} from it
        from_finer, to_finer = (embedding, head) if level <= TRANSFORMER_LEVELS[0] else (pyramid, pyramid)
        down, up = f"encoder.stages.{level}.down", f"decoder.stages.{level - 1}.up"
        modules |= _norm_act_conv(f"{down}.norm_act", f"{down}.conv", f"{from_finer}.down{level}.conv")
        modules |= _norm_act_conv(f"{up}.norm_act_up", f"{up}.up", f"{to_finer}.up{level}.up")
        modules |= _norm_act_conv(f"{up}.norm_act_cat", f"{up}.conv", f"{to_finer}.up{level}.conv")
    for level in range(NUM_LEVELS - 1):
        part = pyramid if level in TRANSFORMER_LEVELS else head
        norm_act, conv = f"decoder.seg_norms.{level}", f"decoder.seg_layers.{level}"
        modules |= _norm_act_conv(norm_act, conv, f"{part}.out_conv{level}.conv")
    return modules


def _norm_act_conv(norm_act: str, conv: str, released: str) -> dict[str, str]:
    """BatchNorm, PReLU and convolution, numbered in the released code."""
    return {f"{norm_act}.norm": f"{released}.0", f"{norm_act}.act": f"{released}.1", conv: f"{released}.2"}


def _conv_block(ours: str, released: str) -> dict[str, str]:
    """Twice norm, activation, convolution, with a dropout (number 5) before the second convolution."""
    first = _norm_act_conv(f"{ours}.norm_act1", f"{ours}.conv1", released)
    second = {"norm_act2.norm": 3, "norm_act2.act": 4, "conv2": 6}
    return first | {f"{ours}.{module}": f"{released}.{number}" for module, number in second.items()}


def _pct_block(ours: str, released: str) -> dict[str, str]:
    """A convolutional block and, under the same names, two transformer blocks."""
    parts = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    transformer = [f"blocks.{block}.{part}" for block in (0, 1) for part in parts]
    modules = _conv_block(f"{ours}.conv", f"{released}.conv.conv_conv")
    return modules | {f"{ours}.swin.{part}": f"{released}.trans.{part}" for part in transformer}
