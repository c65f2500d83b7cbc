"""What all pretraining shares: unlabelled crops in, a task made from each batch on the device, no label anywhere.

A method is one file: a `MethodRecipe`, a pure function `make_task` of volumes on their device, and a subclass of
`PretextTrainer` that names both. Hooks of nnU-Net that are replaced here: `get_dataloaders` (no labels, batches in a
fixed order, validation with fixed seeds), `on_validation_epoch_start` (the same validation every epoch),
`build_network_architecture` (the task's outputs), `perform_actual_validation` (nothing to predict), and in the
constructor the batch size and the label manager (the task's own classes). A step's batch is augmented and made a task
of on the device, in `prepare_batch`.
"""

from collections.abc import Callable
from copy import copy
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn
from torch.nn.functional import interpolate

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.augmentation.augment import augment
from nnunetv2_misfm.trainers.augmentation.crops import Crops
from nnunetv2_misfm.trainers.augmentation.distribution import flips, nnunet_augmentation
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.batch_stream import BatchStream
from nnunetv2_misfm.trainers.dimension import require_3d
from nnunetv2_misfm.trainers.pretext_picture import samples_of, write_picture
from nnunetv2_misfm.trainers.recipe import MethodRecipe, Recipe
from nnunetv2_misfm.trainers.unlabelled_batches import UnlabelledBatches
from nnunetv2_misfm.weights.checkpoint import raise_death_of_worker

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
        optimizer="adam",
        initial_lr=1e-3,
        weight_decay=1e-5,
        lr_schedule="halving",
        augmentation="flips",
        mixed_precision="auto",
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
        """Seeds as usual; the generator of augmentation and task follows PyTorch's seed."""
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
        """Returns the streams of batches to train on and to validate with, the latter from half as many workers.

        Raises:
            MisfmError: Fewer than two cases to train on.
        """
        rotation, in_plane, crop_size, mirror_axes = self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        patch_size = self.configuration_manager.patch_size
        masked = self.configuration_manager.use_mask_for_norm
        augmented: dict[str, Any]
        if self.recipe.augmentation_on == "workers":
            transforms = self.get_training_transforms(
                patch_size, rotation, None, mirror_axes, in_plane, use_mask_for_norm=masked
            )
            augmented = {"transforms": transforms}
        elif self.recipe.augmentation == "nnunet":
            augmented = {"augmentation": nnunet_augmentation(rotation, in_plane, mirror_axes, masked)}
        else:
            augmented = {"augmentation": flips(mirror_axes)}
        dataset_tr, dataset_val = self.get_tr_and_val_datasets()
        if len(dataset_tr.identifiers) < MINIMUM_CASES:
            raise MisfmError(
                f"{type(self).__name__} expected at least {MINIMUM_CASES} cases to train on, got "
                f"{len(dataset_tr.identifiers)} in fold {self.fold} of {self.preprocessed_dataset_folder}; add scans."
            )
        if len(dataset_val.identifiers) < MINIMUM_CASES:
            self.print_to_log_file("Fewer than two validation cases: validating on the training cases.")
            dataset_val = dataset_tr
        saved = {"data_seed": np.random.randint(2**31), "position": 0, **(self.saved_run_state or {})}
        self.data_seed = saved["data_seed"]
        training = self._batches(dataset_tr, crop_size, (self.data_seed, self.local_rank), **augmented)
        validation = self._batches(dataset_val, patch_size, (VALIDATION_SEED, self.local_rank))
        num_workers, pin_memory = get_allowed_n_proc_DA(), self.device.type == "cuda"
        num_for_validation = -(-num_workers // 2)  # nnU-Net's share
        return (
            BatchStream(training, num_workers, pin_memory, saved["position"]),
            BatchStream(validation, num_for_validation, pin_memory),
        )

    @staticmethod
    def labels_are_body_masks(dataset_json: dict[str, Any]) -> bool:
        """Returns whether a dataset declares that its labels mark the body, and were made without annotation."""
        return dataset_json.get("misfm", {}).get("labels") == "body_mask"

    def _batches(self, dataset: Any, crop_size: Any, seed: tuple[int, int], **augmented: Any) -> UnlabelledBatches:
        return UnlabelledBatches(
            dataset,
            self.batch_size,
            crop_size,
            self.configuration_manager.patch_size,
            self.labels_are_body_masks(self.dataset_json),
            seed,
            **augmented,
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

    def prepare_batch(self, batch: dict[str, Any], training: bool) -> dict[str, Any]:
        """Returns a batch's task, made on the device; crops for training are augmented there before."""
        batch = {name: self._patches(value) if isinstance(value, Crops) else value for name, value in batch.items()}
        return self.pose_task(batch, self.task_generator if training else self.validation_generator)

    def _patches(self, crops: Crops) -> torch.Tensor:
        """Returns augmented patches [B, C, D, H, W] on the device."""
        augmentation = self.dataloader_train.batches.augmentation
        patch_size = self.configuration_manager.patch_size
        return augment(crops.to(self.device), patch_size, augmentation, self.task_generator)

    def on_validation_epoch_start(self) -> None:
        """Starts every validation with the same crops and tasks."""
        super().on_validation_epoch_start()
        if self.dataloader_val.position > 0:
            self.dataloader_val.seek(0)
        self.validation_generator.manual_seed(VALIDATION_SEED + self.local_rank)

    def on_validation_epoch_end(self, val_outputs: list[dict[str, Any]]) -> None:
        """Ends a validation; its workers already make the first batches of the next."""
        super().on_validation_epoch_end(val_outputs)
        self.dataloader_val.seek(0)

    def end_workers(self) -> None:
        """Ends the processes that make batches."""
        for stream in (self.dataloader_train, self.dataloader_val):
            stream.close()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Says that there is nothing to predict: a pretext network segments nothing."""
        self.print_to_log_file("Pretraining ends without a sliding-window validation: there is nothing to segment.")

    # ------------------------------------------------------------------ pictures of the answers

    def on_epoch_end(self) -> None:
        """Ends an epoch as usual, now and then with a picture of what the network answers."""
        every, number = self.recipe.picture_every_epochs, self.current_epoch + 1
        if self.local_rank == 0 and every > 0 and number % every == 0:
            self.draw_answers(Path(self.output_folder) / f"pretext_epoch_{number:05d}.png")
        super().on_epoch_end()

    def draw_answers(self, output: Path) -> None:
        """Writes a picture of the same crops and tasks at every call, with the network's answers; logs a failure."""
        shown = copy(self.dataloader_val.batches)
        shown.batch_size = MINIMUM_CASES
        self.bare_network.eval()
        self.set_deep_supervision_enabled(False)
        try:
            samples = samples_of(
                type(self),
                self.method_recipe,
                shown[0],
                torch.Generator().manual_seed(VALIDATION_SEED),
                shown.data,
                self.plans_manager.transpose_forward,
                self.configuration_manager.spacing,
                self.bare_network,
            )
            write_picture(samples, type(self), self.method_recipe, output)
        except (OSError, RuntimeError, MisfmError) as error:  # a full disk or GPU, or a case that cannot be read
            raise_death_of_worker(error)
            self.print_to_log_file(f"WARNING: {output} could not be drawn ({error}).")
        finally:
            self.set_deep_supervision_enabled(self.enable_deep_supervision)

    # ------------------------------------------------------------------ resume

    def run_state(self) -> dict[str, Any]:
        """Returns what this rank needs to go on: also the place in the order of the data, and the task's generator."""
        state = {**super().run_state(), "task_generator": self.task_generator.get_state()}
        if self.dataloader_train is not None:
            state |= {"data_seed": self.data_seed, "position": self.dataloader_train.position}
        return state

    def set_run_state(self, state: dict[str, Any]) -> None:
        """Puts this rank where `run_state` was taken (the data were when they were opened)."""
        super().set_run_state(state)
        self.task_generator.set_state(state["task_generator"])
