import copy

import pytest
import torch
from torch import nn

from nnunetv2_misfm.architectures.convolution import Convolution

KERNELS = [(3, 3, 3), (1, 3, 3), (3, 1, 3), (1, 1, 1)]


def plain(convolution: Convolution) -> nn.Conv3d:
    """PyTorch's own layer with the same weights, in float64, padded so that the grid stays."""
    depth, height, width = convolution.kernel_size
    padding = ((depth - 1) // 2, (height - 1) // 2, (width - 1) // 2)
    layer = nn.Conv3d(convolution.in_channels, convolution.out_channels, convolution.kernel_size, padding=padding)
    layer.load_state_dict(copy.deepcopy(convolution.state_dict()))
    return layer.double()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("channels", "channels_last"), [(1, False), (16, False), (24, True), (32, False), (48, False)])
def test_values_and_gradients_are_those_of_pytorchs_layer(
    channels: int, channels_last: bool, kernel: tuple[int, int, int], batch: int
) -> None:
    torch.manual_seed(0)
    convolution = Convolution(channels, 5, kernel)
    assert convolution.channels_last == channels_last
    reference = plain(convolution)
    x = torch.randn(batch, channels, 6, 5, 7, requires_grad=True)
    y = convolution(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    x_double = x.detach().double().requires_grad_()
    expected = reference(x_double)
    expected.backward(upstream.double())
    for actual, wanted in (
        (y, expected),
        (x.grad, x_double.grad),
        (convolution.weight.grad, reference.weight.grad),
        (convolution.bias.grad, reference.bias.grad),
    ):
        torch.testing.assert_close(actual.double(), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("grid", [(1, 1, 1), (2, 1, 5), (4, 6, 3)])
def test_the_grid_stays(grid: tuple[int, int, int], kernel: tuple[int, int, int]) -> None:
    assert Convolution(24, 3, kernel)(torch.randn(2, 24, *grid)).shape == (2, 3, *grid)


def test_saved_entries_are_those_of_pytorchs_layer() -> None:
    convolution = Convolution(24, 3, (1, 3, 3))
    shapes = {key: tuple(value.shape) for key, value in convolution.state_dict().items()}
    assert shapes == {"weight": (3, 24, 1, 3, 3), "bias": (3,)}


@pytest.mark.parametrize("channels", [16, 24])
def test_the_memory_order_of_the_input_does_not_matter(channels: int) -> None:
    torch.manual_seed(0)
    convolution = Convolution(channels, 3, (3, 3, 3))
    x = torch.randn(2, channels, 5, 4, 6)
    expected = convolution(x)
    channels_last = x.contiguous(memory_format=torch.channels_last_3d)
    width_first = x.transpose(2, 4).contiguous().transpose(2, 4)
    for same in (channels_last, width_first):
        assert torch.equal(same, x) and same.stride() != x.stride()
        torch.testing.assert_close(convolution(same), expected, atol=1e-5, rtol=1e-5)
