"""The fair, short baseline: stock nnU-Net in a length that the `misfm` block sets."""

from dataclasses import replace

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.recipe import MethodRecipe, Recipe

# All else of the block would make the baseline another method than stock nnU-Net
READ_KEYS = ("num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch", "seed")


class nnUNetTrainerBaseline(MisfmTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """`nnUNetTrainer` that reads `num_*` and `seed` of the block and nothing else.

    Stock `nnUNetTrainer` has a fixed length of 1000 epochs. At the same seed this trainer's losses are stock's.
    """

    @classmethod
    def read_recipes(cls, configuration_manager: ConfigurationManager) -> tuple[Recipe, MethodRecipe | None]:
        """Returns nnU-Net's own numbers but for lengths and seed (the whole block is checked all the same)."""
        recipe, _ = super().read_recipes(configuration_manager)
        return replace(cls.recipe_defaults, **{key: getattr(recipe, key) for key in READ_KEYS}), None
