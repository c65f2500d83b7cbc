"""MONAI's Swin UNETR and UNETR as nnU-Net's networks: transformers to compare with, trained from scratch.

Hatamizadeh et al., UNETR, WACV 2022, arXiv:2103.10504; Hatamizadeh et al., Swin UNETR, BrainLes 2021, arXiv:2201.01266.
The networks are MONAI's (the extra `monai`), padded to what they need in architectures/padded.py. Overridden hooks of
nnU-Net: the network, and deep supervision, which these networks have not.
"""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_misfm.citations import NNUNET, SWIN_UNETR, UNETR
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.dimension import require_3d
from nnunetv2_misfm.trainers.recipe import MethodRecipe, Recipe


class MonaiTrainer(MisfmTrainer):
    """Base of the trainers of MONAI's networks: AdamW 1e-4, weight decay 1e-5, nnU-Net's poly schedule, augmentation.

    `features_per_stage`, `num_heads` and `attention_dropout` of the block are PCT-Net's and FMUNet's and are left
    alone: the widths are the published ones, so one configuration serves all trainers of a benchmark.

    Attributes:
        network_class: Dotted path of the network.
        network_arguments: Its arguments but for those that follow from dataset and plans.
    """

    network_class: ClassVar[str]
    network_arguments: ClassVar[dict[str, Any]]
    # MONAI's examples for BTCV (research-contributions, UNETR/BTCV/main.py and SwinUNETR/BTCV/main.py: optim_name,
    # optim_lr, reg_weight); their warm-up and cosine schedule gives way to nnU-Net's, as for all trainers here
    recipe_defaults: ClassVar[Recipe] = Recipe(optimizer="adamw", initial_lr=1e-4, weight_decay=1e-5)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this very signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False

    @classmethod
    def check_configuration(cls, configuration_manager: ConfigurationManager) -> None:
        """Raises NotImplementedError for a 2D configuration."""
        super().check_configuration(configuration_manager)
        require_3d(configuration_manager, cls.__name__)

    @classmethod
    def read_recipes(cls, configuration_manager: ConfigurationManager) -> tuple[Recipe, MethodRecipe | None]:
        """Returns the block's numbers without those of other networks (the whole block is checked all the same)."""
        recipe, method_recipe = super().read_recipes(configuration_manager)
        return replace(recipe, features_per_stage=None, num_heads=None, attention_dropout=None), method_recipe

    @classmethod
    def network_description(
        cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager
    ) -> dict[str, Any]:
        """Returns the network with its published widths."""
        return {"class": cls.network_class, "kwargs": dict(cls.network_arguments), "kwargs_to_import": []}

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = False,
    ) -> nn.Module:
        """Returns the network, which has one output whatever is asked of deep supervision.

        Raises:
            MisfmError: MONAI is not installed.
        """
        return super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, False
        )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Does nothing: nnU-Net's switch sits in a decoder of its own networks."""


class nnUNetTrainerSwinUNETR(MonaiTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """MONAI's Swin UNETR from scratch."""

    network_class = "nnunetv2_misfm.architectures.SwinUNETR"
    # MONAI's example for BTCV (SwinUNETR/BTCV/main.py: feature_size)
    network_arguments: ClassVar[dict[str, Any]] = {"feature_size": 48}
    citations: ClassVar[tuple[str, ...]] = (NNUNET, SWIN_UNETR)


class nnUNetTrainerUNETR(MonaiTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """MONAI's UNETR from scratch."""

    network_class = "nnunetv2_misfm.architectures.UNETR"
    # MONAI's defaults, the same as in its example for BTCV (UNETR/BTCV/main.py)
    network_arguments: ClassVar[dict[str, Any]] = {
        "feature_size": 16,
        "hidden_size": 768,
        "mlp_dim": 3072,
        "num_heads": 12,
    }
    citations: ClassVar[tuple[str, ...]] = (NNUNET, UNETR)

    @classmethod
    def network_description(
        cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager
    ) -> dict[str, Any]:
        """Returns the network for the plans' patch, which sets the number of its tokens."""
        description = super().network_description(plans_manager, configuration_manager)
        description["kwargs"]["patch_size"] = [int(n) for n in configuration_manager.patch_size]
        return description
