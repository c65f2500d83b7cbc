import copy

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures import norm_act
from nnunetv2_misfm.architectures.convolution import Convolution
from nnunetv2_misfm.architectures.norm_act import NormAct

CHANNELS = 3
SHAPES = [(1, CHANNELS, 4, 5, 6), (3, CHANNELS, 4, 2, 3), (2, CHANNELS, 1, 1, 2)]


def module(slope: float = 0.25) -> NormAct:
    """In training mode, every parameter and buffer away from its initial value."""
    torch.manual_seed(0)
    made = NormAct(CHANNELS)
    nn.init.normal_(made.norm.weight)
    nn.init.normal_(made.norm.bias)
    nn.init.constant_(made.act.weight, slope)
    made.norm.running_mean.normal_()
    made.norm.running_var.uniform_(0.5, 2)
    made.norm.num_batches_tracked.fill_(7)
    return made.train()


def plain(made: NormAct) -> nn.Sequential:
    """PyTorch's own two layers in float64 with the same values."""
    batch_norm, prelu = nn.BatchNorm3d(CHANNELS), nn.PReLU()
    batch_norm.load_state_dict(copy.deepcopy(made.norm.state_dict()))
    prelu.load_state_dict(copy.deepcopy(made.act.state_dict()))
    return nn.Sequential(batch_norm, prelu).double().train(made.training)


def image(shape: tuple[int, ...] = SHAPES[0]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return 2 * torch.randn(shape, generator=generator) + 0.5


def all_gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output, and the gradients of its product with fixed random numbers."""
    x = x.clone().requires_grad_()
    y = net(x)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(x.shape, generator=generator).to(x))
    weight, bias, slope = (parameter.grad for parameter in net.parameters())
    return {"output": y.detach(), "x": x.grad, "weight": weight, "bias": bias, "slope": slope}


def assert_agree(actual: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 2e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-4, check_dtype=False)


def refuse_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> Tensor:
        raise AssertionError("went through the fused function")

    monkeypatch.setattr(norm_act._NormAct, "apply", refuse)


@pytest.mark.parametrize("slope", [0.25, 1.5, 0.0, -0.4])
@pytest.mark.parametrize("shape", SHAPES)
def test_training_is_that_of_batchnorm_and_prelu_in_double_precision(shape: tuple[int, ...], slope: float) -> None:
    fused = module(slope)
    reference = plain(fused)
    x = image(shape)
    assert_agree(all_gradients(fused, x), all_gradients(reference, x.double()))
    for name, wanted in reference[0].named_buffers():
        torch.testing.assert_close(fused.norm.get_buffer(name).to(wanted), wanted, atol=1e-6, rtol=1e-6)
    assert fused.norm.num_batches_tracked.item() == 8


def test_running_statistics_move_by_a_tenth_towards_those_of_the_batch() -> None:
    fused, x = module(), image()
    mean, var = fused.norm.running_mean.clone(), fused.norm.running_var.clone()
    fused(x)
    voxels = x.transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(fused.norm.running_mean.double(), 0.9 * mean.double() + 0.1 * voxels.mean(1))
    torch.testing.assert_close(fused.norm.running_var.double(), 0.9 * var.double() + 0.1 * voxels.var(1))


@pytest.mark.parametrize("slope", [0.25, 0.0, -0.4])
def test_evaluation_uses_the_running_statistics_and_leaves_them(slope: float) -> None:
    fused = module(slope).eval()
    before = copy.deepcopy(fused.state_dict())
    assert_agree(all_gradients(fused, image()), all_gradients(plain(fused), image().double()))
    assert all(torch.equal(value, before[key]) for key, value in fused.state_dict().items())


def test_variances_of_the_size_of_eps_and_of_zero_are_no_exception() -> None:
    fused, x = module(), image()
    reference = plain(fused)
    x[:, 1] *= 0.003
    x[:, 2] = 3.0
    assert_agree(all_gradients(fused, x), all_gradients(reference, x.double()), atol=2e-3)


def test_an_input_that_needs_no_gradient_still_gives_those_of_the_parameters() -> None:
    fused, other = module(), module()
    y = fused(image())
    y.sum().backward()
    x = image().requires_grad_()
    other(x).sum().backward()
    for one, two in zip(fused.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)
    assert x.grad is not None


@pytest.mark.parametrize("frozen", ["norm.weight", "norm.bias", "act.weight"])
def test_a_frozen_parameter_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    fused, reference = module(), module()
    fused.get_parameter(frozen).requires_grad_(False)
    fused(image()).square().sum().backward()
    reference(image()).square().sum().backward()
    assert fused.get_parameter(frozen).grad is None
    for name, parameter in fused.named_parameters():
        if name != frozen:
            torch.testing.assert_close(parameter.grad, reference.get_parameter(name).grad)


def test_the_input_keeps_its_values_for_others_that_use_it() -> None:
    x = image().requires_grad_()
    before = x.detach().clone()
    module()(x).sum().backward()
    assert torch.equal(x, before)


def test_memory_order_of_input_and_gradient_do_not_matter() -> None:
    x = image((2, CHANNELS, 4, 5, 6))
    expected = all_gradients(module(), x)
    assert_agree(all_gradients(module(), x.contiguous(memory_format=torch.channels_last_3d)), expected)
    made, leaf = module(), x.clone().requires_grad_()
    made(leaf.transpose(2, 4)).sum().backward()  # the gradient of a sum is expanded, not stored
    reference, leaf_double = plain(module()), x.double().requires_grad_()
    reference(leaf_double.transpose(2, 4)).sum().backward()
    torch.testing.assert_close(leaf.grad.double(), leaf_double.grad, atol=2e-5, rtol=1e-4)


def test_double_precision_uses_the_two_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fusion(monkeypatch)
    double = module().double()
    expected = all_gradients(plain(module()), image().double())
    assert_agree(all_gradients(double, image().double()), expected, atol=1e-12)
    with pytest.raises(AssertionError, match="went through the fused function"):
        module()(image())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_under_autocast_use_the_two_modules(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    refuse_fusion(monkeypatch)
    made = module()
    reference = plain(made)
    with torch.autocast("cpu", dtype):
        y = made(image().to(dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), reference(image().double()), atol=0.05, rtol=0.02)
    assert made.norm.num_batches_tracked.item() == 8


def test_other_devices_and_prediction_use_the_two_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_fusion(monkeypatch)
    made = module()
    assert made.eval()(image()).shape == image().shape
    made = NormAct(CHANNELS).to("meta").train()
    assert made(image().to("meta")).device.type == "meta"


def test_entries_of_the_state_dict_are_those_of_the_two_modules_also_in_a_copy() -> None:
    made = module()
    keys = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"]
    assert list(made.state_dict()) == [*keys, "act.weight"]
    twin = copy.deepcopy(made)
    assert list(twin.state_dict()) == list(made.state_dict())
    assert torch.equal(twin(image()), made(image()))
    twin(image())
    assert (twin.norm.num_batches_tracked.item(), made.norm.num_batches_tracked.item()) == (9, 8)


def test_frozen_batch_norm_stays_frozen_in_training() -> None:
    made = module()
    made.norm.eval()
    before = copy.deepcopy(made.norm.state_dict())
    with torch.no_grad():
        expected = plain(made).eval()(image().double())
    torch.testing.assert_close(made(image()), expected.float(), atol=2e-5, rtol=1e-4)
    assert all(torch.equal(before[key], value) for key, value in made.norm.state_dict().items())


def test_cumulative_average_and_untracked_statistics_are_left_to_pytorch() -> None:
    made = module()
    made.norm.momentum = None  # as torch.optim.swa_utils.update_bn sets it
    expected = nn.BatchNorm3d(CHANNELS, momentum=None)
    expected.load_state_dict(made.norm.state_dict())
    made(image()), expected(image())
    torch.testing.assert_close(made.norm.state_dict(), expected.state_dict())
    made.norm = nn.BatchNorm3d(CHANNELS, track_running_stats=False)
    made(image())


def test_one_value_per_channel_is_refused_as_pytorch_does() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        module()(torch.randn(1, CHANNELS, 1, 1, 1))


@pytest.mark.parametrize(
    "conv",
    [
        Convolution(CHANNELS, 5, (1, 3, 3)),
        nn.ConvTranspose3d(CHANNELS, 4, (1, 2, 2), (1, 2, 2)),
        nn.Conv3d(CHANNELS, 2, 1),
        Convolution(24, 3, (3, 3, 3)),  # goes in channels-last
    ],
)
def test_convolution_in_the_function_is_that_of_the_modules(conv: nn.Module) -> None:
    torch.manual_seed(0)
    made = NormAct(conv.in_channels)
    nn.init.normal_(made.norm.weight)
    reference = copy.deepcopy(nn.ModuleList([made.norm, made.act, conv])).double()
    x = torch.randn(2, conv.in_channels, 4, 5, 6, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    y = made.convolve(x, conv)
    expected = reference[2](reference[1](reference[0](exact)))
    weight = torch.randn_like(expected)
    y.backward(weight.float())
    expected.backward(weight)
    grads = [x.grad, *(p.grad for p in (*made.parameters(), *conv.parameters()))]
    exact_grads = [exact.grad, *(p.grad for p in reference.parameters())]
    for actual, wanted in zip([y, *grads], [expected, *exact_grads], strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    conv.zero_grad(set_to_none=True)


def test_convolution_under_autocast_and_in_evaluation_is_left_to_the_modules() -> None:
    made, conv = NormAct(CHANNELS), Convolution(CHANNELS, 2, (3, 3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        assert made.convolve(image(), conv).dtype == torch.bfloat16
    made.eval()
    assert torch.equal(made.convolve(image(), conv), conv(made(image())))


def test_between_input_and_output_of_the_convolution_nothing_is_stored() -> None:
    stored: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        stored.append(tuple(tensor.shape))
        return tensor

    made, conv, x = NormAct(CHANNELS), Convolution(CHANNELS, 2, (3, 3, 3)), image().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made.convolve(x, conv)
    assert stored.count(tuple(x.shape)) == 1
