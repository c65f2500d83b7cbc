import copy
from typing import Any

import pytest
import torch
from conftest import Workspace

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerPCTNetVFPretrain, nnUNetTrainerVFPretrain

SGD = {"optimizer": "sgd", "initial_lr": 0.1}
ADAM = {"optimizer": "adam", "initial_lr": 0.01}
LABELLED = {"augmentation": "flips"}


def ready(workspace: Workspace, kind: type, block: dict[str, Any], factor: float = 1.0) -> Any:
    """A trainer before its first step, in double precision: rounding must not decide about Adam's signs."""
    trainer = workspace.trainer(kind, {"accumulate_steps": 3, **block})
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.network.double()
    prepare, loss = trainer.prepare_batch, trainer.loss
    trainer.prepared = []

    def recorded(batch: dict, training: bool) -> dict:
        made = prepare(batch, training)
        trainer.prepared.append({**made, "data": made["data"].double(), "state": torch.get_rng_state()})
        return copy.copy(trainer.prepared[-1])

    trainer.prepare_batch = recorded
    trainer.loss = lambda output, target: factor * loss(output, target)
    return trainer


def slow_step(trainer: Any, network: torch.nn.Module) -> tuple[list[torch.Tensor], list[float]]:
    """Returns what the first step makes of a network's parameters, by hand, and the losses of the three batches."""
    parameters = list(network.parameters())
    sums = [torch.zeros_like(p) for p in parameters]
    used = [False] * len(parameters)
    losses = []
    for batch in trainer.prepared:
        torch.set_rng_state(batch["state"])  # the same dropout
        loss = trainer.loss(network(batch["data"]), batch["target"])
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for i, gradient in enumerate(gradients):
            if gradient is not None:
                sums[i] += gradient / 3
                used[i] = True
    norm = float(torch.cat([s.flatten() for s in sums]).norm())
    scale = min(1.0, 12 / norm)
    rate, decay = trainer.initial_lr, trainer.weight_decay
    expected = []
    for parameter, total, moves in zip(parameters, sums, used, strict=True):
        step = total * scale + decay * parameter.detach()
        if not moves:  # a head whose weight in the loss is 0
            expected.append(parameter.detach())
        elif trainer.recipe.optimizer == "sgd":  # Nesterov's first step with momentum 0.99
            expected.append(parameter.detach() - rate * 1.99 * step)
        else:  # Adam's first step: both moments are the gradient's own
            expected.append(parameter.detach() - rate * step / (step.abs() + 1e-8))
    trainer.norm = norm
    return expected, losses


@pytest.mark.parametrize("factor", [1e-3, 1e3], ids=["small gradients", "clipped"])
@pytest.mark.parametrize(
    ("kind", "block"),
    [(nnUNetTrainerVFPretrain, SGD), (nnUNetTrainerVFPretrain, ADAM), (nnUNetTrainerPCTNetVFPretrain, SGD),
     (nnUNetTrainerPCTNet, LABELLED | SGD)],
    ids=["SGD", "Adam", "PCT-Net", "labels"],
)  # fmt: skip
def test_a_step_is_that_of_the_batches_mean_gradient(
    workspace: Workspace, kind: type, block: dict[str, Any], factor: float
) -> None:
    trainer = ready(workspace, kind, block, factor)
    network = copy.deepcopy(trainer.network)
    result = trainer.train_step(next(trainer.dataloader_train))
    assert len(trainer.prepared) == 3
    expected, losses = slow_step(trainer, network)
    assert (trainer.norm > 12) == (factor > 1)
    for made, parameter, before in zip(trainer.network.parameters(), expected, network.parameters(), strict=True):
        assert torch.allclose(made, parameter, rtol=0, atol=1e-6)
        assert made.grad is None or not torch.equal(made, before)
    assert float(result["loss"]) == pytest.approx(sum(losses) / 3, rel=1e-6)
    assert len(set(losses)) == 3


def test_every_step_draws_so_many_batches_and_an_epoch_has_as_many_steps_as_ever(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, {"accumulate_steps": 3, "num_epochs": 2})
    trainer.run_training()
    assert trainer.dataloader_train.position == 2 * 2 * 3  # epochs, steps, batches
    assert trainer.samples_per_step == 3 * 2


def test_a_scaled_loss_changes_nothing(workspace: Workspace) -> None:
    made = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        trainer = ready(workspace, nnUNetTrainerVFPretrain, SGD, factor=1000.0)
        trainer.grad_scaler = scaler
        losses = [float(trainer.train_step(next(trainer.dataloader_train))["loss"]) for _ in range(2)]
        made.append((losses, torch.cat([p.detach().flatten() for p in trainer.network.parameters()])))
    assert made[0][0] == pytest.approx(made[1][0], rel=1e-9)
    assert torch.allclose(made[0][1], made[1][1], rtol=0, atol=1e-9)


def test_a_loss_that_is_not_finite_names_the_cases_of_all_batches(workspace: Workspace) -> None:
    trainer = ready(workspace, nnUNetTrainerVFPretrain, SGD)
    loss = trainer.loss
    trainer.loss = lambda output, target: loss(output, target) * (float("nan") if len(trainer.prepared) == 2 else 1)
    with pytest.raises(MisfmError, match="training stopped in epoch 0, step 0, rank 0: loss nan; cases") as refusal:
        trainer.train_step(next(trainer.dataloader_train))
    named = [key for batch in trainer.prepared for key in batch["keys"]]
    assert len(named) == 6 and f"cases of the batch: {', '.join(named)}." in str(refusal.value)
