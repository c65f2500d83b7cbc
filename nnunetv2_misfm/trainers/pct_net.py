"""PCT-Net as nnU-Net's network: `nnUNetTrainerPCTNet` trains it from scratch, and other trainers mix it in.

MIS-FM (Wang et al., arXiv:2306.16925), section on PCT-Net; the network itself is in architectures/pct_net.py.
"""

from typing import Any, ClassVar

from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_misfm.architectures.pct_net import TRANSFORMER_LEVELS, grid_sizes
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.dimension import require_3d
from nnunetv2_misfm.trainers.recipe import Recipe

# The released network's channels (MIS-FM's configuration files)
FEATURES_PER_STAGE = (24, 48, 128, 256, 512)
# Channels of an attention head at every level of the released network; narrower networks get fewer heads
CHANNELS_PER_HEAD = 32
# Weights of the four heads before they are normalised, finest first (the authors' PyMIC, DeepSuperviseLoss)
HEAD_WEIGHTS = (1.0, 1 / 2, 1 / 4, 1 / 8)


def pct_net_strides(plan_strides: list[list[int]]) -> list[list[int]]:
    """Returns the strides of PCT-Net's five levels under a plan's strides (array order D, H, W).

    The pools 0 -> 1 and 1 -> 2 are the plan's second and third strides, (2, 2, 2) where the plan has fewer stages;
    the two deeper pools are (2, 2, 2) always.
    """
    shallow = [[int(s) for s in stride] for stride in plan_strides[1:3]]
    shallow += [[2, 2, 2]] * (2 - len(shallow))
    return [[1, 1, 1], *shallow, [2, 2, 2], [2, 2, 2]]


def num_heads(channels: int) -> int:
    """Returns the most attention heads of at least 32 channels each that divide the channels (one for fewer)."""
    most = max(1, channels // CHANNELS_PER_HEAD)
    return max(heads for heads in range(1, most + 1) if channels % heads == 0)


class nnUNetTrainerPCTNet(MisfmTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """PCT-Net from scratch: Adam 1e-3, weight decay 1e-5, nnU-Net's poly schedule and augmentation.

    As a mixin (named last among the bases) it only replaces the network of the other base, and what depends on it:
    the scales and weights of deep supervision.
    """

    recipe_defaults: ClassVar[Recipe] = Recipe(optimizer="adam", initial_lr=1e-3, weight_decay=1e-5)
    citations: ClassVar[tuple[str, ...]] = (
        *MisfmTrainer.citations,
        "Wang et al., MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale "
        "Unannotated Dataset, arXiv:2306.16925 (2023)",
    )

    @classmethod
    def check_configuration(cls, configuration_manager: ConfigurationManager) -> None:
        """Raises NotImplementedError for a 2D configuration."""
        super().check_configuration(configuration_manager)
        require_3d(configuration_manager, cls.__name__)

    @classmethod
    def network_description(
        cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager
    ) -> dict[str, Any]:
        """Returns PCT-Net with the plan's pools and the recipe's widths."""
        recipe, _ = cls.read_recipes(configuration_manager)
        features = recipe.features_per_stage or FEATURES_PER_STAGE
        if len(features) != len(FEATURES_PER_STAGE):
            raise MisfmError(
                f"misfm block: features_per_stage must hold {len(FEATURES_PER_STAGE)} numbers for PCT-Net, got "
                f"{list(features)}; correct it in the plans file."
            )
        return {
            "class": "nnunetv2_misfm.architectures.PCTNet",
            "kwargs": {
                "features_per_stage": list(features),
                "strides": pct_net_strides(configuration_manager.pool_op_kernel_sizes),
                "num_heads": [num_heads(channels) for channels in features[TRANSFORMER_LEVELS[0] :]],
            },
            "kwargs_to_import": [],
        }

    def _grid_sizes(self) -> list[tuple[int, int, int]]:
        strides = pct_net_strides(self.configuration_manager.pool_op_kernel_sizes)
        return grid_sizes(self.configuration_manager.patch_size, strides)

    def initialize(self) -> None:
        """Initialises as usual, after a look at whether BatchNorm can be trained.

        Raises:
            MisfmError: A batch has a single value per channel at the deepest level.
        """
        deepest, batch_size = self._grid_sizes()[-1], self.configuration_manager.batch_size
        if batch_size * deepest[0] * deepest[1] * deepest[2] < 2:
            raise MisfmError(
                f"{type(self).__name__} expected more than one value per channel at its deepest level, got batch size "
                f"{batch_size} and patch {list(self.configuration_manager.patch_size)}; raise either."
            )
        super().initialize()

    def _get_deep_supervision_scales(self) -> list[list[float]] | None:
        """Returns the four heads' sizes as shares of the patch, instead of one per stage of the plans."""
        if not self.enable_deep_supervision:
            return None
        patch, *coarser = self._grid_sizes()[: len(HEAD_WEIGHTS)]
        return [[n / size for n, size in zip(grid, patch, strict=True)] for grid in (patch, *coarser)]

    def _build_loss(self) -> nn.Module:
        """Returns nnU-Net's loss with the paper's head weights; nnU-Net leaves its coarsest head out."""
        loss = super()._build_loss()
        if self.enable_deep_supervision:
            loss.weight_factors = tuple(w / sum(HEAD_WEIGHTS) for w in HEAD_WEIGHTS)
        return loss
