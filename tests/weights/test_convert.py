import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from released_layout import released_fmunet, released_pct_net
from torch import Tensor, nn
from toy import toy_architecture, toy_dataset_json

from nnunetv2_misfm.cli import main
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.fmunet import nnUNetTrainerFMUNet
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerFMUNetVF, nnUNetTrainerPCTNetVF
from nnunetv2_misfm.weights.checkpoint import file_sha256, write_checkpoint
from nnunetv2_misfm.weights.convert import convert


def pymic(state: dict[str, Tensor]) -> dict[str, Any]:
    """The container of the released files, NumPy number and optimiser included."""
    optimiser = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    valid = np.float64(0.5)
    return {"iteration": 400000, "valid_pred": valid, "model_state_dict": state, "optimizer_state_dict": optimiser}


def saved(folder: Path, content: Any, name: str = "volf.pt") -> Path:
    torch.save(content, folder / name)
    return folder / name


def body(file: Path) -> dict[str, Tensor]:
    return {k: v for k, v in torch.load(file, weights_only=True)["network_weights"].items() if ".seg_layers." not in k}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


# What is written


def test_written_file_is_plain_data_from_which_the_network_can_be_rebuilt(tmp_path: Path) -> None:
    file = saved(tmp_path, pymic(released_pct_net(classes=5, windows=(6, 6, 4))))
    account = convert(file)
    assert account.output == tmp_path / "volf_nnunet.pth"
    content = torch.load(account.output, weights_only=True)
    assert content.keys() == {"network_weights", "trainer_name", "misfm_meta"}
    assert content["trainer_name"] == "nnUNetTrainerPCTNetVFPretrain"
    meta = content["misfm_meta"]
    origin = meta["converted_from"]
    assert "4x4x4 tokens at level 4" in origin.pop("notes")[0]
    assert origin == {
        "file": "volf.pt", "sha256": file_sha256(file), "format": "PyMIC checkpoint", "network": "PCT-Net",
        "resolution_mode": 1, "windows": [6, 6, 4], "batches_tracked": [0, 100, 0], "iteration": 400000,
    }  # fmt: skip
    assert meta["method"] == "volume_fusion" and meta["versions"].keys() == {"nnunetv2-misfm", "torch"}
    assert any("2306.16925" in paper for paper in meta["citations"])
    network = get_network_from_plans(
        *(meta["network"][key] for key in ("class", "kwargs", "kwargs_to_import", "input_channels", "num_classes")),
        deep_supervision=True,
    )
    network.load_state_dict(content["network_weights"])  # strict
    assert account.output.stat().st_size < 1.5 * sum(t.numel() * 4 for t in network.state_dict().values())


def wrapped(state: dict[str, Tensor], prefix: str) -> OrderedDict[str, Tensor]:
    return OrderedDict((f"{prefix}{key}", value) for key, value in state.items())


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: nn.Parameter(value) if value.is_floating_point() else value for key, value in state.items()}


@pytest.mark.parametrize("make", [released_pct_net, released_fmunet])
@pytest.mark.parametrize(
    "container",
    [
        dict,
        parameters,
        lambda state: wrapped(state, "module."),
        lambda state: wrapped(state, "module._orig_mod."),
        lambda state: {"model_state_dict": wrapped(state, "module.")},
    ],
    ids=["bare", "parameters", "module", "compiled", "container"],
)
def test_every_container_gives_the_same_weights(tmp_path: Path, make: Callable, container: Callable) -> None:
    state = make()
    expected = convert(saved(tmp_path, pymic(state)))
    other = convert(saved(tmp_path, container(state), "other.pt"))
    assert_same(body(expected.output), body(other.output))
    assert (expected.source.iteration, other.source.iteration) == (400000, None)


def test_old_container_of_pytorch_is_read(tmp_path: Path) -> None:
    torch.save(pymic(released_fmunet()), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    new = convert(saved(tmp_path, pymic(released_fmunet())))
    assert_same(body(convert(tmp_path / "old.pt").output), body(new.output))


def test_views_into_larger_memory_are_written_alone(tmp_path: Path) -> None:
    large = torch.zeros(3_000_000)
    state = released_fmunet()
    state["project.bias"] = large[:4]
    account = convert(saved(tmp_path, state))
    assert account.output.stat().st_size < 2_000_000 < saved(tmp_path, state, "again.pt").stat().st_size


def test_account_says_what_was_found_taken_left_out_and_how_it_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = released_pct_net((24, 48, 64, 64, 32), 5, 1, heads=(2, 2, 1), batches={0: 7, 1: 9})
    file, out = saved(tmp_path, pymic(state), "a b.pt"), tmp_path / "out.pth"
    assert main(["convert", str(file), "-o", str(out)]) == 0
    assert capsys.readouterr() == (
        f"read {file} (PyMIC checkpoint, iteration 400000)\n"
        "PCT-Net: channels [24, 48, 64, 64, 32], 1 input channel(s), 5 classes, attention heads [2, 2, 1] and windows "
        "[6, 6, 6] at levels 2 to 4\n"
        "training batches that the resolution branches have seen: mode 0: 7, mode 1: 9, mode 2: 0\n"
        "took resolution mode 1, pools (1, 2, 2) and (2, 2, 2): trained on the most batches; --resolution-mode chooses "
        "another\n"
        "mapped 404 tensors; left out: 260 of the other resolution branches, 10 of LayerNorms that the released "
        "network never uses, 10 buffers of position indices, which are computed\n"
        "note: its attention has [2, 2, 1] heads, the trainers' has [4, 8, 16] by default: bias tables start afresh "
        "unless the configuration has num_heads=[2, 2, 1] (nnUNetv2_misfm configure)\n"
        "note: the trainers' networks have [24, 48, 128, 256, 512] channels by default: first run nnUNetv2_misfm "
        "configure -d DATASET -c 3d_fullres --name NAME features_per_stage=[24,48,64,64,32] and train NAME\n"
        f"wrote {out}\n"
        "fine-tune on images of 1 channel(s) under plans with the pools (1, 2, 2) and (2, 2, 2):\n"
        f"  nnUNetv2_train DATASET 3d_fullres FOLD -tr nnUNetTrainerPCTNetVF -pretrained_weights {out}\n"
        "fine-tune anywhere else (channels and kernels are adapted):\n"
        f"  nnUNet_misfm_weights={out} nnUNetv2_train DATASET 3d_fullres FOLD -tr nnUNetTrainerPCTNetVF\n",
        "",
    )
    assert main(["convert", str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"-pretrained_weights '{tmp_path}/a b_nnunet.pth'\n" in printed
    assert main(["convert", str(file), "-o", str(out), "--resolution-mode", "2"]) == 0
    printed = capsys.readouterr().out
    assert "took resolution mode 2, pools (1, 2, 2) and (1, 2, 2): asked for; WARNING: no training batch is" in printed
    assert torch.load(out, weights_only=True)["misfm_meta"]["converted_from"]["resolution_mode"] == 2


# nnU-Net and our trainers take it


@pytest.mark.parametrize(
    ("state", "kind"),
    [(released_pct_net(batches={0: 1}), nnUNetTrainerPCTNet), (released_fmunet(), nnUNetTrainerFMUNet)],
)
def test_nnunets_own_flag_takes_it_on_the_same_channels_and_strides(
    workspace: Workspace, state: dict[str, Tensor], kind: type
) -> None:
    output = convert(saved(workspace.root, pymic(state))).output
    trainer = workspace.trainer(kind, patch_size=[16, 16, 32])
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(output))
    held = trainer.network.state_dict()
    assert_same(body(output), {key: value for key, value in held.items() if ".seg_layers." not in key})


@pytest.mark.parametrize("by_plans", [True, False])
@pytest.mark.parametrize(
    ("state", "kind"),
    [(released_pct_net(), nnUNetTrainerPCTNetVF), (released_fmunet(mode=1), nnUNetTrainerFMUNetVF)],
)
def test_fine_tuning_adapts_it_to_other_channels_strides_and_classes(
    make_workspace: Any, monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor], kind: type, by_plans: bool
) -> None:
    dataset_json = toy_dataset_json(num_channels=2)
    workspace = make_workspace(dataset_json=dataset_json)
    output = convert(saved(workspace.root, pymic(state))).output
    if not by_plans:
        monkeypatch.setenv("nnUNet_misfm_weights", str(output))
    strides = toy_architecture(strides=[[1, 1, 1], [2, 2, 1], [2, 2, 2]])
    block = {"pretrained_weights": str(output)} if by_plans else {}
    trainer = workspace.trainer(kind, block, dataset_json=dataset_json, architecture=strides)
    trainer.on_train_start()
    report = trainer.weights_report
    assert report["share"] == 1.0 and all(".seg_layers." in name for name in report["fresh"])
    stem = next(name for name in report["adapted"] if "input channels adapted" in report["adapted"][name])
    given = body(output)[stem].sum((2, 3, 4))  # [O, 1]: same response to what is constant
    torch.testing.assert_close(trainer.network.state_dict()[stem].sum((2, 3, 4)), given.expand(-1, 2) / 2)


# What is refused


def refused(file: Path, sentence: str, **options: Any) -> None:
    before = {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()}
    with pytest.raises(MisfmError, match=sentence) as refusal:
        convert(file, **options)
    assert "\n" not in str(refusal.value)
    assert {path: path.read_bytes() for path in file.parent.iterdir() if path.is_file()} == before


def test_missing_truncated_and_foreign_files_get_a_sentence(tmp_path: Path) -> None:
    refused(tmp_path / "none.pt", "expected a checkpoint file at .*none.pt, found none; check the path")
    whole = saved(tmp_path, pymic(released_fmunet())).read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.pt").write_bytes(whole[:size])
        refused(tmp_path / "cut.pt", "cut.pt is truncated or no PyTorch checkpoint")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html>")  # what a download page leaves behind
    refused(tmp_path / "page.pt", "page.pt is truncated or no PyTorch checkpoint")
    refused(saved(tmp_path, [torch.zeros(1)], "list.pt"), "list.pt: expected a checkpoint dictionary, got list")


def test_dictionary_without_a_state_dict_gets_a_sentence(tmp_path: Path) -> None:
    expected = r"expected a state dict of tensors, alone or under 'network_weights' or 'model_state_dict', got the keys"
    for content, keys in (
        ({}, "none"),
        ({"epoch": 3, "state": {"a": torch.zeros(1)}}, "epoch, state"),
        ({"model_state_dict": {}, "iteration": 3}, "model_state_dict, iteration"),
        ({"model_state_dict": {"project.weight": [1.0]}}, "model_state_dict"),
        ({"network_weights": None}, "network_weights"),
    ):
        refused(saved(tmp_path, content), f"volf.pt: {expected} {keys};")


def test_state_dict_of_another_network_gets_its_first_keys(tmp_path: Path) -> None:
    file = saved(tmp_path, nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)).state_dict())
    refused(
        file, r"volf.pt: expected the tensors of a released PCT-Net \(embeddings, pyramid_ct, pred_heads\) or FMUNet "
        r"\(project, encoder, decoder, out_layers\), got those of another network \(0.weight, 0.bias, 1.weight, 1.bias"
    )  # fmt: skip


def test_incomplete_network_is_named_with_its_file(tmp_path: Path) -> None:
    state = released_pct_net()
    del state["pyramid_ct.up3.conv.2.weight"]
    refused(
        saved(tmp_path, state), r"volf.pt: expected a whole PCT-Net, got .*the first is pyramid_ct.up3.conv.2.weigh"
    )
    refused(
        saved(tmp_path, released_fmunet()),
        "volf.pt: expected no --resolution-mode with FMUNet, got 1",
        resolution_mode=1,
    )
    refused(saved(tmp_path, released_pct_net(batches={})), "volf.pt: expected a count of training batches in one")


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_dense_values_get_a_sentence(tmp_path: Path, kind: str) -> None:
    state = released_fmunet()
    bias = state["project.bias"]
    state["project.bias"] = bias.to_sparse() if kind == "sparse" else bias.to("meta")
    refused(saved(tmp_path, state), "volf.pt: expected dense tensors with values, got project.bias without")


def test_tensors_that_claim_more_values_than_the_file_holds_get_a_sentence(tmp_path: Path) -> None:
    state = released_fmunet()
    state["project.bias"] = torch.zeros(1).expand(10**12)
    sentence = (
        r"volf.pt: expected tensors that hold each of their values, got project.bias of shape \(1000000000000,\) "
    )
    refused(saved(tmp_path, state), f"{sentence}with 1 for its 1000000000000: save the weights again")


def test_our_own_and_nnunets_checkpoints_need_no_conversion(tmp_path: Path) -> None:
    write_checkpoint({"network_weights": {"encoder.stem.weight": torch.zeros(1)}}, tmp_path / "own.pth")
    sentence = (
        "own.pth is an nnU-Net checkpoint and needs no conversion: pass it to -pretrained_weights as it is, or add "
    )
    refused(tmp_path / "own.pth", f"{sentence}--dataset ID -c CONFIGURATION")
    converted = convert(saved(tmp_path, released_fmunet())).output
    refused(converted, "volf_nnunet.pth is an nnU-Net checkpoint and needs no conversion")


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("place", ["container", "optimiser", "state"])
def test_nothing_in_a_file_is_run(tmp_path: Path, place: str) -> None:
    marker = tmp_path / "marker"
    content = pymic(released_fmunet())
    part = {"container": content, "optimiser": content["optimizer_state_dict"], "state": content["model_state_dict"]}
    part[place]["extra"] = Malicious(marker)
    file = saved(tmp_path, content)
    refused(
        file, "volf.pt: expected tensors and plain data alone, got posix.system, so the file is not read and nothing"
    )
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # so the object does act where it is let


def test_whole_networks_are_refused_by_name(tmp_path: Path) -> None:
    file = saved(tmp_path, {"model_state_dict": nn.Linear(1, 1)})
    refused(file, "volf.pt: .* got torch.nn.modules.linear.Linear, .*or save the state dict alone")


# Where it is written


def test_file_itself_is_never_overwritten(tmp_path: Path) -> None:
    file = saved(tmp_path, released_fmunet())
    (tmp_path / "link.pth").symlink_to(file)
    os.link(file, tmp_path / "same.pth")
    os.link(file, tmp_path / "temporary.pth.tmp")
    for name in ("volf.pt", "link.pth", "same.pth", "temporary.pth"):
        sentence = f"expected an output other than {file} itself, which stays as it is: choose another -o"
        refused(file, sentence, output=tmp_path / name)


def test_former_output_is_replaced_and_a_missing_folder_gets_a_sentence(tmp_path: Path) -> None:
    file, output = saved(tmp_path, released_fmunet()), tmp_path / "out.pth"
    output.write_text("old")
    assert convert(file, output).output == output
    assert torch.load(output, weights_only=True)["trainer_name"] == "nnUNetTrainerFMUNetVFPretrain"
    refused(file, "none/out.pth could not be written .*No such file or directory", output=tmp_path / "none" / "out.pth")
