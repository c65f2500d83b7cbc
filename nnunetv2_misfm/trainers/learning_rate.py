"""How the learning rate follows the batch size, and how it is warmed up.

- Linear rule: with a batch k times as large the rate is multiplied by k. Goyal et al., 2017 (arXiv:1706.02677, section
  2.1), for SGD.
- Square-root rule: multiplied by sqrt(k). Malladi et al., 2022 (arXiv:2205.10287) derive it for Adam and RMSprop,
  together with changes of their betas and epsilon, which are left alone here. Krizhevsky, 2014 (arXiv:1404.5997) gives
  the square root as theory's answer for SGD (it keeps the variance of a step), and finds the linear rule to work best.
- Gradual warm-up: Goyal et al., section 2.2, raise the rate by equal amounts in every step of the first 5 epochs. Here
  the amounts are equal too, but the rate changes once an epoch, where nnU-Net sets it.
"""

import math
from typing import Literal, Protocol

from torch.optim import Optimizer

ScalingRule = Literal["none", "linear", "sqrt"]


class EpochScheduler(Protocol):
    """A schedule as nnU-Net uses it: `step` sets the rates of an epoch anew, whatever they were before."""

    optimizer: Optimizer

    def step(self, epoch: int, /) -> object:
        """Sets the rate of every parameter group for an epoch (0-based)."""


def scaled_learning_rate(initial_lr: float, rule: ScalingRule, batch_size: int, reference_batch_size: int) -> float:
    """Returns the learning rate for a batch size, given one that suits another.

    Args:
        initial_lr: Rate that suits `reference_batch_size`.
        rule: `none` leaves the rate as it is, `linear` is meant for SGD, `sqrt` for Adam and AdamW.
        batch_size: Samples of a step of the optimiser: of all ranks and all accumulated batches together.
        reference_batch_size: Samples of a step that `initial_lr` was found with, above 0.
    """
    ratio = batch_size / reference_batch_size
    return initial_lr * {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[rule]


class WarmupLRScheduler:
    """Multiplies the rates of another schedule by (epoch + 1) / (num_epochs + 1) in its first epochs.

    So the first epoch is not idle, and the first one after the warm-up has the schedule's own rate.

    Args:
        scheduler: Sets all rates anew in each of its steps, as nnU-Net's `PolyLRScheduler` does.
        num_epochs: Length of the warm-up; 0 is none.
    """

    def __init__(self, scheduler: EpochScheduler, num_epochs: int) -> None:
        self.scheduler = scheduler
        self.num_epochs = num_epochs

    def step(self, epoch: int) -> None:
        """Sets the rates of an epoch (0-based), as nnU-Net calls it at the start of each."""
        self.scheduler.step(epoch)
        if epoch < self.num_epochs:
            for group in self.scheduler.optimizer.param_groups:
                group["lr"] *= (epoch + 1) / (self.num_epochs + 1)
