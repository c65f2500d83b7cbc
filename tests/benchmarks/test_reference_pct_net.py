import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.weights.released import STRIDES


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("reference_pct_net")


@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("mode", [0, 1, 2])
@torch.inference_mode()
def test_reference_computes_what_the_network_does(reference: ModuleType, mode: int, mask_padding: bool) -> None:
    torch.manual_seed(0)
    arguments = {"features_per_stage": (4, 4, 8, 16, 16), "strides": STRIDES[mode], "window_size": 2}
    network = PCTNet(1, 3, **arguments, mask_padding=mask_padding).eval()
    image = torch.randn(1, 1, 24, 40, 56)  # grids of less than a window, of several, and cut ones
    outputs = network(image)
    replaced = reference.reference_pct_net(network)
    kinds = {type(module) for module in replaced.modules()}
    assert set(reference.REFERENCES.values()) <= kinds and not set(reference.REFERENCES) & kinds
    torch.testing.assert_close(replaced(image), outputs)


def test_reference_can_be_of_one_kind_of_module_and_trains(reference: ModuleType) -> None:
    network = reference.reference_pct_net(PCTNet(1, 3, features_per_stage=(4, 4, 8, 16, 16)), "NormAct")
    kinds = {type(module) for module in network.modules()}
    assert reference.ReferenceNormAct in kinds and reference.ReferenceAttention not in kinds
    sum(logits.mean() for logits in network(torch.randn(1, 1, 32, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
