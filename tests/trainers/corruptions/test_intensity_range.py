import numpy as np
import pytest
import torch

from nnunetv2_misfm.trainers.corruptions.intensity_curve import NUM_ENTRIES, apply_curve, draw_curve
from nnunetv2_misfm.trainers.corruptions.intensity_range import percentiles


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def by_numpy(volume: torch.Tensor) -> np.ndarray:
    """The percentiles of all voxels of each channel, [2, C]."""
    return np.percentile(volume.double().flatten(1).numpy(), [0.5, 99.5], axis=1)


def flat(ends: tuple[torch.Tensor, torch.Tensor]) -> np.ndarray:
    return torch.stack(ends).flatten(1).double().numpy()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 8), (5, 20, 200), (24, 24, 24)])
def test_small_volumes_have_exact_percentiles_per_channel(shape: tuple[int, ...]) -> None:
    volume = torch.randn(3, *shape, generator=seeded()) * torch.tensor([1.0, 50.0, 0.01])[:, None, None, None]
    low, high = percentiles(volume)
    assert low.shape == high.shape == (3, 1, 1, 1)
    assert np.allclose(flat((low, high)), by_numpy(volume), rtol=1e-4, atol=1e-6)


def test_large_volumes_have_them_within_the_sampling_error() -> None:
    volume = torch.randn(2, 64, 128, 128, generator=seeded())
    volume[1] = volume[1] * 3 + 10
    # of a quantile q of n samples: sqrt(q (1 - q) / n) / density; 0.038 for N(0, 1) and 16,000 samples
    error = np.abs(flat(percentiles(volume)) - by_numpy(volume)) / [1.0, 3.0]
    assert error.max() < 4 * 0.038


@pytest.mark.parametrize("shape", [(128, 128, 63), (64, 64, 32), (40, 64, 65), (128, 63, 128), (63, 128, 128)])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_gradients_along_an_axis_are_seen_whatever_the_patch(shape: tuple[int, ...], axis: int) -> None:
    profile = torch.linspace(0, 1, shape[axis - 1]).reshape([-1 if i == axis else 1 for i in range(4)])
    volume = profile.expand(1, *shape)
    assert np.abs(flat(percentiles(volume)) - by_numpy(volume)).max() < 0.02


@pytest.mark.parametrize("shape", [(24, 24, 24), (64, 64, 64)])
def test_few_extreme_voxels_do_not_move_the_range(shape: tuple[int, ...]) -> None:
    volume = torch.randn(1, *shape, generator=seeded())
    low, high = flat(percentiles(volume))
    hit = torch.randperm(volume.numel(), generator=seeded(1))[: volume.numel() // 1000]
    volume.view(-1)[hit] = 1e4
    low_with, high_with = flat(percentiles(volume))
    assert abs(low_with - low) < 0.1
    assert abs(high_with - high) < 0.2  # the 99.6 % percentile of the others: 2.65 instead of 2.58


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_range_has_the_precision_of_the_volume(dtype: torch.dtype) -> None:
    volume = torch.randn(1, 10, 11, 12, generator=seeded()).to(dtype)
    ends = percentiles(volume)
    assert {end.dtype for end in ends} == {dtype}
    assert np.allclose(flat(ends), by_numpy(volume), rtol=max(1e-5, torch.finfo(dtype).eps))


def test_channel_of_nearly_only_air_has_its_extremes() -> None:
    volume = torch.zeros(2, 20, 20, 20)
    volume[1, 3, 4, 5:10], volume[1, 0, 0, 0] = 2.0, -1.0  # 6 of 8000 voxels
    volume[0] = torch.arange(8000.0).reshape(20, 20, 20)
    low, high = flat(percentiles(volume))
    assert (low[1], high[1]) == (-1, 2)
    assert np.allclose([low[0], high[0]], np.percentile(np.arange(8000), [0.5, 99.5]))


def test_constant_volume_has_an_empty_range() -> None:
    low, high = percentiles(torch.full((1, 4, 4, 4), 7.0))
    assert float(low) == float(high) == 7.0


def test_normalised_volumes_are_not_crushed_as_on_the_range_from_0_to_1() -> None:
    volume = torch.randn(1, 64, 64, 32, generator=seeded())
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    curves = [torch.linspace(0, 1, NUM_ENTRIES), *(draw_curve(seeded(i)) for i in range(5))]
    for curve in curves:
        share = {}
        for name, (low, high) in {"robust": percentiles(volume), "fixed": (zero, one)}.items():
            mapped = apply_curve(volume, curve, low, high)
            extreme = (volume <= low) | (volume >= high)
            assert torch.equal(mapped[volume <= low].unique(), (low + (high - low) * curve[0]).flatten())
            assert torch.equal(mapped[volume >= high].unique(), (low + (high - low) * curve[-1]).flatten())
            share[name] = float(extreme.double().mean())
            num_distinct = len(mapped.unique())
            assert num_distinct > NUM_ENTRIES // 2
        assert share["robust"] < 0.02
        assert abs(share["fixed"] - 0.66) < 0.01
