"""How well a universal model does on each of its datasets while it trains: whole validation cases, by sliding window.

nnU-Net's curves are of random crops, over all tasks at once. Here cases are predicted whole, in the convention of
their own dataset, and compared on the preprocessed grid; nothing is resampled back, mirrored or written as an image.
"""

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import distributed as dist

from nnunetv2_misfm.universe import Source, Universe

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes

TABLE_NAME = "evaluation_per_dataset.csv"
_HEADER = ("epoch", "dataset", "task", "dice", "cases")


@dataclass(frozen=True)
class CaseScore:
    """Dice of one task in one case: 0 to 1."""

    dataset: str
    task: int
    dice: float


def evaluate_sources(trainer: "nnUNetTrainerHermes") -> None:
    """Predicts validation cases of each source, shared among the ranks, and tells log and table how well.

    A run that a signal has asked to end tells nothing: its next process begins this epoch's end anew.
    """
    universe = trainer.universe
    cases = chosen_cases(trainer.do_split()[1], universe, trainer.method_recipe.evaluation_cases)
    num_ranks = dist.get_world_size() if trainer.is_ddp else 1
    mine = cases[trainer.local_rank :: num_ranks]
    if trainer.average is not None:
        trainer.average.swap()
    scores = score_cases(trainer, trainer.dataset_class(trainer.preprocessed_dataset_folder, mine))
    if trainer.average is not None:
        trainer.average.swap()
    if trainer.is_ddp:
        gathered: list[Any] = [None] * num_ranks
        dist.all_gather_object(gathered, scores)
        scores = [score for of_rank in gathered for score in of_rank]
    if trainer.ends_early() or trainer.local_rank != 0:
        return
    for line in write_scores(scores, universe, trainer.current_epoch, Path(trainer.output_folder)):
        trainer.print_to_log_file(line)


def chosen_cases(cases: Sequence[str], universe: Universe, number: int) -> list[str]:
    """Returns up to `number` cases of each source, evenly spread over their sorted names."""
    chosen: list[str] = []
    for source in universe.sources:
        mine = sorted(case for case in cases if universe.source_of(case) is source)
        wanted = min(number, len(mine))
        chosen += [mine[i * len(mine) // wanted] for i in range(wanted)]
    return chosen


def dice_of_tasks(predicted: np.ndarray, truth: np.ndarray, source: Source) -> list[float]:
    """Returns the Dice of each task of a source, nan where neither map holds the structure.

    Args:
        predicted: Label map (D, H, W) in the source's values.
        truth: Likewise; voxels of the ignore label are left out, what is below zero is background.
        source: The dataset.
    """
    labelled = np.ones(truth.shape, bool) if source.ignore_label is None else truth != source.ignore_label
    scores = []
    for values in source.values:
        said, true = (np.isin(labels, values) & labelled for labels in (predicted, truth))
        total = said.sum() + true.sum()
        scores.append(float(2 * (said & true).sum() / total) if total else float("nan"))
    return scores


def score_cases(trainer: "nnUNetTrainerHermes", dataset: nnUNetBaseDataset) -> list[CaseScore]:
    """Returns the scores of all tasks in all cases of a dataset object of the universal dataset.

    Args:
        trainer: Its network and device are used.
        dataset: The cases to predict; none further once a signal has asked for the end of the run.
    """
    scores: list[CaseScore] = []
    predictor, former = None, None
    network: Any = trainer.bare_network
    was_training = network.training
    network.eval()
    try:
        for case in dataset.identifiers:
            if trainer.interruption.requested is not None:
                break
            source = trainer.universe.source_of(case)
            if source is not former:
                predictor, former = source_predictor(trainer, source), source
                network.answer_for(source.tasks, source.modality, background=not source.has_regions)
            assert predictor is not None
            data, segmentation, _, _ = dataset.load_case(case)
            logits = predictor.predict_sliding_window_return_logits(torch.from_numpy(np.array(data[:])))
            predicted = np.asarray(predictor.label_manager.convert_logits_to_segmentation(logits.cpu().float()))
            found = dice_of_tasks(predicted, np.array(segmentation[0]), source)
            scores += [CaseScore(source.dataset, t, d) for t, d in zip(source.tasks, found, strict=True)]
    finally:
        network.answer_for(None)
        network.train(was_training)
    return scores


def source_predictor(trainer: "nnUNetTrainerHermes", source: Source) -> nnUNetPredictor:
    """Returns nnU-Net's predictor of the trainer's network in the convention of a source, without mirroring."""
    plans, dataset_json = trainer.source_files[source.dataset]
    manager = PlansManager(plans)
    predictor = nnUNetPredictor(
        use_mirroring=False, perform_everything_on_device=trainer.device.type == "cuda", device=trainer.device,
        allow_tqdm=False,
    )  # fmt: skip
    predictor.manual_initialization(
        trainer.bare_network, manager, manager.get_configuration(trainer.configuration_name), None, dataset_json,
        type(trainer).__name__, None,
    )  # fmt: skip
    return predictor


def write_scores(scores: Sequence[CaseScore], universe: Universe, epoch: int, folder: Path) -> list[str]:
    """Adds the mean Dice of each dataset's tasks to a table, and returns a line per dataset for the log.

    Rows of this epoch and later ones, of a run that was cut off or of an earlier one, are replaced.

    Args:
        scores: Of all cases; a structure that is nowhere in a case, neither predicted, does not count.
        universe: The tasks.
        epoch: The epoch that has just ended.
        folder: Where the table lies.
    """
    table = folder / TABLE_NAME
    rows: list[tuple[Any, ...]] = []
    lines = []
    for source in universe.sources:
        means = []
        for task in source.tasks:
            found = [s.dice for s in scores if (s.dataset, s.task) == (source.dataset, task) and not np.isnan(s.dice)]
            if found:
                means.append(float(np.mean(found)))
                rows.append((epoch, source.dataset, universe.tasks[task], f"{means[-1]:.4f}", len(found)))
        if means:
            lines.append(f"Evaluation of whole cases, {source.dataset}: mean Dice {np.mean(means):.4f}")
    former: list[Any] = []
    if table.is_file():
        with open(table, newline="") as file:
            former = [row for row in list(csv.reader(file))[1:] if int(row[0]) < epoch]
    temporary = table.with_name(table.name + ".tmp")
    with open(temporary, "w", newline="") as file:
        csv.writer(file).writerows([_HEADER, *former, *rows])
    os.replace(temporary, table)
    return lines
