import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from toy import toy_architecture, toy_dataset_json, toy_plans

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.masked_image_modelling import nnUNetTrainerMIM
from nnunetv2_misfm.trainers.volume_fusion import (
    nnUNetTrainerPCTNetVF,
    nnUNetTrainerPCTNetVFPretrain,
    nnUNetTrainerVF,
    nnUNetTrainerVFPretrain,
)
from nnunetv2_misfm.weights.checkpoint import file_sha256

PAIRS = pytest.mark.parametrize(
    ("pretrain", "finetune"),
    [(nnUNetTrainerVFPretrain, nnUNetTrainerVF), (nnUNetTrainerPCTNetVFPretrain, nnUNetTrainerPCTNetVF)],
)


def pretrained(workspace: Workspace, kind: type, **arguments: Any) -> Path:
    """Runs a pretraining and returns its final checkpoint."""
    trainer = workspace.trainer(kind, fold=arguments.pop("fold", "all"), **arguments)
    trainer.run_training()
    return Path(trainer.output_folder) / "checkpoint_final.pth"


def body(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t for name, t in weights.items() if ".seg_layers." not in name}


def assert_starts_from(trainer: Any, file: Path) -> None:
    """The trainer's weights are the file's, heads aside (before any step)."""
    given = body(torch.load(file, weights_only=True)["network_weights"])
    held = body(trainer.network.state_dict())
    assert given.keys() == held.keys()
    assert all(torch.equal(given[name], held[name]) for name in given)


def account(trainer: Any) -> dict[str, Any]:
    return json.loads((Path(trainer.output_folder) / "pretrained_weights.json").read_text())


@PAIRS
def test_finished_pretraining_on_the_same_dataset_is_found(workspace: Workspace, pretrain: Any, finetune: Any) -> None:
    file = pretrained(workspace, pretrain)
    trainer = workspace.trainer(finetune)
    trainer.on_train_start()
    assert_starts_from(trainer, file)
    found = account(trainer)
    assert found["route"] == f"a finished run of {pretrain.__name__} on this dataset"
    assert (found["file"], found["sha256"], found["share"]) == (str(file), file_sha256(file), 1.0)
    assert found["method"] == "volume_fusion"
    names = {name for name, _ in trainer.network.named_parameters()}
    assert set(found["fresh"]) == {name for name in names if ".seg_layers." in name}
    assert names <= {*found["moved"], *found["fresh"]} and not found["adapted"]
    log = Path(trainer.log_file).read_text()
    assert f"Pretrained weights: {file}, by a finished run of" in log


@PAIRS
def test_without_weights_it_stops_and_names_the_four_routes(workspace: Workspace, pretrain: Any, finetune: Any) -> None:
    trainer = workspace.trainer(finetune)
    with pytest.raises(MisfmError) as caught:
        trainer.run_training()
    sentence = str(caught.value)
    for part in (
        "1. -pretrained_weights FILE",
        "2. misfm.pretrained_weights in the plans",
        "3. the variable nnUNet_misfm_weights",
        f"4. a finished run of {pretrain.__name__}",
        f"nnUNetv2_train Dataset555_Toy quick all -tr {pretrain.__name__} -p nnUNetPlans",
    ):
        assert part in sentence
    assert not trainer.was_initialized
    trainer.initialize()  # an initialised network that nobody filled is no excuse
    with pytest.raises(MisfmError, match="found none by any of its four routes"):
        trainer.on_train_start()


def test_a_cascade_is_told_to_pretrain_its_single_stage(workspace: Workspace) -> None:
    plans = toy_plans()
    plans["configurations"]["cascade"] = {"inherits_from": "quick", "previous_stage": "3d_lowres"}
    trainer = workspace.trainer(nnUNetTrainerVF, plans=plans, configuration="cascade")
    with pytest.raises(MisfmError, match="nnUNetv2_train Dataset555_Toy quick all -tr nnUNetTrainerVFPretrain"):
        trainer.find_weights()


def test_plans_win_over_the_variable_and_the_variable_over_a_finished_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = pretrained(workspace, nnUNetTrainerVFPretrain)
    by_variable, by_plans = tmp_path / "variable.pth", tmp_path / "plans.pth"
    for seed, file in ((11, by_variable), (12, by_plans)):
        shutil.copy(pretrained(workspace, nnUNetTrainerVFPretrain, block={"seed": seed}), file)
    pretrained(workspace, nnUNetTrainerVFPretrain)  # the run itself once more
    for block, variable, expected, route in (
        ({}, None, run, "a finished run of nnUNetTrainerVFPretrain on this dataset"),
        ({}, by_variable, by_variable, "the variable nnUNet_misfm_weights"),
        ({"pretrained_weights": str(by_plans)}, by_variable, by_plans, "misfm.pretrained_weights in the plans"),
    ):
        if variable:
            monkeypatch.setenv("nnUNet_misfm_weights", str(variable))
        trainer = workspace.trainer(nnUNetTrainerVF, block)
        trainer.on_train_start()
        assert_starts_from(trainer, expected)
        assert account(trainer)["route"] == route


@PAIRS
def test_nnunets_flag_is_recognised_and_nothing_else_is_loaded(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pretrain: Any, finetune: Any
) -> None:
    by_flag, by_variable = tmp_path / "flag.pth", tmp_path / "variable.pth"
    shutil.copy(pretrained(workspace, pretrain), by_flag)
    shutil.copy(pretrained(workspace, pretrain, block={"seed": 11}), by_variable)
    monkeypatch.setenv("nnUNet_misfm_weights", str(by_variable))
    monkeypatch.setattr(
        "sys.argv", ["nnUNetv2_train", "555", "quick", "0", "-pretrained_weights", str(by_flag), "-p", "p"]
    )
    trainer = workspace.trainer(finetune)
    trainer.initialize()  # the two lines of nnU-Net's maybe_load_checkpoint
    load_pretrained_weights(trainer.network, str(by_flag))
    trainer.on_train_start()
    assert_starts_from(trainer, by_flag)
    found = account(trainer)
    assert (found["route"], found["file"], found["sha256"]) == (
        "-pretrained_weights",
        str(by_flag),
        file_sha256(by_flag),
    )
    trainer.save_checkpoint(str(tmp_path / "saved.pth"))
    meta = torch.load(tmp_path / "saved.pth", weights_only=True)["misfm_meta"]
    assert meta["pretrained_weights"] == found


@PAIRS
def test_resuming_loads_nothing_and_keeps_the_account(workspace: Workspace, pretrain: Any, finetune: Any) -> None:
    pretrained(workspace, pretrain)
    trainer = workspace.trainer(finetune)
    trainer.run_training()
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    resumed = workspace.trainer(finetune, continue_training=True)
    resumed.load_checkpoint(str(file))
    resumed.on_train_start()
    assert_starts_from(resumed, file)
    assert resumed.weights_report == trainer.weights_report


def test_continuing_in_an_empty_folder_goes_through_the_routes(workspace: Workspace) -> None:
    with pytest.raises(MisfmError, match="four routes"):
        workspace.trainer(nnUNetTrainerVF, continue_training=True).run_training()
    file = pretrained(workspace, nnUNetTrainerVFPretrain)
    trainer = workspace.trainer(nnUNetTrainerVF, continue_training=True)
    trainer.on_train_start()
    assert_starts_from(trainer, file)


def test_run_on_the_inherited_configuration_counts_and_fold_all_comes_first(workspace: Workspace) -> None:
    plans = toy_plans()
    plans["configurations"]["finer"] = {**plans["configurations"]["quick"], "inherits_from": "quick"}
    same_fold = pretrained(workspace, nnUNetTrainerVFPretrain, fold=0, plans=plans)
    trainer = workspace.trainer(nnUNetTrainerVF, plans=plans, configuration="finer")
    assert trainer.find_weights()[0] == same_fold
    fold_all = pretrained(workspace, nnUNetTrainerVFPretrain, plans=plans)
    assert trainer.find_weights()[0] == fold_all
    second = pretrained(workspace, nnUNetTrainerVFPretrain, plans=plans, configuration="finer")
    with pytest.raises(MisfmError) as caught:
        trainer.find_weights()
    assert "expected one finished run of nnUNetTrainerVFPretrain, got 2" in str(caught.value)
    assert str(second) in str(caught.value) and str(fold_all) in str(caught.value)


def test_other_classes_channels_patch_and_anisotropy_adapt(workspace: Workspace, make_workspace: Any) -> None:
    file = pretrained(workspace, nnUNetTrainerPCTNetVFPretrain)
    dataset_json = toy_dataset_json(num_channels=2, labels={"background": 0, "organ": 1})
    workspace = make_workspace(dataset_json=dataset_json, labels=[1])
    flat = toy_architecture(strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2]])
    trainer = workspace.trainer(
        nnUNetTrainerPCTNetVF, {"pretrained_weights": str(file)}, dataset_json=dataset_json, architecture=flat,
        patch_size=[12, 20, 18],
    )  # fmt: skip
    trainer.run_training()
    found = account(trainer)
    assert found["share"] == 1.0
    assert "input channels adapted" in found["adapted"]["encoder.stem.weight"]
    assert "kernel resized" in found["adapted"]["encoder.stem.weight"]


@PAIRS
def test_encoder_alone_can_be_transferred(workspace: Workspace, pretrain: Any, finetune: Any) -> None:
    file = pretrained(workspace, pretrain)
    trainer = workspace.trainer(finetune, {"transfer": "encoder"})
    trainer.on_train_start()
    given, held = torch.load(file, weights_only=True)["network_weights"], trainer.network.state_dict()
    encoder = [name for name in held if name.startswith("encoder.")]
    decoder = [name for name, t in trainer.network.named_parameters() if name.startswith("decoder.") and t.ndim == 5]
    assert all(torch.equal(given[name], held[name]) for name in encoder)
    same = [name for name in decoder if given[name].shape == held[name].shape and torch.equal(given[name], held[name])]
    assert decoder and not same


@PAIRS
def test_label_channels_of_a_cascade_start_at_zero(workspace: Workspace, pretrain: Any, finetune: Any) -> None:
    file = pretrained(workspace, pretrain)
    trainer = workspace.trainer(finetune, {"pretrained_weights": str(file)}, previous_stage="3d_lowres")
    assert trainer.is_cascaded
    trainer.initialize()
    trainer._load(file, "test")
    stem = next(t for t in trainer.network.state_dict().values() if t.ndim == 5)
    given = next(t for t in torch.load(file, weights_only=True)["network_weights"].values() if t.ndim == 5)
    assert stem.shape[1] == 1 + 2
    assert torch.equal(stem[:, :1], given) and (stem[:, 1:] == 0).all()


def test_checkpoints_that_do_not_fit_are_refused_with_a_sentence(workspace: Workspace, tmp_path: Path) -> None:
    unet = pretrained(workspace, nnUNetTrainerVFPretrain)
    empty, truncated, missing = (tmp_path / f"{name}.pth" for name in ("empty", "truncated", "missing"))
    empty.write_bytes(b"")
    truncated.write_bytes(unet.read_bytes()[:5000])
    other_width = tmp_path / "width.pth"
    wider = pretrained(workspace, nnUNetTrainerPCTNetVFPretrain, block={"features_per_stage": [6, 6, 12, 24, 48]})
    shutil.copy(wider, other_width)
    for file, sentence in (
        (unet, r"expected weights of the same network, but only 0.0 % of its parameters fit the file"),
        (other_width, r"expected weights of the same network, but only \d+\.\d % .* with the same features_per_stage"),
        (empty, "is truncated or no PyTorch checkpoint"),
        (truncated, "is truncated or no PyTorch checkpoint"),
        (missing, "expected a checkpoint file at .*missing.pth, found none"),
    ):
        trainer = workspace.trainer(nnUNetTrainerPCTNetVF, {"pretrained_weights": str(file)})
        with pytest.raises(MisfmError, match=sentence):
            trainer.run_training()
        assert trainer.current_epoch == 0 and not list(Path(trainer.output_folder).glob("*.pth"))


@pytest.mark.parametrize("route", ["variable", "flag"])
def test_weights_of_another_method_are_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    file = pretrained(workspace, nnUNetTrainerVFPretrain)
    trainer = workspace.trainer(nnUNetTrainerMIM)
    if route == "variable":
        monkeypatch.setenv("nnUNet_misfm_weights", str(file))
    else:
        trainer.initialize()
        load_pretrained_weights(trainer.network, str(file))
        monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    sentence = (
        "expected weights that masked_image_modelling pretrained, got those of volume_fusion: take the trainer that "
        "fine-tunes from volume_fusion"
    )
    with pytest.raises(MisfmError, match=sentence):
        trainer.on_train_start()
    assert not list(Path(trainer.output_folder).glob("pretrained_weights.json"))


def test_account_of_a_fitted_file_is_that_of_the_fitting(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    file = pretrained(workspace, nnUNetTrainerVFPretrain)
    checkpoint = torch.load(file, weights_only=True)
    fitting = {
        "transfer": "encoder",
        "moved": ["encoder.a"],
        "adapted": {},
        "fresh": {"decoder.b": "why"},
        "share": 0.6,
    }
    checkpoint["misfm_meta"]["adapted_to"] = {"transfer": fitting}
    torch.save(checkpoint, file)
    trainer = workspace.trainer(nnUNetTrainerVF)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(file))
    monkeypatch.setattr("sys.argv", ["nnUNetv2_train", "-pretrained_weights", str(file)])
    trainer.on_train_start()
    assert {key: account(trainer)[key] for key in fitting} == fitting


def test_2d_is_refused(workspace: Workspace) -> None:
    for kind in (nnUNetTrainerVF, nnUNetTrainerPCTNetVF):
        with pytest.raises(NotImplementedError, match="expected a 3D configuration"):
            workspace.trainer(kind, patch_size=[16, 16])
