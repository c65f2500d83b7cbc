"""A model folder of nnU-Net for each source of a universal model: own plans and dataset.json, shared weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed, nnUNet_results

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import PREPROCESSING_KEYS, write_json
from nnunetv2_misfm.universe import PLANS_KEY, Source, Universe
from nnunetv2_misfm.weights.checkpoint import plain, read_checkpoint, tensors_sha256, write_checkpoint

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes


class SourceFiles(NamedTuple):
    """What nnU-Net needs to know of a source.

    Attributes:
        plans: Its own, with the configurations of the universal dataset's plans.
        dataset_json: Its dataset.json.
    """

    plans: dict[str, Any]
    dataset_json: dict[str, Any]


def read_source_files(universe: Universe, plans: Mapping[str, Any]) -> dict[str, SourceFiles]:
    """Returns plans and dataset.json of every source, by its name.

    Args:
        universe: The sources.
        plans: The universal dataset's.

    Raises:
        MisfmError: A source's are not there.
    """
    files = {}
    for source in universe.sources:
        folder = Path(str(nnUNet_preprocessed)) / source.dataset
        plans_file = folder / f"{universe.source_plans_name(plans['plans_name'])}.json"
        for file in (plans_file, folder / "dataset.json"):
            if not file.is_file():
                raise MisfmError(
                    f"expected {file} of a source of {universe.dataset}, found none: run nnUNetv2_misfm universal "
                    "again."
                )
        own = load_json(str(plans_file))
        own["configurations"] = {**plans["configurations"], **own["configurations"]}
        files[source.dataset] = SourceFiles(own, load_json(str(folder / "dataset.json")))
    return files


def require_unchanged(trained: Mapping[str, SourceFiles], now: Mapping[str, SourceFiles]) -> None:
    """Raises where a source is preprocessed or labelled otherwise than when its model was trained.

    Raises:
        MisfmError: Another spacing, normalisation, orientation, labels or tasks.
    """
    for dataset, files in now.items():
        if dataset not in trained or _facts(trained[dataset]) != _facts(files):
            raise MisfmError(
                f"{dataset} has been joined, planned or labelled in another way since this model was trained on it, so "
                "that its preprocessed cases and the weights no longer belong together: restore its plans and "
                "dataset.json, or train anew without --c."
            )


def _facts(files: SourceFiles) -> str:
    """Returns what decides how cases of a source look and what its labels mean, as text that can be compared."""
    universe = Universe.from_plans(files.plans)
    own = [s for s in universe.sources if s.dataset == universe.source]
    source = [(s.tasks, s.values, s.modality, s.has_regions, s.ignore_label) for s in own]
    planned = next(c for c in files.plans["configurations"].values() if "inherits_from" not in c)
    keys = ("transpose_forward", "image_reader_writer", "foreground_intensity_properties_per_channel")
    labels = [files.dataset_json.get(key) for key in ("labels", "regions_class_order")]
    facts = [source, [planned.get(k) for k in PREPROCESSING_KEYS], [files.plans.get(k) for k in keys], labels]
    return json.dumps(facts, sort_keys=True)


def inference_axes(source: Source) -> tuple[int, ...] | None:
    """Returns the axes along which nnU-Net's prediction may mirror, in its form (None for none)."""
    return source.mirror_axes or None


def write_source_models(trainer: "nnUNetTrainerHermes", names: tuple[str, ...]) -> None:
    """Writes a model folder for every source, from checkpoints of the universal run.

    Args:
        trainer: The universal run's, its checkpoints written.
        names: File names of checkpoints; those that are not there are passed over.
    """
    run = Path(trainer.output_folder)
    checkpoints = {name: read_checkpoint(run / name) for name in names if (run / name).is_file()}
    for source in trainer.universe.sources:
        files = trainer.source_files[source.dataset]
        parts = (type(trainer).__name__, files.plans["plans_name"], trainer.configuration_name)
        folder = Path(str(nnUNet_results)) / source.dataset / "__".join(parts)
        fold = folder / run.name
        fold.mkdir(parents=True, exist_ok=True)
        write_json(files.plans, folder / "plans.json")
        write_json(files.dataset_json, folder / "dataset.json")
        fingerprint = Path(str(nnUNet_preprocessed)) / source.dataset / "dataset_fingerprint.json"
        for file, target in ((fingerprint, folder), (run / "progress.png", fold)):
            if file.is_file():
                shutil.copy(file, target)
        for name, checkpoint in checkpoints.items():
            write_checkpoint(_of_source(checkpoint, source, files), fold / name)


def _of_source(checkpoint: dict[str, Any], source: Source, files: SourceFiles) -> dict[str, Any]:
    """Returns what nnU-Net's prediction reads of a checkpoint, for a source; it cannot be trained on."""
    arguments = {**checkpoint["init_args"], "plans": files.plans, "dataset_json": files.dataset_json}
    meta = {key: value for key, value in checkpoint["misfm_meta"].items() if key != "sources"}
    return {
        "network_weights": checkpoint["network_weights"],
        "trainer_name": checkpoint["trainer_name"],
        "init_args": plain(arguments),
        "current_epoch": checkpoint["current_epoch"],
        "inference_allowed_mirroring_axes": inference_axes(source),
        "misfm_meta": {
            **meta,
            "source_of": files.plans[PLANS_KEY]["dataset"],
            "weights_sha256": tensors_sha256(checkpoint["network_weights"]),
        },
    }
