"""A model folder of nnU-Net for each source of a universal model: own plans and dataset.json, shared weights."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import write_json
from nnunetv2_misfm.universe import Source, Universe
from nnunetv2_misfm.weights.checkpoint import plain, read_checkpoint, tensors_sha256, write_checkpoint

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.base import MisfmTrainer


def source_files(trainer: "MisfmTrainer", universe: Universe, source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns plans and dataset.json of a source, the plans with the configuration that is trained.

    Raises:
        MisfmError: They are not there.
    """
    folder = Path(str(nnUNet_preprocessed)) / source.dataset
    plans_file = folder / f"{universe.source_plans_name(trainer.plans_manager.plans_name)}.json"
    for file in (plans_file, folder / "dataset.json"):
        if not file.is_file():
            raise MisfmError(
                f"expected {file} of a source of {universe.dataset}, found none: run nnUNetv2_misfm universal again."
            )
    plans = load_json(str(plans_file))
    plans["configurations"] = {**trainer.plans_manager.plans["configurations"], **plans["configurations"]}
    return plans, load_json(str(folder / "dataset.json"))


def inference_axes(source: Source) -> tuple[int, ...] | None:
    """Returns the axes along which nnU-Net's prediction may mirror, in its form (None for none)."""
    return source.mirror_axes or None


def write_source_models(trainer: "MisfmTrainer", universe: Universe, names: tuple[str, ...]) -> None:
    """Writes a model folder for every source, from checkpoints of the universal run.

    Args:
        trainer: The universal run's, its checkpoints written.
        universe: Its sources.
        names: File names of checkpoints; those that are not there are passed over.
    """
    run = Path(trainer.output_folder)
    checkpoints = {name: read_checkpoint(run / name) for name in names if (run / name).is_file()}
    for source in universe.sources:
        plans, dataset_json = source_files(trainer, universe, source)
        parts = (type(trainer).__name__, plans["plans_name"], trainer.configuration_name)
        folder = Path(str(nnUNet_results)) / source.dataset / "__".join(parts)
        fold = folder / run.name
        fold.mkdir(parents=True, exist_ok=True)
        write_json(plans, folder / "plans.json")
        write_json(dataset_json, folder / "dataset.json")
        fingerprint = Path(str(nnUNet_preprocessed)) / source.dataset / "dataset_fingerprint.json"
        for file, target in ((fingerprint, folder), (run / "progress.png", fold)):
            if file.is_file():
                shutil.copy(file, target)
        for name, checkpoint in checkpoints.items():
            write_checkpoint(_of_source(checkpoint, source, plans, dataset_json), fold / name)


def _of_source(
    checkpoint: dict[str, Any], source: Source, plans: dict[str, Any], dataset_json: dict[str, Any]
) -> dict[str, Any]:
    """Returns what nnU-Net's prediction reads of a checkpoint, for a source; it cannot be trained on."""
    arguments = {**checkpoint["init_args"], "plans": plans, "dataset_json": dataset_json}
    return {
        "network_weights": checkpoint["network_weights"],
        "trainer_name": checkpoint["trainer_name"],
        "init_args": plain(arguments),
        "current_epoch": checkpoint["current_epoch"],
        "inference_allowed_mirroring_axes": inference_axes(source),
        "misfm_meta": {
            **checkpoint["misfm_meta"],
            "source_of": plans["misfm_universal"]["dataset"],
            "weights_sha256": tensors_sha256(checkpoint["network_weights"]),
        },
    }
