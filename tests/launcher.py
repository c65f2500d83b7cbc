"""`torchrun` of this environment on the toy dataset, as one agent or as two that stand for two machines."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toy import DATASET, toy_plans, write_toy_dataset

PRETRAIN, FINETUNE = "nnUNetTrainerPCTNetVFPretrainWitnessed", "nnUNetTrainerPCTNetVFWitnessed"
# Long enough for a machine that does much else
TIMEOUT_S = 300
# Until processes that were told to end are gone
SECONDS_TO_END = 20


@dataclass
class Finished:
    """What a launch came to.

    Attributes:
        codes: Exit codes of the agents.
        output: What they and their ranks printed.
        left_behind: Command lines of processes that outlived the agents.
    """

    codes: list[int]
    output: str
    left_behind: list[str]


@dataclass
class Launcher:
    """A folder with the toy dataset, and launches by name."""

    root: Path
    finished: dict[str, Finished] = field(default_factory=dict)

    def write_dataset(self) -> None:
        """Writes six cases, and configurations of two epochs of three steps with a checkpoint after each."""
        block = {"num_epochs": 2, "num_iterations_per_epoch": 3, "checkpoint_every_minutes": 1e-6}
        plans = toy_plans(block, patch_size=[16, 16, 32])  # two values per channel for a BatchNorm with a batch of one
        quick = plans["configurations"]["quick"]
        short = {**quick["misfm"], "num_epochs": 1}
        whole = {**short, "batch_per_gpu": True, "lr_scaling": "sqrt"}
        plans["configurations"] |= {"short": {**quick, "misfm": short}, "whole": {**quick, "misfm": whole}}
        write_toy_dataset(self.root / "preprocessed", plans)
        (self.root / "raw").mkdir()

    def variables(self, name: str, more: Mapping[str, str]) -> dict[str, str]:
        """Returns the environment of a launch, nothing of nnU-Net's or torchrun's taken from this process'."""
        ours = ("nnUNet_", "TORCHELASTIC_", "PET_", "MISFM_")
        inherited = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        return {
            **inherited,
            **{f"nnUNet_{folder}": str(self.root / folder) for folder in ("raw", "preprocessed")},
            "nnUNet_results": str(self.root / name),
            "nnUNet_extTrainer": str(Path(__file__).with_name("launcher_trainers")),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "nnUNet_compile": "f",
            "nnUNet_misfm_skip_validation": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
            "CUDA_VISIBLE_DEVICES": "",
            "MISFM_TEST_ACCOUNTS": str(self.root / f"{name}_accounts"),
            **more,
        }

    def launch(
        self,
        name: str,
        trainer: str,
        configuration: str,
        *options: str | Path,
        torchrun: Sequence[str] = ("--standalone", "--nproc-per-node", "2"),
        variables: Sequence[Mapping[str, str]] = ({},),
        results: str | None = None,
    ) -> None:
        """Runs one torchrun for each entry of `variables`, at once, and waits for them."""
        arguments = ["555", configuration, "0", "-tr", trainer, "-device", "cpu", *map(str, options)]
        program = str(Path(sys.executable).with_name("torchrun"))
        command = [program, *torchrun, "-m", "nnunetv2_misfm.distributed", *arguments]
        agents, outputs = [], [self.root / f"{name}_{i}.txt" for i in range(len(variables))]
        for more, output in zip(variables, outputs, strict=True):
            environment = self.variables(results or name, {"MISFM_TEST_LAUNCH": str(self.root / name), **more})
            with output.open("w") as stream:
                agents.append(
                    subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
                    )
                )
        try:
            codes = [agent.wait(timeout=TIMEOUT_S) for agent in agents]
        finally:
            for agent in agents:
                agent.kill()
        text = "\n".join(output.read_text() for output in outputs)
        self.finished[name] = Finished(codes, text, self.left_behind(name))

    def launch_on_two_machines(self, *arguments: Any, torchrun: Sequence[str] = (), **more: Any) -> None:
        """Runs two agents of one process each, which meet at a port of this machine; `variables` has two entries."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        meeting = (
            "--nnodes",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"127.0.0.1:{port}",
            "--rdzv-id",
            "toy",
        )
        more.setdefault("variables", ({}, {}))
        self.launch(*arguments, torchrun=("--nproc-per-node", "1", *meeting, *torchrun), **more)

    def left_behind(self, name: str) -> list[str]:
        """Returns the command lines of a launch's processes that are still there after a while (on Linux)."""
        mark = f"MISFM_TEST_LAUNCH={self.root / name}\0".encode()
        deadline = time.monotonic() + SECONDS_TO_END
        while True:
            found = [process for process in Path("/proc").glob("[0-9]*") if mark in _read(process / "environ")]
            if not found or time.monotonic() > deadline:
                return [_read(process / "cmdline").decode() for process in found]
            time.sleep(0.1)

    def accounts(self, name: str, start: int = 0) -> list[dict[str, Any]]:
        """Returns what both ranks told after a start of their processes."""
        files = [self.root / f"{name}_accounts" / f"{rank}_{start}.json" for rank in (0, 1)]
        assert all(file.is_file() for file in files), self.finished[name].output[-4000:]
        return [json.loads(file.read_text()) for file in files]

    def fold(self, name: str, trainer: str = PRETRAIN, configuration: str = "quick") -> Path:
        """Returns the results of a launch."""
        return self.root / name / DATASET / f"{trainer}__nnUNetPlans__{configuration}" / "fold_0"


def free_port() -> int:
    """Returns a port of this machine that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError:  # a process that has just ended
        return b""
