import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from interrupting import make_repeatable
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch._dynamo.testing import CompileCounter
from toy import toy_plans
from toy_universe import (
    BRAIN,
    TRUNK,
    TUMOUR,
    given_batch,
    uneven_universe,
    universal_plans,
    universal_trainer,
    with_audible_priors,
    write_toy_universe,
)

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import discovery_folder
from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes
from nnunetv2_misfm.universe import PLANS_KEY

SGD = {"optimizer": "sgd", "initial_lr": 0.01, "weight_decay": 0.0, "warmup_epochs": 0}


@pytest.fixture
def universe(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The workspace with the universal toy dataset in it."""
    make_repeatable(monkeypatch.setattr)
    write_toy_universe(workspace.preprocessed)
    return workspace


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


# ---------------------------------------------------------------------- what is refused


def test_nnunets_search_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(discovery_folder()))
    assert recursive_find_trainer_class_by_name("nnUNetTrainerHermes") is nnUNetTrainerHermes


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"balance": 1.5}, "hermes.balance must be from 0 to 1, got 1.5"),
        ({"modality_loss_weight": -1}, "hermes.modality_loss_weight must be a number of at least 0, got -1"),
        ({"evaluate_every_epochs": -1}, "hermes.evaluate_every_epochs must be a number of at least 0, got -1"),
        ({"evaluation_cases": 0}, "hermes.evaluation_cases must be at least 1, got 0"),
        ({"dataset_weights": [1, 0, 1]}, "hermes.dataset_weights must be positive numbers, got"),
        ({"dataset_weights": []}, "hermes.dataset_weights must be positive numbers, got"),
        (
            {"dataset_weights": [1, 2]},
            f"hermes.dataset_weights must be one per dataset, {BRAIN}, {TRUNK}, {TUMOUR}, got",
        ),
        ({"balanse": 1}, "unknown key 'hermes.balanse'"),
    ],
)
def test_wrong_numbers_are_named(universe: Workspace, block: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MisfmError) as caught:
        universal_trainer(universe, {"hermes": block})
    assert sentence in str(caught.value)


def test_plans_that_know_no_universe_are_refused(workspace: Workspace) -> None:
    with pytest.raises(MisfmError, match="got nnUNetPlans of Dataset555_Toy, which know of none: join datasets with"):
        workspace.trainer(nnUNetTrainerHermes, plans=toy_plans())


# ---------------------------------------------------------------------- training


def test_loss_falls(universe: Workspace) -> None:
    length = {"num_epochs": 5, "num_iterations_per_epoch": 10, "num_val_iterations_per_epoch": 2}
    trainer = universal_trainer(universe, {**length, "initial_lr": 1e-2, "warmup_epochs": 0})
    trainer.run_training()
    logged = trainer.logger.local_logger.my_fantastic_logging
    assert logged["train_losses"][-1] < logged["train_losses"][0] - 0.2
    assert logged["val_losses"][-1] < logged["val_losses"][0]


@pytest.mark.parametrize(
    ("case", "tasks", "modality"), [("041_x", [0, 1], 0), ("042_x", [0, 2], 1), ("043_x", [3, 4], 0)]
)
def test_a_batch_of_one_source_reaches_only_its_rows_of_the_pools(
    universe: Workspace, case: str, tasks: list[int], modality: int
) -> None:
    trainer = universal_trainer(universe, SGD)
    trainer.initialize()
    before = copy.deepcopy(trainer.network)
    trainer.train_step(given_batch(case, case))
    for name, fusion in trainer.network.fusions.items():
        former = before.fusions[name]
        changed = (fusion.task_tokens != former.task_tokens).any(1).nonzero().flatten()
        assert changed.tolist() == tasks
        changed = (fusion.modality_tokens != former.modality_tokens).flatten(1).any(1).nonzero().flatten()
        assert changed.tolist() == [modality]


def test_each_sample_is_asked_for_the_tasks_of_its_own_dataset(universe: Workspace) -> None:
    trainer = universal_trainer(universe)
    batch = trainer.prepare_batch(given_batch("042_a", "043_b"), training=False)
    assert batch["data"].context.labelled.tolist() == [[2, 0], [3, 4]] and batch["data"].context.present.all()
    assert batch["data"].context.modality.tolist() == batch["target"].modality.tolist() == [1, 0]
    maps = given_batch("042_a", "043_b")["target"]
    assert torch.equal(batch["target"].masks[0], torch.stack([maps[0, 0] == 1, maps[0, 0] == 2]))
    assert torch.equal(batch["target"].masks[1], torch.stack([maps[1, 0] > 0, maps[1, 0] == 2]))


def test_training_mirrors_as_the_case_allows_and_validation_never(universe: Workspace) -> None:
    trainer = universal_trainer(universe)
    given = given_batch(*["041_a", "042_a", "043_a"] * 12)
    given["data"] = given["target"].float()
    batches = [trainer.prepare_batch(given, training=training) for training in (True, False)]
    images = [batch["data"].image for batch in batches]
    assert all(torch.equal(batch["target"].masks[:, 1], batch["data"].image[:, 0] == 2) for batch in batches)
    changed = [i for i in range(36) if not torch.equal(images[0][i], given["data"][i])]
    assert {i % 3 for i in changed} == {0, 1} and torch.equal(images[1], given["data"])
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == ()
    kidneys = [i for i in changed if i % 3 == 1]
    assert all(images[0][i].sum((0, 1, 2)).allclose(given["data"][i].sum((0, 1, 2)), atol=1e-3) for i in kidneys)


def test_pseudo_dice_is_one_value_per_task_and_nan_for_tasks_that_did_not_come(universe: Workspace) -> None:
    trainer = universal_trainer(universe)
    trainer.initialize()
    with_audible_priors(trainer.network)
    trainer.on_train_start()
    trainer.logger.log("mean_fg_dice", 0.5, 0)
    outputs = [trainer.validation_step(given_batch("041_a", "042_b")) for _ in range(2)]
    trainer.on_validation_epoch_end(outputs)
    found = np.array(trainer.logger.get_value("dice_per_class_or_region", step=-1))
    with torch.no_grad():
        batch = trainer.prepare_batch(given_batch("041_a", "042_b"), training=False)
        said = trainer.network(batch["data"]).logits > 0
    masks = batch["target"].masks
    pairs = {0: [(0, 0), (1, 1)], 1: [(0, 1)], 2: [(1, 0)]}
    for task, places in pairs.items():
        common = sum(int((said[place] & masks[place]).sum()) for place in places)
        total = sum(int(said[place].sum() + masks[place].sum()) for place in places)
        assert found[task] == pytest.approx(2 * common / total)
    assert len(found) == 5 and np.isnan(found[3:]).all()
    assert f"Pseudo dice of {BRAIN}: {found[:2].mean():.4f}" in log_of(trainer)
    assert f"Pseudo dice of {TRUNK}: {found[[2, 0]].mean():.4f}" in log_of(trainer)
    assert f"Pseudo dice of {TUMOUR}" not in log_of(trainer)


def test_accumulated_step_is_that_of_the_batches_mean_gradient(universe: Workspace) -> None:
    trainer = universal_trainer(universe, {**SGD, "accumulate_steps": 2})
    trainer.initialize()
    prepared, prepare = [], trainer.prepare_batch

    def remember(batch: dict, training: bool) -> dict:
        prepared.append(prepare(batch, training))
        return prepared[-1]

    trainer.prepare_batch = remember
    trainer.dataloader_train = iter([given_batch("043_c", "042_d")])
    network = copy.deepcopy(trainer.network)
    result = trainer.train_step(given_batch("041_a", "041_b"))
    losses = [trainer.loss(network(batch["data"]), batch["target"]) for batch in prepared]
    (sum(losses) / 2).backward()
    assert len(losses) == 2 and float(result["loss"]) == pytest.approx(float(sum(losses)) / 2, rel=1e-5)
    for made, expected in zip(trainer.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(made.grad, expected.grad, atol=1e-6, rtol=1e-4)


def test_compiled_once_for_batches_of_datasets_with_other_numbers_of_tasks(universe: Workspace) -> None:
    plans = {**universal_plans(SGD), PLANS_KEY: uneven_universe().as_dict()}
    trainer = universal_trainer(universe, plans=plans)
    trainer.initialize()
    torch._dynamo.reset()
    counter = CompileCounter()
    trainer.network = torch.compile(trainer.network, backend=counter, fullgraph=True)
    for cases in (("041_a", "041_b"), ("041_a", "042_b"), ("043_a", "042_a"), ("042_x", "041_x")):
        assert np.isfinite(trainer.train_step(given_batch(*cases))["loss"])
    assert counter.frame_count == 1


def test_weights_for_every_dataset_reach_the_loader(universe: Workspace) -> None:
    trainer = universal_trainer(universe, {"hermes": {"dataset_weights": [1, 1, 2]}})
    trainer.initialize()
    training, validation = (loader.data_loader for loader in trainer.get_dataloaders())
    share = dict(zip(training.indices, training.sampling_probabilities, strict=True))
    assert share["043_case_0"] == pytest.approx(0.5) and share["041_case_0"] == pytest.approx(0.25 / 5)
    assert dict(zip(validation.indices, validation.sampling_probabilities, strict=True))["043_case_1"] == 0.5
