"""What all trainers of this package share, on top of nnU-Net's `nnUNetTrainer`.

Hooks of nnU-Net 2.8 that are overridden, and what each does instead: `__init__` (reads the `misfm` block),
`initialize` (seeds; wraps for DDP on any device), `build_network_architecture` (a classmethod, so that mixins chain),
`_set_batch_size_and_oversample`, `configure_optimizers` and the two augmentation hooks (follow the recipe), `do_split`
(no silent random fold), `perform_actual_validation` (can be left out). `on_train_start` and the validation's start and
end only add to nnU-Net's. What checkpoints, resume and interruptions take is in resumable.py.
"""

import os
import random
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DistributedDataParallel

from nnunetv2_misfm.citations import NNUNET
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import require_supported_nnunet
from nnunetv2_misfm.trainers.accumulation import accumulated_step
from nnunetv2_misfm.trainers.halving_lr import HalvingLRScheduler
from nnunetv2_misfm.trainers.learning_rate import WarmupLRScheduler, scaled_learning_rate
from nnunetv2_misfm.trainers.metadata import added_keys, data_fingerprint
from nnunetv2_misfm.trainers.precision import autocast_dtype, use_autocast_dtype
from nnunetv2_misfm.trainers.progress import Progress
from nnunetv2_misfm.trainers.recipe import MethodRecipe, Recipe, read_recipes
from nnunetv2_misfm.trainers.resumable import ResumableTrainer
from nnunetv2_misfm.trainers.weight_average import WeightAverage, start_average

# Set to 1, leaves out the prediction of the validation cases that ends a training (no readers, or other test cases)
SKIP_VALIDATION_VARIABLE = "nnUNet_misfm_skip_validation"
# Distance of the seeds of two epochs, above any number of ranks (ours)
SEED_STEP = 10_000
# nnU-Net's cross-validation (nnUNetTrainer.do_split)
NUM_DEFAULT_FOLDS = 5


class MisfmTrainer(ResumableTrainer):
    """nnU-Net's trainer with numbers from the `misfm` block, checkpoints that lose no work, and DDP on any device.

    Attributes:
        recipe_defaults: Common numbers where the block says nothing.
        method: Recipe class of a pretraining trainer's method; None for trainers that learn from labels.
        citations: Papers to cite, recorded in every checkpoint.
    """

    output_folder_base: str
    grad_scaler: Any
    recipe_defaults: ClassVar[Recipe] = Recipe()
    method: ClassVar[type[MethodRecipe] | None] = None
    citations: ClassVar[tuple[str, ...]] = (NNUNET,)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this very signature
    ) -> None:
        require_supported_nnunet()
        for variable in (nnUNet_preprocessed, nnUNet_results):
            if not variable.is_set():
                raise MisfmError(
                    f"expected the environment variable {variable.env_var_name} to name a folder, but it is "
                    "not set: export it (nnU-Net's documentation, setting_up_paths)."
                )
        self.check_configuration(PlansManager(plans).get_configuration(configuration))
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.recipe, self.method_recipe = self.read_recipes(self.configuration_manager)
        if self.is_ddp:  # nnU-Net takes the global rank for the number of the GPU
            launched = {"WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()  # by torchrun, not by nnU-Net's -num_gpus
            index = int(os.environ["LOCAL_RANK"]) if launched else self.local_rank
            use_cuda = "nccl" in dist.get_backend() or device.index is not None  # distributed.py names one
            self.device = torch.device("cuda", index) if use_cuda else torch.device("cpu")
        self.autocast_dtype = autocast_dtype(self.recipe.mixed_precision, self.device)
        if self.autocast_dtype is not torch.float16:  # the only one whose gradients need a scaled loss
            self.grad_scaler = None
        self.apply_recipe()
        self.average: WeightAverage | None = None
        self.progress = Progress()
        self.weights_report: dict[str, Any] | None = None
        self.data_fingerprint: dict[str, Any] | None = None

    @classmethod
    def check_configuration(cls, configuration_manager: ConfigurationManager) -> None:
        """Raises, before anything is written, where this trainer cannot work on a configuration at all."""
        cls.read_recipes(configuration_manager)

    @classmethod
    def read_recipes(cls, configuration_manager: ConfigurationManager) -> tuple[Recipe, MethodRecipe | None]:
        """Returns the common and the method's recipe under a configuration's `misfm` block.

        Raises:
            MisfmError: The block has an unknown key or a wrong value.
        """
        return read_recipes(configuration_manager.configuration.get("misfm"), cls.recipe_defaults, cls.method)

    def apply_recipe(self) -> None:
        """Hands the recipe's numbers to nnU-Net's attributes."""
        self.num_epochs = self.recipe.num_epochs
        self.num_iterations_per_epoch = self.recipe.num_iterations_per_epoch
        self.num_val_iterations_per_epoch = self.recipe.num_val_iterations_per_epoch
        self.initial_lr = self.recipe.initial_lr
        self.weight_decay = self.recipe.weight_decay
        self.save_every = self.recipe.checkpoint_every_epochs
        self.checkpoint_every_minutes = self.recipe.checkpoint_every_minutes
        self.keep_checkpoints = self.recipe.keep_checkpoints

    # ------------------------------------------------------------------ network

    @classmethod
    def network_description(
        cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager
    ) -> dict[str, Any]:
        """Returns the network as plain data: `class` (dotted path), `kwargs`, and which of them are dotted paths."""
        return {
            "class": configuration_manager.network_arch_class_name,
            "kwargs": configuration_manager.network_arch_init_kwargs,
            "kwargs_to_import": list(configuration_manager.network_arch_init_kwargs_req_import),
        }

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Returns the network of `network_description`; nnU-Net calls this on the class at prediction.

        Args:
            plans_manager: The plans.
            configuration_manager: The resolved configuration, whose `misfm` block may hold widths.
            num_input_channels: Channels of the input.
            num_output_channels: Channels of the output.
            enable_deep_supervision: Whether the network returns a list of outputs, finest first.
        """
        description = cls.network_description(plans_manager, configuration_manager)
        return get_network_from_plans(
            description["class"],
            description["kwargs"],
            description["kwargs_to_import"],
            num_input_channels,
            num_output_channels,
            allow_init=True,
            deep_supervision=enable_deep_supervision,
        )

    def lineage(self) -> list[str]:
        """Returns this configuration and those that it inherits from, the planned one last."""
        configurations = self.plans_manager.plans["configurations"]
        names = [self.configuration_name]
        while "inherits_from" in configurations[names[-1]]:
            names.append(configurations[names[-1]]["inherits_from"])
        return names

    @property
    def num_label_channels(self) -> int:
        """Number of trailing input channels that hold the previous stage's labels (0 but for a cascade)."""
        return len(self.label_manager.foreground_labels) if self.is_cascaded else 0

    @property
    def num_network_outputs(self) -> int:
        """Number of the network's output channels."""
        return self.label_manager.num_segmentation_heads

    @property
    def bare_network(self) -> nn.Module:
        """The network without the wrappers of DDP and torch.compile."""
        network = self.network.module if isinstance(self.network, DistributedDataParallel) else self.network
        return network._orig_mod if isinstance(network, OptimizedModule) else network

    def initialize(self) -> None:
        """Seeds, then lets nnU-Net build network, optimiser and loss; replaces only its wrapping for DDP."""
        self.seed_everything()
        if self.autocast_dtype is not None:
            use_autocast_dtype(self.autocast_dtype)
        self._scale_learning_rate()
        is_ddp, self.is_ddp = self.is_ddp, False  # nnU-Net's own wrapping supposes CUDA and equates rank and GPU
        super().initialize()
        if is_ddp:
            self.is_ddp = True
            self._set_batch_size_and_oversample()
            self.network = self._wrap_for_ddp(self.network)
            self.loss = self._build_loss()

    def _scale_learning_rate(self) -> None:
        size, recipe = self.configuration_manager.batch_size, self.recipe
        num_shares = dist.get_world_size() if self.is_ddp and recipe.batch_per_gpu else 1
        self.samples_per_step = size * num_shares * recipe.accumulate_steps
        self.initial_lr = scaled_learning_rate(recipe.initial_lr, recipe.lr_scaling, self.samples_per_step, size)
        if self.samples_per_step != size:
            self.print_to_log_file(
                f"{self.samples_per_step} samples per step for a batch size of {size}; initial learning rate "
                f"{self.initial_lr:g} (lr_scaling: {recipe.lr_scaling})."
            )

    def _set_batch_size_and_oversample(self) -> None:
        """Splits the batch among the ranks as nnU-Net does, unless the recipe gives every rank a whole one."""
        if self.recipe.batch_per_gpu:
            self.batch_size = self.configuration_manager.batch_size
        else:
            super()._set_batch_size_and_oversample()

    def seed_everything(self) -> None:
        """Seeds Python, NumPy and PyTorch where the recipe has a seed: differently per rank and epoch of (re)start."""
        if self.recipe.seed is None:
            return
        seed = self.recipe.seed + self.local_rank + SEED_STEP * self.current_epoch
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def _wrap_for_ddp(self, network: nn.Module) -> DistributedDataParallel:
        if self.device.type != "cuda":  # SyncBatchNorm exists for CUDA only
            return DistributedDataParallel(network)
        return DistributedDataParallel(nn.SyncBatchNorm.convert_sync_batchnorm(network), device_ids=[self.device.index])

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Returns optimiser and learning-rate schedule of the recipe (nnU-Net has SGD and poly only)."""
        optimizer, scheduler = super().configure_optimizers()
        if self.recipe.optimizer != "sgd":
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.recipe.optimizer]
            optimizer = kind(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
            scheduler = PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)
        if self.recipe.lr_schedule == "halving":
            scheduler = HalvingLRScheduler(optimizer, self.initial_lr, self.num_epochs)
        if self.recipe.warmup_epochs > 0:
            scheduler = WarmupLRScheduler(scheduler, self.recipe.warmup_epochs)
        return optimizer, scheduler

    # ------------------------------------------------------------------ data

    def do_split(self) -> tuple[list[str], list[str]]:
        """Returns nnU-Net's split, but refuses a fold past the end instead of drawing a random one.

        Raises:
            MisfmError: The fold is not in splits_final.json, or there are too few cases to make that file.
        """
        splits_file = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if self.fold != "all":
            num_splits = len(load_json(str(splits_file))) if splits_file.is_file() else NUM_DEFAULT_FOLDS
            if self.fold >= num_splits:
                raise MisfmError(
                    f"expected a fold below {num_splits} (the splits in {splits_file}), got {self.fold}; "
                    "append the split there or choose another fold."
                )
            if not splits_file.is_file():
                folder = self.preprocessed_dataset_folder
                num_cases = len(infer_dataset_class(folder).get_identifiers(folder))
                if num_cases < NUM_DEFAULT_FOLDS:
                    raise MisfmError(
                        f"expected at least {NUM_DEFAULT_FOLDS} cases for nnU-Net's cross-validation, got {num_cases}; "
                        "use the fold 'all' or write splits_final.json."
                    )
        return super().do_split()

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 - nnU-Net's name
        """Returns nnU-Net's settings; without rotation the crop needs no margin, so it is the patch itself."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        if self.recipe.augmentation == "flips":
            initial_patch_size = np.array(self.configuration_manager.patch_size)
        return rotation, dummy_2d, initial_patch_size, mirror_axes

    def get_training_transforms(
        self,
        patch_size: Any,
        rotation_for_DA: Any,  # noqa: N803 - nnU-Net's name
        deep_supervision_scales: list | None,
        mirror_axes: tuple[int, ...],
        do_dummy_2d_data_aug: bool,
        **labels: Any,
    ) -> BasicTransform:
        """Returns nnU-Net's augmentation, or for `flips` mirroring and nnU-Net's handling of labels alone."""
        if self.recipe.augmentation == "nnunet":
            return super().get_training_transforms(
                patch_size, rotation_for_DA, deep_supervision_scales, mirror_axes, do_dummy_2d_data_aug, **labels
            )
        labels.pop("use_mask_for_norm", None)  # only needed where noise was added outside the mask
        handling = self.get_validation_transforms(deep_supervision_scales, **labels)
        return ComposeTransforms([MirrorTransform(allowed_axes=mirror_axes), handling])

    # ------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        """Starts as nnU-Net does, and notes what the run is made of."""
        if not self.was_initialized:
            self.initialize()
        if self.was_resumed:
            self.seed_everything()  # for what the checkpoint does not hold
        self.average = start_average(self.bare_network, self.recipe.ema_decay, self._saved_state or {})
        if self.is_ddp:  # nnU-Net lets all ranks write a new splits_final.json at once
            if self.local_rank == 0:
                self.do_split()
            dist.barrier()
        folder = self.output_folder_base
        with TemporaryDirectory() as elsewhere:  # nnU-Net lets every rank write plans.json and its companions
            if self.local_rank != 0:
                self.output_folder_base = elsewhere
            super().on_train_start()
        self.output_folder_base = folder
        self._may_fall_back = False
        self.data_fingerprint = data_fingerprint(self)
        self.print_to_log_file(f"Recipe: {self.recipe}" + (f" {self.method_recipe}" if self.method_recipe else ""))

    def optimisation_step(self, batch: dict) -> dict:
        """Takes nnU-Net's training step, or one over several batches; the moving average follows."""
        if self.recipe.accumulate_steps == 1:
            result = super().optimisation_step(batch)
        else:
            more = (next(self.dataloader_train) for _ in range(self.recipe.accumulate_steps - 1))
            result = accumulated_step(self, batch, (self.prepare_batch(other, training=True) for other in more))
        if self.average is not None:
            self.average.update()
        return result

    def train_step(self, batch: dict) -> dict:
        """Takes a training step and tells the log now and then how fast the epoch goes."""
        result = super().train_step(batch)
        self.progress.note(self)
        return result

    def on_train_epoch_start(self) -> None:
        """Starts an epoch as nnU-Net does, and its clock."""
        super().on_train_epoch_start()
        self.progress.start(self)

    def on_validation_epoch_start(self) -> None:
        """Starts the validation of an epoch as nnU-Net does, with the average of the weights where there is one."""
        if self.average is not None:
            self.average.swap()
        super().on_validation_epoch_start()

    def on_validation_epoch_end(self, val_outputs: list[dict]) -> None:
        """Logs the validation; the network trains on with its own weights."""
        self.log_validation(val_outputs)
        if self.average is not None:
            self.average.swap()

    def log_validation(self, val_outputs: list[dict]) -> None:
        """Logs the results of an epoch's validation steps as nnU-Net does."""
        super().on_validation_epoch_end(val_outputs)

    def on_epoch_end(self) -> None:
        """Ends an epoch as nnU-Net does and notes how long its end took."""
        self.progress.end()
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Ends as nnU-Net does; from here on the network holds the average of the weights where there is one."""
        if self.average is not None:
            self.average.swap()
        super().on_train_end()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validates as nnU-Net does at the end of a training, unless the variable above asks to leave it out."""
        if os.environ.get(SKIP_VALIDATION_VARIABLE) == "1":
            self.print_to_log_file(f"Final validation left out: {SKIP_VALIDATION_VARIABLE}=1 is set.")
            return
        super().perform_actual_validation(save_probabilities)

    # ------------------------------------------------------------------ checkpoints

    def added_keys(self) -> dict[str, Any]:
        """Returns what a checkpoint says of itself (metadata.py)."""
        return added_keys(self)

    def read_added_keys(self, checkpoint: dict[str, Any]) -> None:
        """Takes the account of pretrained weights from a checkpoint that is resumed from."""
        self.weights_report = checkpoint.get("misfm_meta", {}).get("pretrained_weights")

    def shared_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Returns the trained weights where a moving average stands for them in the checkpoint."""
        if self.average is None:
            return {}
        checkpoint["network_weights"] = self.average.average()
        return {"raw_weights": self.average.raw(), "num_updates": self.average.num_updates}
