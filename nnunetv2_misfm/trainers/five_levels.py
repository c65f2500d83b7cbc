"""What the trainers of MIS-FM's networks share: five levels whose pools follow the plans, with heads on four of them.

MIS-FM (Wang et al., arXiv:2306.16925) and the authors' code. Overridden hooks of nnU-Net: the network, and the scales
and weights of deep supervision, which nnU-Net derives from the plans' own network.
"""

from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_misfm.architectures.anisotropy import NUM_LEVELS, Size3, grid_sizes
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.dimension import require_3d
from nnunetv2_misfm.trainers.recipe import Recipe

# Weights of the four heads before they are normalised, finest first (the authors' PyMIC, DeepSuperviseLoss)
HEAD_WEIGHTS = (1.0, 1 / 2, 1 / 4, 1 / 8)


def five_level_strides(plan_strides: list[list[int]]) -> list[list[int]]:
    """Returns the strides of the five levels under a plan's strides (array order D, H, W).

    The pools 0 -> 1 and 1 -> 2 are the plan's second and third strides, (2, 2, 2) where the plan has fewer stages;
    the two deeper pools are (2, 2, 2) always.
    """
    shallow = [[int(s) for s in stride] for stride in plan_strides[1:3]]
    shallow += [[2, 2, 2]] * (2 - len(shallow))
    return [[1, 1, 1], *shallow, [2, 2, 2], [2, 2, 2]]


def network_strides(configuration_manager: ConfigurationManager) -> list[list[int]]:
    """Returns the strides of the five levels under a configuration's plans.

    Raises:
        MisfmError: The plans' network has no strides, or the first two pools have others than 1 and 2.
    """
    planned = configuration_manager.network_arch_init_kwargs.get("strides")
    shallow = planned[1:3] if isinstance(planned, list) else [None]
    num_axes = len(configuration_manager.patch_size)
    if not all(isinstance(s, list | tuple) and len(s) >= num_axes and {*s} <= {1, 2} for s in shallow):
        raise MisfmError(
            "expected plans whose network has strides of 1 and 2 at its first two pools, which PCT-Net and FMUNet take "
            f"over, got {configuration_manager.network_arch_class_name} with "
            f"{'none' if planned is None else f'strides {planned}'}: use nnUNetPlans or run nnUNetv2_misfm plan."
        )
    return five_level_strides(planned)


class FiveLevelTrainer(MisfmTrainer):
    """Base of the trainers of PCT-Net and FMUNet, whatever network the plans name.

    Where the plans name the very network (`nnUNetv2_misfm plan`), their arguments are taken, and the recipe's go before
    them; else it is built from the recipe and the plans' pools.

    Attributes:
        network_class: Dotted path of the network.
        default_features: Channels of the five levels where neither recipe nor plans say otherwise.
    """

    network_class: ClassVar[str]
    default_features: ClassVar[tuple[int, ...]]

    @classmethod
    def check_configuration(cls, configuration_manager: ConfigurationManager) -> None:
        """Raises NotImplementedError for a 2D configuration, MisfmError for plans without fitting strides."""
        super().check_configuration(configuration_manager)
        require_3d(configuration_manager, cls.__name__)
        network_strides(configuration_manager)

    @classmethod
    def network_description(
        cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager
    ) -> dict[str, Any]:
        """Returns the network with the plan's pools and the recipe's numbers."""
        recipe, _ = cls.read_recipes(configuration_manager)
        planned = {}
        if configuration_manager.network_arch_class_name == cls.network_class:
            planned = configuration_manager.network_arch_init_kwargs
        features = recipe.features_per_stage or planned.get("features_per_stage") or cls.default_features
        if len(features) != NUM_LEVELS:
            network = cls.network_class.rsplit(".", 1)[-1]
            raise MisfmError(
                f"misfm block: features_per_stage must hold {NUM_LEVELS} numbers for {network}, got "
                f"{list(features)}; correct it in the plans file."
            )
        kwargs = {
            **planned,
            "features_per_stage": list(features),
            "strides": network_strides(configuration_manager),
            **cls.recipe_arguments(recipe, planned, tuple(features)),
        }
        return {"class": cls.network_class, "kwargs": kwargs, "kwargs_to_import": []}

    @classmethod
    def recipe_arguments(
        cls, recipe: Recipe, planned: dict[str, Any], features_per_stage: tuple[int, ...]
    ) -> dict[str, Any]:
        """Returns what else of the network's arguments follows from the recipe and the plans' own ones."""
        return {}

    def grid_sizes(self) -> list[Size3]:
        """Returns the grid (D, H, W) of each level for the plans' patch, finest first."""
        return grid_sizes(self.configuration_manager.patch_size, network_strides(self.configuration_manager))

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """Returns the four heads' sizes as shares of the patch, instead of one per stage of the plans."""
        if not self.enable_deep_supervision:
            return None
        patch, *coarser = self.grid_sizes()[: len(HEAD_WEIGHTS)]
        return [[n / size for n, size in zip(grid, patch, strict=True)] for grid in (patch, *coarser)]

    def _build_loss(self) -> nn.Module:
        """Returns nnU-Net's loss with the authors' head weights; nnU-Net leaves its coarsest head out."""
        loss = super()._build_loss()
        if self.enable_deep_supervision:
            loss.weight_factors = tuple(w / sum(HEAD_WEIGHTS) for w in HEAD_WEIGHTS)
        return loss
