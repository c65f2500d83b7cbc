import numpy as np
import pytest
import torch

from nnunetv2_misfm.trainers.corruptions.intensity_curve import NUM_ENTRIES, apply_curve, draw_curve, interpolate_at

HALF = [torch.float16, torch.bfloat16]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def per_channel(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[:, None, None, None]


def by_de_casteljau(inner: np.ndarray, t: np.ndarray) -> np.ndarray:
    """A cubic Bézier coordinate from 0 to 1 with two inner control values, by repeated linear interpolation."""
    points = [np.full_like(t, value) for value in (0.0, inner[0], inner[1], 1.0)]
    while len(points) > 1:
        points = [(1 - t) * a + t * b for a, b in zip(points, points[1:], strict=False)]
    return points[0]


def as_published(seed: int) -> np.ndarray:
    """The published table: 100,000 points from t = 1 down, x sorted, and y sorted too unless the curve inverts."""
    generator = seeded(seed)
    inner = torch.rand((2, 2), generator=generator).double().numpy()
    inverted = float(torch.rand((), generator=generator)) < 0.5
    t = np.linspace(1, 0, 100_000)
    x, y = np.sort(by_de_casteljau(inner[0], t)), by_de_casteljau(inner[1], t)
    return np.interp(np.linspace(0, 1, NUM_ENTRIES), x, y if inverted else np.sort(y))


def test_curves_are_the_published_ones() -> None:
    for seed in range(40):
        curve = draw_curve(seeded(seed))
        assert (curve.dtype, curve.shape) == (torch.float32, (NUM_ENTRIES,))
        assert np.abs(curve.double().numpy() - as_published(seed)).max() < 1e-3, seed


def test_curves_rise_from_0_to_1_or_fall_from_1_to_0_equally_often() -> None:
    num_rising = 0
    for seed in range(600):
        curve = draw_curve(seeded(seed))
        rising = bool(curve[0] < curve[-1])
        num_rising += rising
        ends = curve[[0, -1]] if rising else curve[[-1, 0]]
        assert torch.allclose(ends, torch.tensor([0.0, 1.0]), atol=1e-6)
        steps = curve.diff() if rising else -curve.diff()
        assert float(steps.min()) > -1e-6  # rounding
    assert abs(num_rising / 600 - 0.5) < 0.06


def test_curves_differ_and_repeat_with_the_seed() -> None:
    assert torch.equal(draw_curve(seeded(1)), draw_curve(seeded(1)))
    assert not torch.equal(draw_curve(seeded(1)), draw_curve(seeded(2)))


def test_interpolation_is_linear_also_where_points_coincide() -> None:
    x, y = torch.tensor([0.0, 0.2, 0.2, 0.7, 1.0]), torch.tensor([0.0, 0.4, 0.6, 0.8, 1.0])
    positions = torch.tensor([0.0, 0.05, 0.1, 0.45, 0.7, 0.85, 1.0])
    expected = [0.0, 0.1, 0.2, 0.7, 0.8, 0.9, 1.0]
    assert interpolate_at(positions, x, y).tolist() == pytest.approx(expected)
    assert 0.4 <= float(interpolate_at(torch.tensor([0.2]), x, y)) <= 0.6 + 1e-6  # a jump: anything between
    between = torch.rand(100, generator=seeded())
    by_numpy = np.interp(between.numpy(), x.numpy(), y.numpy())
    assert np.allclose(interpolate_at(between, x, y).numpy(), by_numpy, atol=1e-6)


def test_values_are_mapped_as_by_hand_and_clamped_outside_the_range() -> None:
    curve = torch.tensor([0.5, 0.0, 1.0])  # at 0, 0.5 and 1 of the range; the nearest entry is taken
    volume = torch.tensor([10.0, 12.0, 13.0, 15.0, 17.0, 18.0, 20.0, 5.0, -1e30, 99.0, 1e30]).reshape(1, 1, 1, -1)
    before = volume.clone()
    mapped = apply_curve(volume, curve, per_channel(10.0), per_channel(20.0))
    expected = [15.0, 15.0, 10.0, 10.0, 10.0, 20.0, 20.0, 15.0, 15.0, 20.0, 20.0]
    assert mapped.flatten().tolist() == expected
    assert torch.equal(volume, before)


def test_every_channel_has_its_own_range() -> None:
    curve = torch.tensor([1.0, 0.75, 0.0])
    volume = torch.tensor([[0.0, 1.0, 2.0], [-40.0, -20.0, 0.0]]).reshape(2, 1, 1, 3)
    mapped = apply_curve(volume, curve, per_channel(0.0, -40.0), per_channel(2.0, 0.0))
    assert mapped.reshape(2, 3).tolist() == [[2.0, 1.5, 0.0], [0.0, -10.0, -40.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_identity_leaves_a_volume_within_the_tables_resolution(dtype: torch.dtype) -> None:
    volume = torch.rand(1, 8, 9, 10, generator=seeded(), dtype=dtype) * 7 - 3
    curve = torch.linspace(0, 1, NUM_ENTRIES)
    mapped = apply_curve(volume, curve, per_channel(-3.0, dtype=dtype), per_channel(4.0, dtype=dtype))
    assert mapped.dtype == dtype
    assert float((mapped - volume).abs().max()) <= 7 / (NUM_ENTRIES - 1) / 2 + 1e-5


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_is_mapped_within_its_own_resolution(dtype: torch.dtype) -> None:
    volume = (torch.rand(1, 8, 9, 10, generator=seeded()) * 7 - 3).to(dtype)
    volume[0, 0, 0, :2] = torch.tensor([-3.0, 4.0])  # the ends of the range themselves
    curve = torch.linspace(1, 0, NUM_ENTRIES)
    mapped = apply_curve(volume, curve, per_channel(-3.0, dtype=dtype), per_channel(4.0, dtype=dtype))
    assert mapped.dtype == dtype
    assert float((mapped.double() - (1 - volume.double())).abs().max()) < 4 * 7 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
@pytest.mark.parametrize("value", [0.0, 3.0, -1000.0])
def test_constant_volume_stays_as_it_is(dtype: torch.dtype, value: float) -> None:
    volume, end = torch.full((1, 4, 5, 6), value, dtype=dtype), per_channel(value, dtype=dtype)
    assert torch.equal(apply_curve(volume, draw_curve(seeded()), end, end), volume)


def test_few_voxels_beyond_an_empty_range_are_taken_for_its_ends() -> None:
    volume = torch.zeros(1, 8, 8, 8)
    volume[0, 0, 0, 0], volume[0, 1, 1, 1] = 5.0, -5.0
    zero = per_channel(0.0)
    assert torch.equal(apply_curve(volume, draw_curve(seeded()), zero, zero), torch.zeros_like(volume))
