"""`torchrun ... -m nnunetv2_misfm.distributed DATASET CONFIGURATION FOLD -tr TRAINER`: training on one or many machines.

What `nnUNetv2_train -num_gpus N` does on one machine, on whatever processes torchrun starts: each takes the device that
its LOCAL_RANK names, in a process group of any backend. After a restart by torchrun the training goes on from its last
checkpoint. The arguments are nnU-Net's; the steps are nnU-Net's own functions, but for `run_ddp`, which takes the rank
among all processes for the number of a GPU.
"""

import argparse
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from nnunetv2_misfm._startup import SEARCH_PATH_VARIABLE
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.scripts import search_path
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.resumable import BEST
from nnunetv2_misfm.weights.checkpoint import network_weights, read_checkpoint
from nnunetv2_misfm.weights.transfer import transfer_weights

# What torchrun tells every process
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How often torchrun has started these processes anew
RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT"


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line: `nnUNetv2_train`'s, with a backend in place of a number of GPUs."""
    parser = argparse.ArgumentParser(prog="torchrun ... -m nnunetv2_misfm.distributed", description=__doc__)
    parser.add_argument("dataset", help="number or name of the dataset")
    parser.add_argument("configuration", help="configuration of its plans")
    parser.add_argument("fold", help="fold of the cross-validation, or all")
    parser.add_argument("-tr", required=True, metavar="TRAINER", help="a trainer of this package")
    parser.add_argument("-p", default="nnUNetPlans", metavar="PLANS", help="name of the plans file")
    parser.add_argument("-pretrained_weights", metavar="FILE", help="checkpoint to start from")
    parser.add_argument("-device", choices=["cuda", "cpu"], default="cuda", help="where to train")
    parser.add_argument("--backend", metavar="NAME", help="of torch.distributed; default nccl on GPUs, gloo on CPUs")
    parser.add_argument("--timeout", type=float, default=30, metavar="MINUTES", help="until a silent rank is an error")
    parser.add_argument("--npz", action="store_true", help="keep the probabilities of the final validation")
    parser.add_argument("--c", action="store_true", help="go on from the last checkpoint, as after every restart")
    parser.add_argument("--val", action="store_true", help="only validate")
    parser.add_argument("--val_best", action="store_true", help="validate with checkpoint_best")
    parser.add_argument("--disable_checkpointing", action="store_true", help="write no checkpoint")
    return parser


@record
def main(arguments: list[str] | None = None) -> None:
    """Trains and validates as one of torchrun's processes.

    Raises:
        MisfmError: Not started by torchrun, no GPU for this process, or no trainer of this package.
        SystemExit: With `interruption.EXIT_CODE` after a signal, when the checkpoint is written.
    """
    asked = build_parser().parse_args(arguments)
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise MisfmError(
            f"expected the variables that torchrun sets, got no {', '.join(missing)}: start with torchrun "
            "--nproc-per-node GPUS -m nnunetv2_misfm.distributed ..."
        )
    if (asked.c and asked.val) or (asked.c and asked.pretrained_weights):
        raise MisfmError("expected --c alone, got it with --val or -pretrained_weights; leave one of them out.")
    device = find_device(asked.device)
    os.environ[SEARCH_PATH_VARIABLE] = search_path()
    if int(os.environ["RANK"]) > 0:
        os.environ["nnUNet_wandb_enabled"] = "0"  # nnU-Net would open one run of Weights & Biases per rank
    backend = asked.backend or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, timeout=timedelta(minutes=asked.timeout))
    try:
        run(asked, device)
    finally:
        dist.destroy_process_group()


def find_device(kind: str) -> torch.device:
    """Returns the device of this process: on GPUs the one that LOCAL_RANK names, made the current one.

    Raises:
        MisfmError: There is no such GPU.
    """
    if kind == "cpu":
        return torch.device("cpu")
    torch.set_num_threads(1)  # as nnU-Net on GPUs
    index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if index >= count:
        raise MisfmError(
            f"expected a GPU for every process, got {count} for local rank {index}: lower --nproc-per-node, or use "
            "-device cpu."
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def run(asked: argparse.Namespace, device: torch.device) -> None:
    """Trains and validates in a process group.

    Raises:
        MisfmError: The trainer is not one of this package.
    """
    restarted = int(os.environ.get(RESTARTS_VARIABLE, "0")) > 0 and not asked.val
    fold = asked.fold if asked.fold == "all" else int(asked.fold)
    trainer: Any = get_trainer_from_args(
        asked.dataset, asked.configuration, fold, asked.tr, asked.p, asked.c or restarted, device
    )
    if not isinstance(trainer, MisfmTrainer):
        raise MisfmError(
            f"expected a trainer of nnunetv2_misfm, got {asked.tr}, which would take its rank for the number of a GPU; "
            "use nnUNetv2_train -num_gpus for it."
        )
    trainer.disable_checkpointing = asked.disable_checkpointing
    has_checkpoint = any(Path(trainer.output_folder).glob("checkpoint_*.pth"))
    goes_on = asked.c or (restarted and has_checkpoint)
    maybe_load_checkpoint(trainer, goes_on, asked.val)
    if asked.pretrained_weights and not (goes_on or asked.val):
        _load_pretrained(trainer, asked.pretrained_weights)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as nnU-Net
    if not asked.val:
        trainer.run_training()
    if asked.val_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder) / BEST))
    trainer.perform_actual_validation(asked.npz)


def _load_pretrained(trainer: MisfmTrainer, file: str) -> None:
    """Does what nnU-Net's flag does; its own function would map the file to a GPU by the rank among all processes."""
    trainer.initialize()
    report = transfer_weights(network_weights(read_checkpoint(file), file), trainer.bare_network)
    trainer.print_to_log_file(f"Pretrained weights: {file}: {report.summary()}")


if __name__ == "__main__":
    main()
