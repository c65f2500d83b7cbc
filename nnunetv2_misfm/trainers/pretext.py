"""What all pretraining shares: unlabelled crops in, a task made from each batch on the device, no label anywhere.

A method is one file: a `MethodRecipe`, a pure function `make_task` of volumes on their device, and a subclass of
`PretextTrainer` that names both. Hooks of nnU-Net that are replaced here: `get_dataloaders` (no labels, validation
with fixed seeds), `train_step` / `validation_step` (pose the task, then nnU-Net's own step),
`on_validation_epoch_start` (the same validation every epoch), `build_network_architecture` (the task's outputs),
`perform_actual_validation` (nothing to predict), and in the constructor the batch size and the label manager (the
task's own classes).
"""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.functional import interpolate

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.dimension import require_3d
from nnunetv2_misfm.trainers.recipe import MethodRecipe, Recipe
from nnunetv2_misfm.trainers.unlabelled_loader import UnlabelledLoader

# MIS-FM's pretraining (arXiv:2306.16925); a configuration that names its own batch_size wins
BATCH_SIZE = 4
# Every epoch validates on the crops and tasks of this seed, so that curves compare (ours)
VALIDATION_SEED = 20230630
# A task that mixes volumes needs two cases
MINIMUM_CASES = 2


class PretextTrainer(MisfmTrainer):
    """Base of the `...Pretrain` trainers.

    The recipe's defaults are MIS-FM's: Adam 1e-3, weight decay 1e-5, halved every fifth of the run, crops and flips
    only (nnU-Net's intensity augmentation before the task hides what Volume Fusion asks for: an option).

    Attributes:
        make_task: The method itself: (volumes float [B, C, D, H, W], recipe, generator on the CPU) -> network input of
            the same shape and target [B, outputs or 1, D, H, W], on the volumes' device.
    """

    recipe_defaults: ClassVar[Recipe] = Recipe(
        optimizer="adam", initial_lr=1e-3, weight_decay=1e-5, lr_schedule="halving", augmentation="flips"
    )
    method_recipe: MethodRecipe
    make_task: ClassVar[Callable[..., tuple[torch.Tensor, torch.Tensor]]]

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this very signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        entries = self.plans_manager.plans["configurations"]
        if not any("batch_size" in entries[name] for name in self.lineage()[:-1]):  # the last one is nnU-Net's plan
            self.configuration_manager.configuration["batch_size"] = BATCH_SIZE  # this run's own resolved copy
        self.label_manager = self.task_label_manager(self.plans_manager, self.method_recipe)
        self.task_generator = torch.Generator()
        self.validation_generator = torch.Generator()

    def seed_everything(self) -> None:
        """Seeds as usual; the task's generator follows PyTorch's seed."""
        super().seed_everything()
        self.task_generator.manual_seed(torch.initial_seed() % 2**63)

    @classmethod
    def check_configuration(cls, configuration_manager: ConfigurationManager) -> None:
        """Raises where a configuration cannot be pretrained.

        Raises:
            NotImplementedError: A 2D configuration.
            MisfmError: A cascade's second stage, or a faulty block.
        """
        super().check_configuration(configuration_manager)
        require_3d(configuration_manager, cls.__name__)
        if configuration_manager.previous_stage_name is not None:
            raise MisfmError(
                f"{cls.__name__} expected a configuration without a previous stage, got a cascade, whose input holds "
                "labels; pretrain on 3d_fullres and fine-tune the cascade from it."
            )

    # ------------------------------------------------------------------ what a method defines

    @classmethod
    def num_outputs(cls, recipe: MethodRecipe, num_input_channels: int) -> int:
        """Returns the number of output channels that the task needs: one per class, unless a method says otherwise."""
        return cls.num_task_classes(recipe)

    @classmethod
    def num_task_classes(cls, recipe: MethodRecipe) -> int:
        """Returns the number of classes of a task that is a segmentation, 1 for any other."""
        return 1

    def other_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns what `make_task` gets by name from a batch, beside its volumes."""
        return {}

    @staticmethod
    def resize_target(target: torch.Tensor, size: list[int]) -> torch.Tensor:
        """Returns a target [B, 1, D, H, W] for a coarser head, resized as nnU-Net resizes labels."""
        return interpolate(target.float(), size, mode="nearest-exact").to(target.dtype)

    # ------------------------------------------------------------------ pictures of the task

    @classmethod
    def preview_sources(cls, volumes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns what a batch's inputs are made of, by name: float [B, C, D, H, W] each, as in `make_task`."""
        return {"volume": volumes}

    @classmethod
    def preview_caption(cls, recipe: MethodRecipe) -> str:
        """Returns what the network is to answer, for the legend of a picture."""
        if cls.num_task_classes(recipe) > 1:
            return "level of a voxel, which the network is to tell from the input"
        return "from the input the network is to restore the target"

    # ------------------------------------------------------------------ network and loss

    @property
    def num_network_outputs(self) -> int:
        """Number of the network's output channels."""
        return self.num_outputs(self.method_recipe, self.num_input_channels)

    @classmethod
    def task_label_manager(cls, plans_manager: PlansManager, recipe: MethodRecipe) -> Any:
        """Returns a label manager of the task's classes; the dataset's regions and ignore label have no say here."""
        names = ["background", *(f"level_{i}" for i in range(1, cls.num_task_classes(recipe)))]
        return plans_manager.label_manager_class({name: i for i, name in enumerate(names)}, None)

    @classmethod
    def build_network_architecture(
        cls,
        plans_manager: PlansManager,
        configuration_manager: ConfigurationManager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        """Returns the network with as many outputs as the task has, whatever labels the dataset has."""
        _, method_recipe = cls.read_recipes(configuration_manager)
        assert method_recipe is not None
        heads = cls.num_outputs(method_recipe, num_input_channels)
        return super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, heads, enable_deep_supervision
        )

    # ------------------------------------------------------------------ data

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Returns training batches from nnU-Net's data workers and validation batches made in this process.

        Raises:
            MisfmError: Fewer than two cases to train on.
        """
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        patch_size = self.configuration_manager.patch_size
        transforms = self.get_training_transforms(patch_size, rotation, None, mirror_axes, dummy_2d)
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        if len(dataset_tr.identifiers) < MINIMUM_CASES:
            raise MisfmError(
                f"{type(self).__name__} expected at least {MINIMUM_CASES} cases to train on, got "
                f"{len(dataset_tr.identifiers)} in fold {self.fold} of {self.preprocessed_dataset_folder}; add scans."
            )
        if len(dataset_val.identifiers) < MINIMUM_CASES:
            self.print_to_log_file("Fewer than two validation cases: validating on the training cases.")
            dataset_val = dataset_tr
        training = self._loader(dataset_tr, initial_patch_size, transforms)
        validation = self._loader(dataset_val, patch_size, None)
        num_workers = get_allowed_n_proc_DA()
        if num_workers == 0:
            return SingleThreadedAugmenter(training, None), validation
        seeds = np.random.randint(2**31, size=num_workers).tolist()
        workers = NonDetMultiThreadedAugmenter(
            training, None, num_workers, num_cached=max(6, num_workers // 2), seeds=seeds,
            pin_memory=self.device.type == "cuda", wait_time=0.002,
        )  # fmt: skip
        next(workers)  # starts them, as nnU-Net does
        return workers, validation

    @staticmethod
    def labels_are_body_masks(dataset_json: dict[str, Any]) -> bool:
        """Returns whether a dataset declares that its labels mark the body, and were made without annotation."""
        return dataset_json.get("misfm", {}).get("labels") == "body_mask"

    def _loader(self, dataset: Any, initial_patch_size: Any, transforms: Any) -> UnlabelledLoader:
        return UnlabelledLoader(
            in_body=self.labels_are_body_masks(self.dataset_json),
            data=dataset,
            batch_size=self.batch_size,
            patch_size=initial_patch_size,
            final_patch_size=self.configuration_manager.patch_size,
            label_manager=self.label_manager,
            transforms=transforms,
        )

    # ------------------------------------------------------------------ training

    def pose_task(self, batch: dict[str, Any], generator: torch.Generator) -> dict[str, Any]:
        """Returns nnU-Net's kind of batch, on the device: `data` is the task's input, `target` what to answer.

        With deep supervision the target is a list, finest first.
        """
        volumes = batch["data"].to(self.device, non_blocking=True)
        task_input, target = self.make_task(volumes, self.method_recipe, generator, **self.other_inputs(batch))
        return {"data": task_input, "target": self._at_all_scales(target), "keys": batch["keys"]}

    def _at_all_scales(self, target: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        scales = self._get_deep_supervision_scales()
        if scales is None:
            return target
        sizes = [[round(n * s) for n, s in zip(target.shape[2:], scale, strict=True)] for scale in scales]
        return [target, *(self.resize_target(target, size) for size in sizes[1:])]

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Takes nnU-Net's training step on the task made from a batch."""
        return super().train_step(self.pose_task(batch, self.task_generator))

    def on_validation_epoch_start(self) -> None:
        """Starts every validation with the same crops and tasks."""
        super().on_validation_epoch_start()
        self.dataloader_val.restart(VALIDATION_SEED + self.local_rank)
        self.validation_generator.manual_seed(VALIDATION_SEED + self.local_rank)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Takes nnU-Net's validation step on the task made from a batch."""
        return super().validation_step(self.pose_task(batch, self.validation_generator))

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Says that there is nothing to predict: a pretext network segments nothing."""
        self.print_to_log_file("Pretraining ends without a sliding-window validation: there is nothing to segment.")
