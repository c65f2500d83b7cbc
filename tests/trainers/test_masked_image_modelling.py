import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.masked_image_modelling import MaskedImageModellingRecipe, draw_mask, make_task
from nnunetv2_misfm.trainers.recipe import Recipe, read_recipes
from nnunetv2_misfm.trainers.reconstruction import ReconstructionLoss

SHAPES = st.tuples(*[st.integers(1, 20)] * 3)
BLOCKS = st.tuples(*[st.integers(1, 24)] * 3)
SEEDS = st.integers(0, 2**31)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def masked_shares(mask: torch.Tensor, block_size: tuple[int, ...]) -> list[float]:
    """The masked share of each block, by a loop over their corners."""
    corners = itertools.product(*(range(0, n, edge) for n, edge in zip(mask.shape, block_size, strict=True)))
    boxes = [tuple(slice(c, c + edge) for c, edge in zip(corner, block_size, strict=True)) for corner in corners]
    return [int(mask[box].sum()) / mask[box].numel() for box in boxes]


@settings(max_examples=150, deadline=None)
@given(shape=SHAPES, block_size=BLOCKS, ratio=st.floats(0.001, 0.999), seed=SEEDS)
@example(shape=(20, 20, 20), block_size=(8, 8, 8), ratio=0.75, seed=0)  # does not divide
@example(shape=(5, 6, 7), block_size=(16, 16, 16), ratio=0.75, seed=0)  # a single, partial block
@example(shape=(1, 1, 1), block_size=(1, 1, 1), ratio=0.5, seed=0)  # half a voxel
@example(shape=(2, 2, 2), block_size=(2, 2, 2), ratio=0.999, seed=0)  # all
def test_masked_share_is_exact_and_blocks_are_whole_but_for_one(
    shape: tuple, block_size: tuple, ratio: float, seed: int
) -> None:
    recipe = MaskedImageModellingRecipe(mask_ratio=ratio, block_size=block_size)
    mask = draw_mask(shape, recipe, seeded(seed))
    assert (mask.dtype, tuple(mask.shape)) == (torch.bool, shape)
    asked = ratio * shape[0] * shape[1] * shape[2]
    assert int(mask.sum()) == round(asked)
    assert abs(int(mask.sum()) - asked) <= 0.5 + 1e-9
    assert sum(0 < share < 1 for share in masked_shares(mask, block_size)) <= 1


def test_default_masks_three_quarters_of_blocks_of_sixteen() -> None:
    mask = draw_mask((64, 128, 128), MaskedImageModellingRecipe(), seeded())
    assert int(mask.sum()) == 786432  # 0.75 of 1,048,576
    shares = masked_shares(mask, (16, 16, 16))
    assert (len(shares), shares.count(1.0), shares.count(0.0)) == (256, 192, 64)
    recipe = MaskedImageModellingRecipe()
    assert (recipe.mask_ratio, recipe.block_size, recipe.loss) == (0.75, (16, 16, 16), "mse")


def test_partial_block_is_filled_from_its_first_voxel() -> None:
    recipe = MaskedImageModellingRecipe(mask_ratio=0.4, block_size=(2, 2, 2))
    mask = draw_mask((2, 2, 2), recipe, seeded())  # 3.2 voxels of the one block
    assert mask.flatten().tolist() == [True] * 3 + [False] * 5


def test_every_block_is_masked_as_often_as_the_others() -> None:
    recipe = MaskedImageModellingRecipe(block_size=(4, 4, 4))
    generator = seeded()
    shares = torch.tensor([masked_shares(draw_mask((8, 12, 10), recipe, generator), (4, 4, 4)) for _ in range(400)])
    assert shares.shape[1] == 2 * 3 * 3
    # four standard deviations of 400 draws; small blocks at the border fill up the count a little less evenly
    assert (shares.mean(0) - 0.75).abs().max() < 4 * (0.75 * 0.25 / 400) ** 0.5


def test_masked_voxels_are_zero_in_the_input_and_all_others_nan_in_the_target() -> None:
    recipe = MaskedImageModellingRecipe(block_size=(5, 4, 8))
    volumes = torch.randn(3, 2, 12, 10, 16, generator=seeded()) + 10  # no voxel is 0 by itself
    before = volumes.clone()
    task_input, target = make_task(volumes, recipe, seeded(3))
    assert torch.equal(volumes, before)
    generator = seeded(3)
    for sample in range(3):
        mask = draw_mask((12, 10, 16), recipe, generator)
        for channel, z, y, x in itertools.product(range(2), range(12), range(10), range(16)):
            voxel, given_voxel = volumes[sample, channel, z, y, x], task_input[sample, channel, z, y, x]
            wanted = target[sample, channel, z, y, x]
            if mask[z, y, x]:
                assert given_voxel == 0 and wanted == voxel
            else:
                assert given_voxel == voxel and wanted.isnan()


def test_channels_share_a_mask_samples_do_not_and_the_seed_decides() -> None:
    volumes = torch.ones(2, 3, 16, 16, 16)
    recipe = MaskedImageModellingRecipe(block_size=(4, 4, 4))
    first, again, other = (make_task(volumes, recipe, seeded(s))[0] for s in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first[:, 0], first[:, 1]) and torch.equal(first[:, 0], first[:, 2])
    assert not torch.equal(first[0], first[1])
    assert first.mean((1, 2, 3, 4)).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_type_of_the_volumes_is_kept(dtype: torch.dtype) -> None:
    volumes = torch.ones(1, 1, 8, 8, 8, dtype=dtype)
    task_input, target = make_task(volumes, MaskedImageModellingRecipe(block_size=(4, 4, 4)), seeded())
    assert task_input.dtype == target.dtype == dtype and task_input.shape == target.shape == volumes.shape


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_loss_and_gradient_do_not_depend_on_visible_voxels(kind: str) -> None:
    volumes = torch.randn(2, 2, 8, 8, 8, generator=seeded())
    _, target = make_task(volumes, MaskedImageModellingRecipe(block_size=(4, 4, 4)), seeded(1))
    visible = target.isnan()
    restored = torch.randn(2, 2, 8, 8, 8, generator=seeded(2))
    elsewhere = torch.where(visible, restored + 100, restored)
    results = []
    for prediction in (restored, elsewhere):
        prediction = prediction.clone().requires_grad_()
        loss = ReconstructionLoss(kind)(prediction, target)  # type: ignore[arg-type]
        loss.backward()
        assert prediction.grad is not None
        results.append((loss.detach(), prediction.grad))
    assert results[0][0] > 0
    for loss, gradient in results:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])
        assert (gradient[visible] == 0).all() and (gradient[~visible] != 0).all()


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"mask_ratio": 0}, r"masked_image_modelling.mask_ratio must be above 0 and below 1, got 0.0"),
        ({"mask_ratio": 1}, r"masked_image_modelling.mask_ratio must be above 0 and below 1, got 1.0"),
        ({"mask_ratio": float("nan")}, r"masked_image_modelling.mask_ratio must be above 0 and below 1, got nan"),
        ({"block_size": 16}, r"masked_image_modelling.block_size must be a list of 3 int values, got 16"),
        ({"block_size": [16, 16]}, r"masked_image_modelling.block_size must be a list of 3 int values, got \[16, 16\]"),
        ({"block_size": [0, 16, 16]}, r"block_size must be at least 1 voxel each, got \(0, 16, 16\)"),
        ({"loss": "ssim"}, r"masked_image_modelling.loss must be one of 'mse', 'l1', got 'ssim'"),
        ({"ratio": 0.5}, r"unknown key 'masked_image_modelling.ratio'; known keys in masked_image_modelling are loss"),
    ],
)
def test_faulty_block_gets_a_sentence(block: dict, sentence: str) -> None:
    with pytest.raises(MisfmError, match=sentence):
        read_recipes({"masked_image_modelling": block}, Recipe(), MaskedImageModellingRecipe)
