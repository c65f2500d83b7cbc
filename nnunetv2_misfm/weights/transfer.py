"""Moving pretrained weights into a network that need not be the same: what fits moves, what nearly fits is adapted.

Adapted are: the first convolution to another number of input channels, kernels between 2D (size 1 along an axis) and
3D, relative-position tables of another window, and the decoder of nnU-Net's U-Nets with another number of stages.
Output heads always start afresh. Every tensor of the network is accounted for.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from nnunetv2_misfm.errors import MisfmError

# nnU-Net's own mark of output heads (nnunetv2/run/load_pretrained_weights.py): never transferred
HEAD_MARK = ".seg_layers."
# Ours: below one half the run would be closer to one from scratch than to a fine-tuning
MINIMUM_SHARE = 0.5
_POSITION_TABLE = "relative_position_bias_table"
# The parts of nnU-Net's U-Net decoder that are numbered from the deepest level on
_UNET_DECODER = re.compile(r"^decoder\.(stages|transpconvs)\.(\d+)\.")


@dataclass
class TransferReport:
    """Account of a transfer.

    Attributes:
        transfer: `all` or `encoder`.
        moved: Names of the parameters and buffers that were copied as they are.
        adapted: Name -> how it was fitted.
        fresh: Name -> why it keeps its initial value (heads, absent in the file, other shape, not asked for).
        share: Share (0..1) of the scalar parameters that were moved or adapted, among those that the transfer is
            meant for: all but the heads, or the encoder's.
    """

    transfer: Literal["all", "encoder"]
    moved: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    fresh: dict[str, str] = field(default_factory=dict)
    share: float = 0.0

    def summary(self) -> str:
        """Returns one line with the counts."""
        return (
            f"{len(self.moved)} tensors moved, {len(self.adapted)} adapted, {len(self.fresh)} left fresh; "
            f"{100 * self.share:.1f} % of the parameters (heads aside)"
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for a checkpoint or a JSON file."""
        return asdict(self)


def transfer_weights(
    source: Mapping[str, torch.Tensor],
    network: nn.Module,
    transfer: Literal["all", "encoder"] = "all",
    num_label_channels: int = 0,
    num_source_label_channels: int = 0,
) -> TransferReport:
    """Copies pretrained tensors into `network` in place and returns the account.

    Args:
        source: State dict of the pretrained network.
        network: Bare network (no DDP or compile wrapper).
        transfer: `encoder` takes only the network's part of that name.
        num_label_channels: Trailing input channels of `network` that hold the labels of a cascade's previous stage:
            the first convolution's weights for them start at zero, unless the file's network had the same.
        num_source_label_channels: The same of the pretrained network; they never pass for images.

    Raises:
        MisfmError: Less than half of the parameters in question could be moved; the network is left as it was.
    """
    report = TransferReport(transfer)
    targets = _targets(network)
    transposed = {f"{n}.weight" for n, m in network.named_modules() if isinstance(m, nn.ConvTranspose3d)}
    stem = next((name for name, tensor in targets.items() if tensor.ndim == 5), None)
    upsamplings = [_num_upsamplings(tensors) for tensors in (source, targets)]
    deeper = upsamplings[0] - upsamplings[1] if all(upsamplings) else 0
    fitted: dict[str, torch.Tensor] = {}
    wanted = arrived = 0
    for name, target in targets.items():
        if HEAD_MARK in name:
            report.fresh[name] = "output head"
            continue
        if transfer == "encoder" and not name.startswith("encoder."):
            report.fresh[name] = "outside the encoder"
            continue
        size = target.numel() if isinstance(target, nn.Parameter) else 0
        wanted += size
        origin = _of_same_level(name, deeper)
        if origin not in source:
            report.fresh[name] = "not in the file"
            continue
        labels = (num_source_label_channels, num_label_channels)
        value, how = _fit(source[origin], target, name, labels if name == stem else None, name in transposed)
        if value is None:
            report.fresh[name] = how
            continue
        fitted[name] = value
        arrived += size
        steps = [f"from {origin}"] * (origin != name) + [how] * bool(how)
        if steps:
            report.adapted[name] = ", ".join(steps)
        else:
            report.moved.append(name)
    report.share = arrived / wanted if wanted else 0.0
    if report.share < MINIMUM_SHARE:
        raise MisfmError(_too_little(report))
    with torch.no_grad():
        for name, value in fitted.items():
            targets[name].copy_(value)
    return report


def _targets(network: nn.Module) -> dict[str, torch.Tensor]:
    """Returns parameters and saved buffers by name; a tensor that is registered twice appears under its first name."""
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    saved = network.state_dict().keys()
    return {name: tensor for name, tensor in tensors.items() if name in saved}


def _too_little(report: TransferReport) -> str:
    misfits = {n: why for n, why in report.fresh.items() if why not in ("output head", "outside the encoder")}
    name, why = next(iter(misfits.items()), ("the network", "it has no parameters to fill"))
    return (
        f"expected weights of the same network, but only {100 * report.share:.1f} % of its parameters fit the file "
        f"(at least {100 * MINIMUM_SHARE:.0f} % needed; the first misfit is {name}: {why}); "
        "use a checkpoint of the matching Pretrain trainer with the same features_per_stage."
    )


def _num_upsamplings(tensors: Mapping[str, torch.Tensor]) -> int:
    """Returns the upsampling steps of nnU-Net's U-Net decoder, 0 for another network."""
    return sum(bool(re.fullmatch(r"decoder\.transpconvs\.\d+\.weight", name)) for name in tensors)


def _of_same_level(name: str, deeper: int) -> str:
    """Returns the file's name for a tensor, where the file's U-Net has `deeper` stages more than the network."""
    return _UNET_DECODER.sub(lambda part: f"decoder.{part[1]}.{int(part[2]) + deeper}.", name)


def _fit(
    value: torch.Tensor, target: torch.Tensor, name: str, stem: tuple[int, int] | None, transposed: bool
) -> tuple[torch.Tensor | None, str]:
    """Returns the tensor in the target's shape and how it was adapted ("" = as it is), or None and why not.

    `stem` is for the first convolution alone: the label channels among the file's and the network's input channels.
    """
    given, shape = tuple(value.shape), tuple(target.shape)
    steps = []
    if value.ndim == target.ndim == 5:
        if value.shape[2:] != target.shape[2:]:
            value = _resize_kernel(value, target.shape[2:], transposed)
            steps.append("kernel resized")
        if stem and value.shape[0] == target.shape[0] and (value.shape[1] != target.shape[1] or stem[0] != stem[1]):
            images = value[:, : value.shape[1] - stem[0]]
            value = _resize_input_channels(images, target.shape[1], stem[1])
            steps.append("input channels adapted")
    elif name.endswith(_POSITION_TABLE) and value.shape[1:] == target.shape[1:] and value.shape != target.shape:
        value = _resize_position_table(value, target.shape[0])
        steps.append("position table re-indexed")
    if value.shape != target.shape:
        return None, f"shape {given} in the file, {shape} in the network"
    return value, f"{' and '.join(steps)}: {given} -> {shape}" if steps else ""


def _resize_kernel(weight: torch.Tensor, kernel: torch.Size, transposed: bool) -> torch.Tensor:
    """Returns a kernel [O, I, kD, kH, kW] of another size along some axes.

    A convolution's 1 -> 3 puts the weight in the centre (the same function); 3 -> 1 sums the taps (the same response
    to what is constant along the axis). A transposed convolution whose kernel is its stride writes every output voxel
    with one tap: 1 -> 2 repeats the tap, 2 -> 1 averages them. Other changes are left to the shape check.
    """
    for axis, size in enumerate(kernel, start=2):
        given = weight.shape[axis]
        if given == 1 < size:
            if transposed:
                weight = weight.repeat_interleave(size, axis)
            else:
                zeros = torch.zeros_like(weight)
                weight = torch.cat([weight if i == size // 2 else zeros for i in range(size)], axis)
        elif size == 1 < given:
            weight = weight.mean(axis, keepdim=True) if transposed else weight.sum(axis, keepdim=True)
    return weight


def _resize_input_channels(weight: torch.Tensor, num_channels: int, num_label_channels: int) -> torch.Tensor:
    """Returns a first convolution [O, num_channels, ...] with the same response where all image channels are equal.

    An unchanged number of image channels keeps its weights; else each gets the sum over the file's channels divided
    by the new number. Label channels of a cascade (the last ones) are zero.
    """
    num_images = num_channels - num_label_channels
    if weight.shape[1] != num_images:
        repeats = (1, num_images, *[1] * (weight.ndim - 2))
        weight = (weight.sum(1, keepdim=True) / num_images).repeat(repeats)
    labels = weight.new_zeros((weight.shape[0], num_label_channels, *weight.shape[2:]))
    return torch.cat([weight, labels], 1)


def _resize_position_table(table: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Returns a cubic window's table [(2w-1)^3, heads] for another window w: same offsets, new ones zero."""
    given, wanted = (round(n ** (1 / 3)) for n in (table.shape[0], num_rows))
    if given**3 != table.shape[0] or wanted**3 != num_rows or (given - wanted) % 2:
        return table
    cube = table.reshape(given, given, given, -1)
    if given > wanted:
        cut = slice((given - wanted) // 2, (given + wanted) // 2)
        return cube[cut, cut, cut].reshape(num_rows, -1)
    larger = table.new_zeros((wanted, wanted, wanted, table.shape[1]))
    at = slice((wanted - given) // 2, (wanted + given) // 2)
    larger[at, at, at] = cube
    return larger.reshape(num_rows, -1)
