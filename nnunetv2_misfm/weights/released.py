"""What the converters of the networks that the MIS-FM authors released share: their result, and checks of the input.

Errors name tensors by their released names; the caller adds the file.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunetv2_misfm.errors import MisfmError

# nnU-Net's strides of the three "resolution modes" of the released code (net/pct_net.py), for both networks: isotropic,
# mildly and strongly anisotropic
STRIDES = {
    0: [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    1: [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    2: [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
}


@dataclass(frozen=True)
class Conversion:
    """A released network in this package's terms.

    Attributes:
        name: Name of the network.
        trainer: Name of the pretraining trainer that trains the same network by the same method.
        description: `network` of a checkpoint's `misfm_meta`: enough to rebuild the network.
        weights: State dict of that network, float32 but for the counters of BatchNorm.
        resolution_mode: The authors' number for the pools, 0 to 2.
        left_out: Kind of tensor -> how many of the file have no place in our network.
        found: Sentences on what the file holds.
        taken: Sentence on which resolution mode was taken, and why.
        notes: Sentences on what a user of the weights should know.
        facts: Plain data on the file for `misfm_meta`.
        citations: Papers to cite.
    """

    name: str
    trainer: str
    description: dict[str, Any]
    weights: dict[str, Tensor]
    resolution_mode: int
    left_out: dict[str, int]
    found: list[str]
    taken: str
    notes: list[str]
    facts: dict[str, Any]
    citations: list[str]


def pools(resolution_mode: int) -> str:
    """Returns the first two pools of a resolution mode in words, the others being (2, 2, 2) always."""
    first, second = (tuple(stride) for stride in STRIDES[resolution_mode][1:3])
    return f"pools {first} and {second}"


def width_note(features: Sequence[int], default: Sequence[int]) -> list[str]:
    """Returns what to do where the channels are not those that the trainers give a network, nothing where they are."""
    if list(features) == list(default):
        return []
    widths = ",".join(map(str, features))
    return [
        f"the trainers' networks have {list(default)} channels by default: first run nnUNetv2_misfm configure -d "
        f"DATASET -c 3d_fullres --name NAME features_per_stage=[{widths}] and train NAME"
    ]


def require_names(state: Mapping[str, Tensor], needed: Collection[str], allowed: Collection[str], name: str) -> None:
    """Raises where a state dict lacks tensors of a network, or holds others than the `allowed` ones.

    Raises:
        MisfmError: The sentence names the first one.
    """
    missing = [key for key in needed if key not in state]
    if missing:
        raise MisfmError(
            f"expected a whole {name}, got one that lacks {len(missing)} of its tensors (the first is {missing[0]}): "
            "the file is incomplete or of another version of the network; use the authors' file as it is."
        )
    others = [key for key in state if key not in allowed]
    if others:
        raise MisfmError(
            f"expected the tensors of {name} alone, got {len(others)} that it does not have (the first is "
            f"{others[0]}): the file is of another network or version; use the authors' file as it is."
        )


def size(state: Mapping[str, Tensor], key: str, axis: int, num_axes: int) -> int:
    """Returns one axis of a tensor.

    Raises:
        MisfmError: The tensor has not `num_axes` axes.
    """
    shape = tuple(state[key].shape)
    if len(shape) != num_axes:
        raise MisfmError(f"expected {key} to have {num_axes} axes, got the shape {shape}: the file is damaged.")
    return shape[axis]


def require_shapes(state: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raises where a tensor has not the shape that follows from the network's widths.

    Raises:
        MisfmError: The sentence names the first one.
    """
    for key, shape in expected.items():
        if key in state and tuple(state[key].shape) != shape:
            raise MisfmError(
                f"expected {key} of shape {shape} in this {name}, got {tuple(state[key].shape)}: the file is damaged "
                "or of another version of the network; use the authors' file as it is."
            )


def shapes_of(name: str, network: Callable[..., nn.Module], **arguments: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor in a network's state dict, from its class and arguments (without values).

    Raises:
        MisfmError: There is no such network.
    """
    try:
        with torch.device("meta"):
            state = network(**arguments).state_dict()
    except ValueError as error:
        raise MisfmError(f"expected a {name} that can be built, got a file of which this holds: {error}") from error
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


def finite_float32(state: Mapping[str, Tensor], key: str) -> Tensor:
    """Returns a tensor as float32 in memory of its own.

    Raises:
        MisfmError: It holds other than floating-point numbers, or NaN or infinity.
    """
    tensor = state[key]
    if not tensor.is_floating_point():
        raise MisfmError(f"expected floating-point numbers in {key}, got {tensor.dtype}: the file is damaged.")
    converted = torch.empty(tensor.shape, dtype=torch.float32).copy_(tensor.detach())
    if not torch.isfinite(converted).all():
        raise MisfmError(
            f"expected finite numbers in {key}, got NaN or infinity: use a checkpoint of a sound training."
        )
    return converted
