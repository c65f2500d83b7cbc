"""Which trainers of a benchmark are compared with which: stock nnU-Net, and counterparts from scratch."""

from collections.abc import Sequence

from nnunetv2_misfm.benchmark.grid import STOCK, STOCK_WITH_LENGTH
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.finetune import FinetuneTrainer


def stock_of(trainers: Sequence[str]) -> str | None:
    """Returns the one that stands for stock nnU-Net: `nnUNetTrainer`, else `nnUNetTrainerBaseline`, else None."""
    return next((name for name in (STOCK, STOCK_WITH_LENGTH) if name in trainers), None)


def scratch_of(trainer: str, trainers: Sequence[str]) -> str | None:
    """Returns the counterpart from scratch of a fine-tuned trainer, where it is among `trainers`.

    It is the first of the trainer's ancestors that is among them and is not fine-tuned itself: the architecture mixin
    (`nnUNetTrainerPCTNet` for `nnUNetTrainerPCTNetVF`), or `nnUNetTrainer` for the plans' networks. None for trainers
    that start from scratch, and for those that are not of this package.
    """
    kind = getattr(nnunetv2_misfm_trainers, trainer, None)
    if kind is None or not issubclass(kind, FinetuneTrainer):
        return None
    ancestors = [base.__name__ for base in kind.__mro__[1:] if not issubclass(base, FinetuneTrainer)]
    return next((name for name in ancestors if name in trainers), None)


def default_pairs(trainers: Sequence[str]) -> list[tuple[str, str]]:
    """Returns the comparisons (trainer, reference) that a report shows.

    Args:
        trainers: In the order of the grid.

    Returns:
        Every trainer against stock, then every fine-tuned trainer against its own counterpart from scratch.
    """
    stock = stock_of(trainers)
    against_stock = [(trainer, stock) for trainer in trainers if stock and trainer != stock]
    counterparts = [(trainer, scratch_of(trainer, trainers)) for trainer in trainers]
    against_scratch = [(trainer, scratch) for trainer, scratch in counterparts if scratch]
    return list(dict.fromkeys(against_stock + against_scratch))
