import mmap
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerNoDeepSupervision import (
    nnUNetTrainerNoDeepSupervision,
)
from torch import nn
from toy import DATASET, toy_architecture, toy_dataset_json

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.benchmark import cost
from nnunetv2_misfm.benchmark.cost import cost_of, forward_flops, measure_cost, random_batch
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.monai_networks import nnUNetTrainerUNETR
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerPCTNetVF, nnUNetTrainerPCTNetVFPretrain

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "lesion": 2}, "regions_class_order": [1, 2]}

# The toy plans' PlainConvUNet: 1 -> 4 -> 8 -> 16 channels at 16, 8 and 4 voxels per axis; a norm has two per channel
ENCODER = (27 * 1 * 4 + 4 + 8) + (27 * 4 * 8 + 8 + 16) + (27 * 8 * 16 + 16 + 32)
DECODER = (8 * 16 * 8 + 8) + (27 * 16 * 8 + 8 + 16) + (8 * 8 * 4 + 4) + (27 * 8 * 4 + 4 + 8)
HEADS = (8 * 3 + 3) + (4 * 3 + 3)
TOY_PARAMETERS = ENCODER + DECODER + HEADS
# Two per multiplication; of the heads only the finest, and a transposed convolution works on its input's voxels
TOY_FLOPS = 2 * (
    16**3 * 27 * 1 * 4 + 8**3 * 27 * 4 * 8 + 4**3 * 27 * 8 * 16
    + 4**3 * 8 * 16 * 8 + 8**3 * 27 * 16 * 8 + 8**3 * 8 * 8 * 4 + 16**3 * 27 * 8 * 4
    + 16**3 * 4 * 3
)  # fmt: skip


def test_flops_of_layers_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv3d(2, 6, 3, stride=2, padding=1), nn.BatchNorm3d(6), nn.ReLU(), nn.ConvTranspose3d(6, 4, 2, 2),
        nn.Flatten(), nn.Linear(4 * 8**3, 5),
    )  # fmt: skip
    expected = 2 * (4**3 * 27 * 2 * 6 + 4**3 * 8 * 6 * 4 + 4 * 8**3 * 5)
    assert forward_flops(network, torch.zeros(1, 2, 8, 8, 8)) == expected


def test_flops_of_pct_net_by_hand_with_its_window_attention() -> None:
    network = PCTNet(1, 3, features_per_stage=[4, 4, 8, 16, 32], num_heads=[1, 2, 4], deep_supervision=False)
    products = []

    def multiplications(module: Any, inputs: tuple, output: torch.Tensor) -> None:
        if isinstance(module, nn.Linear):
            products.append(output.numel() * module.in_features)
        else:
            voxels = inputs[0] if isinstance(module, nn.ConvTranspose3d) else output
            products.append(voxels[0, 0].numel() * module.weight.numel())

    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(multiplications)
    total = forward_flops(network, torch.zeros(1, 1, 32, 32, 32))
    # Grids of 8, 4 and 2 voxels per axis in windows of 6 (padded to 12), 4 and 2; query x key and weights x value for
    # every pair of tokens of a window, in two blocks each of encoder and decoder but for the deepest level's decoder
    pairs = {8: 8 * (6**3) ** 2, 16: (4**3) ** 2, 32: (2**3) ** 2}
    attention = sum(2 * pairs[channels] * channels * blocks for channels, blocks in ((8, 4), (16, 4), (32, 2)))
    assert total == 2 * (sum(products) + attention)


def test_deep_supervision_is_off_when_operations_are_counted(workspace: Workspace) -> None:
    result = cost_of(workspace.trainer(nnUNetTrainer))
    assert (result.trainer, result.parameters, result.gflops) == ("nnUNetTrainer", TOY_PARAMETERS, TOY_FLOPS / 1e9)


@pytest.mark.parametrize("case", ["stock", "no deep supervision", "PCT-Net", "regions", "channels"])
def test_noise_has_the_form_of_nnunets_own_batches(case: str, make_workspace: Any) -> None:
    entries: dict[str, Any] = {"regions": REGIONS, "channels": {"num_channels": 2}}.get(case, {})
    dataset_json = toy_dataset_json(**entries)
    kind = {"no deep supervision": nnUNetTrainerNoDeepSupervision, "PCT-Net": nnUNetTrainerPCTNet}.get(
        case, nnUNetTrainer
    )
    trainer = make_workspace(dataset_json=dataset_json).trainer(kind, dataset_json=dataset_json)
    trainer.on_train_start()
    real, noise = next(trainer.dataloader_train), random_batch(trainer)
    for key in ("data", "target"):
        expected, found = ([v] if isinstance(v, torch.Tensor) else v for v in (real[key], noise[key]))
        assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
    trainer.network.train()
    trainer.train_step(noise)


@pytest.mark.parametrize("regions", [False, True])
def test_an_ignore_label_has_its_place_in_the_noise(workspace: Workspace, regions: bool) -> None:
    whole = {"whole": [1, 2], "lesion": 2} if regions else {"organ": 1, "lesion": 2}
    dataset_json = toy_dataset_json(labels={"background": 0, **whole, "ignore": 3}, regions_class_order=[1, 2])
    trainer = workspace.trainer(nnUNetTrainer, dataset_json=dataset_json)
    trainer.initialize()
    noise = random_batch(trainer)
    assert noise["target"][0].shape == (2, 3 if regions else 1, 16, 16, 16)
    trainer.network.train()
    trainer.train_step(noise)


def test_2d_configurations_have_a_cost(workspace: Workspace) -> None:
    architecture = toy_architecture(2, strides=[[1, 1], [2, 2]])
    architecture["arch_kwargs"] |= {
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "kernel_sizes": [[3, 3], [3, 3]],
    }
    result = cost_of(workspace.trainer(nnUNetTrainer, patch_size=[16, 16], architecture=architecture))
    convolutions = 16**2 * 9 * 1 * 4 + 8**2 * 9 * 4 * 8 + 8**2 * 4 * 8 * 4 + 16**2 * 9 * 8 * 4 + 16**2 * 4 * 3
    assert result.gflops == 2 * convolutions / 1e9


def test_noise_of_a_cascade_has_its_label_channels(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainer, previous_stage="3d_lowres")
    trainer.initialize()
    data = random_batch(trainer)["data"]
    assert data.shape == (2, 3, 16, 16, 16)
    assert set(data[:, 1:].unique().tolist()) == {0, 1} and (data[:, 1:].sum(1) <= 1).all()


@pytest.mark.parametrize("kind", [nnUNetTrainerPCTNetVF, nnUNetTrainerPCTNetVFPretrain])
def test_pretraining_and_fine_tuning_need_no_data_and_no_weights(workspace: Workspace, kind: type) -> None:
    for file in (workspace.base / "nnUNetPlans_3d_fullres").iterdir():
        file.write_bytes(b"")  # their endings alone are looked at
    result = cost_of(workspace.trainer(kind))
    scratch = cost_of(workspace.trainer(nnUNetTrainerPCTNet))
    extra_heads = (5 - 3) * (4 + 4 + 8 + 16 + 4) if kind is nnUNetTrainerPCTNetVFPretrain else 0
    assert result.parameters == scratch.parameters + extra_heads


def test_transformers_of_monai_have_a_cost(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    narrow = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2}
    monkeypatch.setattr(nnUNetTrainerUNETR, "network_arguments", narrow)
    assert cost_of(workspace.trainer(nnUNetTrainerUNETR)).gflops > 0


@LINUX
def test_a_fresh_process_measures_and_leaves_no_results(workspace: Workspace) -> None:
    architecture = toy_architecture()
    architecture["arch_kwargs"]["features_per_stage"] = [4, 128, 256]
    workspace.plans(architecture=architecture)
    result = measure_cost(DATASET, "quick", "nnUNetTrainerBaseline", device="cpu")
    trainable = result.parameters * 4  # bytes
    assert trainable > 4e6
    assert result.memory_kind == cost.RESIDENT
    # Weights, gradients and momentum at least; at most some more copies, and 200 MB for what a first step brings
    assert 3 * trainable < result.peak_memory_gib * 2**30 < 8 * trainable + 200e6
    assert list((workspace.root / "results").iterdir()) == []


def test_unknown_trainer_is_one_sentence(workspace: Workspace) -> None:
    sentence = (
        rf"the cost of nnUNetTrainerNone under quick of {DATASET} .* Could not find requested .*nnUNetTrainerNone"
    )
    with pytest.raises(MisfmError, match=sentence) as refusal:
        measure_cost(DATASET, "quick", "nnUNetTrainerNone", device="cpu")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("status", "errors", "said"),
    [
        (-9, "", "its process ended with status -9 (-9 is what happens where memory does not suffice)."),
        (
            1,
            "Traceback\n  File x\ntorch.OutOfMemoryError: no memory\nSee the notes.\n",
            "torch.OutOfMemoryError: no memory",
        ),
        (1, "Traceback\nnnunetv2_misfm.errors.MisfmError: expected a, got b.\n", "expected a, got b."),
        (1, "python: no such module\n", "python: no such module"),
    ],
)
def test_a_process_that_failed_is_explained(status: int, errors: str, said: str) -> None:
    assert cost._reason(status, errors) == said


def test_a_trainer_that_never_steps_is_refused(workspace: Workspace) -> None:
    class Stuck(nnUNetTrainer):
        def train_step(self, batch: dict) -> dict:
            return {"loss": float("nan")}

    with pytest.raises(MisfmError, match="expected Stuck to train on noise, but its gradients were not finite"):
        cost_of(workspace.trainer(Stuck))


@LINUX
def test_memory_of_before_does_not_count() -> None:
    """Memory of the starting process, and what this one gave back, are no part of the peak."""
    code = """
import mmap
from nnunetv2_misfm.benchmark import cost
def fill(mib):
    block = mmap.mmap(-1, mib << 20)
    block.write(b"x" * (mib << 20))
    return block
fill(512).close()
before = cost._start_resident()
kept = fill(64)
print((cost._resident()["VmHWM"] - before) / 2**20)
"""
    large = mmap.mmap(-1, 768 << 20)
    large.write(bytes(768 << 20))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert 60 < float(ended.stdout) < 160


def test_without_proc_memory_is_not_measured(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_STATUS", Path("/nowhere"))
    result = cost_of(workspace.trainer(nnUNetTrainer))
    assert result.peak_memory_gib != result.peak_memory_gib and result.memory_kind.startswith("not measured")
