"""Moving between this package and nnssl, with nnU-Net's own fine-tuning of nnssl checkpoints rebuilt from its source.

What `nnunet_fine_tuning` does follows nnU-Net's master after 2.8.1 (`preprocess_like_nnssl`, `PretrainedTrainer`),
which is not what is installed.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from nnssl_files import nnssl_checkpoint, primus_checkpoint, toy_network
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from toy import toy_architecture, toy_dataset_json, toy_plans

from nnunetv2_misfm.cli import main
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.adapt import adapt
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.masked_image_modelling import (
    nnUNetTrainerMIM,
    nnUNetTrainerMIMPretrain,
    nnUNetTrainerPCTNetMIM,
    nnUNetTrainerPCTNetMIMPretrain,
)
from nnunetv2_misfm.weights.checkpoint import file_sha256

RESIDUAL = toy_architecture(residual=True)
STEM = "encoder.stem.convs.0.conv.weight"
DECODER_LEFT = "the decoder of an nnssl checkpoint is not taken"


def pretrained(workspace: Workspace, kind: type = nnUNetTrainerMIMPretrain, **arguments: Any) -> Path:
    """The final checkpoint of a run, without its epochs."""
    trainer = workspace.trainer(kind, fold="all", **arguments)
    trainer.initialize()
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    trainer.save_checkpoint(str(file))
    return file


def written(folder: Path, checkpoint: dict[str, Any] | None = None) -> Path:
    file = folder / "nnssl.pth"
    torch.save(checkpoint or nnssl_checkpoint(toy_network().state_dict()), file)
    return file


def weights_of(file: Path) -> dict[str, Tensor]:
    return torch.load(file, weights_only=True)["network_weights"]


# Ours, read by nnU-Net's fine-tuning


def nnunet_fine_tuning(file: Path, num_channels: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The network that nnU-Net fine-tunes from a file, and its weights before they were loaded."""
    checkpoint = torch.load(file, weights_only=True, map_location="cpu")
    plan, weights = checkpoint["nnssl_adaptation_plan"], checkpoint["network_weights"]
    configuration = next(iter(plan["pretrain_plan"]["configurations"].values()))
    info = {key: plan[key] for key in ("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe")}
    info |= {
        "pt_num_in_channels": plan["pretrain_num_input_channels"],
        "pt_used_patchsize": configuration["patch_size"],
        "pt_recommended_downstream_patchsize": plan["recommended_downstream_patchsize"],
        "spacing": [f"{edge:.2f}" for edge in configuration["spacing"]],
        "citations": checkpoint["citations"],
        "architecture": dict(plan["architecture_plans"]),
    }
    info = json.loads(json.dumps(info))  # it goes through a plans file
    for citation in info["citations"]:
        assert citation["type"] and citation["name"] and citation["apa_citations"]
    architecture = info["architecture"]
    assert architecture["arch_class_name"].endswith(("PlainConvUNet", "ResidualEncoderUNet"))  # nnU-Net's condition
    network = get_network_from_plans(
        architecture["arch_class_name"], architecture["arch_kwargs"], architecture["arch_kwargs_requiring_import"],
        num_channels, 3, allow_init=True, deep_supervision=False,
    )  # fmt: skip
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    stem = {name: tensor for name, tensor in weights.items() if name.startswith(info["key_to_stem"])}
    if num_channels > info["pt_num_in_channels"]:
        first = stem[info["keys_to_in_proj"][0] + ".weight"]
        stem |= {f"{k}.weight": first.repeat(1, num_channels, 1, 1, 1) / num_channels for k in info["keys_to_in_proj"]}
    encoder = {name: tensor for name, tensor in weights.items() if name.startswith(info["key_to_encoder"])}
    for key, own_key, part in (
        (info["key_to_encoder"], network.key_to_encoder, encoder),
        (info["key_to_stem"], network.key_to_stem, stem),
    ):
        inner = {name.removeprefix(key + "."): tensor for name, tensor in part.items()}
        network.get_submodule(own_key).load_state_dict(inner)  # strict, as nnU-Net's
    return network, before


@pytest.mark.parametrize(("residual", "num_channels"), [(True, 1), (True, 2), (False, 1)])
def test_nnunets_fine_tuning_reads_our_pretraining(workspace: Workspace, residual: bool, num_channels: int) -> None:
    file = pretrained(workspace, architecture=toy_architecture(residual=residual))
    given = weights_of(file)
    network, before = nnunet_fine_tuning(file, num_channels)
    held = network.state_dict()
    names = {name for name in held if name.startswith("encoder.")}
    same = {name for name in names if held[name].shape == given[name].shape}
    assert all(torch.equal(held[name], given[name]) for name in same)
    assert names - same == (set() if num_channels == 1 else {STEM, STEM.replace(".conv.", ".all_modules.0.")})
    if num_channels == 2:
        assert torch.equal(held[STEM], given[STEM].repeat(1, 2, 1, 1, 1) / 2)
    assert any(not torch.equal(held[name], before[name]) for name in names)
    fresh = [name for name, _ in network.named_parameters() if name.startswith("decoder.")]
    assert all(torch.equal(held[name], before[name]) for name in fresh)


def test_plan_names_the_run_that_it_came_from(workspace: Workspace) -> None:
    checkpoint = torch.load(pretrained(workspace, architecture=RESIDUAL), weights_only=True)
    plan = checkpoint["nnssl_adaptation_plan"]
    assert list(plan["pretrain_plan"]["configurations"]) == ["quick"]
    assert plan["pretrain_plan"]["plans_name"] == "nnUNetPlans"
    assert (plan["pretrain_num_input_channels"], plan["recommended_downstream_patchsize"]) == (1, [16, 16, 16])
    assert checkpoint["citations"][0]["apa_citations"] == checkpoint["misfm_meta"]["citations"]
    assert checkpoint["citations"][0]["name"] == "masked_image_modelling"


def test_supervised_and_pct_net_checkpoints_carry_no_plan(workspace: Workspace) -> None:
    for file in (pretrained(workspace, MisfmTrainer), pretrained(workspace, nnUNetTrainerPCTNetMIMPretrain)):
        assert not {"nnssl_adaptation_plan", "citations"} & set(torch.load(file, weights_only=True))


def test_our_own_checkpoint_still_gives_its_decoder(workspace: Workspace) -> None:
    file = pretrained(workspace, architecture=RESIDUAL)
    trainer = workspace.trainer(nnUNetTrainerMIM, architecture=RESIDUAL)
    trainer.on_train_start()
    given, held = weights_of(file), trainer.network.state_dict()
    assert all(torch.equal(given[name], held[name]) for name in held if ".seg_layers." not in name)
    assert (trainer.weights_report["transfer"], trainer.weights_report["share"]) == ("all", 1.0)


# nnssl's, read by ours


@pytest.mark.parametrize("route", ["plans", "variable", "finished run"])
def test_fine_tuning_takes_an_encoder_of_nnssl_by_each_route(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, route: str
) -> None:
    file, block = written(tmp_path), {}
    if route == "plans":
        block = {"pretrained_weights": str(file)}
    elif route == "variable":
        monkeypatch.setenv("nnUNet_misfm_weights", str(file))
    else:
        folder = workspace.results / "nnUNetTrainerMIMPretrain__nnUNetPlans__quick" / "fold_all"
        folder.mkdir(parents=True)
        file = Path(shutil.move(file, folder / "checkpoint_final.pth"))
    trainer, untouched = (workspace.trainer(nnUNetTrainerMIM, block, architecture=RESIDUAL) for _ in range(2))
    untouched.initialize()
    trainer.on_train_start()
    given, held, fresh = weights_of(file), trainer.network.state_dict(), untouched.network.state_dict()
    for name in held:
        assert torch.equal(held[name], (given if "encoder." in name else fresh)[name])
    account = json.loads((Path(trainer.output_folder) / "pretrained_weights.json").read_text())
    assert (account["transfer"], account["share"], account["sha256"]) == ("encoder", 1.0, file_sha256(file))
    assert set(account["fresh"].values()) == {"output head", DECODER_LEFT}
    assert {name.split(".")[0] for name in account["fresh"]} == {"decoder"}
    log = Path(trainer.log_file).read_text()
    assert f"{file} is a checkpoint of nnssl: its encoder and stem are taken, its decoder is not (transfer: enc" in log
    assert f"left fresh decoder.stages.0.convs.0.conv.weight: {DECODER_LEFT}" in log


def test_two_channels_and_a_deeper_checkpoint_train(make_workspace: Callable[..., Workspace], tmp_path: Path) -> None:
    file = written(tmp_path, nnssl_checkpoint(toy_network(num_stages=4).state_dict()))
    dataset_json = toy_dataset_json(num_channels=2)
    workspace = make_workspace(dataset_json=dataset_json)
    block = {"pretrained_weights": str(file)}
    trainer = workspace.trainer(nnUNetTrainerMIM, block, dataset_json=dataset_json, architecture=RESIDUAL)
    trainer.initialize()
    trainer._load(*trainer.find_weights())
    torch.testing.assert_close(trainer.network.state_dict()[STEM], weights_of(file)[STEM].repeat(1, 2, 1, 1, 1) / 2)
    trainer = workspace.trainer(nnUNetTrainerMIM, block, dataset_json=dataset_json, architecture=RESIDUAL)
    trainer.run_training()
    meta = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=True)["misfm_meta"]
    account = meta["pretrained_weights"]
    assert (account["transfer"], account["share"]) == ("encoder", 1.0)
    assert "input channels adapted" in account["adapted"][STEM]


def test_other_architectures_stop_before_the_first_epoch(workspace: Workspace, tmp_path: Path) -> None:
    residual, transformer = written(tmp_path), tmp_path / "primus.pth"
    torch.save(primus_checkpoint(), transformer)
    for kind, file, sentence in (
        (nnUNetTrainerMIM, transformer, "primus.pth .*: expected an nnssl checkpoint of a ResidualEncoderUNet"),
        (nnUNetTrainerPCTNetMIM, residual, "expected a ResidualEncoderUNet for the encoder .* got PCTNet; plan with"),
    ):
        trainer = workspace.trainer(kind, {"pretrained_weights": str(file)}, architecture=RESIDUAL)
        with pytest.raises(MisfmError, match=sentence):
            trainer.run_training()
        assert not list(Path(trainer.output_folder).glob("*.pth"))


def test_convert_makes_a_file_that_nnunets_own_flag_takes(
    make_workspace: Callable[..., Workspace], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset_json = toy_dataset_json(num_channels=2)
    plans = toy_plans(architecture=RESIDUAL)
    workspace = make_workspace(plans=plans, dataset_json=dataset_json)
    file, out = written(tmp_path), tmp_path / "adapted.pth"
    assert main(["convert", str(file), "--dataset", "555", "-c", "quick", "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"read {file} (nnssl checkpoint)" in printed
    assert f"left fresh decoder.stages.0.convs.0.conv.weight: {DECODER_LEFT}" in printed
    trainer = workspace.trainer(nnUNetTrainerBaseline, plans=plans, dataset_json=dataset_json)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(out))
    given, held = weights_of(file), trainer.network.state_dict()
    torch.testing.assert_close(held[STEM], given[STEM].repeat(1, 2, 1, 1, 1) / 2)
    rest = [name for name in held if name.startswith("encoder.stages.")]
    assert rest and all(torch.equal(held[name], given[name]) for name in rest)
    meta = torch.load(out, weights_only=True)["misfm_meta"]
    assert meta["adapted_to"]["transfer"]["transfer"] == "encoder"
    assert meta["citations"][0]["apa_citations"] == ["Wald et al. (2025)"]


def test_convert_refuses_a_transformer_with_a_sentence(workspace: Workspace, tmp_path: Path) -> None:
    file = written(tmp_path, primus_checkpoint())
    with pytest.raises(MisfmError, match="nnssl.pth for Dataset555_Toy, .* expected an nnssl checkpoint of a Residual"):
        adapt(file, "555", "quick")
    assert not list(tmp_path.glob("nnssl__*"))
