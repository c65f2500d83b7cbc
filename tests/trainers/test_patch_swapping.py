import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.patch_swapping import PatchSwappingRecipe, draw_pairs, make_task, swap
from nnunetv2_misfm.trainers.recipe import Recipe, read_recipes

SHAPES = st.tuples(*[st.integers(1, 20)] * 3)
SEEDS = st.integers(0, 2**31)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def numbered(shape: tuple[int, ...], num_samples: int = 1) -> torch.Tensor:
    """Volumes [B, 2, D, H, W] whose voxels are all different: their flat index, and minus it in the second channel."""
    first = torch.arange(math.prod(shape), dtype=torch.float64).reshape(1, 1, *shape)
    return torch.cat([first, -first], 1).repeat(num_samples, 1, 1, 1, 1)


def boxes_of(blocks: torch.Tensor, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The box around each list of flat indices, which must name every voxel of it once."""
    found = []
    for block in blocks.tolist():
        places = np.stack(np.unravel_index(block, shape))
        box = tuple(slice(int(low), int(high) + 1) for low, high in zip(places.min(1), places.max(1), strict=True))
        inside = np.arange(math.prod(shape)).reshape(shape)[box]
        assert sorted(block) == sorted(inside.flatten().tolist())
        found.append(box)
    return found


def test_swapped_voxels_are_the_hand_computed_ones() -> None:
    volume = torch.tensor([[10.0, 11, 12, 13, 14, 15], [20, 21, 22, 23, 24, 25]]).reshape(2, 1, 2, 3)
    first, second = torch.tensor([[0, 1], [3, 2]]), torch.tensor([[4, 5], [3, 2]])  # the second pair stays where it is
    assert swap(volume, first, second).reshape(2, 6).tolist() == [[14, 15, 12, 13, 10, 11], [24, 25, 22, 23, 20, 21]]
    crossed = swap(volume, torch.tensor([[0], [2]]), torch.tensor([[5], [1]]))
    assert crossed.reshape(2, 6).tolist() == [[15, 12, 11, 13, 14, 10], [25, 22, 21, 23, 24, 20]]
    assert volume[0].flatten().tolist() == [10, 11, 12, 13, 14, 15]  # the volume itself is left alone


def test_blocks_change_places_as_in_a_slow_loop_over_boxes() -> None:
    shape = (16, 24, 20)
    volumes = torch.randn(1, 3, *shape, generator=seeded())
    task_input, _ = make_task(volumes, PatchSwappingRecipe(), seeded(4))
    first, second = draw_pairs(shape, PatchSwappingRecipe(), seeded(4))
    expected = volumes[0].clone()
    for a, b in zip(boxes_of(first, shape), boxes_of(second, shape), strict=True):
        expected[:, a[0], a[1], a[2]] = volumes[0][:, b[0], b[1], b[2]]
        expected[:, b[0], b[1], b[2]] = volumes[0][:, a[0], a[1], a[2]]
    assert torch.equal(task_input[0], expected)


@pytest.mark.parametrize(
    ("shape", "edges"),
    [
        ((64, 128, 128), (8, 16, 16)),  # the published block
        ((4, 64, 64), (1, 8, 8)),
        ((1, 8, 8), (1, 1, 1)),
        ((15, 17, 28), (1, 2, 3)),
    ],
)
def test_edges_are_an_eighth_of_each_axis_and_at_least_one_voxel(shape: tuple, edges: tuple) -> None:
    blocks = torch.cat(draw_pairs(shape, PatchSwappingRecipe(), seeded()))
    assert {tuple(s.stop - s.start for s in box) for box in boxes_of(blocks, shape)} == {edges}


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=SEEDS, share=st.sampled_from([0.125, 0.3, 0.5]))
def test_blocks_never_overlap_and_fill_the_room_there_is(shape: tuple, seed: int, share: float) -> None:
    recipe = PatchSwappingRecipe(block_share=share)
    first, second = draw_pairs(shape, recipe, seeded(seed))
    assert first.shape == second.shape and first.dtype == torch.int64
    touched = torch.cat([first, second]).flatten().tolist()
    assert len(touched) == len(set(touched)) and all(0 <= i < math.prod(shape) for i in touched)
    edges = [max(1, int(share * size)) for size in shape]
    boxes = boxes_of(torch.cat([first, second]), shape)
    assert {tuple(s.stop - s.start for s in box) for box in boxes} <= {tuple(edges)}
    room = [size // edge for size, edge in zip(shape, edges, strict=True)]  # an offset costs one block per axis
    least = [n if edge == 1 or n == 1 else n - 1 for n, edge in zip(room, edges, strict=True)]
    assert min(20, math.prod(least) // 2) <= len(first) <= min(40, math.prod(room) // 2)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=SEEDS)
def test_swapping_twice_restores_and_keeps_all_voxels(shape: tuple, seed: int) -> None:
    volumes = numbered(shape)
    task_input, target = make_task(volumes, PatchSwappingRecipe(), seeded(seed))
    place = task_input[0, 0].flatten().long()  # where each voxel was taken from
    assert place.sort().values.tolist() == list(range(place.numel()))  # nothing lost, nothing doubled
    assert torch.equal(place[place], torch.arange(place.numel()))  # the same exchange once more
    assert torch.equal(task_input[0, 1], -task_input[0, 0])  # the channels move together
    first, second = draw_pairs(shape, PatchSwappingRecipe(), seeded(seed))
    moved = (place != torch.arange(place.numel())).nonzero().flatten().tolist()
    assert moved == sorted(torch.cat([first, second]).flatten().tolist())  # all voxels outside the blocks stay
    assert torch.equal(target, numbered(shape))


def test_number_of_pairs_takes_every_value_of_its_range() -> None:
    recipe = PatchSwappingRecipe(num_pairs=(3, 6))
    counts = {len(draw_pairs((32, 32, 32), recipe, seeded(seed))[0]) for seed in range(60)}
    assert counts == {3, 4, 5, 6}


def test_where_there_is_no_room_fewer_pairs_are_swapped() -> None:
    first, second = draw_pairs((2, 3, 4), PatchSwappingRecipe(), seeded())  # 24 blocks of one voxel
    assert sorted(torch.cat([first, second]).flatten().tolist()) == list(range(24))


def test_without_room_for_a_pair_the_input_is_the_volume() -> None:
    volumes = numbered((1, 1, 1), 2)
    task_input, target = make_task(volumes, PatchSwappingRecipe(), seeded())
    assert torch.equal(task_input, volumes) and torch.equal(target, volumes)


def test_no_pair_is_drawn_where_the_recipe_allows_none() -> None:
    volume, recipe = numbered((8, 8, 8), 1), PatchSwappingRecipe(num_pairs=(0, 1))
    moved = {int((make_task(volume, recipe, seeded(i))[0] != volume).sum()) for i in range(20)}
    assert moved == {0, 4}  # none, or a pair of blocks of one voxel, in both channels


def test_blocks_reach_every_position_up_to_the_far_border() -> None:
    shape, edges = (16, 20, 11), (4, 6, 3)  # 0.3 of each axis
    starts: list[set[int]] = [set(), set(), set()]
    for seed in range(150):
        pairs = draw_pairs(shape, PatchSwappingRecipe(block_share=0.3), seeded(seed))
        for box, axis in itertools.product(boxes_of(torch.cat(pairs), shape), range(3)):
            starts[axis].add(box[axis].start)
    assert starts == [set(range(size - edge + 1)) for size, edge in zip(shape, edges, strict=True)]


def test_samples_of_a_batch_differ_and_the_seed_decides() -> None:
    volumes = numbered((16, 16, 16), 2)
    before = volumes.clone()
    first, again, other = (make_task(volumes, PatchSwappingRecipe(), seeded(s))[0] for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(volumes, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_target_is_the_clean_volume_and_the_type_is_kept(dtype: torch.dtype) -> None:
    volumes = torch.randn(2, 1, 16, 16, 16, generator=seeded()).to(dtype)
    task_input, target = make_task(volumes, PatchSwappingRecipe(), seeded())
    assert torch.equal(target, volumes) and not torch.equal(task_input, volumes)
    assert (task_input.dtype, task_input.shape) == (dtype, volumes.shape)


def test_defaults_are_the_authors() -> None:
    recipe = PatchSwappingRecipe()
    assert (recipe.num_pairs, recipe.block_share, recipe.loss) == ((20, 40), 0.125, "mse")


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"num_pairs": [9, 1]}, r"patch_swapping.num_pairs must be two ordered counts, not both 0, got \(9, 1\)"),
        ({"num_pairs": [-1, 1]}, r"patch_swapping.num_pairs must be two ordered counts, not both 0, got \(-1, 1\)"),
        ({"num_pairs": [0, 0]}, r"patch_swapping.num_pairs must be two ordered counts, not both 0, got \(0, 0\)"),
        ({"num_pairs": 20}, r"patch_swapping.num_pairs must be a list of 2 int values, got 20"),
        ({"block_share": 0}, r"patch_swapping.block_share must be above 0 and at most 0.5, got 0.0"),
        ({"block_share": 0.6}, r"patch_swapping.block_share must be above 0 and at most 0.5, got 0.6"),
        ({"loss": "l2"}, r"patch_swapping.loss must be one of 'mse', 'l1', got 'l2'"),
        ({"deep_supervision": 1}, r"patch_swapping.deep_supervision must be of type bool, got 1"),
        ({"pairs": 3}, r"unknown key 'patch_swapping.pairs'; known keys in patch_swapping are loss, deep_super"),
    ],
)
def test_faulty_block_gets_a_sentence(block: dict, sentence: str) -> None:
    with pytest.raises(MisfmError, match=sentence):
        read_recipes({"patch_swapping": block}, Recipe(), PatchSwappingRecipe)
