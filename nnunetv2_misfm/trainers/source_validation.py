"""The final validation of a universal model: every source as nnU-Net validates a model of that dataset."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunetv2_misfm.trainers.source_models import inference_axes
from nnunetv2_misfm.universe import Source

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes

# nnU-Net's switch of Weights & Biases, which its trainers read when they are made
_WANDB_VARIABLE = "nnUNet_wandb_enabled"


def validate_sources(trainer: "nnUNetTrainerHermes", save_probabilities: bool) -> None:
    """Predicts each source's validation cases into its model folder and writes its `summary.json`.

    Args:
        trainer: Of the universal run, trained.
        save_probabilities: As nnU-Net's.
    """
    cases = trainer.do_split()[1]
    for source in trainer.universe.sources:
        if not any(trainer.universe.source_of(case) == source for case in cases):
            trainer.print_to_log_file(f"{source.dataset} has no validation case in fold {trainer.fold}.")
            continue
        part = _trainer_of_source(trainer, source)
        network = trainer.bare_network
        trainer.answer_for(source)
        try:
            part.network = network  # neither compiled anew for every source nor synchronised between ranks
            part.perform_actual_validation(save_probabilities)
        finally:
            trainer.answer_for(None)
        trainer.print_to_log_file(f"Validation of {source.dataset}: {os.path.join(part.output_folder, 'validation')}")


def _trainer_of_source(trainer: "nnUNetTrainerHermes", source: Source) -> "nnUNetTrainerHermes":
    """Returns a trainer under a source's plans that counts as initialised; its network is to be set."""
    plans, dataset_json = trainer.source_files[source.dataset]
    plans = {**plans, "continue_training": False}
    with _without_wandb():  # one run, not one for every source
        part = type(trainer)(plans, trainer.configuration_name, trainer.fold, dataset_json, trainer.device)
    part.was_initialized = True
    part.dataset_class = infer_dataset_class(part.preprocessed_dataset_folder)
    part.inference_allowed_mirroring_axes = inference_axes(source)
    return part


@contextmanager
def _without_wandb() -> Iterator[None]:
    former = os.environ.pop(_WANDB_VARIABLE, None)
    try:
        yield
    finally:
        if former is not None:
            os.environ[_WANDB_VARIABLE] = former
