"""`torchrun ... -m nnunetv2_misfm.distributed DATASET CONFIGURATION FOLD -tr TRAINER`: training on several machines.

What `nnUNetv2_train -num_gpus N` does on one machine, on whatever processes torchrun starts: each takes the device that
its LOCAL_RANK names, in a process group of any backend. After a restart by torchrun the training goes on from its last
checkpoint. The arguments are nnU-Net's; the steps are nnU-Net's own functions, but for `run_ddp`, which takes the rank
among all processes for the number of a GPU.
"""

import argparse
import os
import sys
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run.run_training import get_trainer_from_args, maybe_load_checkpoint
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from nnunetv2_misfm._startup import SEARCH_PATH_VARIABLE
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.scripts import search_path
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.resumable import BEST, FINAL, LATEST
from nnunetv2_misfm.weights.checkpoint import network_weights, read_checkpoint
from nnunetv2_misfm.weights.transfer import HEAD_MARK, transfer_weights

# What torchrun tells every process
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# How often this machine's torchrun has started its processes anew, and how often it may
RESTARTS_VARIABLE, MAX_RESTARTS_VARIABLE = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
# "True" where all starts of the processes meet at one store, in which they may read addresses of those before them
# (github.com/pytorch/pytorch/issues/135712; PyTorch 2.15 still does), and what torchrun takes to give each its own
SHARED_STORE_VARIABLE, OWN_STORE_VARIABLE = "TORCHELASTIC_USE_AGENT_STORE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
# Exit status after an error of the user, as that of nnUNetv2_misfm
USER_ERROR = 2


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line: `nnUNetv2_train`'s, with a backend in place of a number of GPUs."""
    parser = argparse.ArgumentParser(prog="torchrun ... -m nnunetv2_misfm.distributed", description=__doc__)
    parser.add_argument("dataset", help="number or name of the dataset")
    parser.add_argument("configuration", help="configuration of its plans")
    parser.add_argument("fold", type=fold, help="fold of the cross-validation, or all")
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


def fold(text: str) -> int | str:
    """Returns a fold as nnU-Net takes it: a number, or `all`."""
    return text if text == "all" else int(text)


@record
def main(arguments: list[str] | None = None) -> None:
    """Trains and validates as one of torchrun's processes.

    Raises:
        SystemExit: With `USER_ERROR` after an error that is said in a sentence; with `interruption.EXIT_CODE` after a
            signal, when the checkpoint is written.
    """
    asked = build_parser().parse_args(arguments)
    try:
        train(asked)
    except (MisfmError, NotImplementedError) as error:
        sentence = str(error)
    else:
        return
    print(f"nnunetv2_misfm.distributed, rank {os.environ.get('RANK', 0)}: {sentence}", file=sys.stderr)
    _tell_torchrun(sentence)
    raise SystemExit(USER_ERROR)


def _tell_torchrun(sentence: str) -> None:
    """Puts a sentence into torchrun's report, where the traceback of its error would take pages."""
    try:
        raise MisfmError(sentence)
    except MisfmError as error:
        get_error_handler().record_exception(error)


def train(asked: argparse.Namespace) -> None:
    """Joins torchrun's process group, trains and validates.

    Raises:
        MisfmError: Not started by torchrun or in a way that cannot work, no GPU for this process, or what `run` raises.
    """
    if missing := [name for name in VARIABLES if name not in os.environ]:
        raise MisfmError(
            f"expected the variables that torchrun sets, got no {', '.join(missing)}: start with torchrun "
            "--nproc-per-node GPUS -m nnunetv2_misfm.distributed ..."
        )
    if _may_restart() and os.environ.get(SHARED_STORE_VARIABLE) == "True":
        raise MisfmError(
            f"expected {OWN_STORE_VARIABLE}=1 in the environment of a torchrun with --max-restarts, got none: without "
            "it processes that were started anew look for those before them; export it on every machine."
        )
    if asked.c and (asked.val or asked.pretrained_weights):
        raise MisfmError("expected --c alone, got it with --val or -pretrained_weights; leave one of them out.")
    device = find_device(asked.device)
    os.environ[SEARCH_PATH_VARIABLE] = search_path()
    if int(os.environ["RANK"]) > 0:
        os.environ["nnUNet_wandb_enabled"] = "0"  # nnU-Net would open one run of Weights & Biases per rank
    backend = asked.backend or ("nccl" if device.type == "cuda" else "gloo")
    dist.init_process_group(backend, timeout=timedelta(minutes=asked.timeout))
    try:
        run(asked, device)
    except SystemExit:  # on all ranks; after an error on one, leaving the group could wait for those that wait for it
        dist.destroy_process_group()
        raise
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
        MisfmError: The trainer is not one of this package, the ranks find different checkpoints, a new training that
            may be restarted finds any, or weights that do not fit.
    """
    goes_on = asked.c or (not asked.val and was_restarted(device))
    trainer: Any = get_trainer_from_args(
        asked.dataset, asked.configuration, asked.fold, asked.tr, asked.p, goes_on, device
    )
    if not isinstance(trainer, MisfmTrainer):
        raise MisfmError(
            f"expected a trainer of nnunetv2_misfm, got {asked.tr}, which would take its rank for the number of a GPU; "
            "use nnUNetv2_train -num_gpus for it."
        )
    trainer.disable_checkpointing = asked.disable_checkpointing
    require_shared_results(Path(trainer.output_folder))
    if not (goes_on or asked.val):
        require_no_checkpoints(Path(trainer.output_folder))
    maybe_load_checkpoint(trainer, goes_on, asked.val)
    if asked.pretrained_weights and not (trainer.was_resumed or asked.val):
        load_pretrained(trainer, asked.pretrained_weights)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as nnU-Net
    if not asked.val:
        trainer.run_training()
    if asked.val_best:
        trainer.load_checkpoint(str(Path(trainer.output_folder) / BEST))
    trainer.perform_actual_validation(asked.npz)


def was_restarted(device: torch.device) -> bool:
    """Returns whether torchrun started the processes anew on any machine; those of the others count no restart."""
    restarted = torch.tensor(int(os.environ.get(RESTARTS_VARIABLE, "0")) > 0, dtype=torch.int32, device=device)
    dist.all_reduce(restarted, dist.ReduceOp.MAX)
    return bool(restarted)


def _may_restart() -> bool:
    return int(os.environ.get(MAX_RESTARTS_VARIABLE, "0")) > 0


def require_no_checkpoints(folder: Path) -> None:
    """Keeps a new training from going on, after a restart, where another one ended.

    Raises:
        MisfmError: torchrun may restart this training, and there are checkpoints in its folder.
    """
    found = sorted(path.name for path in folder.glob("checkpoint_*.pth"))
    if found and _may_restart():
        raise MisfmError(
            f"expected no checkpoint in {folder} before a new training that torchrun may restart from its last one, "
            f"got {', '.join(found)}: go on from there with --c, or move them away."
        )


def load_pretrained(trainer: MisfmTrainer, file: str) -> None:
    """Does what nnU-Net's flag does; its own function would map the file to a GPU by the rank among all processes.

    Raises:
        MisfmError: The file cannot be read, or more than the heads of its network differs.
    """
    trainer.initialize()
    report = transfer_weights(network_weights(read_checkpoint(file), file), trainer.bare_network)
    misfits = {**report.adapted, **{name: why for name, why in report.fresh.items() if HEAD_MARK not in name}}
    if misfits:
        name, why = next(iter(misfits.items()))
        raise MisfmError(
            f"-pretrained_weights expected a file that fits the network as it is, but {len(misfits)} tensors of {file} "
            f"do not (the first is {name}: {why}): fit it with nnUNetv2_misfm convert FILE --dataset ID, or name it in "
            "misfm.pretrained_weights of the plans."
        )
    trainer.print_to_log_file(f"Pretrained weights: {file}: {report.summary()}")


def require_shared_results(folder: Path) -> None:
    """Compares the ranks: machines with folders of their own would each go on with a network of their own.

    Raises:
        MisfmError: The ranks find different checkpoints.
    """
    written = []
    for name in (FINAL, LATEST, BEST):
        with suppress(FileNotFoundError), open(folder / name, "rb") as file:  # opened: NFS may answer stat from memory
            written.append(f"{name} of {datetime.fromtimestamp(os.fstat(file.fileno()).st_mtime, timezone.utc)}")
    mine = ", ".join(written) or "none"
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    if other := next((rank for rank, theirs in enumerate(found) if theirs != found[0]), None):
        raise MisfmError(
            f"expected all ranks to find the same checkpoints, got {found[0]} on rank 0 and {found[other]} on rank "
            f"{other}: let nnUNet_results be one folder that all machines share (here the run is in {folder})."
        )


if __name__ == "__main__":
    main()
