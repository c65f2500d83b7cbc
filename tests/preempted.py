"""nnU-Net's training in a process of its own that meets with a mishap, as on a cluster."""

import multiprocessing
import os
import resource
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from interrupting import Phase, disturb, make_repeatable
from toy import DATASET, toy_plans, write_plans

from nnunetv2_misfm.installation import discovery_folder
from nnunetv2_misfm.trainers.base import MisfmTrainer

VF = "nnUNetTrainerVFPretrain"
FILLER = "filler"
# A process that hangs is killed after so many seconds
PATIENCE = 120
PRELOADED = ["nnunetv2.run.run_training", "nnunetv2_misfm.trainers.discovery.nnunetv2_misfm_trainers", "preempted"]


@dataclass(frozen=True)
class Mishap:
    """What happens just before a step.

    Attributes:
        deed: A function of this module.
        argument: Its argument.
        epoch: From 0.
        step: From 0, of the epoch's training or validation.
        phase: Which of them.
    """

    deed: str
    argument: Any
    epoch: int = 1
    step: int = 1
    phase: Phase = "training"


def signal_to_all(trainer: Any, name: str) -> None:
    """Sends a signal to every process of the job from outside, as SLURM does."""
    command = f"kill -s {name.removeprefix('SIG')} -- -{os.getpgid(0)}"
    subprocess.run(["sh", "-c", command], start_new_session=True, check=True)


def signal_to_all_while_waiting(trainer: Any, name: str) -> None:
    """Does so while the training waits for its next batch, for longer than data workers need to die."""
    kind = type(trainer.dataloader_train)
    take = kind.__next__

    def late(loader: Any) -> Any:
        if loader is trainer.dataloader_train:
            kind.__next__ = take
            signal_to_all(trainer, name)
            time.sleep(1)
        return take(loader)

    kind.__next__ = late


def kill_here(trainer: Any = None, _: None = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in(trainer: Any, function: str) -> None:
    """Kills this process in the next call of a function of `os` (checkpoints are what calls them)."""
    setattr(os, function, lambda *_: kill_here())


def kill_a_worker(trainer: Any, _: None) -> None:
    worker = multiprocessing.active_children()[0]
    os.kill(worker.pid or 0, signal.SIGKILL)


def limit_file_size(trainer: Any, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def fill(trainer: Any, folder: str) -> None:
    """Leaves no room on a file system."""
    with open(Path(folder) / FILLER, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


@dataclass
class Job:
    """A training of the toy dataset that may take several processes.

    Attributes:
        root: nnU-Net's folders lie here.
        results: Folder of results.
        trainer: Class name.
        block: The `misfm` block.
        workers: Number of data workers.
        output: What the last process said.
    """

    root: Path
    results: Path
    trainer: str = VF
    block: dict[str, Any] = field(default_factory=dict)
    workers: int = 0
    output: str = ""

    @property
    def folder(self) -> Path:
        return self.results / DATASET / f"{self.trainer}__nnUNetPlans__quick" / "fold_0"

    @property
    def variables(self) -> dict[str, str]:
        own = {"n_proc_DA": self.workers, "compile": "f", "extTrainer": discovery_folder(), "results": self.results}
        folders = {name: self.root / name for name in ("raw", "preprocessed")}
        variables = {f"nnUNet_{name}": str(value) for name, value in {**own, **folders}.items()}
        return {**variables, "nnUNet_misfm_skip_validation": "1"}

    def run(self, resume: bool = False, mishap: Mishap | None = None) -> int | None:
        """Trains as nnU-Net's command does, and returns the exit code."""
        self.results.mkdir(exist_ok=True)
        write_plans(self.root / "preprocessed", toy_plans(self.block))
        output = self.root / "output.txt"
        output.unlink(missing_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        process = context.Process(target=_train, args=(self.variables, output, self.trainer, resume, mishap))
        process.start()
        process.join(PATIENCE)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise AssertionError(f"no end after {PATIENCE} s:\n{output.read_text()[-3000:]}")
        self.output = output.read_text()
        return process.exitcode

    def steps(self) -> list[tuple[int, int]]:
        """(epoch, step) of the training steps that the last process took or began."""
        lines = [line.split() for line in self.output.splitlines() if line.startswith("begins ")]
        return [(int(epoch), int(step)) for _, epoch, step in lines]


def _train(variables: dict[str, str], output: Path, trainer: str, resume: bool, mishap: Mishap | None) -> None:
    from nnunetv2.run.run_training import run_training

    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)  # else data workers would be started as this process was
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    for name in [name for name in os.environ if name.startswith("nnUNet_")]:
        del os.environ[name]
    os.environ.update(variables)
    torch.set_num_threads(1)
    make_repeatable()
    start = MisfmTrainer.on_train_start

    def on_train_start(this: Any) -> None:
        start(this)
        if mishap is not None:
            deed = globals()[mishap.deed]
            disturb(this, lambda: deed(this, mishap.argument), mishap.epoch, mishap.step, mishap.phase)
        take = this.train_step

        def train_step(batch: dict) -> dict:
            print("begins", this.current_epoch, this.steps_done, flush=True)
            return take(batch)

        this.train_step = train_step

    MisfmTrainer.on_train_start = on_train_start  # type: ignore[method-assign]
    run_training(DATASET, "quick", 0, trainer, continue_training=resume, device=torch.device("cpu"))
