"""FMUNet as nnU-Net's network: `nnUNetTrainerFMUNet` trains it from scratch, and other trainers mix it in.

Wang et al., IEEE Transactions on Image Processing 34, 6041-6052, 2025, DOI 10.1109/TIP.2025.3610249, the follow-up of
MIS-FM (Wang et al., arXiv:2306.16925); the network itself is in architectures/fmunet.py.
"""

import math
from typing import ClassVar

from nnunetv2_misfm.citations import FMUNET, MISFM, NNUNET
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.five_levels import FiveLevelTrainer
from nnunetv2_misfm.trainers.recipe import Recipe


class nnUNetTrainerFMUNet(FiveLevelTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """FMUNet from scratch: Adam 1e-3, weight decay 1e-5, nnU-Net's poly schedule and augmentation.

    These are MIS-FM's numbers for PCT-Net; the follow-up's own are not public. As a mixin (named last among the bases)
    it only replaces the network of the other base, and what depends on it: the scales and weights of deep supervision.
    """

    network_class = "nnunetv2_misfm.architectures.FMUNet"
    # The released network's channels (FMUNet's default in the authors' code)
    default_features = (32, 64, 128, 256, 512)
    recipe_defaults: ClassVar[Recipe] = Recipe(optimizer="adam", initial_lr=1e-3, weight_decay=1e-5)
    citations: ClassVar[tuple[str, ...]] = (NNUNET, MISFM, FMUNET)

    def initialize(self) -> None:
        """Initialises as usual, after a look at whether InstanceNorm can be trained.

        Raises:
            MisfmError: A sample has a single value per channel at the deepest level.
        """
        if math.prod(self.grid_sizes()[-1]) < 2:
            raise MisfmError(
                f"{type(self).__name__} expected more than one voxel per sample at its deepest level, got patch "
                f"{list(self.configuration_manager.patch_size)}; raise the patch size (a larger batch does not help)."
            )
        super().initialize()
