"""PCT-Net compiled, in half precision and on an accelerator, as far as a machine without one can tell."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nnunetv2_misfm.architectures import cpu_attention
from nnunetv2_misfm.architectures.norm_act import NormAct
from nnunetv2_misfm.architectures.pct_net import PCTNet
from nnunetv2_misfm.architectures.window_attention import cached_attention_mask

WITHOUT_DROPOUT = {"dropout_per_stage": (0.0,) * 5, "attention_dropout": 0.0, "drop_path": 0.0}
# No level's grid is two deep, where oneDNN's gradient of a convolution's weights in bfloat16 is unset memory (PyTorch
# 2.15, a CPU with AVX512-BF16; nn.Conv3d(32, 32, 3, padding=1) on 2 x 1 x 1 voxels shows it).
HALF_PRECISION_SIZE = (40, 16, 32)
TRAINING = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


def tiny_net(**kwargs) -> PCTNet:
    torch.manual_seed(0)
    return PCTNet(1, 3, features_per_stage=(4, 8, 8, 16, 32), num_heads=(2, 2, 4), **kwargs)


def compiled(net: PCTNet):
    torch._dynamo.reset()
    return torch.compile(net, backend="eager", fullgraph=True)


@TRAINING
def test_compiles_into_one_graph_with_the_same_outputs_and_without_warning(training: bool) -> None:
    net = tiny_net(**WITHOUT_DROPOUT).train(training)
    image = torch.randn(1, 1, 32, 32, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        outputs = compiled(net)(image)
    for output, expected in zip(outputs, net(image), strict=True):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


def test_compiles_into_one_graph_with_dropout_and_trains() -> None:
    net = tiny_net(mask_padding=True).train()
    outputs = compiled(net)(torch.randn(1, 1, 16, 32, 32))
    sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


def relative_error(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """Root mean square of the difference over that of the expected values, the worst head's."""
    pairs = zip(outputs, expected, strict=True)
    return max(((output.float() - wanted).norm() / wanted.norm()).item() for output, wanted in pairs)


# BatchNorm over the few voxels of a tiny image magnifies what half precision rounds.
@pytest.mark.parametrize(
    ("dtype", "training", "tolerance"),
    [
        (torch.bfloat16, False, 0.01),
        (torch.float16, False, 0.002),
        (torch.bfloat16, True, 0.2),
        (torch.float16, True, 0.03),
    ],
)
def test_half_precision_stays_near_float_and_its_gradients_are_finite(
    dtype: torch.dtype, training: bool, tolerance: float
) -> None:
    net = tiny_net(**WITHOUT_DROPOUT).train(training)
    image = torch.randn(2, 1, *HALF_PRECISION_SIZE)
    with torch.no_grad():
        expected = net(image)
        with torch.autocast("cpu", dtype):
            predicted = net(image)
    with torch.autocast("cpu", dtype):
        outputs = net(image)
    assert {output.dtype for output in outputs + predicted} == {dtype}
    assert relative_error(outputs, expected) < tolerance
    assert relative_error(predicted, expected) < tolerance
    loss = sum(output.float().square().mean() for output in outputs)
    (1024 * loss).backward()  # what a GradScaler does, so that no gradient becomes zero in float16
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_with_dropout(dtype: torch.dtype) -> None:
    net = tiny_net().train()
    with torch.autocast("cpu", dtype):
        outputs = net(torch.randn(1, 1, *HALF_PRECISION_SIZE))
    assert all(output.isfinite().all() for output in outputs)
    sum(output.float().square().mean() for output in outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.fixture
def values_out_of_reach() -> Iterator[None]:
    """Tensors have a device, a shape and a type but no values: whatever fetches one to the host raises."""
    cached_attention_mask.cache_clear()
    with FakeTensorMode():
        yield
    cached_attention_mask.cache_clear()


@pytest.mark.usefixtures("values_out_of_reach")
def test_without_values_a_fetch_is_an_error() -> None:
    with pytest.raises(DataDependentOutputException):
        torch.randn(1, device="cuda").item()
    with pytest.raises(DataDependentOutputException):
        NormAct(2).train()(torch.randn(1, 2, 3, 3, 3))  # on the CPU, where it costs nothing


@TRAINING
@pytest.mark.parametrize("mask_padding", [False, True])
@pytest.mark.parametrize("device", ["cuda", "meta"])
def test_on_an_accelerator_a_forward_pass_fetches_no_value(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    mask_padding: bool,
    training: bool,
) -> None:
    monkeypatch.setattr(cpu_attention, "attend", None)
    net = tiny_net(mask_padding=mask_padding).train(training)
    request.getfixturevalue("values_out_of_reach")
    tensors: dict[str, Tensor] = dict(net.named_parameters()) | dict(net.named_buffers())
    on_device = {
        name: torch.empty(tensor.shape, dtype=tensor.dtype, device=device, requires_grad=tensor.requires_grad)
        for name, tensor in tensors.items()
    }
    outputs = torch.func.functional_call(net, on_device, torch.randn(1, 1, 32, 20, 32, device=device))
    assert [tuple(output.shape[2:]) for output in outputs] == [(32, 20, 32), (16, 10, 16), (8, 5, 8), (4, 3, 4)]
    assert {output.device.type for output in outputs} == {device}
