"""Hermes: one universal model over many datasets of nnU-Net, each with labels of its own.

Paper: Gao et al., Training Like a Medical Resident: Context-Prior Learning Toward Universal Medical Image
Segmentation, CVPR 2024, arXiv:2306.02416. The network is architectures/context_prior.py around the plans' own;
`nnUNetv2_misfm universal` joins the datasets.

Hooks of nnU-Net that are overridden, and what each does instead: `build_network_architecture` (puts the priors around
the plans' network; answers for one source at prediction), `get_dataloaders` (draws datasets in balance),
`configure_rotation_dummyDA_mirroring_and_inital_patch_size` (mirroring is done per case, on the device),
`_build_loss`, `validation_step` (per task), `do_split` (a source validates on the universal split),
`perform_actual_validation` (of every source, as nnU-Net does it for one dataset), `load_checkpoint` (a source's model
folder holds weights alone). `save_checkpoint` and `on_epoch_end` only add to nnU-Net's.
"""

import os
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_misfm.architectures.context_prior import Sample
from nnunetv2_misfm.citations import HERMES, NNUNET
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.balanced_loader import balanced_loaders
from nnunetv2_misfm.trainers.base import SKIP_VALIDATION_VARIABLE
from nnunetv2_misfm.trainers.finetune import WEIGHTS_VARIABLE, FinetuneTrainer
from nnunetv2_misfm.trainers.hermes_recipe import HermesRecipe
from nnunetv2_misfm.trainers.partial_label_loss import PartialLabelLoss, counts
from nnunetv2_misfm.trainers.recipe import Recipe, require
from nnunetv2_misfm.trainers.resumable import BEST, FINAL
from nnunetv2_misfm.trainers.source_evaluation import evaluate_sources
from nnunetv2_misfm.trainers.source_models import (
    SourceFiles,
    inference_axes,
    read_source_files,
    require_unchanged,
    write_source_models,
)
from nnunetv2_misfm.trainers.source_validation import validate_sources
from nnunetv2_misfm.trainers.task_labels import contexts, mirrored, task_labels
from nnunetv2_misfm.universe import PLANS_KEY, Source, Universe, dataset_number
from nnunetv2_misfm.weights.checkpoint import network_weights, read_checkpoint
from nnunetv2_misfm.weights.transfer import TransferReport
from nnunetv2_misfm.weights.universal import transfer_to_universal


class nnUNetTrainerHermes(FinetuneTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """One model for all datasets that `nnUNetv2_misfm universal` joined; from scratch, or from any weights that fit.

    One that extends an earlier universal model starts from that one's. Under a source's plans it only predicts and
    validates (`--val`).
    """

    method = HermesRecipe
    recipe_defaults: ClassVar[Recipe] = Recipe(optimizer="adamw", initial_lr=1e-3, weight_decay=1e-5, warmup_epochs=5)
    citations: ClassVar[tuple[str, ...]] = (NNUNET, HERMES)
    pretrain_trainer = ""
    method_recipe: HermesRecipe

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this very signature
    ) -> None:
        self.universe = Universe.from_plans(plans)
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.enable_deep_supervision = False  # Hermes-R has one output
        weights = self.method_recipe.dataset_weights
        expected = f"one per dataset, {', '.join(source.dataset for source in self.universe.sources)}"
        fits = weights is None or len(weights) == len(self.universe.sources)
        require(fits, "hermes.dataset_weights", expected, weights)
        self.needs_weights = self.universe.extends is not None
        self._source_files: dict[str, SourceFiles] | None = None
        self._trained_on: dict[str, SourceFiles] | None = None

    @classmethod
    def check_configuration(cls, configuration_manager: ConfigurationManager) -> None:
        """Raises where a patch leaves a single voxel at the deepest level, which no normalisation can train on.

        Raises:
            MisfmError: Such a patch.
        """
        super().check_configuration(configuration_manager)
        patch = configuration_manager.patch_size
        divisors = np.prod(configuration_manager.pool_op_kernel_sizes, axis=0)
        if np.prod(np.ceil(np.array(patch) / divisors)) < 2:
            raise MisfmError(
                f"{cls.__name__} expected a patch of more than one voxel at the deepest level, got {list(patch)}, "
                f"which the network divides by {divisors.tolist()}: enlarge it."
            )

    @property
    def own_source(self) -> Source | None:
        """The source that this trainer's plans answer for; None for the universal dataset itself."""
        return None if self.universe.source is None else self.universe.named(self.universe.source)

    # ------------------------------------------------------------------ network

    @classmethod
    def network_description(
        cls, plans_manager: PlansManager, configuration_manager: ConfigurationManager
    ) -> dict[str, Any]:
        """Returns the plans' network with the priors around it."""
        bare = super().network_description(plans_manager, configuration_manager)
        num_modalities = len(Universe.from_plans(plans_manager.plans).modalities)
        return {
            "class": "nnunetv2_misfm.architectures.ContextPriorNetwork",
            "kwargs": {"num_modalities": num_modalities, "network": bare},
            "kwargs_to_import": [],
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
        """Returns the network; under a source's plans it answers plain images in the convention of that source.

        Args:
            plans_manager: The plans.
            configuration_manager: The resolved configuration.
            num_input_channels: Channels of the input.
            num_output_channels: Of the dataset, as nnU-Net counts; the pool of tasks has its own size.
            enable_deep_supervision: Must be false.
        """
        universe = Universe.from_plans(plans_manager.plans)
        network: Any = super().build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, len(universe.tasks), enable_deep_supervision
        )
        if universe.source is not None:
            answer_for(network, universe.named(universe.source))
        return network

    def answer_for(self, source: Source | None) -> None:
        """Makes the network answer plain images in the convention of a source; None takes that back."""
        answer_for(self.bare_network, source)

    @property
    def num_network_outputs(self) -> int:
        """Size of the pool of tasks."""
        return len(self.universe.tasks)

    def _do_i_compile(self) -> bool:
        return self.own_source is None and super()._do_i_compile()

    def _build_loss(self) -> nn.Module:
        return PartialLabelLoss(self.method_recipe.modality_loss_weight, across_ranks=self.is_ddp)

    def find_weights(self) -> tuple[Path, str]:
        """Returns the weights that are named, else those of the universal model that this one extends.

        Of that one the same fold counts, since another fold's training cases may be held out here.

        Raises:
            MisfmError: There are none.
        """
        if named := self._named_weights():
            return named
        run = f"{type(self).__name__}__{self.plans_manager.plans_name}"
        folder = Path(str(nnUNet_results)) / str(self.universe.extends)
        found = [folder / f"{run}__{name}" / f"fold_{self.fold}" / FINAL for name in self.lineage()]
        for file in found:
            if file.is_file():
                return file, f"the finished run on {self.universe.extends}, which this one extends"
        raise MisfmError(
            f"{self.universe.dataset} extends {self.universe.extends}: expected its trained weights at {found[0]}, "
            "found none; train it first, or name others with misfm.pretrained_weights in the plans or the variable "
            f"{WEIGHTS_VARIABLE}."
        )

    def _transfer(self, checkpoint: dict[str, Any], weights: dict[str, torch.Tensor]) -> TransferReport:
        plans = (checkpoint.get("init_args") or {}).get("plans", {})
        known = Universe.from_plans(plans) if PLANS_KEY in plans else None
        labels = checkpoint.get("misfm_meta", {}).get("network", {}).get("label_channels", 0)
        return transfer_to_universal(weights, known, self.bare_network, self.universe, self.recipe.transfer, labels)

    def _account_of_flag(self) -> dict[str, Any]:
        """Returns the account of what nnU-Net's flag loaded, which copies a pool's rows by their place.

        Raises:
            MisfmError: The file's tasks or modalities are others, or in another order.
        """
        account = super()._account_of_flag()
        try:
            checkpoint = read_checkpoint(account["file"]) if account["file"] else {}
        except MisfmError:  # nnU-Net reads what is refused here: no universal checkpoint, which would be plain data
            checkpoint = {}
        plans = (checkpoint.get("init_args") or {}).get("plans", {})
        if PLANS_KEY in plans:
            theirs = Universe.from_plans(plans)
            if (theirs.tasks, theirs.modalities) != (self.universe.tasks, self.universe.modalities):
                raise MisfmError(
                    f"-pretrained_weights expected the tasks and modalities of {self.universe.dataset} in the same "
                    f"order, got those of {theirs.dataset}: name the file with misfm.pretrained_weights in the plans "
                    f"or the variable {WEIGHTS_VARIABLE}, which go by names."
                )
        return account

    # ------------------------------------------------------------------ data

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple:  # noqa: N802 - nnU-Net's name
        """Returns nnU-Net's settings without mirroring, which depends on the case (`prepare_batch`)."""
        rotation, dummy_2d, initial_patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = inference_axes(self.own_source) if self.own_source else None
        return rotation, dummy_2d, initial_patch_size, ()

    def do_split(self) -> tuple[list[str], list[str]]:
        """Returns the split; a source's is its part of the universal one, where that is there."""
        source = self.own_source
        splits_file = Path(str(nnUNet_preprocessed)) / self.universe.dataset / "splits_final.json"
        if source is None or self.fold == "all" or not splits_file.is_file():
            return super().do_split()
        split = load_json(str(splits_file))[int(self.fold)]
        train, val = (
            [case.removeprefix(source.prefix) for case in split[part] if self.universe.source_of(case) == source]
            for part in ("train", "val")
        )
        return train, val

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Returns nnU-Net's loaders, with cases drawn as the recipe's balance says.

        Raises:
            MisfmError: The fold holds no case for training, or none for validation.
        """
        return balanced_loaders(self)

    def prepare_batch(self, batch: dict, training: bool) -> dict:
        """Returns the batch with what is asked of each case, and what should be answered, on the device."""
        sources = [self.universe.source_of(case) for case in batch["keys"]]
        image, segmentation = (batch[name].to(self.device, non_blocking=True) for name in ("data", "target"))
        if training:
            image, segmentation = mirrored(image, segmentation, sources)
        context = contexts(sources, self.universe.max_tasks, self.device)
        return {**batch, "data": Sample(image, context), "target": task_labels(segmentation, sources, context)}

    # ------------------------------------------------------------------ training

    @property
    def source_files(self) -> dict[str, SourceFiles]:
        """Plans and dataset.json of every source, as they were when training started or went on.

        Raises:
            MisfmError: They are not there, or not those that the loaded checkpoint was trained on.
        """
        if self._source_files is None:
            files = read_source_files(self.universe, self.plans_manager.plans)
            if self._trained_on is not None:
                require_unchanged(self._trained_on, files)
            self._source_files = files
        return self._source_files

    def added_keys(self) -> dict[str, Any]:
        """Returns what a checkpoint says of itself, the sources' plans and dataset.json among it."""
        added = super().added_keys()
        added["misfm_meta"]["sources"] = {name: files._asdict() for name, files in self.source_files.items()}
        return added

    def read_added_keys(self, checkpoint: dict[str, Any]) -> None:
        """Takes from a checkpoint that is resumed from what its sources were."""
        super().read_added_keys(checkpoint)
        sources = checkpoint.get("misfm_meta", {}).get("sources")
        if sources is not None:
            self._trained_on = {name: SourceFiles(**files) for name, files in sources.items()}

    def on_train_start(self) -> None:
        """Starts as nnU-Net does.

        Raises:
            MisfmError: The plans are a source's, or those of a source are missing or changed.
        """
        if self.own_source is not None:
            number, plans = dataset_number(self.universe.dataset), self.plans_manager.plans_name
            raise MisfmError(
                f"{plans} of {self.own_source.dataset} only answer for a universal model: train "
                f"{self.universe.dataset} with nnUNetv2_train {number} {self.configuration_name} {self.fold} "
                f"-tr {type(self).__name__} -p {plans.removesuffix(f'Of{number}')}."
            )
        _ = self.source_files  # what is wrong with them shows now, not at the end
        super().on_train_start()

    def evaluation_step(self, batch: dict) -> dict:
        """Returns loss and, for each task, the voxels found rightly, wrongly and not at all."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=self.device.type == "cuda"):
            answer = self.network(batch["data"])
            loss = self.loss(answer, batch["target"])
        found = counts(answer, batch["target"], batch["data"].context.labelled, len(self.universe.tasks))
        names = ("tp_hard", "fp_hard", "fn_hard")
        return {
            "loss": loss.cpu().numpy(),
            **{name: voxels.numpy() for name, voxels in zip(names, found, strict=True)},
        }

    def log_validation(self, val_outputs: list[dict]) -> None:
        """Logs as nnU-Net does, a curve per task, and a line per dataset."""
        with np.errstate(invalid="ignore"):  # a task that no crop of the epoch held
            super().log_validation(val_outputs)
        dice = np.array(self.logger.get_value("dice_per_class_or_region", step=-1))
        for source in self.universe.sources:
            mine = dice[list(source.tasks)]
            if not np.isnan(mine).all():
                self.print_to_log_file(f"Pseudo dice of {source.dataset}: {np.nanmean(mine):.4f}")

    def on_epoch_end(self) -> None:
        """Ends an epoch as nnU-Net does; now and then whole cases of each dataset are evaluated before."""
        every = self.method_recipe.evaluate_every_epochs
        if every and (self.current_epoch + 1) % every == 0:
            evaluate_sources(self)
            empty_cache(self.device)
        super().on_epoch_end()

    def ends_early(self) -> bool:
        """Whether a signal has asked any rank to end the run."""
        return self._on_any_rank(self.interruption.requested is not None)[0]

    def save_checkpoint(self, filename: str) -> None:
        """Writes the checkpoint; with the final one, a model folder for each source."""
        super().save_checkpoint(filename)
        if Path(filename).name == FINAL and self.local_rank == 0 and not self.disable_checkpointing:
            write_source_models(self, (FINAL, BEST))

    def load_checkpoint(self, filename: str) -> None:
        """Resumes; of a source's model folder only weights are there to be loaded.

        Raises:
            MisfmError: The datasets were joined anew, in another way, since the checkpoint was written.
        """
        if self.own_source is None:
            try:
                trained = Universe.from_plans(read_checkpoint(filename)["init_args"]["plans"])
            except MisfmError:
                trained = self.universe  # an unreadable file is told, or passed over, by what reads it next
            if (trained.tasks, trained.modalities) != (self.universe.tasks, self.universe.modalities):
                raise MisfmError(
                    f"{filename} was trained on the tasks {', '.join(trained.tasks)}; expected those of "
                    f"{self.universe.dataset}, {', '.join(self.universe.tasks)}: join the datasets as they were, or "
                    "train anew without --c."
                )
            super().load_checkpoint(filename)
            return
        if not self.was_initialized:
            self.initialize()
        self.bare_network.load_state_dict(network_weights(read_checkpoint(filename), filename))
        self.inference_allowed_mirroring_axes = inference_axes(self.own_source)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validates every source into its own model folder, as nnU-Net would validate a model of that dataset."""
        if self.own_source is None and os.environ.get(SKIP_VALIDATION_VARIABLE) != "1":
            validate_sources(self, save_probabilities)
        else:
            super().perform_actual_validation(save_probabilities)

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        """Does nothing: there is one output."""


def answer_for(network: Any, source: Source | None) -> None:
    """Makes a network answer plain images in the convention of a source; None takes that back."""
    if source is None:
        network.answer_for(None)
    else:
        network.answer_for(source.tasks, source.modality, background=not source.has_regions)
