from functools import partial

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from toy import toy_architecture

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.planning.memory import LiveStorages, training_memory

PATCH = (16, 16, 16)
VOXELS = 16**3


class Convolutions(nn.Module):
    """A chain of convolutions with a nonlinearity, each of which keeps its input for the backward pass."""

    def __init__(self, count: int = 4, recompute: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 8, 3, padding=1)
        self.chain = nn.ModuleList(nn.Conv3d(8, 8, 3, padding=1) for _ in range(count))
        self.head = nn.Conv3d(8, 3, 1)
        self.recompute = recompute

    @staticmethod
    def block(convolution: nn.Module, x: Tensor) -> Tensor:
        return convolution(x.sin())

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for convolution in self.chain:
            block = partial(self.block, convolution)
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return self.head(x)


class Attention(nn.Module):
    """One head of attention over all voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(1, 3 * 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x.flatten(2).transpose(1, 2)[:, None]).chunk(3, -1)
        attended = functional.scaled_dot_product_attention(query, key, value, dropout_p=0.1)
        return self.head(attended[:, 0]).transpose(1, 2).unflatten(2, x.shape[2:])


class ReadsANumber(nn.Module):
    """Reads its parameter back, as code that branches on a value does."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv3d(1, 3, 1)
        self.slope = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return functional.leaky_relu(self.head(x), self.slope.item()) * self.slope


# The tracker, against arithmetic by hand


def test_storages_count_once_from_the_operation_that_makes_them_until_they_are_freed() -> None:
    with LiveStorages() as storages:
        a = torch.zeros(100)
        assert (storages.live, storages.peak) == (400, 400)
        b = a.view(10, 10).t()[1:]
        b += 1
        assert storages.live == 400  # views and work in place bring no storage
        c = a + b.sum()  # the sum is one number
        assert (storages.live, storages.peak) == (800, 804)
        del a
        assert storages.live == 800  # b is a view of it
        del b, c
        assert (storages.live, storages.peak) == (0, 804)


def test_saved_tensors_and_gradients_of_two_linear_layers_by_hand() -> None:
    batch, features, hidden, outputs = 7, 10, 20, 5
    with LiveStorages() as storages:
        first = torch.zeros(features, hidden, requires_grad=True)
        second = torch.zeros(hidden, outputs, requires_grad=True)
        x = torch.zeros(batch, features)
        start = 4 * (features * hidden + hidden * outputs + batch * features)
        assert storages.live == start
        loss = (x @ first @ second).sum()
        # the hidden layer is saved for the gradient of the second one's weight, the output for nothing
        assert storages.live == start + 4 * (batch * hidden + 1)
        forward_peak = start + 4 * (batch * hidden + batch * outputs + 1)
        assert storages.peak == forward_peak
        loss.backward()
        # at the second layer: loss, its gradient, the hidden layer, the gradients of weight and hidden layer
        at_second = start + 4 * (1 + 1 + batch * hidden + hidden * outputs + batch * hidden)
        # at the first layer: the hidden layer is gone, the gradient of the first weight is made
        at_first = start + 4 * (1 + 1 + hidden * outputs + batch * hidden + features * hidden)
        assert storages.peak == max(forward_peak, at_second, at_first)
        assert storages.live == start + 4 * (1 + hidden * outputs + features * hidden)


# The estimate


def test_optimisers_differ_by_their_states_alone() -> None:
    weights = 4 * sum(parameter.numel() for parameter in Convolutions().parameters())
    sgd, adam = (training_memory(Convolutions, 1, PATCH, 2, optimizer=name) for name in ("sgd", "adam"))
    assert adam - sgd == weights


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kept_activations_are_counted_per_layer_batch_and_voxel(device: str) -> None:
    four, six = (
        training_memory(lambda n=n: Convolutions(n), 1, PATCH, 2, device=device, precision="float32") for n in (4, 6)
    )
    # two more layers: what the sine and the convolution keep (8 channels, float32, batch of 2); weights, two states
    # of Adam and at most the gradients
    weights = 2 * 4 * (8 * 8 * 27 + 8)
    assert 2 * 2 * 8 * VOXELS * 4 * 2 + 3 * weights <= six - four <= 2 * 2 * 8 * VOXELS * 4 * 2 + 4 * weights


def test_both_devices_agree_where_a_network_is_the_same_on_both() -> None:
    architecture = toy_architecture(num_stages=3)

    def build() -> nn.Module:
        name, kwargs = architecture["network_class_name"], architecture["arch_kwargs"]
        return get_network_from_plans(name, kwargs, architecture["_kw_requires_import"], 1, 3, deep_supervision=True)

    # in half precision the heads of this narrow network, whose loss is the most part, tell autocast from its model
    for precision, tolerance in (("float32", 0.01), ("bfloat16", 0.1), ("float16", 0.1)):
        cpu, gpu = (training_memory(build, 1, (32, 32, 32), 2, device=d, precision=precision) for d in ("cpu", "cuda"))
        assert abs(cpu / gpu - 1) < tolerance, precision


def test_half_precision_needs_about_half_of_the_activations() -> None:
    single, half = (training_memory(Convolutions, 1, (32, 32, 32), 2, precision=p) for p in ("float32", "float16"))
    assert 0.45 < half / single < 0.75  # the loss stays in float32


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_made_anew_in_the_backward_pass_is_not_counted_as_kept(device: str) -> None:
    plain, frugal = (
        training_memory(lambda r=r: Convolutions(8, r), 1, PATCH, 2, device=device, precision="float32")
        for r in (False, True)
    )
    sine = 8 * VOXELS * 4 * 2
    assert 6 * sine <= plain - frugal <= 8 * sine  # eight are kept, or one or two at a time made anew


def test_attention_on_a_gpu_keeps_no_matrix() -> None:
    matrix = 4 * VOXELS**2
    assert training_memory(Attention, 1, PATCH, 1, device="cuda", precision="float32") < matrix / 10
    assert training_memory(Attention, 1, PATCH, 1, device="cpu", precision="float32") > matrix


def test_network_that_reads_a_number_from_a_tensor_can_be_traced() -> None:
    for device in ("cpu", "cuda"):
        assert training_memory(ReadsANumber, 1, PATCH, 1, device=device, precision="float32") > 3 * 4 * VOXELS


def test_trace_leaves_random_numbers_and_caches_as_they_were() -> None:
    small = {"features_per_stage": (4, 4, 8, 16, 32), "num_heads": (1, 1, 1), "window_size": 2}
    x = torch.zeros(1, 1, 32, 32, 32)
    network = PCTNet(1, 2, **small, deep_supervision=False).eval()
    state = torch.get_rng_state()
    estimates = []
    for _ in range(2):  # before and after the caches hold real tensors
        estimates.append(training_memory(lambda: PCTNet(1, 2, **small), 1, (32, 32, 32), 2, device="cpu"))
        logits = network(x)
        assert type(logits) is Tensor and logits.isfinite().all()
    assert estimates[0] == estimates[1]
    assert torch.equal(torch.get_rng_state(), state)
