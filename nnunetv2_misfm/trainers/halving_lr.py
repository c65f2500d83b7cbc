"""The learning-rate schedule of the paper's pretraining: halved after every fifth of the run."""

import torch

# MIS-FM pretrains 100k / 200k / 400k iterations and halves every 20k / 40k / 50k of them
NUM_PARTS = 5


class HalvingLRScheduler:
    """Sets the learning rate to `initial_lr` / 2^(number of whole fifths of the run that have passed).

    Args:
        optimizer: Its groups get the rate in place.
        initial_lr: Rate of the first fifth.
        num_epochs: Length of the run in epochs.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, num_epochs: int) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.num_epochs = num_epochs

    def step(self, epoch: int) -> None:
        """Sets the rate of an epoch (0-based), as nnU-Net calls it at the start of each."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr * 0.5 ** (NUM_PARTS * epoch // self.num_epochs)
