"""PCT-Net as nnU-Net's network: `nnUNetTrainerPCTNet` trains it from scratch, and other trainers mix it in.

MIS-FM (Wang et al., arXiv:2306.16925), section on PCT-Net; the network itself is in architectures/pct_net.py.
"""

from typing import Any, ClassVar

from nnunetv2_misfm.architectures.pct_net import default_num_heads
from nnunetv2_misfm.citations import MISFM, NNUNET
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.five_levels import FiveLevelTrainer
from nnunetv2_misfm.trainers.recipe import Recipe


class nnUNetTrainerPCTNet(FiveLevelTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """PCT-Net from scratch: Adam 1e-3, weight decay 1e-5, nnU-Net's poly schedule and augmentation.

    As a mixin (named last among the bases) it only replaces the network of the other base, and what depends on it:
    the scales and weights of deep supervision.
    """

    network_class = "nnunetv2_misfm.architectures.PCTNet"
    # The released network's channels (MIS-FM's configuration files)
    default_features = (24, 48, 128, 256, 512)
    recipe_defaults: ClassVar[Recipe] = Recipe(optimizer="adam", initial_lr=1e-3, weight_decay=1e-5)
    citations: ClassVar[tuple[str, ...]] = (NNUNET, MISFM)

    @classmethod
    def recipe_arguments(
        cls, recipe: Recipe, planned: dict[str, Any], features_per_stage: tuple[int, ...]
    ) -> dict[str, Any]:
        """Returns attention heads and dropout: the recipe's, else the plans' for these widths, else the released."""
        arguments: dict[str, Any] = {}
        if recipe.attention_dropout is not None:
            arguments["attention_dropout"] = recipe.attention_dropout
        if recipe.num_heads is not None:
            arguments["num_heads"] = list(recipe.num_heads)
        elif planned.get("features_per_stage") != list(features_per_stage) or "num_heads" not in planned:
            arguments["num_heads"] = default_num_heads(features_per_stage)
        return arguments

    def initialize(self) -> None:
        """Initialises as usual, after a look at whether BatchNorm can be trained.

        Raises:
            MisfmError: A batch has a single value per channel at the deepest level.
        """
        deepest, batch_size = self.grid_sizes()[-1], self.configuration_manager.batch_size
        if batch_size * deepest[0] * deepest[1] * deepest[2] < 2:
            raise MisfmError(
                f"{type(self).__name__} expected more than one value per channel at its deepest level, got batch size "
                f"{batch_size} and patch {list(self.configuration_manager.patch_size)}; raise either."
            )
        super().initialize()
