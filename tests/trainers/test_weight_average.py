from collections.abc import Mapping
from copy import deepcopy

import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import Tensor, nn

from nnunetv2_misfm.architectures.pct_net import PCTNet
from nnunetv2_misfm.trainers.weight_average import WeightAverage, average_or_copy, start_average


def scalar_network(value: float = 10.0) -> nn.Linear:
    network = nn.Linear(1, 1, bias=False)
    set_weight(network, value)
    return network


def set_weight(network: nn.Linear, value: float) -> None:
    with torch.no_grad():
        network.weight.fill_(value)


def norm_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def pct_net(seed: int = 0) -> PCTNet:
    torch.manual_seed(seed)
    return PCTNet(input_channels=1, num_classes=2, features_per_stage=(4, 8, 8, 16, 32), num_heads=(2, 2, 4))


def plain_unet() -> PlainConvUNet:
    norm = {"norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True}, "nonlin": nn.LeakyReLU}
    return PlainConvUNet(1, 2, (4, 8), nn.Conv3d, 3, (1, 2), 1, 2, 1, deep_supervision=True, **norm)


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in state.items()}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage, images: Tensor) -> None:
    network.train()
    optimizer.zero_grad()
    outputs = network(images)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    torch.stack([(output - 1).square().mean() for output in outputs]).sum().backward()
    optimizer.step()
    average.update()


def test_average_is_the_hand_reckoned_one() -> None:
    network = scalar_network(10.0)
    average = WeightAverage(network, decay=0.75)
    assert (average.average()["weight"].item(), average.num_updates) == (10.0, 0)
    # the first update copies; then 0.75 * 2 + 0.25 * 6 = 3, and 0.75 * 3 + 0.25 * -5 = 1
    for count, (weight, expected) in enumerate([(2.0, 2.0), (6.0, 3.0), (-5.0, 1.0)], start=1):
        set_weight(network, weight)
        average.update()
        assert (average.average()["weight"].item(), average.num_updates) == (expected, count)
        assert average.raw()["weight"].item() == network.weight.item() == weight


def test_swap_is_undone_by_a_second_one_and_both_states_can_be_read_throughout() -> None:
    network = scalar_network()
    average = WeightAverage(network, decay=0.5)
    for weight in (4.0, 8.0):
        set_weight(network, weight)
        average.update()
    seen = []
    for _ in range(3):
        values = (network.weight.item(), average.average()["weight"].item(), average.raw()["weight"].item())
        seen.append((average.holds_average, values))
        average.swap()
    assert seen == [(False, (8.0, 6.0, 8.0)), (True, (6.0, 6.0, 8.0)), (False, (8.0, 6.0, 8.0))]


def test_swap_keeps_the_tensors_that_optimiser_and_wrappers_refer_to() -> None:
    network = norm_network()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    average = WeightAverage(network, decay=0.5)
    for _ in range(3):
        train_step(network, optimizer, average, torch.randn(8, 3))
    before, addresses = tensors(network), [tensor.data_ptr() for tensor in tensors(network)]
    average.swap()
    assert all(now is then for now, then in zip(tensors(network), before, strict=True))
    assert [tensor.data_ptr() for tensor in tensors(network)] == addresses
    assert all(parameter.requires_grad for parameter in network.parameters())
    average.swap()
    raw = copied(network.state_dict())
    train_step(network, optimizer, average, torch.randn(8, 3))
    assert not torch.equal(network[0].weight, raw["0.weight"])  # the optimiser still moves this very network


def test_update_is_refused_while_the_network_holds_the_average() -> None:
    average = WeightAverage(scalar_network(), decay=0.5)
    average.swap()
    with pytest.raises(RuntimeError, match=r"expected the network to hold its trained weights, got the average: swap"):
        average.update()
    assert average.num_updates == 0


def test_statistics_of_batch_norm_are_averaged_and_its_counter_is_that_of_the_run() -> None:
    network = norm_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    average = WeightAverage(network, decay=0.9)
    expected: dict[str, Tensor] = {}
    for step in range(12):
        train_step(network, optimizer, average, torch.randn(8, 3) + step)
        for name, tensor in network.state_dict().items():
            if not expected.get(name, tensor).is_floating_point():
                continue
            new = tensor.double()
            expected[name] = 0.9 * expected[name] + 0.1 * new if name in expected else new
    state = average.average()
    assert state.keys() == network.state_dict().keys() == expected.keys() | {"1.num_batches_tracked"}
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name].double(), tensor, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(state["1.running_mean"], network[1].running_mean)
    assert state["1.num_batches_tracked"].item() == 12


def test_whole_numbers_and_flags_are_copied_instead_of_rounded_down() -> None:
    # 0.9 * 7 + 0.1 * 7 falls short of 7 in float32, and PyTorch's own average of whole numbers cuts it to 6
    table, flags = torch.arange(1000), torch.tensor([True, False])
    averaged = [table.clone()], [torch.tensor([True, True])]
    for old, new in zip(averaged, (table, flags), strict=True):
        average_or_copy(0.9)(old, [new], 3)
        assert torch.equal(old[0], new)


@pytest.mark.parametrize("build", [norm_network, pct_net])
def test_restored_run_goes_on_bit_for_bit(build) -> None:
    torch.manual_seed(1)
    shape = (4, 3) if build is norm_network else (2, 1, 16, 16, 16)
    batches = torch.randn(6, *shape)
    network = build()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    average = WeightAverage(network, decay=0.7)
    for number, batch in enumerate(batches):
        if number == 3:
            checkpoint = copied(average.average()), copied(average.raw()), average.num_updates
            state, random_state = deepcopy(optimizer.state_dict()), torch.get_rng_state()
        train_step(network, optimizer, average, batch)

    again = build(seed=5)
    average_again = WeightAverage(again, decay=0.7)
    optimizer_again = torch.optim.Adam(again.parameters())
    optimizer_again.load_state_dict(state)
    again.load_state_dict(checkpoint[0])
    average_again.restore(*checkpoint[1:])
    assert (average_again.num_updates, average_again.holds_average) == (3, False)
    assert_same(average_again.average(), checkpoint[0])
    assert_same(again.state_dict(), checkpoint[1])
    torch.set_rng_state(random_state)
    for batch in batches[3:]:
        train_step(again, optimizer_again, average_again, batch)
    assert_same(average_again.raw(), average.raw())
    assert_same(average_again.average(), average.average())
    assert average_again.num_updates == 6


def test_restore_during_a_swap_ends_it() -> None:
    network = scalar_network(1.0)
    average = WeightAverage(network, decay=0.5)
    average.swap()
    set_weight(network, 3.0)
    average.restore({"weight": torch.tensor([[7.0]])}, num_updates=2)
    assert not average.holds_average
    assert (average.average()["weight"].item(), average.raw()["weight"].item()) == (3.0, 7.0)
    average.update()  # 0.5 * 3 + 0.5 * 7
    assert (average.average()["weight"].item(), average.num_updates) == (5.0, 3)


@pytest.mark.parametrize("build", [pct_net, plain_unet])
def test_networks_predict_with_the_average_as_one_that_was_built_from_its_state(build) -> None:
    network = build()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    torch.manual_seed(1)
    network(torch.randn(2, 1, 16, 16, 16))  # what a network remembers of a batch must be fit for copying
    average = WeightAverage(network, decay=0.9)
    for _ in range(4):
        train_step(network, optimizer, average, torch.randn(2, 1, 16, 16, 16))
    assert list(average.average()) == list(network.state_dict())
    average.swap()
    fresh, image = build(), torch.randn(2, 1, 16, 16, 16)
    fresh.load_state_dict(copied(average.average()))
    # tables that no state dict holds (PCT-Net's relative positions) have come through the averaging unharmed
    assert all(torch.equal(one, other) for one, other in zip(network.buffers(), fresh.buffers(), strict=True))
    with torch.inference_mode():
        pairs = zip(network.eval()(image), fresh.eval()(image), strict=True)
        assert all(torch.equal(output, expected) for output, expected in pairs)


def test_a_run_goes_on_with_an_average_or_without_one() -> None:
    network = torch.nn.Linear(1, 1, bias=False)
    raw = {"weight": torch.full((1, 1), 7.0)}
    saved = {"raw_weights": raw, "num_updates": 3}
    torch.nn.init.constant_(network.weight, 2.0)  # the average, as a checkpoint's network_weights
    average = start_average(network, 0.5, saved)
    assert average is not None and (network.weight.item(), average.average()["weight"].item()) == (7.0, 2.0)
    assert average.num_updates == 3
    torch.nn.init.constant_(network.weight, 2.0)
    assert start_average(network, None, saved) is None and network.weight.item() == 7.0
    assert start_average(network, None, {}) is None and network.weight.item() == 7.0
