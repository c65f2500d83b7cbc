import pytest

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.recipe import Recipe, read_recipes
from nnunetv2_misfm.trainers.volume_fusion import VolumeFusionRecipe


def test_without_a_block_the_trainers_defaults_hold() -> None:
    assert read_recipes(None, Recipe(num_epochs=3)) == (Recipe(num_epochs=3), None)


def test_pretraining_defaults_are_the_papers() -> None:
    recipe, fusion = read_recipes(None, PretextTrainer.recipe_defaults, VolumeFusionRecipe)
    assert (recipe.optimizer, recipe.initial_lr, recipe.weight_decay, recipe.lr_schedule, recipe.augmentation) == (
        "adam", 1e-3, 1e-5, "halving", "flips",
    )  # fmt: skip
    assert (fusion.num_levels, fusion.num_boxes, fusion.box_min_size, fusion.box_max_share) == (4, (10, 40), 8, 0.625)


def test_block_overrides_and_lists_become_tuples() -> None:
    recipe, _ = read_recipes({"num_epochs": 5, "features_per_stage": [8, 16], "initial_lr": 1}, Recipe())
    assert recipe == Recipe(num_epochs=5, features_per_stage=(8, 16), initial_lr=1.0)
    assert isinstance(recipe.initial_lr, float)


def test_common_key_in_the_methods_block_wins_for_its_pretraining_alone() -> None:
    block = {"num_epochs": 5, "volume_fusion": {"num_epochs": 9, "num_levels": 8}}
    recipe, fusion = read_recipes(block, Recipe(), VolumeFusionRecipe)
    assert (recipe.num_epochs, fusion) == (9, VolumeFusionRecipe(num_levels=8))
    assert read_recipes(block, Recipe()) == (Recipe(num_epochs=5), None)


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ({"num_epoch": 5}, r"unknown key 'num_epoch'; known keys are num_epochs, .*transfer, volume_fusion"),
        ({"volume_fusion": {"levels": 5}}, r"unknown key 'volume_fusion.levels'; known keys in volume_fusion are"),
        ({"volume_fusionn": {}}, r"unknown key 'volume_fusionn'"),
        ({"volume_fusion": 3}, r"volume_fusion must be a dictionary"),
        ({"num_epochs": "5"}, r"num_epochs must be of type int, got '5'"),
        ({"num_epochs": 5.5}, r"num_epochs must be of type int, got 5.5"),
        ({"num_epochs": True}, r"num_epochs must be of type int, got True"),
        ({"num_epochs": 0}, r"num_epochs must be a number above 0, got 0"),
        ({"seed": -1}, r"seed must be from 0 to 2147483647, got -1"),
        ({"initial_lr": float("inf")}, r"initial_lr must be a number above 0, got inf"),
        ({"initial_lr": None}, r"initial_lr must be of type float, got None"),
        ({"transfer": "decoder"}, r"transfer must be one of 'all', 'encoder', got 'decoder'"),
        ({"features_per_stage": 8}, r"features_per_stage must be a list of int values, got 8"),
        ({"features_per_stage": [8, "x"]}, r"features_per_stage must be of type int, got 'x'"),
        ({"volume_fusion": {"num_boxes": [1]}}, r"volume_fusion.num_boxes must be a list of 2 int values, got \[1\]"),
        ({"volume_fusion": {"num_boxes": [9, 1]}}, r"num_boxes must be two ordered numbers"),
        ({"volume_fusion": {"map": "discs"}}, r"volume_fusion.map must be one of 'boxes', 'grid', got 'discs'"),
        ({"volume_fusion": {"box_max_share": 1.5}}, r"box_max_share must be above 0 and at most 1, got 1.5"),
        ([1], r"expected a dictionary of keys, got \[1\]"),
    ],
)  # fmt: skip
def test_faulty_block_gets_a_sentence(block: object, sentence: str) -> None:
    with pytest.raises(MisfmError, match=sentence):
        read_recipes(block, Recipe(), VolumeFusionRecipe)
