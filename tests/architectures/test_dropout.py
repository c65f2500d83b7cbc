import copy
import itertools

import pytest
import torch
from torch import Tensor

from nnunetv2_misfm.architectures.dropout import Dropout, random_bytes, rounded

CPU = torch.device("cpu")
SHARE = 51 / 256  # of 0.2, rounded to a multiple of 1/256
SCALE = 256 / 205


def dropped_ones(*shape: int, probability: float = 0.2, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return Dropout(probability).train()(torch.ones(shape, dtype=dtype))


def test_a_fifth_becomes_51_of_256_and_the_mean_is_kept() -> None:
    assert rounded(0.2) == SHARE
    values = dropped_ones(2_000_000)
    # the share's standard deviation is 0.0003
    assert (values == 0).double().mean().item() == pytest.approx(SHARE, abs=0.001)
    assert values.mean().item() == pytest.approx(1, abs=0.001)


@pytest.mark.parametrize(("probability", "outcomes"), [(1 / 256, 1), (0.1, 26), (0.5, 128), (0.75, 192), (0.99, 253)])
def test_any_probability_drops_its_share_and_scales_the_rest_exactly(probability: float, outcomes: int) -> None:
    values = dropped_ones(400_000, probability=probability)
    assert (values == 0).double().mean().item() == pytest.approx(outcomes / 256, abs=0.004)
    assert values.unique().tolist() == [0, pytest.approx(256 / (256 - outcomes), rel=1e-15)]


def test_each_of_the_eight_values_of_a_draw_is_uniform_over_256_outcomes() -> None:
    torch.manual_seed(0)
    lanes = random_bytes(torch.Size((512_000, 8)), CPU)
    assert lanes.dtype == torch.int8
    for lane in range(8):
        counts = torch.bincount(lanes[:, lane].int() + 128, minlength=256).double()
        chi_squared = ((counts - 2000) ** 2 / 2000).sum().item()
        assert len(counts) == 256
        assert 255 - 5 * 22.6 < chi_squared < 255 + 5 * 22.6  # five standard deviations, sqrt(2 x 255)


def test_the_eight_values_of_a_draw_and_neighbouring_draws_are_independent() -> None:
    zeros = dropped_ones(400_000, 8) == 0
    assert zeros.double().mean(0).tolist() == [pytest.approx(SHARE, abs=0.004)] * 8
    for first, second in itertools.combinations(range(8), 2):
        both = (zeros[:, first] & zeros[:, second]).double().mean().item()
        assert both == pytest.approx(SHARE**2, abs=0.002), (first, second)
    following = (zeros[1:] & zeros[:-1]).double().mean(0)
    assert following.tolist() == [pytest.approx(SHARE**2, abs=0.002)] * 8


@pytest.mark.parametrize("dropout", [Dropout(0.0).train(), Dropout(0.2).eval()], ids=["p=0", "evaluation"])
def test_without_a_probability_and_in_evaluation_the_input_itself_comes_back(dropout: Dropout) -> None:
    x = torch.randn(3, 5)
    state = torch.get_rng_state()
    assert dropout(x) is x
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_is_zero_where_the_output_is_and_scaled_elsewhere(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(7, 11, 13, dtype=dtype).abs() + 0.1).requires_grad_()
    upstream = torch.randn(7, 11, 13, dtype=dtype)
    y = Dropout(0.2).train()(x)
    y.backward(upstream)
    zero = y == 0
    assert 0 < zero.sum() < zero.numel() / 2
    torch.testing.assert_close(y, torch.where(zero, 0, x * SCALE).detach())
    torch.testing.assert_close(x.grad, torch.where(zero, 0, upstream * SCALE))
    assert torch.equal(x.grad == 0, zero)


def test_the_seed_decides_on_the_mask() -> None:
    assert torch.equal(dropped_ones(999, seed=1), dropped_ones(999, seed=1))
    assert not torch.equal(dropped_ones(999, seed=1), dropped_ones(999, seed=2))
    torch.manual_seed(1)
    dropout = Dropout(0.2)
    first, second = dropout(torch.ones(999)), copy.deepcopy(dropout)(torch.ones(999))
    assert not torch.equal(first, second)  # each call draws anew


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_stay_and_drop_what_float_drops(dtype: torch.dtype) -> None:
    half, full = dropped_ones(20_000, dtype=dtype), dropped_ones(20_000)
    assert half.dtype == dtype
    assert torch.equal(half == 0, full == 0)
    assert half.max().item() == pytest.approx(SCALE, rel=2**-8)
    torch.manual_seed(0)
    x = torch.ones(20_000, dtype=dtype, requires_grad=True)
    Dropout(0.2)(x).sum().backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, half)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5, 7), (0, 4), ()])
def test_any_number_of_values_is_served(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dropout = Dropout(0.5).train()
    for _ in range(20):
        values = dropout(torch.ones(shape))
        assert values.shape == shape
        assert set(values.flatten().tolist()) <= {0.0, 2.0}


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda x: x.transpose(1, 4),
        lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        lambda x: x[:, ::2, 1:],
        lambda x: x[:, :1].expand(-1, 6, -1, -1, -1),
    ],
    ids=["transposed", "channels last", "strided", "expanded"],
)
def test_values_stay_in_place_whatever_the_memory_order(rearrange) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4, 5, 3)
    x = rearrange(x).detach().requires_grad_()
    expected = x.detach().clone() * SCALE
    upstream = rearrange(torch.randn(2, 6, 4, 5, 3))
    y = Dropout(0.2).train()(x)
    zero = y == 0
    assert 0 < zero.double().mean() < 0.4
    torch.testing.assert_close(y.detach(), expected.masked_fill(zero, 0))
    y.backward(upstream)
    torch.testing.assert_close(x.grad, (upstream * SCALE).masked_fill(zero, 0))


def test_the_input_is_not_altered() -> None:
    x = torch.randn(100)
    before = x.clone()
    Dropout(0.2).train()(x)
    assert torch.equal(x, before)


def test_it_prints_its_probability() -> None:
    assert repr(Dropout(0.2)) == "Dropout(p=0.2)"


@pytest.mark.parametrize(("probability", "dropped"), [(1e-4, 1), (0.9999, 255)])
def test_extreme_probabilities_drop_some_and_keep_some(probability: float, dropped: int) -> None:
    assert rounded(probability) == dropped / 256
    assert torch.isfinite(Dropout(probability)(torch.ones(100))).all()
