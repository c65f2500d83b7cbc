import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from nnunetv2_misfm.trainers.corruptions import local_shuffling
from nnunetv2_misfm.trainers.corruptions.local_shuffling import draw_edges, draw_source, shuffle_locally
from nnunetv2_misfm.trainers.models_genesis import ModelsGenesisRecipe

THIN = [(1, 8, 8), (5, 20, 200), (2, 33, 7)]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiling(shape: tuple[int, ...], seed: int) -> list[tuple[slice, ...]]:
    """The blocks that `draw_source` of the same seed permutes: its edges are its first draws."""
    generator, axes = seeded(seed), []
    for size in shape:
        stops = list(itertools.accumulate(draw_edges(size, generator).tolist()))
        axes.append([slice(a, b) for a, b in zip([0, *stops], stops, strict=False)])
    return list(itertools.product(*axes))


def local_permutation(source: np.ndarray, block: tuple[slice, ...]) -> list[int]:
    """What happens in a block, as places 0..n-1 in it; fails if one of its voxels comes from another block."""
    voxels = np.ravel_multi_index(np.mgrid[block], source.shape).flatten().tolist()
    places = {voxel: place for place, voxel in enumerate(voxels)}
    return [places[voxel] for voxel in source[block].flatten().tolist()]


def local_permutations(shape: tuple[int, ...], share: float, seed: int, least: int) -> list[list[int]]:
    """What happens in each block of at least so many voxels."""
    source = draw_source(shape, share, seeded(seed)).reshape(shape).numpy()
    large = [b for b in tiling(shape, seed) if math.prod(s.stop - s.start for s in b) >= least]
    return [local_permutation(source, block) for block in large]


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 300), seed=st.integers(0, 2**31))
def test_edges_are_at_most_a_tenth_of_the_axis_and_add_up_to_it(size: int, seed: int) -> None:
    edges = draw_edges(size, seeded(seed))
    assert edges.dtype == torch.int64
    assert int(edges.sum()) == size
    assert 1 <= int(edges.min()) and int(edges.max()) <= max(1, size // 10)


def test_edges_are_uniform() -> None:
    first = torch.tensor([int(draw_edges(64, seeded(i))[0]) for i in range(3000)])
    shares = torch.bincount(first, minlength=7) / 3000
    assert shares[0] == 0
    assert torch.allclose(shares[1:], torch.full((6,), 1 / 6), atol=0.03)


@pytest.mark.parametrize("shape", [(23, 40, 31), *THIN])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_every_block_keeps_its_values(shape: tuple[int, ...], share: float) -> None:
    volume = torch.randn(1, *shape, generator=seeded(1))
    before = volume.clone()
    shuffled = shuffle_locally(volume, share, seeded(2))
    assert torch.equal(volume, before)
    assert shuffled.shape == volume.shape
    for block in tiling(shape, 2):
        was, now = volume[0][block].flatten(), shuffled[0][block].flatten()
        assert torch.equal(was.sort().values, now.sort().values)
    assert torch.equal(shuffled.flatten().sort().values, volume.flatten().sort().values)


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 45)] * 3), share=st.floats(0, 1), seed=st.integers(0, 2**31))
def test_voxels_of_any_patch_change_places_within_their_block_only(
    shape: tuple[int, ...], share: float, seed: int
) -> None:
    source, number = draw_source(shape, share, seeded(seed)).numpy(), np.empty(shape, np.int64)
    for i, block in enumerate(tiling(shape, seed)):
        number[block] = i
    assert np.array_equal(np.sort(source), np.arange(number.size))
    assert np.array_equal(number.flatten()[source], number.flatten())


def test_share_of_zero_leaves_everything_in_place() -> None:
    volume = torch.randn(2, 20, 30, 40, generator=seeded())
    assert torch.equal(shuffle_locally(volume, 0.0, seeded(1)), volume)


def test_share_of_one_permutes_every_block() -> None:
    large = local_permutations((42, 40, 45), 1.0, 3, least=8)  # smaller ones may by chance be left as they are
    assert len(large) > 1000
    assert all(p != sorted(p) for p in large)
    alike: dict[int, set[tuple[int, ...]]] = {}
    for permutation in large:
        alike.setdefault(len(permutation), set()).add(tuple(permutation))
    assert all(len(kinds) > 1 for kinds in alike.values())  # blocks of one size do not all move the same way


def test_share_of_permuted_blocks_is_the_one_asked_for() -> None:
    found = [p for seed in range(3) for p in local_permutations((42, 40, 45), 0.3, seed, least=8)]
    assert abs(np.mean([p != sorted(p) for p in found]) - 0.3) < 0.02


def test_permutations_are_uniform() -> None:
    drawn = []
    for seed in range(600):
        largest = local_permutations((1, 30, 30), 1.0, seed, least=9)  # 3 x 3
        if largest:  # one block per seed: others may share its permutation
            drawn.append(largest[seed % len(largest)])
    permutations, expected = np.array(drawn), len(drawn) / 9
    assert expected > 50
    counts = np.stack([np.bincount(permutations[:, place], minlength=9) for place in range(9)])
    # Pearson's statistic of sums of permutation matrices follows n / (n - 1) times chi-square of (n - 1)^2 degrees
    assert ((counts - expected) ** 2 / expected).sum() * 8 / 9 < chi2.ppf(0.999, 64)
    pairs = np.bincount(permutations[:, 0] * 9 + permutations[:, 1], minlength=81)
    pairs = np.delete(pairs, range(0, 81, 10))  # one voxel in both places
    assert ((pairs - expected / 8) ** 2 / (expected / 8)).sum() < chi2.ppf(0.999, 71)


def test_channels_move_together() -> None:
    first = torch.randn(12, 31, 40, generator=seeded())
    shuffled = shuffle_locally(torch.stack([first, 2 * first, -first]), 0.8, seeded(1))
    assert not torch.equal(shuffled[0], first)
    assert torch.equal(shuffled[1], 2 * shuffled[0]) and torch.equal(shuffled[2], -shuffled[0])


@pytest.mark.parametrize("shape", [(64, 64, 32), (23, 40, 31), *THIN])
def test_double_precision_for_large_patches_finds_the_same_places(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    single = draw_source(shape, 0.8, seeded(4))
    monkeypatch.setattr(local_shuffling, "LARGEST_FLOAT32", 0)
    assert torch.equal(draw_source(shape, 0.8, seeded(4)), single)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_shuffled_alike(dtype: torch.dtype) -> None:
    volume = torch.randn(1, 20, 21, 22, generator=seeded()).to(dtype)
    shuffled = shuffle_locally(volume, 1.0, seeded(1))
    assert shuffled.dtype == dtype
    assert torch.equal(shuffled.double(), shuffle_locally(volume.double(), 1.0, seeded(1)))


def shuffled_as_published(volume: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """10,000 boxes, one after the other, each read from the original volume and written permuted."""
    result = volume.copy()
    for _ in range(10_000):
        box = []
        for size in volume.shape:
            edge = int(generator.integers(1, size // 10 + 1))
            start = int(generator.integers(0, size - edge + 1))
            box.append(slice(start, start + edge))
        window = volume[tuple(box)]
        result[tuple(box)] = generator.permutation(window.flatten()).reshape(window.shape)
    return result


def test_as_many_voxels_change_as_in_the_published_procedure() -> None:
    volume = torch.rand(1, 64, 64, 32, generator=seeded())
    published = shuffled_as_published(volume[0].numpy(), np.random.default_rng(0))
    of_theirs = (published != volume[0].numpy()).mean()
    assert abs(of_theirs - 0.79) < 0.01  # measured on the authors' code
    share = ModelsGenesisRecipe().shuffled_blocks
    of_ours = np.mean([(shuffle_locally(volume, share, seeded(i)) != volume).double().mean() for i in range(10)])
    assert abs(of_ours - of_theirs) < 0.02


@pytest.mark.parametrize(("shape", "of_theirs"), [((64, 128, 128), 0.72), ((24, 32, 24), 0.70)])
def test_at_other_sizes_as_many_change_to_a_tenth(shape: tuple[int, ...], of_theirs: float) -> None:
    volume = torch.rand(1, *shape, generator=seeded())  # `of_theirs` by `shuffled_as_published`
    share = ModelsGenesisRecipe().shuffled_blocks
    of_ours = np.mean([(shuffle_locally(volume, share, seeded(i)) != volume).double().mean() for i in range(10)])
    assert abs(of_ours - of_theirs) < 0.1


@pytest.mark.parametrize("shape", [(20, 30, 40), *THIN])
def test_same_seed_same_places_other_seed_others(shape: tuple[int, ...]) -> None:
    first, again, other = (draw_source(shape, 1.0, seeded(seed)) for seed in (5, 5, 6))
    assert first.dtype == torch.int32
    assert torch.equal(first, again)
    if max(shape) >= 20:  # else all blocks are single voxels
        assert not torch.equal(first, other)
