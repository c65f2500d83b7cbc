from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.corruptions.intensity_curve import apply_curve, draw_curve
from nnunetv2_misfm.trainers.corruptions.intensity_range import percentiles
from nnunetv2_misfm.trainers.corruptions.local_shuffling import shuffle_locally
from nnunetv2_misfm.trainers.corruptions.painting import paint_in, paint_out
from nnunetv2_misfm.trainers.models_genesis import ModelsGenesisRecipe, corrupt, make_task
from nnunetv2_misfm.trainers.recipe import Recipe, read_recipes

NOTHING = ModelsGenesisRecipe(shuffling=0, intensity=0, painting=0)
ALWAYS = ModelsGenesisRecipe(shuffling=1, intensity=1, painting=1)
PROBABILITIES = ["shuffling", "intensity", "painting", "inpainting", "shuffled_blocks"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 100) -> torch.Tensor:
    return torch.randn(shape, generator=seeded(seed))


def changed_shares(recipe: ModelsGenesisRecipe, number: int = 400) -> torch.Tensor:
    """Share of voxels that differ from the clean volume, for each of many samples."""
    volume, generator = noise(1, 20, 20, 20), seeded()
    return torch.tensor([float((corrupt(volume, recipe, generator) != volume).float().mean()) for _ in range(number)])


@pytest.mark.parametrize(("key", "published"), [("shuffling", 0.5), ("intensity", 0.9), ("painting", 0.9)])
def test_each_corruption_has_its_published_probability(key: str, published: float) -> None:
    defaults = ModelsGenesisRecipe()
    alone = replace(NOTHING, inpainting=0, **{key: getattr(defaults, key)})  # an in-painting may have no box
    frequency = (changed_shares(alone) > 0).float().mean()
    assert abs(frequency - published) < 4 * (published * (1 - published) / 400) ** 0.5


def test_one_painting_in_five_is_an_inpainting() -> None:
    shares = changed_shares(replace(NOTHING, painting=1))
    # five boxes of a third of each axis hold 0.19 of a volume; the boxes that an out-painting keeps leave over 0.4
    assert not ((shares > 0.2) & (shares < 0.4)).any()
    assert abs((shares < 0.3).float().mean() - 0.2) < 4 * (0.2 * 0.8 / 400) ** 0.5


def test_corruptions_are_drawn_independently() -> None:
    recipe = ModelsGenesisRecipe(shuffling=0.5, intensity=0.5, painting=0)
    volume, generator = noise(1, 20, 20, 20), seeded()
    values, counts = volume.flatten().sort().values, Counter[str]()
    for _ in range(400):
        corrupted = corrupt(volume, recipe, generator)
        moved_only = torch.equal(corrupted.flatten().sort().values, values)
        counts["none" if torch.equal(corrupted, volume) else "shuffled" if moved_only else "mapped, or both"] += 1
    assert counts["none"] / 400 == pytest.approx(0.25, abs=0.07)
    assert counts["shuffled"] / 400 == pytest.approx(0.25, abs=0.07)
    assert counts["mapped, or both"] / 400 == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize(("inpainting", "paint"), [(1.0, paint_in), (0.0, paint_out)])
def test_shuffling_comes_first_then_the_curve_then_the_painting(
    inpainting: float, paint: Callable[..., torch.Tensor]
) -> None:
    volume, recipe = noise(2, 24, 30, 20), replace(ALWAYS, inpainting=inpainting, shuffled_blocks=0.6)
    for seed in range(5):
        generator = seeded(seed)
        torch.rand(4, generator=generator)  # which corruptions there are
        by_hand = shuffle_locally(volume, 0.6, generator)
        ends = percentiles(volume)  # of the clean volume
        by_hand = apply_curve(by_hand, draw_curve(generator), *ends)
        by_hand = paint(by_hand, *ends, generator)
        assert torch.equal(corrupt(volume, recipe, seeded(seed)), by_hand)


def test_nothing_changes_at_probabilities_of_zero() -> None:
    volumes = noise(3, 2, 8, 9, 10)
    task_input, target = make_task(volumes, NOTHING, seeded())
    assert torch.equal(task_input, volumes) and torch.equal(target, volumes)


@pytest.mark.parametrize("recipe", [NOTHING, ALWAYS, replace(ALWAYS, inpainting=1)])
def test_target_is_the_clean_volume_and_shares_no_memory_with_the_input(recipe: ModelsGenesisRecipe) -> None:
    volumes = noise(2, 1, 20, 20, 20)
    before = volumes.clone()
    task_input, target = make_task(volumes, recipe, seeded())
    task_input.zero_()
    assert torch.equal(target, before) and torch.equal(volumes, before)


def test_samples_of_a_batch_are_corrupted_differently() -> None:
    task_input, _ = make_task(noise(1, 1, 20, 20, 20).expand(2, -1, -1, -1, -1), ALWAYS, seeded())
    assert not torch.equal(task_input[0], task_input[1])


@pytest.mark.parametrize("inpainting", [0.0, 1.0])
def test_channels_are_corrupted_alike_each_in_its_own_range(inpainting: float) -> None:
    first = noise(20, 24, 20)
    volumes = torch.stack([first, 4 * first])[None]  # a power of two: every product is exact
    for seed in range(5):
        task_input, _ = make_task(volumes, replace(ALWAYS, inpainting=inpainting), seeded(seed))
        assert torch.allclose(task_input[0, 1], 4 * task_input[0, 0], atol=1e-5)
        assert not torch.equal(task_input[0, 0], first)


def test_input_stays_in_the_range_of_the_volume() -> None:
    volume = noise(1, 1, 32, 32, 32) * 100 - 700
    low, high = percentiles(volume[0])
    for seed in range(10):
        task_input, _ = make_task(volume, ALWAYS, seeded(seed))
        assert float(low) - 1e-2 <= float(task_input.min()) and float(task_input.max()) <= float(high) + 1e-2


@pytest.mark.parametrize("shape", [(20, 24, 22), (1, 8, 8), (5, 20, 200), (2, 30, 7), (1, 1, 1)])
def test_same_seed_same_sample_for_any_patch(shape: tuple[int, ...]) -> None:
    volumes = noise(2, 2, *shape)
    for seed in range(10):
        first, again, other = (make_task(volumes, ModelsGenesisRecipe(), seeded(s)) for s in (seed, seed, seed + 1))
        assert torch.equal(first[0], again[0])
        assert first[0].shape == first[1].shape == volumes.shape
        assert first[0].isfinite().all()
        if volumes.numel() > 100:
            assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("value", [0.0, -3.5, 1e4])
def test_constant_volumes_stay_constant(value: float) -> None:
    volumes = torch.full((2, 1, 20, 16, 20), value)
    for seed in range(10):
        task_input, _ = make_task(volumes, ALWAYS, seeded(seed))
        assert torch.equal(task_input, volumes)


def test_patches_of_almost_only_air_are_corrupted_to_finite_values() -> None:
    volumes = torch.full((1, 2, 20, 20, 20), -1.2)
    volumes[0, 0, 3, 3, :3] = 4.0  # less than half a percent
    for seed in range(10):
        assert make_task(volumes, ALWAYS, seeded(seed))[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_kept(dtype: torch.dtype) -> None:
    for seed in range(3):
        task_input, target = make_task(noise(1, 1, 20, 20, 20).to(dtype), ALWAYS, seeded(seed))
        assert task_input.dtype == target.dtype == dtype
        assert task_input.isfinite().all()


@pytest.mark.parametrize("key", PROBABILITIES)
@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_value_that_is_no_probability_is_refused(key: str, value: float) -> None:
    sentence = rf"^misfm block: models_genesis\.{key} must be from 0 to 1, got {value}; correct it in the plans file\.$"
    with pytest.raises(MisfmError, match=sentence):
        ModelsGenesisRecipe(**{key: value})  # type: ignore[arg-type]
    with pytest.raises(MisfmError, match=sentence):
        read_recipes({"models_genesis": {key: value}}, Recipe(), ModelsGenesisRecipe)


def test_block_of_the_plans_is_read_and_unknown_keys_are_named() -> None:
    _, recipe = read_recipes({"models_genesis": {"painting": 0, "loss": "l1"}}, Recipe(), ModelsGenesisRecipe)
    assert recipe == ModelsGenesisRecipe(painting=0.0, loss="l1")
    assert set(PROBABILITIES) <= {field.name for field in fields(ModelsGenesisRecipe)}
    with pytest.raises(MisfmError, match=r"unknown key 'models_genesis\.shuffle'; known keys .*shuffling, intensity"):
        read_recipes({"models_genesis": {"shuffle": 1}}, Recipe(), ModelsGenesisRecipe)
