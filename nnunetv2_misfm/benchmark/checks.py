"""Whether test cases are no training cases, and whether every trainer of a grid can do what is asked of it."""

import hashlib
import io
import os
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from nnunetv2.paths import nnUNet_results
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunetv2_misfm.benchmark.grid import STOCK, STOCK_WITH_LENGTH, Grid
from nnunetv2_misfm.benchmark.splits import test_truths
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import read_json
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.finetune import WEIGHTS_VARIABLE, FinetuneTrainer
from nnunetv2_misfm.trainers.pretext import PretextTrainer


def check_test(test: Path, base: Path, cases: Sequence[str]) -> None:
    """Raises where a test folder lacks images or labels, or holds cases to learn from.

    Args:
        test: Folder with imagesTs and labelsTs.
        base: The dataset's folder in nnUNet_preprocessed.
        cases: All preprocessed cases.
    """
    dataset_json = read_json(base / "dataset.json")
    ending, channels = dataset_json["file_ending"], len(dataset_json["channel_names"])
    truths = test_truths(test, ending)
    if not truths:
        raise MisfmError(
            f"expected labels *{ending} in {test / 'labelsTs'}, found none: --test takes a folder with imagesTs and "
            "labelsTs in nnU-Net's format."
        )
    images = [f"{case}_{channel:04d}{ending}" for case in truths for channel in range(channels)]
    if lacking := [name for name in images if not (test / "imagesTs" / name).is_file()]:
        raise MisfmError(f"expected {lacking[0]} in {test / 'imagesTs'}, found none ({len(lacking)} files missing).")
    if names := sorted({*truths} & {*cases}):
        raise MisfmError(
            f"expected test cases that no run learns from, but {', '.join(names[:5])} of {test} are named as cases of "
            f"{base.name} ({len(names)} in all): take them out of one of the two, or rename them if they are others."
        )
    known = {(file.stat().st_size, _sha256(file)): file for file in (base / "gt_segmentations").glob(f"*{ending}")}
    for file in truths.values():
        if twin := known.get((file.stat().st_size, _sha256(file))):
            raise MisfmError(
                f"expected test cases that no run learns from, but {file} equals the training case {twin.name}: take "
                "it out of the test folder."
            )


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_trainers(grid: Grid, plans: dict[str, Any], length: bool) -> None:
    """Raises where a trainer is unknown, learns without labels, cannot take the settings, or would find no weights.

    Args:
        grid: All cells, the recorded ones too.
        plans: Content of the plans file.
        length: Whether the block names another length than nnU-Net's.
    """
    if length and {STOCK, STOCK_WITH_LENGTH} <= {*grid.trainers}:
        raise MisfmError(
            f"expected {STOCK} or {STOCK_WITH_LENGTH}, got both: with its length set the former runs as the latter."
        )
    configuration = PlansManager(plans).get_configuration(grid.configuration)
    for name in grid.trainers:
        trainer = _find(name)
        if issubclass(trainer, PretextTrainer):
            raise MisfmError(f"expected trainers that learn from labels, got {name}, which pretrains without any.")
        if length and name != STOCK and not issubclass(trainer, MisfmTrainer):
            raise MisfmError(
                f"expected trainers that read the length set here, got {name}, which has its own: leave the length "
                f"out, or name {STOCK} for stock nnU-Net."
            )
        if issubclass(trainer, MisfmTrainer):
            try:
                trainer.check_configuration(configuration)
            except NotImplementedError as error:
                raise MisfmError(str(error)) from error
        if issubclass(trainer, FinetuneTrainer):
            _check_weights(grid, name, trainer, plans, configuration)
        elif name in grid.weights:
            raise MisfmError(
                f"expected --weights for a trainer that fine-tunes, got them for {name}, which takes none."
            )


def _find(name: str) -> type[nnUNetTrainer]:
    """Returns one of our trainers, which all commands of a benchmark find, or what nnU-Net's own search gives."""
    if name in nnunetv2_misfm_trainers.__all__:
        return getattr(nnunetv2_misfm_trainers, name)
    try:
        with redirect_stdout(io.StringIO()):  # nnU-Net tells how it searches
            trainer = recursive_find_trainer_class_by_name(name)
    except RuntimeError as error:
        raise MisfmError(
            f"expected the name of a trainer that nnU-Net finds, got {name!r}: check the spelling, and "
            "nnUNet_extTrainer with nnUNetv2_misfm check."
        ) from error
    return trainer


def _check_weights(
    grid: Grid, name: str, trainer: type[FinetuneTrainer], plans: dict[str, Any], configuration: ConfigurationManager
) -> None:
    """Raises where a fine-tuning trainer would find no weights by any of its routes, or others than those named."""
    in_block = (configuration.configuration.get("misfm") or {}).get("pretrained_weights")
    if name in grid.weights:
        if in_block:
            raise MisfmError(
                f"expected --weights or pretrained_weights in {grid.configuration}, got both: the latter ({in_block}) "
                "would win; name one."
            )
        return
    if in_block or os.environ.get(WEIGHTS_VARIABLE) or any(s.startswith("pretrained_weights=") for s in grid.settings):
        return
    configurations = [grid.configuration]
    while parent := plans["configurations"][configurations[-1]].get("inherits_from"):
        configurations.append(parent)
    results = Path(str(nnUNet_results)) / grid.dataset
    runs = [results / f"{trainer.pretrain_trainer}__{grid.plans}__{c}" for c in configurations]
    for fold in dict.fromkeys(str(cell.run_fold) for cell in grid.cells):
        if not any((run / f"fold_{f}" / "checkpoint_final.pth").is_file() for run in runs for f in ("all", fold)):
            raise MisfmError(
                f"{name} expected pretrained weights and would find none: pretrain first with nnUNetv2_train "
                f"{grid.dataset} {configurations[-1]} all -tr {trainer.pretrain_trainer} -p {grid.plans}, or name a "
                f"file with --weights {name}=FILE."
            )
