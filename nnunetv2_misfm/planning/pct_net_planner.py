"""Plans for PCT-Net: `nnUNetPCTNetPlans.json`, with which nnU-Net's own trainers train and predict it.

nnU-Net's planner decides all but the network: target spacing, transposition, resampling, normalisation, whether there
is a low resolution and a cascade. Hooks of nnU-Net 2.8's `ExperimentPlanner` that are overridden, and what each does
instead: `get_plans_for_configuration` (PCT-Net, with patch and batch size by the memory of its training step),
`static_estimate_VRAM_usage` (nothing: the size of nnU-Net's own network is not asked for), `plan_experiment` (refuses
2D data first), `save_plans` (no 2D configuration; shares the preprocessed cases of nnU-Net's default plans).
"""

import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.network_topology import get_pool_and_conv_props
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_misfm.architectures.anisotropy import Size3, as_size3
from nnunetv2_misfm.architectures.pct_net import PCTNet, default_num_heads
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.memory import training_memory
from nnunetv2_misfm.plans_file import PREPROCESSING_KEYS, read_json
from nnunetv2_misfm.trainers.five_levels import five_level_strides
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet

PLANS_NAME = "nnUNetPCTNetPlans"
DEFAULT_PLANS_NAME = "nnUNetPlans"
# nnU-Net's default (ExperimentPlanner)
DEFAULT_GPU_MEMORY_GB = 8.0
# The unit that GPUs are labelled in
GIB = 2**30
# Share of the GPU's memory that the estimate leaves for the CUDA context, the workspace of cuDNN and fragmentation
# (ours; not measured)
HEADROOM = 0.15
# Volume from which nnU-Net's planner begins to shrink a patch, before it is cut to the median image
LARGEST_PATCH_VOXELS = 256**3
# Shortest axis of a feature map that nnU-Net's planner pools to, and its bound on the number of pools (none)
NNUNET_MIN_FEATURE_MAP, NNUNET_MAX_POOLS = 4, 999999
# Voxels per axis below which no patch shrinks: four pools leave one voxel of them
MIN_EDGE = 16
# Edges of the two cubes whose traces give the memory per voxel (ours)
REFERENCE_EDGES = (32, 64)
# What of plans and of a configuration decides how preprocessed cases look
_PREPROCESSING_OF_PLANS = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")


def times(values: Sequence[float]) -> str:
    """Returns numbers as a text: 64 x 128 x 128."""
    return " x ".join(f"{value:g}" for value in values)


def patch_candidates(spacing: Sequence[float], median_shape: Sequence[float]) -> list[tuple[Size3, list[list[int]]]]:
    """Returns the patches that may be planned, the largest first, with PCT-Net's strides for each.

    The first has nnU-Net's aspect: as many millimetres along each axis, cut to the median image. Then the axis that is
    longest against the median image loses voxels until every axis has about `MIN_EDGE` left (an axis along which images
    are shorter keeps them all). An axis is a multiple of what its pools divide it by, but for the last pool, to a level
    without a head. Where fewer voxels along one axis mean other pools, and these mean more voxels along another, a
    patch that is not smaller than the one before is left out.

    Args:
        spacing: Target spacing (D, H, W) in mm.
        median_shape: Median image (D, H, W) in voxels, at that spacing.
    """
    aspect = 1 / np.asarray(spacing)
    size = np.minimum(np.round(aspect * (LARGEST_PATCH_VOXELS / aspect.prod()) ** (1 / 3)), median_shape)
    candidates: list[tuple[Size3, list[list[int]]]] = []
    while True:
        _, pools, _, _, _ = get_pool_and_conv_props(spacing, size, NNUNET_MIN_FEATURE_MAP, NNUNET_MAX_POOLS)
        strides = five_level_strides([list(pool) for pool in pools])
        divisor = np.prod(strides[:-1], axis=0)  # the deepest level has no head and may round up
        patch = (np.ceil(size / divisor) * divisor).astype(int)
        if not candidates or patch.prod() < math.prod(candidates[-1][0]):
            candidates.append((as_size3(patch.tolist()), strides))
        shrinkable = patch - divisor >= MIN_EDGE
        if not shrinkable.any():
            return candidates
        axis = np.argmax(np.where(shrinkable, patch / median_shape, 0))
        size = patch.copy()
        size[axis] -= divisor[axis]


class PCTNetPlanner(ExperimentPlanner):
    """nnU-Net's planner with PCT-Net for its network; the arguments are those of nnU-Net's.

    Attributes:
        features_per_stage: Channels of the five levels.
    """

    plans: dict[str, Any]

    def __init__(
        self,
        dataset_name_or_id: str | int,
        gpu_memory_target_in_gb: float = DEFAULT_GPU_MEMORY_GB,
        preprocessor_name: str = "DefaultPreprocessor",
        plans_name: str = PLANS_NAME,
        overwrite_target_spacing: Sequence[float] | None = None,
        suppress_transpose: bool = False,
    ) -> None:
        super().__init__(
            dataset_name_or_id,
            gpu_memory_target_in_gb,
            preprocessor_name,
            plans_name,
            overwrite_target_spacing,
            suppress_transpose,
        )
        self.features_per_stage = nnUNetTrainerPCTNet.default_features
        self._estimates: dict[str, int] = {}

    @property
    def budget(self) -> float:
        """Bytes that the estimate may come to."""
        return self.UNet_vram_target_GB * GIB * (1 - HEADROOM)

    @property
    def num_input_channels(self) -> int:
        """Channels of the images."""
        return len(self.dataset_json.get("channel_names", self.dataset_json.get("modality")))

    @property
    def num_classes(self) -> int:
        """Outputs of a head: labels, or regions."""
        return LabelManager(
            self.dataset_json["labels"], self.dataset_json.get("regions_class_order")
        ).num_segmentation_heads

    def network_arguments(self, strides: list[list[int]]) -> dict[str, Any]:
        """Returns all arguments of the network but channels and classes, so that no later default changes it."""
        parameters = inspect.signature(PCTNet).parameters.values()
        defaults = {p.name: p.default for p in parameters if p.default is not p.empty and p.name != "deep_supervision"}
        heads = default_num_heads(self.features_per_stage)
        planned = {"features_per_stage": self.features_per_stage, "strides": strides, "num_heads": heads}
        return json.loads(json.dumps(defaults | planned))  # lists for tuples

    def estimate(self, patch_size: Size3, strides: list[list[int]], batch_size: int) -> int:
        """Returns the peak memory of a training step in bytes (half precision, Adam), from a trace of it."""
        key = str((patch_size, strides, batch_size))
        if key not in self._estimates:
            arguments = self.network_arguments(strides)
            self._estimates[key] = training_memory(
                lambda: PCTNet(self.num_input_channels, self.num_classes, **arguments),
                self.num_input_channels,
                patch_size,
                batch_size,
            )
        return self._estimates[key]

    def prediction(self, patch_size: Size3, strides: list[list[int]], batch_size: int) -> float:
        """Returns about what `estimate` does, from the line through the traces of two cubes."""
        edges, batch = REFERENCE_EDGES, self.UNet_min_batch_size
        low, high = (self.estimate((edge, edge, edge), strides, batch) for edge in edges)
        voxels = [batch * edge**3 for edge in edges]
        slope = (high - low) / (voxels[1] - voxels[0])
        return low + slope * (batch_size * math.prod(patch_size) - voxels[0])

    def fits(self, patch_size: Size3, strides: list[list[int]], batch_size: int) -> bool:
        """Returns whether a training step fits the budget; traces it only where that is likely."""
        if self.prediction(patch_size, strides, batch_size) > self.budget:
            return False
        return self.estimate(patch_size, strides, batch_size) <= self.budget

    def choose_patch(self, spacing: Sequence[float], median_shape: Sequence[float]) -> tuple[Size3, list[list[int]]]:
        """Returns the largest of `patch_candidates` that fits with nnU-Net's smallest batch, and its strides.

        Raises:
            MisfmError: None fits.
        """
        *larger, smallest = patch_candidates(spacing, median_shape)
        batch_size = self.UNet_min_batch_size
        chosen = next((candidate for candidate in larger if self.fits(*candidate, batch_size)), smallest)
        needed = self.estimate(*chosen, batch_size)
        if needed > self.budget:
            raise MisfmError(
                f"expected a GPU of at least {math.ceil(10 * needed / GIB / (1 - HEADROOM)) / 10:g} GB for "
                f"{self.dataset_name} (smallest patch {times(smallest[0])}, batch {batch_size}), got "
                f"{self.UNet_vram_target_GB:g}: raise --gpu-memory-gb."
            )
        return chosen

    def get_plans_for_configuration(
        self,
        spacing: Any,
        median_shape: Any,
        data_identifier: str,
        approximate_n_voxels_dataset: float,
        _cache: dict[str, Any],
    ) -> dict[str, Any]:
        """Returns nnU-Net's plan of a 3D configuration with PCT-Net, and with a patch and a batch that fit it."""
        if len(spacing) == 2:  # nnU-Net always asks for one; save_plans drops it
            return {}
        plan = super().get_plans_for_configuration(
            spacing, median_shape, data_identifier, approximate_n_voxels_dataset, _cache
        )
        patch_size, strides = self.choose_patch(spacing, median_shape)
        # nnU-Net's rule: a batch holds no more than this share of the dataset
        share = self.max_dataset_covered * approximate_n_voxels_dataset / math.prod(patch_size)
        batch_size = self.UNet_min_batch_size
        while batch_size < round(share) and self.prediction(patch_size, strides, batch_size + 1) <= self.budget:
            batch_size += 1
        while batch_size > self.UNet_min_batch_size and self.estimate(patch_size, strides, batch_size) > self.budget:
            batch_size -= 1
        architecture = {
            "network_class_name": nnUNetTrainerPCTNet.network_class,
            "arch_kwargs": self.network_arguments(strides),
            "_kw_requires_import": [],
        }
        return {**plan, "patch_size": patch_size, "batch_size": batch_size, "architecture": architecture}

    @staticmethod
    def static_estimate_VRAM_usage(*arguments: Any, **options: Any) -> int:  # noqa: N802 - nnU-Net's name
        """Returns a size that fits any memory: nnU-Net's own network is not planned."""
        return 1

    def plan_experiment(self) -> dict[str, Any]:
        """Plans as nnU-Net does.

        Raises:
            MisfmError: The images are 2D.
        """
        target, fingerprint = self.determine_fullres_target_spacing(), self.dataset_fingerprint
        sizes = zip(fingerprint["shapes_after_crop"], fingerprint["spacings"], strict=True)
        median_shape = np.median([compute_new_shape(shape, spacing, target) for shape, spacing in sizes], 0)
        if median_shape.min() < 2:
            raise MisfmError(
                f"PCT-Net is a 3D network, expected 3D images, got a median image of {times(median_shape)} voxels in "
                f"{self.dataset_name}: plan it with nnUNetv2_plan_experiment."
            )
        return super().plan_experiment()

    def save_plans(self, plans: dict[str, Any]) -> None:
        """Writes the plans without nnU-Net's 2D configuration.

        A configuration whose preprocessed cases are those of nnU-Net's default plans shares their folder. Others, and
        all where there are no default plans, get a folder that bears the name of these plans, so that no other plans
        write other cases into it.

        Raises:
            MisfmError: nnU-Net's default plans are no JSON.
        """
        del plans["configurations"]["2d"]
        recursive_fix_for_json_export(plans)
        default_file = Path(str(nnUNet_preprocessed)) / self.dataset_name / f"{DEFAULT_PLANS_NAME}.json"
        default = read_json(default_file) if default_file.is_file() else {"configurations": {}}
        for name, configuration in plans["configurations"].items():
            theirs = default["configurations"].get(name, {})
            if _same(plans, default, _PREPROCESSING_OF_PLANS) and _same(configuration, theirs, PREPROCESSING_KEYS):
                configuration["data_identifier"] = theirs["data_identifier"]
        super().save_plans(plans)


def _same(ours: dict[str, Any], theirs: dict[str, Any], keys: Sequence[str]) -> bool:
    """Returns whether plans or configurations agree in some keys, tuples counting as lists."""
    return all(key in theirs and json.loads(json.dumps(ours[key])) == theirs[key] for key in keys)
