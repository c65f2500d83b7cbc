"""Command lines of nnU-Net and of this package, and the environment in which nnU-Net finds our trainers."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

from nnunetv2_misfm._startup import SEARCH_PATH_VARIABLE, is_listed
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import discovery_folder

# Seconds that nvidia-smi, or PyTorch's start, may take to name the GPU: ours
_ANSWER_SECONDS = 60


@dataclass(frozen=True)
class Command:
    """One command line; as a string, what a shell would take.

    Attributes:
        title: What it does, for the reader.
        arguments: The command and its arguments.
        variables: What its environment has besides the one that it is started in.
    """

    title: str
    arguments: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join(
            [*(f"{name}={shlex.quote(value)}" for name, value in self.variables.items()), shlex.join(self.arguments)]
        )


def find_script(name: str) -> str:
    """Returns the path of a command, that of this Python's environment first.

    Raises:
        MisfmError: Neither there nor on PATH.
    """
    beside_python = str(Path(sys.executable).parent)
    script = shutil.which(name, path=beside_python) or shutil.which(name)
    if script is None:
        raise MisfmError(
            f"expected the command {name} in {beside_python} or on PATH, found none; install nnunetv2_misfm (and "
            "with it nnunetv2) into this environment."
        )
    return script


def search_path() -> str:
    """Returns nnU-Net's search path for trainers: the user's, and our folder behind it."""
    users, ours = os.environ.get(SEARCH_PATH_VARIABLE, ""), str(discovery_folder())
    if is_listed(ours, users):
        return users
    return os.pathsep.join([entry for entry in (users, ours) if entry.strip()])


def describe_machine(device: str) -> str:
    """Returns the hardware and the versions of the packages that matter, in one line.

    Args:
        device: cpu, cuda or mps.
    """
    hardware = _gpu_name() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    packages = ("nnunetv2-misfm", "nnunetv2", "torch")
    return ", ".join([hardware, *(f"{package} {version(package)}" for package in packages)])


@cache
def _gpu_name() -> str:
    """Returns the name of the first GPU, asked in another process: this one must not open a device that others need."""
    torch_says = "import torch; print(torch.cuda.get_device_name())"
    for command in (["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], [sys.executable, "-c", torch_says]):
        try:
            said = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            continue
        if said.strip():
            return said.strip().splitlines()[0]
    return "a GPU of unknown name"
