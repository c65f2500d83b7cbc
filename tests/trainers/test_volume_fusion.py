import itertools

import pytest
import torch

from nnunetv2_misfm.trainers.volume_fusion import (
    VolumeFusionRecipe,
    draw_box_map,
    draw_boxes,
    draw_grid_map,
    edge_range,
    fuse,
    make_task,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_fused_voxels_are_the_hand_computed_mixtures() -> None:
    background, foreground = torch.full((1, 2, 1, 1, 5), 10.0), torch.full((1, 2, 1, 1, 5), 20.0)
    foreground[:, 1] = 50.0  # the channels share one map
    levels = torch.arange(5, dtype=torch.uint8).reshape(1, 1, 1, 1, 5)
    fused = fuse(background, foreground, levels, num_levels=4)
    assert fused[0, 0, 0, 0].tolist() == [10.0, 12.5, 15.0, 17.5, 20.0]
    assert fused[0, 1, 0, 0].tolist() == [10.0, 20.0, 30.0, 40.0, 50.0]


def test_foreground_is_the_previous_sample_of_the_batch() -> None:
    volumes = torch.tensor([1.0, 2.0, 4.0]).reshape(3, 1, 1, 1, 1).expand(3, 1, 16, 16, 16).clone()
    before = volumes.clone()
    task_input, target = make_task(volumes, VolumeFusionRecipe(), seeded())
    for sample, (own, previous) in enumerate([(1.0, 4.0), (2.0, 1.0), (4.0, 2.0)]):
        alpha = target[sample].float() / 4
        assert torch.allclose(task_input[sample], alpha * previous + (1 - alpha) * own)
    assert torch.equal(volumes, before)
    assert (target.dtype, target.shape) == (torch.int16, (3, 1, 16, 16, 16))


def test_batch_of_one_needs_a_foreground_and_takes_the_given_one() -> None:
    volume = torch.zeros(1, 1, 8, 8, 8)
    with pytest.raises(ValueError, match="expected two samples or a foreground, got one sample"):
        make_task(volume, VolumeFusionRecipe(), seeded())
    task_input, target = make_task(volume, VolumeFusionRecipe(), seeded(), foreground=torch.ones_like(volume))
    assert torch.allclose(task_input, target.float() / 4)


def test_box_map_is_what_a_slow_loop_paints() -> None:
    recipe, shape = VolumeFusionRecipe(), (10, 14, 12)
    levels = draw_box_map(shape, recipe, seeded(3))
    expected = torch.zeros(shape, dtype=torch.uint8)
    for voxel in itertools.product(*map(range, shape)):
        for box, level in draw_boxes(shape, recipe, seeded(3)):
            if all(s.start <= v < s.stop for v, s in zip(voxel, box, strict=True)):
                expected[voxel] = level  # the later box wins
    assert torch.equal(levels, expected)
    assert len(set(expected.flatten().tolist())) > 2


def test_boxes_have_the_papers_numbers_edges_and_classes() -> None:
    shape = (64, 128, 128)
    assert [edge_range(n, 8, 0.625) for n in shape] == [(8, 40), (8, 80), (8, 80)]
    samples = [draw_boxes(shape, VolumeFusionRecipe(), seeded(i)) for i in range(300)]
    assert {len(s) for s in samples} <= set(range(10, 41))
    assert (min(map(len, samples)), max(map(len, samples))) == (10, 40)
    boxes = [box for sample in samples for box, _ in sample]
    for axis, size in enumerate(shape):
        slices = [box[axis] for box in boxes]
        assert all(0 <= s.start < s.stop <= size for s in slices)
        inside = [s.stop - s.start for s in slices if s.start > 0 and s.stop < size]
        assert (min(inside), max(inside)) == (8, int(0.625 * size))  # both ends are drawn
        assert any(s.stop - s.start < 8 for s in slices)  # clipped at the border
    classes = torch.tensor([level for sample in samples for _, level in sample])
    shares = torch.bincount(classes, minlength=5) / len(classes)
    assert shares[0] == 0
    assert torch.allclose(shares[1:], torch.full((4,), 0.25), atol=0.02)


def test_mean_class_shares_are_the_measured_ones() -> None:
    # measured on the authors' generator of boxes (PyMIC a906dfc): 0.484 background, 0.12 to 0.135 each class
    generator, total = seeded(1), torch.zeros(5, dtype=torch.float64)
    for _ in range(1000):
        levels = draw_box_map((64, 128, 128), VolumeFusionRecipe(), generator)
        total += torch.bincount(levels.flatten(), minlength=5) / levels.numel()
    shares = total / 1000
    assert abs(shares[0] - 0.484) < 0.02
    assert all(0.12 - 0.02 < share < 0.135 + 0.02 for share in shares[1:])


def test_grid_is_made_of_equal_blocks_with_empty_margins() -> None:
    recipe = VolumeFusionRecipe(map="grid", num_levels=200, grid_foreground_share=1.0)
    for seed in range(20):
        levels = draw_grid_map((20, 30, 26), recipe, seeded(seed))
        occupied = levels.nonzero()
        lower, upper = occupied.min(0).values, occupied.max(0).values + 1
        inner = levels[tuple(slice(a, b) for a, b in zip(lower, upper, strict=True))]
        assert (inner > 0).all()  # every block is foreground here, so all outside `inner` is margin
        for axis, size in enumerate((20, 30, 26)):
            smallest, largest = edge_range(size, 8, 0.25)
            assert largest < 8 and smallest == largest  # 8 is more than a quarter of these axes
            assert inner.shape[axis] == size // largest * largest
            blocks = inner.unflatten(axis, (-1, largest))
            assert (blocks == blocks.select(axis + 1, 0).unsqueeze(axis + 1)).all()


def test_share_of_foreground_blocks_is_exact() -> None:
    recipe = VolumeFusionRecipe(map="grid", grid_min_size=2, grid_max_share=0.125)
    levels = draw_grid_map((16, 16, 16), recipe, seeded())  # edges of 2: 512 blocks, 358 of them foreground
    assert (levels[::2, ::2, ::2] > 0).sum() == int(0.7 * 512)


def test_mean_share_of_the_grids_background_is_the_measured_one() -> None:
    # measured on the follow-up's generator (PyMIC 53db91d): 0.436 to 0.438 background
    generator = seeded(2)
    maps = [draw_grid_map((64, 128, 128), VolumeFusionRecipe(map="grid"), generator) for _ in range(200)]
    assert abs(torch.stack([(m == 0).double().mean() for m in maps]).mean() - 0.437) < 0.02


@pytest.mark.parametrize("kind", ["boxes", "grid"])
@pytest.mark.parametrize("shape", [(16, 24, 20), (1, 16, 16), (7, 5, 3)])
def test_same_generator_same_task_other_seed_another(kind: str, shape: tuple[int, ...]) -> None:
    recipe = VolumeFusionRecipe(map=kind, num_levels=3)  # type: ignore[arg-type]
    volumes = torch.randn(2, 3, *shape, generator=seeded())
    first, again, other = (make_task(volumes, recipe, seeded(s)) for s in (5, 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert first[0].shape == volumes.shape and 0 <= int(first[1].min()) and int(first[1].max()) <= 3
