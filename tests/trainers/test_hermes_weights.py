import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from interrupting import make_repeatable
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from toy_universe import (
    BRAIN,
    UNIVERSAL,
    given_batch,
    source_json,
    source_plans,
    toy_universe,
    universal_plans,
    universal_trainer,
    with_audible_priors,
    write_toy_universe,
)

from nnunetv2_misfm.architectures.context_prior import Answer, Sample
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.task_labels import contexts
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerVFPretrain
from nnunetv2_misfm.universe import PLANS_KEY, Universe
from nnunetv2_misfm.weights.checkpoint import file_sha256

CPU = torch.device("cpu")


@pytest.fixture
def universe(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The workspace with the universal toy dataset in it."""
    make_repeatable(monkeypatch.setattr)
    write_toy_universe(workspace.preprocessed)
    return workspace


def small_universe() -> Universe:
    """Brain and trunk without the tumour, under another name, and its tasks and modalities in another order."""
    brain, trunk, _ = toy_universe().sources
    return replace(
        toy_universe(),
        dataset="Dataset940_Small",
        tasks=("42:left kidney", "41:organ", "41:lesion"),
        modalities=("CT", "MR"),
        sources=(replace(brain, tasks=(1, 2), modality=1), replace(trunk, tasks=(0, 1), modality=0)),
    )


@pytest.fixture
def small(universe: Workspace) -> Any:
    """A trainer of the small universe, and its checkpoint as if it had been trained."""
    folder, of_all = universe.preprocessed / "Dataset940_Small", universe.preprocessed / UNIVERSAL
    folder.mkdir()
    for name in ("nnUNetPlans_3d_fullres", "dataset.json", "dataset_fingerprint.json"):
        (folder / name).symlink_to(of_all / name)
    (folder / "splits_final.json").write_text('[{"train": ["041_case_0", "042_case_0"], "val": ["041_case_1"]}]')
    for source in small_universe().sources:
        own = {"plans_name": "nnUNetPlansOf940", PLANS_KEY: small_universe().answering(source.dataset).as_dict()}
        plans = json.dumps({**source_plans(source.dataset), **own})
        (universe.preprocessed / source.dataset / "nnUNetPlansOf940.json").write_text(plans)
    trainer = universal_trainer(universe, plans=plans_of(small_universe()))
    trainer.initialize()
    with_audible_priors(trainer.network)
    trainer.file = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.universe = replace(small_universe(), sources=())  # no model folders
    trainer.save_checkpoint(str(trainer.file))
    return trainer


def plans_of(universe: Universe, block: dict[str, Any] | None = None) -> dict[str, Any]:
    return {**universal_plans(block), "dataset_name": universe.dataset, PLANS_KEY: universe.as_dict()}


def account(trainer: Any) -> dict[str, Any]:
    return json.loads((Path(trainer.output_folder) / "pretrained_weights.json").read_text())


@torch.no_grad()
def answer(network: Any, universe: Universe, dataset: str) -> Answer:
    """What a network says of an image of a dataset."""
    source = universe.named(dataset)
    return network.eval()(Sample(given_batch("041_a")["data"], contexts([source], len(source.tasks), CPU)))


# ---------------------------------------------------------------------- where they come from


def test_without_a_name_it_starts_from_scratch_and_reports_nothing(universe: Workspace) -> None:
    workspace_run = universe.trainer(nnUNetTrainerVFPretrain, fold="all")
    workspace_run.run_training()  # a finished pretraining that nobody named
    trainer = universal_trainer(universe)
    trainer.initialize()
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.on_train_start()
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.network.state_dict().items())
    assert not (Path(trainer.output_folder) / "pretrained_weights.json").exists()
    assert trainer.weights_report is None and "Pretrained weights" not in Path(trainer.log_file).read_text()


@pytest.mark.parametrize("by_variable", [False, True])
def test_volume_fusion_gives_encoder_and_decoder(
    universe: Workspace, monkeypatch: pytest.MonkeyPatch, by_variable: bool
) -> None:
    pretraining = universe.trainer(nnUNetTrainerVFPretrain, fold="all")
    pretraining.run_training()
    file = Path(pretraining.output_folder) / "checkpoint_final.pth"
    if by_variable:
        monkeypatch.setenv("nnUNet_misfm_weights", str(file))
    trainer = universal_trainer(universe, None if by_variable else {"pretrained_weights": str(file)})
    trainer.initialize()
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.on_train_start()
    given = torch.load(file, weights_only=True)["network_weights"]
    held = trainer.network.state_dict()
    body = {name for name in held if name.startswith(("encoder.", "decoder."))}
    assert body == {name for name in given if ".seg_layers." not in name}
    assert all(torch.equal(held[name], given[name]) for name in body)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held.items() if name not in body)
    found = account(trainer)
    assert (found["share"], found["method"], found["sha256"]) == (1.0, "volume_fusion", file_sha256(file))
    parameters = {name for name, _ in trainer.network.named_parameters()}  # each under one of its names
    assert set(found["moved"]) == body & parameters and not found["adapted"]
    assert found["fresh"] == dict.fromkeys(set(held) - body, "not in the file")
    assert found["route"] == ("the variable nnUNet_misfm_weights" if by_variable else
                              "misfm.pretrained_weights in the plans")  # fmt: skip


def test_a_larger_universe_answers_old_tasks_as_before_until_it_is_trained(universe: Workspace, small: Any) -> None:
    trainer = universal_trainer(universe, {"pretrained_weights": str(small.file), "initial_lr": 0.1})
    trainer.on_train_start()
    for dataset in (BRAIN, "Dataset042_Trunk"):
        old, new = answer(small.network, small_universe(), dataset), answer(trainer.network, toy_universe(), dataset)
        assert torch.equal(old.logits, new.logits) and old.logits.std() > 0.01
        assert torch.allclose(old.modality.flip(1), new.modality, atol=1e-6)  # CT and MR change places
    before = answer(trainer.network, toy_universe(), BRAIN).logits
    trainer.network.train()
    trainer.train_step(given_batch("043_a", "043_b"))
    assert not torch.equal(answer(trainer.network, toy_universe(), BRAIN).logits, before)


def test_the_account_lists_what_moved_was_adapted_and_stays_fresh(universe: Workspace, small: Any) -> None:
    trainer = universal_trainer(universe, {"pretrained_weights": str(small.file)})
    trainer.on_train_start()
    found, names = account(trainer), [name for name, _ in trainer.network.named_parameters()]
    tokens = {"fusions.encoder_2.task_tokens": "3 of 5 tasks moved, fresh: 43:whole, 43:core"}
    other_order = "2 of 2 modalities moved, in another order"
    modalities = ("fusions.encoder_2.modality_tokens", "modality_head.2.weight", "modality_head.2.bias")
    assert found["adapted"] == {**tokens, **dict.fromkeys(modalities, other_order)}
    assert found["fresh"] == {} and sorted(found["moved"] + list(found["adapted"])) == sorted(names)
    assert (found["share"], found["file"], found["method"]) == (1.0, str(small.file), "hermes")
    log = Path(trainer.log_file).read_text()
    assert "adapted fusions.encoder_2.task_tokens: 3 of 5 tasks moved, fresh: 43:whole, 43:core" in log
    old, new = (t.network.fusions["encoder_2"].task_tokens for t in (small, trainer))
    assert torch.equal(new[:3], old[[1, 2, 0]])


def test_a_model_folder_of_a_source_serves_as_well(universe: Workspace) -> None:
    first = universal_trainer(universe)
    first.run_training()
    run = "nnUNetTrainerHermes__nnUNetPlansOf950__quick"
    file = universe.root / "results" / BRAIN / run / "fold_0" / "checkpoint_final.pth"
    trainer = universal_trainer(universe, {"pretrained_weights": str(file)})
    trainer.on_train_start()
    held = trainer.network.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in first.network.state_dict().items())
    assert account(trainer)["share"] == 1.0 and not account(trainer)["fresh"]


def test_priors_in_a_file_without_plans_are_refused_before_the_first_epoch(universe: Workspace, small: Any) -> None:
    torch.save({"network_weights": small.network.state_dict()}, small.file)
    trainer = universal_trainer(universe, {"pretrained_weights": str(small.file)})
    with pytest.raises(MisfmError, match="expected plans that name the tasks of these context priors"):
        trainer.run_training()


def test_resuming_loads_nothing_and_keeps_the_account(universe: Workspace, small: Any) -> None:
    block = {"pretrained_weights": str(small.file)}
    trainer = universal_trainer(universe, block)
    trainer.run_training()
    small.file.unlink()
    resumed = universal_trainer(universe, block, continue_training=True)
    resumed.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    resumed.on_train_start()
    assert resumed.weights_report == trainer.weights_report == account(trainer)
    held = resumed.network.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in trainer.network.state_dict().items())


# ---------------------------------------------------------------------- a model that extends another


@pytest.fixture
def extending(universe: Workspace) -> Callable[..., Any]:
    """Makes a trainer of a universe that extends the small one."""
    return lambda block=None: universal_trainer(
        universe, plans=plans_of(replace(toy_universe(), extends="Dataset940_Small"), block)
    )


def test_a_model_that_extends_another_starts_from_it(extending: Callable[..., Any], small: Any) -> None:
    trainer = extending()
    trainer.on_train_start()
    found = account(trainer)
    assert found["route"] == "the finished run on Dataset940_Small, which this one extends"
    assert found["file"] == str(small.file)
    old, new = answer(small.network, small_universe(), BRAIN), answer(trainer.network, toy_universe(), BRAIN)
    assert torch.equal(old.logits, new.logits)


def test_a_model_that_extends_an_untrained_one_says_so(extending: Callable[..., Any], small: Any) -> None:
    small.file.unlink()
    with pytest.raises(MisfmError) as caught:
        extending().run_training()
    assert f"{UNIVERSAL} extends Dataset940_Small: expected its trained weights at {small.file}" in str(caught.value)


# ---------------------------------------------------------------------- nnU-Net's own flag


def with_flag(monkeypatch: pytest.MonkeyPatch, trainer: Any, file: Path) -> None:
    """What nnU-Net's maybe_load_checkpoint does."""
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "1", "quick", "0", "-pretrained_weights", str(file)])
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(file))


def test_the_flag_loads_a_model_of_the_same_tasks(
    universe: Workspace, small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = universal_trainer(universe, plans=plans_of(small_universe()))
    with_flag(monkeypatch, trainer, small.file)
    trainer.on_train_start()
    assert (account(trainer)["route"], account(trainer)["file"]) == ("-pretrained_weights", str(small.file))
    held = trainer.network.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in small.network.state_dict().items())


@pytest.mark.parametrize("part", ["tasks", "modalities"])
def test_the_flag_never_takes_one_task_for_another(
    universe: Workspace, small: Any, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    shuffled = replace(small_universe(), **{part: getattr(small_universe(), part)[::-1]})
    trainer = universal_trainer(universe, plans=plans_of(shuffled))
    with_flag(monkeypatch, trainer, small.file)
    with pytest.raises(MisfmError, match="in the same order, got those of Dataset940_Small: name the file with misfm"):
        trainer.on_train_start()


def test_stock_nnunet_starts_from_a_universal_checkpoint(universe: Workspace) -> None:
    first = universal_trainer(universe)
    first.run_training()
    stock = universe.trainer(
        nnUNetTrainer, plans=source_plans(BRAIN), dataset_json=source_json(BRAIN), configuration="3d_fullres"
    )
    stock.initialize()
    heads = {name: t.clone() for name, t in stock.network.state_dict().items() if ".seg_layers." in name}
    load_pretrained_weights(stock.network, str(Path(first.output_folder) / "checkpoint_final.pth"))
    trained = first.network.state_dict()
    for name, tensor in stock.network.state_dict().items():
        assert torch.equal(tensor, heads[name] if name in heads else trained[name])
    stock.num_epochs, stock.num_iterations_per_epoch, stock.num_val_iterations_per_epoch = 1, 1, 1
    stock.run_training()
    assert (Path(stock.output_folder) / "checkpoint_final.pth").is_file()
