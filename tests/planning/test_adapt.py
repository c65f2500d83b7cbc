import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from released_layout import released_fmunet, released_pct_net
from torch import Tensor
from toy import DATASET, toy_architecture, toy_dataset_json, toy_plans

from nnunetv2_misfm.cli import main
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.adapt import adapt
from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.fmunet import nnUNetTrainerFMUNet
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.volume_fusion import (
    nnUNetTrainerFMUNetVF,
    nnUNetTrainerFMUNetVFPretrain,
    nnUNetTrainerPCTNetVF,
    nnUNetTrainerPCTNetVFPretrain,
    nnUNetTrainerVF,
    nnUNetTrainerVFPretrain,
)
from nnunetv2_misfm.weights.checkpoint import file_sha256
from nnunetv2_misfm.weights.convert import convert

OTHER_POOLS = [[1, 1, 1], [2, 2, 1], [2, 2, 2]]
PATCH = [16, 16, 32]


def saved(folder: Path, content: Any, name: str = "volf.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def pretrained(workspace: Workspace, kind: type) -> Path:
    """Runs a pretraining on the one-channel toy dataset and returns a copy of its final checkpoint."""
    trainer = workspace.trainer(kind, fold="all", patch_size=PATCH)
    trainer.run_training()
    return Path(shutil.copy(Path(trainer.output_folder) / "checkpoint_final.pth", workspace.root / "pretrained.pth"))


@pytest.fixture
def other(make_workspace: Callable[..., Workspace]) -> Callable[..., Workspace]:
    """Makes the target: two channels, one organ, other pools; what is given replaces parts of it."""

    def make(**configuration: Any) -> Workspace:
        configuration = {"architecture": toy_architecture(strides=OTHER_POOLS), "patch_size": PATCH, **configuration}
        dataset_json = toy_dataset_json(num_channels=2, labels={"background": 0, "organ": 1})
        return make_workspace(plans=toy_plans(**configuration), dataset_json=dataset_json, num_cases=4, labels=[1])

    return make


def written(workspace: Workspace) -> dict[str, Any]:
    return json.loads((workspace.base / "nnUNetPlans.json").read_text())


def trainer_of(workspace: Workspace, kind: type) -> Any:
    dataset_json = json.loads((workspace.base / "dataset.json").read_text())
    return workspace.trainer(kind, plans=written(workspace), dataset_json=dataset_json)


def accepted_by_nnunet(workspace: Workspace, file: Path, kind: type) -> dict[str, Tensor]:
    """What a trainer's network holds after nnU-Net's own `-pretrained_weights`, which asserts names and shapes."""
    trainer = trainer_of(workspace, kind)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(file))
    held = {key: value for key, value in trainer.network.state_dict().items() if ".seg_layers." not in key}
    given = torch.load(file, weights_only=True)["network_weights"]
    assert held.keys() == given.keys() and all(torch.equal(held[key], given[key]) for key in held)
    return held


# Files of the MIS-FM authors


@pytest.mark.parametrize(
    ("state", "kind", "finetune"),
    [
        (released_pct_net(), nnUNetTrainerPCTNet, "nnUNetTrainerPCTNetVF"),
        (released_fmunet(mode=1), nnUNetTrainerFMUNet, "nnUNetTrainerFMUNetVF"),
    ],
)
def test_released_file_is_taken_by_nnunets_flag_on_other_channels_and_pools(
    other: Callable[..., Workspace], state: dict[str, Tensor], kind: type, finetune: str
) -> None:
    workspace = other()
    file = saved(workspace.root, {"model_state_dict": state, "iteration": 7})
    account = adapt(file, "555", "quick")
    assert account.output == workspace.root / f"volf__{DATASET}__nnUNetPlans__quick.pth"
    held = accepted_by_nnunet(workspace, account.output, kind)
    converted = torch.load(convert(file).output, weights_only=True)["network_weights"]
    stem = next(name for name, tensor in held.items() if tensor.ndim == 5)
    expected = converted[stem].sum((2, 3, 4)).expand(-1, 2) / 2  # the response to what is constant stays
    torch.testing.assert_close(held[stem].sum((2, 3, 4)), expected)
    same = [name for name in held if name not in account.report.adapted]
    assert len(same) > 100 and all(torch.equal(held[name], converted[name]) for name in same)
    meta = torch.load(account.output, weights_only=True)["misfm_meta"]
    assert meta["network"]["kwargs"]["strides"][:3] == OTHER_POOLS
    sizes = [meta["network"][key] for key in ("input_channels", "label_channels", "num_classes")]
    assert sizes == [2, 0, 2] and meta["adapted_from"]["network"]["input_channels"] == 1
    assert meta["converted_from"]["iteration"] == 7 and meta["converted_from"]["sha256"] == file_sha256(file)
    assert meta["adapted_from"]["sha256"] == file_sha256(file)
    assert meta["adapted_to"]["transfer"] == account.report.as_dict() and account.report.share == 1.0
    assert account.trainer == finetune


def test_branch_that_pools_as_the_target_does_is_taken_if_it_was_trained(other: Callable[..., Workspace]) -> None:
    flat = toy_architecture(strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2]])
    workspace = other(architecture=flat)
    for batches, asked, mode in (({0: 5, 1: 9, 2: 1}, None, 2), ({0: 5, 1: 9}, None, 1), ({0: 5, 2: 1}, 0, 0)):
        account = adapt(saved(workspace.root, released_pct_net(batches=batches)), "555", "quick", resolution_mode=asked)
        assert account.conversion is not None and account.conversion.resolution_mode == mode
        resized = [name for name, how in account.report.adapted.items() if "kernel resized" in how]
        assert bool(resized) == (mode != 2)
        accepted_by_nnunet(workspace, account.output, nnUNetTrainerPCTNet)


# Our own checkpoints, and nnU-Net's


@pytest.mark.parametrize(
    ("pretrain", "finetune"),
    [
        (nnUNetTrainerPCTNetVFPretrain, nnUNetTrainerPCTNetVF),
        (nnUNetTrainerFMUNetVFPretrain, nnUNetTrainerFMUNetVF),
        (nnUNetTrainerVFPretrain, nnUNetTrainerVF),
    ],
)
def test_own_checkpoint_is_adapted_as_fine_tuning_adapts_it(
    workspace: Workspace, other: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch, pretrain: Any, finetune: Any
) -> None:
    file = pretrained(workspace, pretrain)
    workspace = other()
    account = adapt(file, "555", "quick", output=workspace.root / "fitted.pth")
    assert (account.trainer, account.conversion) == (finetune.__name__, None)
    held = accepted_by_nnunet(workspace, account.output, finetune)
    monkeypatch.setenv("nnUNet_misfm_weights", str(file))
    trainer = trainer_of(workspace, finetune)
    trainer.on_train_start()
    by_route = trainer.network.state_dict()
    assert all(torch.equal(held[name], by_route[name]) for name in held)
    content = torch.load(account.output, weights_only=True)
    assert content["trainer_name"] == pretrain.__name__
    assert content["misfm_meta"]["recipe"]["seed"] == 7  # of the pretraining
    monkeypatch.setenv("nnUNet_misfm_weights", str(account.output))  # and it goes by our routes, too
    again = trainer_of(workspace, finetune)
    again.on_train_start()
    assert again.weights_report["adapted"] == {} and again.weights_report["share"] == 1.0


def test_label_channels_of_a_cascade_are_zero(other: Callable[..., Workspace]) -> None:
    workspace = other(previous_stage="3d_lowres")
    account = adapt(saved(workspace.root, released_pct_net()), "555", "quick")
    held = accepted_by_nnunet(workspace, account.output, nnUNetTrainerPCTNet)
    stem = held["encoder.stem.weight"]
    assert stem.shape[1] == 2 + 1 and (stem[:, :2] != 0).any() and (stem[:, 2:] == 0).all()
    network = torch.load(account.output, weights_only=True)["misfm_meta"]["network"]
    assert (network["input_channels"], network["label_channels"]) == (3, 1)
    again = adapt(account.output, "555", "quick", output=workspace.root / "again.pth")
    assert again.report.adapted == {}  # the same cascade: labels stay labels


def test_what_the_file_does_not_give_is_drawn_alike_every_time(other: Callable[..., Workspace]) -> None:
    workspace = other()
    file = saved(workspace.root, released_pct_net(heads=(2, 4, 1)))  # the trainer's network has one head per level
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = adapt(file, "555", "quick", output=workspace.root / "first.pth")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    second = adapt(file, "555", "quick", output=workspace.root / "second.pth")
    weights = [torch.load(a.output, weights_only=True)["network_weights"] for a in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    fresh = [name for name in first.report.fresh if ".seg_layers." not in name]
    assert len(fresh) == 8 and all(name.endswith("relative_position_bias_table") for name in fresh)
    assert f"  left fresh {fresh[0]}: shape (1331, 2) in the file, (1331, 1) in the network\n" in str(first)


# The command line


def test_account_names_the_target_and_the_command(other: Callable[..., Workspace], capsys: Any) -> None:
    workspace = other()
    file = saved(workspace.root, released_pct_net())
    assert main(["convert", str(file), "--dataset", "555", "-p", "nnUNetPlans", "-c", "quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    output = workspace.root / f"volf__{DATASET}__nnUNetPlans__quick.pth"
    assert lines[0] == f"read {file} (bare state dict)" and lines[1].startswith(
        "PCT-Net: channels [4, 4, 8, 16, 32], 1"
    )
    summary = next(line for line in lines if line.startswith("adapted to"))
    assert summary.startswith(f"adapted to {DATASET}, nnUNetPlans, quick: ") and "100.0 % of the parameters" in summary
    assert any(line.startswith("  adapted encoder.stem.weight: kernel resized and input channels") for line in lines)
    assert lines[-3:] == [
        f"wrote {output}", "fine-tune:",
        f"  nnUNetv2_train {DATASET} quick FOLD -tr nnUNetTrainerPCTNetVF -p nnUNetPlans -pretrained_weights {output}",
    ]  # fmt: skip


# What is refused


def refused(workspace: Workspace, sentence: str, *arguments: Any, **options: Any) -> None:
    before = sorted(workspace.root.rglob("*"))
    with pytest.raises(MisfmError, match=sentence) as refusal:
        adapt(*arguments, **options)
    assert "\n" not in str(refusal.value)
    assert sorted(workspace.root.rglob("*")) == before


def test_wrong_targets_get_a_sentence(other: Callable[..., Workspace]) -> None:
    workspace = other()
    file = saved(workspace.root, released_pct_net())
    refused(workspace, "expected the number or name of a dataset, got '7'", file, "7", "quick")
    refused(workspace, "expected plans at .*none.json, found none", file, "555", "quick", "none")
    refused(workspace, "expected one of the configurations 3d_fullres, quick of .*, got '2d'", file, "555", "2d")
    refused(workspace, "expected an output other than .*volf.pt itself", file, "555", "quick", output=file)
    refused(
        workspace, "expected a checkpoint file at .*none.pt, found none", workspace.root / "none.pt", "555", "quick"
    )
    (workspace.base / "dataset.json").unlink()
    refused(workspace, "expected .*dataset.json beside the plans, found none: plan and", file, "555", "quick")


def test_too_little_that_fits_gets_a_sentence(other: Callable[..., Workspace]) -> None:
    workspace = other()
    wider = saved(workspace.root, released_pct_net((8, 8, 16, 32, 64)))
    refused(
        workspace, "only .* % of its parameters fit the file .*with the same features_per_stage", wider, "555", "quick"
    )
    stock = saved(workspace.root, {"network_weights": {"a": torch.zeros(1)}, "trainer_name": "nnUNetTrainer"})
    where = f"volf.pt for {DATASET}, nnUNetPlans, quick: expected weights of the same network, but"
    refused(workspace, f"{where} only 0.0 % of its parameters fit the file", stock, "555", "quick")


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"misfm_meta": [1]}, "expected misfm_meta to be of type dict, got list"),
        ({"misfm_meta": {"network": "PCTNet"}}, "expected network to be of type dict, got str"),
        ({"misfm_meta": {"network": {"label_channels": "1"}}}, "expected label_channels to be of type int, got str"),
        ({"trainer_name": 7}, "expected trainer_name to be of type str, got int"),
    ],
)
def test_checkpoint_that_describes_itself_wrongly_gets_a_sentence(
    other: Callable[..., Workspace], entries: dict[str, Any], sentence: str
) -> None:
    workspace = other()
    trainer = trainer_of(workspace, nnUNetTrainerBaseline)
    trainer.initialize()
    weights = {"network_weights": trainer.network.state_dict()}
    file = saved(workspace.root, {**weights, **entries}, "own.pth")
    refused(workspace, f"own.pth: {sentence}: correct it or leave it out, and save the", file, "555", "quick")
    silent = saved(workspace.root, {**weights, "trainer_name": None, "misfm_meta": {"network": None}}, "own.pth")
    assert adapt(silent, "555", "quick").trainer == "nnUNetTrainerBaseline"


def test_plans_without_pools_to_take_over_get_a_sentence(other: Callable[..., Workspace]) -> None:
    architecture = toy_architecture()
    del architecture["arch_kwargs"]["strides"]
    workspace = other(architecture=architecture)
    file = saved(workspace.root, released_pct_net())
    refused(workspace, "expected plans whose network has strides of 1 and 2 at its first two", file, "555", "quick")


def test_there_is_no_resolution_mode_in_an_nnunet_checkpoint(other: Callable[..., Workspace]) -> None:
    workspace = other()
    own = saved(workspace.root, {"network_weights": {"a": torch.zeros(1)}}, "own.pth")
    sentence = "expected no --resolution-mode with .*own.pth, got 1: .* this is an nnU-Net checkpoint; leave the option"
    refused(workspace, sentence, own, "555", "quick", resolution_mode=1)


def test_two_dimensional_target_is_refused(other: Callable[..., Workspace]) -> None:
    workspace = other(patch_size=[16, 16])
    with pytest.raises(NotImplementedError, match="nnUNetTrainerPCTNet expected a 3D configuration"):
        adapt(saved(workspace.root, released_pct_net()), "555", "quick")


def test_stock_checkpoint_fits_the_network_that_the_plans_name(other: Callable[..., Workspace]) -> None:
    workspace = other()
    trainer = trainer_of(workspace, nnUNetTrainerBaseline)
    trainer.initialize()
    stock = {"network_weights": trainer.network.state_dict(), "trainer_name": "nnUNetTrainer"}
    account = adapt(saved(workspace.root, stock, "stock.pth"), "555", "quick")
    assert account.report.share == 1.0 and account.trainer == "nnUNetTrainerBaseline"
    accepted_by_nnunet(workspace, account.output, nnUNetTrainerBaseline)
