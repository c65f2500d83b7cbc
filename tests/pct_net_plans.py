"""What the tests of PCT-Net's plans share: where they lie, and how large a GPU is taken to be."""

import json
import math
from pathlib import Path
from typing import Any

from nnunetv2_misfm.planning.pct_net_planner import GIB, HEADROOM

NAME = "Dataset801_Plan"
BYTES_PER_VOXEL = 1000


def gigabytes(*patch: int, batch: int = 2) -> float:
    """A GPU on which this patch and batch just fit, at 1,000 bytes a voxel."""
    return BYTES_PER_VOXEL * math.prod(patch) * batch / GIB / (1 - HEADROOM) + 1e-6


def written(base: Path, name: str = "nnUNetPCTNetPlans") -> dict[str, Any]:
    return json.loads((base / f"{name}.json").read_text())


def planned(base: Path, configuration: str = "3d_fullres") -> tuple[list[int], int, list[list[int]]]:
    """Patch, batch and strides of the written plans."""
    entry = written(base)["configurations"][configuration]
    return entry["patch_size"], entry["batch_size"], entry["architecture"]["arch_kwargs"]["strides"]
