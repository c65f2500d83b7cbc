"""FMUNet reproduces the outputs of the released network, from the released layout of weights."""

from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_misfm.architectures import FMUNet


def our_key(key: str) -> str:
    """Our key for a released one."""
    if key.startswith("project."):
        return f"encoder.{key}"
    if key.startswith("out_layers."):
        _, level, index, leaf = key.split(".")
        part = {"0": "seg_norms", "2": "seg_layers"}[index]
        return f"decoder.{part}.{level}.{leaf}"
    return key


@pytest.fixture(scope="module")
def official(shared: Path) -> dict:
    numpy_types = [np.dtype, type(np.dtype("float32")), type(np.dtype("float64"))]
    numpy_core = np._core if hasattr(np, "_core") else np.core  # the fixture's best score is a NumPy scalar
    with torch.serialization.safe_globals([numpy_core.multiarray.scalar, *numpy_types]):
        return torch.load(shared / "reference" / "fixtures" / "official_fmunet.pt", weights_only=True)


def network(official: dict) -> FMUNet:
    return FMUNet(
        input_channels=official["in_chns"],
        num_classes=official["class_num"],
        features_per_stage=official["feature_chns"],
        depth=official["depth"],
    )


def test_every_official_tensor_finds_one_place_and_every_place_is_filled(official: dict) -> None:
    state = official["cases"][0]["checkpoint"]["model_state_dict"]
    ours = {our_key(key): tuple(tensor.shape) for key, tensor in state.items()}
    assert len(ours) == len(state) == 146
    assert ours == {key: tuple(tensor.shape) for key, tensor in network(official).state_dict().items()}
    assert sum(our_key(key) != key for key in state) == 2 + 16  # the stem and the heads alone are called otherwise


@torch.inference_mode()
def test_outputs_are_those_of_the_released_network(official: dict) -> None:
    (expected,) = official["cases"]
    assert expected["res_mode"] == 0  # the default strides
    generator = torch.Generator().manual_seed(expected["input_seed"])
    image = torch.randn(1, 1, *expected["input_size"], generator=generator)
    net = network(official).eval()
    state = expected["checkpoint"]["model_state_dict"]
    net.load_state_dict({our_key(key): tensor for key, tensor in state.items()})  # strict: sets every key
    outputs = net(image)
    assert len(outputs) == len(expected["outputs"]) == 4
    for output, reference in zip(outputs, expected["outputs"], strict=True):
        assert list(output.shape) == reference["shape"]
        torch.testing.assert_close(output[:, :, ::4, ::4, ::4], reference["every4"], atol=1e-4, rtol=0)
        assert output.double().abs().sum().item() == pytest.approx(reference["abs_sum"], rel=1e-4)
        assert output.double().sum().item() == pytest.approx(reference["sum"], abs=1e-4 * reference["abs_sum"])
