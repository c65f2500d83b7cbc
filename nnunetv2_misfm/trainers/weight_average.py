"""An exponential moving average of a network's weights, kept beside the network and exchanged with it in place.

Averaging the iterates of stochastic gradient descent goes back to Polyak and Juditsky (1992). The exponential form,
average = decay * average + (1 - decay) * weights after every step, is that of Tarvainen and Valpola, 2017 (mean
teacher, arXiv:1703.01780, section 2). The arithmetic is PyTorch's `AveragedModel`, but for buffers of whole numbers
(BatchNorm's counter of batches, PCT-Net's table of relative positions): these are copied, since PyTorch rounds their
average down, which breaks such a table.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class WeightAverage:
    """Exponential moving average of a network's parameters and buffers.

    Until the first update the average equals the weights that the network had here; the first update replaces it by
    the weights of that moment (PyTorch's way: weights loaded in between count, earlier ones do not); from the second on
    it is the formula above.

    Args:
        network: The bare network, without the wrappers of DDP and torch.compile. It must not be replaced later: all
            exchanges write into its own tensors.
        decay: Share of the old average, in [0, 1). At 0.999 (Tarvainen and Valpola's after their ramp-up) the average
            reaches back about 1 / (1 - decay) = 1,000 steps.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        self._averaged = AveragedModel(network, multi_avg_fn=average_or_copy(decay), use_buffers=True)
        self._holds_average = False

    @property
    def holds_average(self) -> bool:
        """Whether the network holds the average at present, and this object the trained weights."""
        return self._holds_average

    @property
    def num_updates(self) -> int:
        """Number of updates so far."""
        return int(self._averaged.n_averaged)

    def update(self) -> None:
        """Takes the network's weights into the average; to be called after every step of the optimiser.

        Raises:
            RuntimeError: The network holds the average, which would be averaged with itself.
        """
        if self._holds_average:
            raise RuntimeError("expected the network to hold its trained weights, got the average: swap() first.")
        self._averaged.update_parameters(self._network)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the network's values with the averaged ones, in place; a second call undoes the first.

        The optimiser, DDP and torch.compile keep the tensors that they refer to. One tensor at a time is held twice.
        """
        for own, other in zip(_tensors(self._network), _tensors(self._averaged.module), strict=True):
            held = own.clone()
            own.copy_(other)
            other.copy_(held)
        self._holds_average = not self._holds_average

    def average(self) -> dict[str, Tensor]:
        """Returns the averaged state dict under the bare network's names; the tensors are those in use, not copies."""
        return (self._network if self._holds_average else self._averaged.module).state_dict()

    def raw(self) -> dict[str, Tensor]:
        """Returns the trained, not averaged state dict; the tensors are those in use, not copies."""
        return (self._averaged.module if self._holds_average else self._network).state_dict()

    @torch.no_grad()
    def restore(self, raw: Mapping[str, Tensor], num_updates: int) -> None:
        """Goes on from a checkpoint whose average has just been loaded into the network.

        The average moves from the network to this object, and the network gets the trained weights.

        Args:
            raw: What `raw` returned when the checkpoint was written.
            num_updates: `num_updates` of that moment.
        """
        for averaged, loaded in zip(_tensors(self._averaged.module), _tensors(self._network), strict=True):
            averaged.copy_(loaded)
        self._network.load_state_dict(raw)
        self._averaged.n_averaged.fill_(num_updates)
        self._holds_average = False


def start_average(network: nn.Module, decay: float | None, saved: Mapping[str, Any]) -> WeightAverage | None:
    """Returns the average of a run that starts or goes on; None without one.

    Args:
        network: The bare network; with an average in `saved`, it holds that now, and gets its trained weights back.
        decay: As of `WeightAverage`; None trains (on) without an average.
        saved: State of a checkpoint: `raw_weights` and `num_updates` where it was written with an average.
    """
    if decay is None:
        if "raw_weights" in saved:
            network.load_state_dict(saved["raw_weights"])
        return None
    average = WeightAverage(network, decay)
    if "raw_weights" in saved:
        average.restore(saved["raw_weights"], saved["num_updates"])
    return average


def average_or_copy(decay: float) -> Callable[[Sequence[Tensor], Sequence[Tensor], Tensor | int], None]:
    """Returns an averaging function for `AveragedModel`: exponential for real numbers, a copy for whole ones.

    Args:
        decay: Share of the old average, in [0, 1).
    """
    average_ = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_(averaged: Sequence[Tensor], current: Sequence[Tensor], num_averaged: Tensor | int) -> None:
        if averaged[0].is_floating_point() or averaged[0].is_complex():  # a call brings tensors of one dtype only
            average_(averaged, current, num_averaged)
            return
        for old, new in zip(averaged, current, strict=True):
            old.copy_(new)

    return update_


def _tensors(network: nn.Module) -> Iterator[Tensor]:
    """Yields every parameter and buffer once, shared ones too, in the order in which `AveragedModel` pairs them."""
    return chain(network.parameters(), network.buffers())
