"""One optimisation step over several batches, for a larger batch than the device holds."""

from collections.abc import Iterable
from contextlib import nullcontext
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.base import MisfmTrainer

# nnU-Net's own limit of the gradient's norm (nnUNetTrainer.train_step)
MAX_GRADIENT_NORM = 12


def accumulated_step(trainer: "MisfmTrainer", first: dict[str, Any], others: Iterable[dict[str, Any]]) -> dict:
    """Takes nnU-Net's training step with the mean of several batches' gradients; returns the mean of their losses.

    Losses over a whole batch (Dice) and statistics of batch normalisation are those of each batch.

    Args:
        trainer: Its network, loss, optimiser and scaler are used.
        first: A prepared batch; the names of the other batches' cases are added to its `keys`.
        others: One prepared batch less than `accumulate_steps`.
    """
    number, scaler = trainer.recipe.accumulate_steps, trainer.grad_scaler
    trainer.optimizer.zero_grad(set_to_none=True)
    total = torch.zeros((), device=trainer.device)
    keys: list[str] = []
    for i, batch in enumerate(chain([first], others), start=1):
        keys.extend(batch["keys"])
        data, target = (_to(batch[name], trainer.device) for name in ("data", "target"))
        synchronised = i == number or not isinstance(trainer.network, DistributedDataParallel)
        with nullcontext() if synchronised else trainer.network.no_sync():
            with torch.autocast(trainer.device.type, enabled=trainer.device.type == "cuda"):
                loss = trainer.loss(trainer.network(data), target) / number
            (loss if scaler is None else scaler.scale(loss)).backward()
        total += loss.detach()
    if scaler is not None:
        scaler.unscale_(trainer.optimizer)
    torch.nn.utils.clip_grad_norm_(trainer.network.parameters(), MAX_GRADIENT_NORM)
    if scaler is None:
        trainer.optimizer.step()
    else:
        scaler.step(trainer.optimizer)
        scaler.update()
    first["keys"] = keys
    return {"loss": total.cpu().numpy()}


def _to(value: Any, device: torch.device) -> Any:
    """Returns a tensor, or a list of them, on a device."""
    if isinstance(value, list):
        return [_to(entry, device) for entry in value]
    return value.to(device, non_blocking=True)
