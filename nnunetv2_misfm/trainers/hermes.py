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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import distributed as dist
from torch import nn

from nnunetv2_misfm.architectures.context_prior import Sample
from nnunetv2_misfm.citations import HERMES, NNUNET
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.balanced_loader import case_probabilities, make_loader, num_worker_processes
from nnunetv2_misfm.trainers.finetune import WEIGHTS_VARIABLE, FinetuneTrainer
from nnunetv2_misfm.trainers.partial_label_loss import PartialLabelLoss, counts
from nnunetv2_misfm.trainers.recipe import MethodRecipe, Recipe, require
from nnunetv2_misfm.trainers.resumable import BEST, FINAL
from nnunetv2_misfm.trainers.source_evaluation import chosen_cases, score_cases, write_scores
from nnunetv2_misfm.trainers.source_models import inference_axes, source_files, write_source_models
from nnunetv2_misfm.trainers.task_labels import contexts, mirrored, task_labels
from nnunetv2_misfm.universe import PLANS_KEY, Source, Universe
from nnunetv2_misfm.weights.checkpoint import network_weights, read_checkpoint
from nnunetv2_misfm.weights.transfer import TransferReport
from nnunetv2_misfm.weights.universal import transfer_to_universal


@dataclass(frozen=True)
class HermesRecipe(MethodRecipe):
    """Numbers of a universal training.

    Attributes:
        modality_loss_weight: Of the modality's cross-entropy. The paper's: 0.01.
        balance: Datasets of n training cases are drawn in proportion to n ** balance. Ours: the square root.
        dataset_weights: Weights of the datasets in a draw instead, in the order in which they were joined.
        evaluate_every_epochs: Epochs between two evaluations of whole validation cases per dataset; 0 leaves them out.
            The authors': 25 of 200 epochs; ours, for nnU-Net's 1000: 50.
        evaluation_cases: Validation cases of each dataset that these look at. Ours.
    """

    method: ClassVar[str] = "hermes"
    modality_loss_weight: float = 0.01
    balance: float = 0.5
    dataset_weights: tuple[float, ...] | None = None
    evaluate_every_epochs: int = 50
    evaluation_cases: int = 5

    def __post_init__(self) -> None:
        for key in ("modality_loss_weight", "evaluate_every_epochs"):
            require(getattr(self, key) >= 0, f"hermes.{key}", "a number of at least 0", getattr(self, key))
        require(0 <= self.balance <= 1, "hermes.balance", "from 0 to 1", self.balance)
        require(self.evaluation_cases >= 1, "hermes.evaluation_cases", "at least 1", self.evaluation_cases)
        weights = self.dataset_weights
        require(weights is None or min(weights, default=0) > 0, "hermes.dataset_weights", "positive numbers", weights)


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
            _answer_for(network, universe.named(universe.source))
        return network

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
        plans = (read_checkpoint(account["file"]).get("init_args") or {}).get("plans", {}) if account["file"] else {}
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
        """Returns nnU-Net's loaders, with cases drawn as the recipe's balance says."""
        rotation, dummy_2d, initial_patch_size, mirror_axes = (
            self.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        )
        patch_size = self.configuration_manager.patch_size
        transforms = (
            self.get_training_transforms(
                patch_size, rotation, None, mirror_axes, dummy_2d,
                use_mask_for_norm=self.configuration_manager.use_mask_for_norm,
            ),
            self.get_validation_transforms(None),
        )  # fmt: skip
        recipe = self.method_recipe
        loaders = []
        for dataset, size, transform, processes in zip(
            self.get_tr_and_val_datasets(), (initial_patch_size, patch_size), transforms, num_worker_processes(),
            strict=True,
        ):  # fmt: skip
            odds = case_probabilities(dataset.identifiers, self.universe, recipe.balance, recipe.dataset_weights)
            loader = make_loader(self, dataset, size, transform, odds, processes)
            next(loader)  # starts its processes
            loaders.append(loader)
        return loaders[0], loaders[1]

    def prepare_batch(self, batch: dict, training: bool) -> dict:
        """Returns the batch with what is asked of each case, and what should be answered, on the device."""
        sources = [self.universe.source_of(case) for case in batch["keys"]]
        image, segmentation = (batch[name].to(self.device, non_blocking=True) for name in ("data", "target"))
        if training:
            image, segmentation = mirrored(image, segmentation, sources)
        num_slots = self.universe.max_tasks
        return {
            **batch,
            "data": Sample(image, contexts(sources, num_slots, self.device)),
            "target": task_labels(segmentation, sources, num_slots),
        }

    # ------------------------------------------------------------------ training

    def on_train_start(self) -> None:
        """Starts as nnU-Net does.

        Raises:
            MisfmError: The plans are a source's.
        """
        if self.own_source is not None:
            number, name = self.universe.dataset.removeprefix("Dataset").split("_", 1)
            plans = self.plans_manager.plans_name.removesuffix(f"Of{int(number)}")
            raise MisfmError(
                f"{self.plans_manager.plans_name} of {self.own_source.dataset} only answer for a universal model: "
                f"train {name} with nnUNetv2_train {int(number)} {self.configuration_name} {self.fold} "
                f"-tr {type(self).__name__} -p {plans}."
            )
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
            self._evaluate_sources()
        super().on_epoch_end()

    def _evaluate_sources(self) -> None:
        cases = chosen_cases(self.do_split()[1], self.universe, self.method_recipe.evaluation_cases)
        num_ranks = dist.get_world_size() if self.is_ddp else 1
        mine = cases[self.local_rank :: num_ranks]
        if self.average is not None:
            self.average.swap()
        scores = score_cases(self, self.universe, self.dataset_class(self.preprocessed_dataset_folder, mine))
        if self.average is not None:
            self.average.swap()
        if self.is_ddp:
            gathered: list[Any] = [None] * num_ranks
            dist.all_gather_object(gathered, scores)
            scores = [score for of_rank in gathered for score in of_rank]
        (cut_short,) = self._on_any_rank(self.interruption.requested is not None)
        if self.local_rank == 0 and not cut_short:
            for line in write_scores(scores, self.universe, self.current_epoch, Path(self.output_folder)):
                self.print_to_log_file(line)
        empty_cache(self.device)

    def save_checkpoint(self, filename: str) -> None:
        """Writes the checkpoint; with the final one, a model folder for each source."""
        super().save_checkpoint(filename)
        if Path(filename).name == FINAL and self.local_rank == 0 and not self.disable_checkpointing:
            write_source_models(self, self.universe, (FINAL, BEST))

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
        if self.own_source is not None:
            super().perform_actual_validation(save_probabilities)
            return
        validation_cases = self.do_split()[1]
        for source in self.universe.sources:
            if not any(self.universe.source_of(case) == source for case in validation_cases):
                self.print_to_log_file(f"{source.dataset} has no validation case in fold {self.fold}.")
                continue
            plans, dataset_json = source_files(self, self.universe, source)
            plans["continue_training"] = False
            part = type(self)(plans, self.configuration_name, self.fold, dataset_json, self.device)
            part.network, part.was_initialized = self.network, True
            part.dataset_class = infer_dataset_class(part.preprocessed_dataset_folder)
            part.inference_allowed_mirroring_axes = inference_axes(source)
            network: Any = self.bare_network
            _answer_for(network, source)
            try:
                part.perform_actual_validation(save_probabilities)
            finally:
                network.answer_for(None)
            self.print_to_log_file(f"Validation of {source.dataset}: {os.path.join(part.output_folder, 'validation')}")


def _answer_for(network: Any, source: Source) -> None:
    network.answer_for(source.tasks, source.modality, background=not source.has_regions)
