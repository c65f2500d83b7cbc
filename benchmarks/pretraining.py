"""How fast pretraining runs on a preprocessed dataset, and what it waits for, in one run.

    python benchmarks/pretraining.py 900 3d_fullres -tr nnUNetTrainerPCTNetVFPretrain --device cuda --workers 8
    python benchmarks/pretraining.py 900 3d_fullres -tr nnUNetTrainerPCTNetVFPretrain --device cpu --workers 1 --steps 5

Rows, in samples per second:

- whole run: nnU-Net's loop of training steps, batches from the workers, with the share of the time that it waited for
  them;
- step with task: the same steps on one batch that is there, whose augmentation and task are made anew every time;
- step alone: the same on a batch whose task lies on the device;
- loader: the workers alone, and per worker;
- one core, ours: crops read and augmented by one thread, everything on the CPU; and only read, as the workers do where
  the device augments;
- one core, nnU-Net's: its own loader and transforms, one thread.

nnU-Net's row has its full set of augmentation always, ours what `--augmentation` says. All
rows are measured once in every round, so that a machine whose speed drifts does so for all; figures are median (lowest
to highest) over the rounds, ratios those within a round. nnU-Net's folders are the usual variables; nothing is written
but to a temporary results folder.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.paths import nnUNet_preprocessed
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.dataset_name_id_conversion import maybe_convert_to_dataset_name

from nnunetv2_misfm.preview import find_pretraining_trainer
from nnunetv2_misfm.trainers.augmentation.augment import augment
from nnunetv2_misfm.trainers.augmentation.distribution import flips, nnunet_augmentation
from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.unlabelled_batches import UnlabelledBatches

WHOLE, WITH_TASK, ALONE, LOADER = "whole run", "step with task", "step alone", "loader"
READ, OURS, NNUNETS = "one core, ours, reading alone", "one core, ours, all", "one core, nnU-Net's"


def open_trainer(options: argparse.Namespace) -> PretextTrainer:
    """Returns a trainer that is ready for its first step."""
    kind = find_pretraining_trainer(options.trainer)
    name = maybe_convert_to_dataset_name(int(options.dataset) if options.dataset.isdigit() else options.dataset)
    folder = os.path.join(str(nnUNet_preprocessed), name)
    plans = {**load_json(os.path.join(folder, f"{options.plans}.json")), "continue_training": False}
    block = plans["configurations"][options.configuration].setdefault("misfm", {})
    block |= {"augmentation": options.augmentation, "checkpoint_every_minutes": 0, "accumulate_steps": 1}
    dataset_json = load_json(os.path.join(folder, "dataset.json"))
    trainer = kind(plans, options.configuration, "all", dataset_json, torch.device(options.device))
    trainer.on_train_start()
    trainer.network.train()
    return trainer


def steps(trainer: PretextTrainer, batches: Iterator[dict[str, Any]]) -> Callable[[], None]:
    """Returns a training step on the next of some batches."""

    def step() -> None:
        trainer.train_step(next(batches))

    return step


def stock_loader(trainer: PretextTrainer) -> Iterator[Any]:
    """Returns nnU-Net's own batches, with labels and all, made in this process."""
    manager = trainer.configuration_manager
    rotation, in_plane, crop_size, axes = nnUNetTrainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size(
        trainer
    )
    transforms = nnUNetTrainer.get_training_transforms(manager.patch_size, rotation, None, axes, in_plane)
    dataset, _ = trainer.get_tr_and_val_datasets()
    return nnUNetDataLoader(
        dataset, trainer.batch_size, crop_size, manager.patch_size, trainer.label_manager, 0.33, transforms=transforms
    )


def one_core(trainer: PretextTrainer) -> dict[str, Callable[[], object]]:
    """Returns what one core does for a batch: reading for the device, all of ours, all of nnU-Net's."""
    rotation, in_plane, crop_size, axes = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    full = trainer.recipe.augmentation == "nnunet"
    augmentation = nnunet_augmentation(rotation, in_plane, axes) if full else flips(axes)
    dataset, _ = trainer.get_tr_and_val_datasets()
    patch_size, generator = trainer.configuration_manager.patch_size, torch.Generator().manual_seed(0)
    ours = UnlabelledBatches(
        dataset, trainer.batch_size, crop_size, patch_size, trainer.labels_are_body_masks(trainer.dataset_json), [1],
        augmentation=augmentation,
    )  # fmt: skip
    numbers, stock = count(), stock_loader(trainer)
    return {
        READ: lambda: ours[next(numbers)],
        OURS: lambda: augment(ours[next(numbers)]["data"], patch_size, augmentation, generator),
        NNUNETS: lambda: next(stock),
    }


def seconds(call: Callable[[], object], calls: int, device: str) -> float:
    """Returns the time of some calls."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(options: argparse.Namespace, trainer: PretextTrainer) -> dict[str, list[float]]:
    """Returns samples per second of every row, one value per round, and under `waiting` the share of the whole run."""
    size, stream = trainer.batch_size, trainer.dataloader_train
    raw = next(stream)
    crops = {name: value.to(trainer.device) if hasattr(value, "to") else value for name, value in raw.items()}
    prepared = trainer.prepare_batch(dict(crops), training=True)
    cores, threads = one_core(trainer), torch.get_num_threads()
    found: dict[str, list[float]] = {}

    def note(row: str, calls: int, call: Callable[[], object]) -> float:
        taken = seconds(call, calls, options.device)
        found.setdefault(row, []).append(calls * size / taken)
        return taken

    whole, with_task = steps(trainer, stream), steps(trainer, iter(lambda: dict(crops), None))
    for call in (whole, with_task, *cores.values()):
        call()  # compiles, fills caches, lets nnU-Net's blur choose its way
    for _ in range(options.rounds):
        stream.seek(stream.position)  # nothing made in advance while other rows were measured
        for _ in range(2 * max(1, options.workers)):
            whole()
        waited = stream.seconds_waited
        taken = note(WHOLE, options.steps, whole)
        found.setdefault("waiting", []).append((stream.seconds_waited - waited) / taken)
        for _ in range(2 * options.workers):
            next(stream)  # what was made while the steps ran
        note(LOADER, options.batches, lambda: next(stream))
        stream.close()
        note(WITH_TASK, options.steps, with_task)
        note(ALONE, options.steps, lambda: trainer.optimisation_step(prepared))
        torch.set_num_threads(1)
        for row, call in cores.items():
            note(row, options.batches, call)
        torch.set_num_threads(threads)
    return found


def spread(values: list[float], form: str = ".3g") -> str:
    """Returns median (lowest to highest)."""
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def report(options: argparse.Namespace, found: dict[str, list[float]]) -> str:
    """Returns the Markdown table and the ratios that matter."""

    def ratio(row: str, to: str) -> str:
        return spread([a / b for a, b in zip(found[row], found[to], strict=True)])

    lines = ["| row | samples/s |", "|---|---|"]
    lines += [f"| {row} | {spread(values)} |" for row, values in found.items() if row != "waiting"]
    workers = max(1, options.workers)
    return "\n".join(
        [
            *lines,
            f"\nwaiting for data in the whole run: {spread(found['waiting'], '.1%')}",
            f"loader per worker: {spread([value / workers for value in found[LOADER]])} samples/s",
            f"whole run / step alone: {ratio(WHOLE, ALONE)}; / step with task: {ratio(WHOLE, WITH_TASK)}",
            f"one core, of nnU-Net's: reading alone {ratio(READ, NNUNETS)}, all of ours {ratio(OURS, NNUNETS)}",
        ]
    )


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="number or name of a preprocessed dataset")
    parser.add_argument("configuration", help="configuration of its plans")
    parser.add_argument("-tr", dest="trainer", default="nnUNetTrainerPCTNetVFPretrain", help="a pretraining trainer")
    parser.add_argument("-p", dest="plans", default="nnUNetPlans", help="name of the plans file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--workers", type=int, default=8, help="data workers (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch in the training process (default: 1)")
    parser.add_argument("--augmentation", choices=("flips", "nnunet"), default="nnunet")
    parser.add_argument("--steps", type=int, default=50, help="training steps of a row and round (default: 50)")
    parser.add_argument("--batches", type=int, default=20, help="batches of the other rows (default: 20)")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ["nnUNet_n_proc_DA"] = str(options.workers)
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = options.device == "cuda"
    np.random.seed(0)
    with tempfile.TemporaryDirectory() as results:
        os.environ["nnUNet_results"] = results
        trainer = open_trainer(options)
        manager = trainer.configuration_manager
        found = measure(options, trainer)
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"\n{options.trainer} on {trainer.plans_manager.dataset_name}, patch {list(manager.patch_size)}, batch "
        f"{trainer.batch_size}, augmentation {options.augmentation}, {options.workers} workers, {device}, "
        f"torch {torch.__version__}, {platform.machine()}, rounds {options.rounds}\n"
    )
    print(report(options, found))


if __name__ == "__main__":
    main()
