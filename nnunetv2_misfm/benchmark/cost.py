"""What a trainer costs beside quality: parameters, operations of a forward pass, memory of a training step.

All is measured on the trainer that nnU-Net itself would make, in a process of its own (so that nothing else counts as
its memory) and with a temporary nnUNet_results; no case is read. planning/memory.py, which estimates for a machine that
is not there, is another thing: here the steps are real.

Shape letters: B batch, C channels, D H W voxels in array order.
"""

import json
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nnunetv2.run.run_training import get_trainer_from_args
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_misfm._startup import append_discovery_folder
from nnunetv2_misfm.errors import MisfmError

GPU = "GPU"
RESIDENT = "resident on the CPU"
NOT_MEASURED = "not measured: /proc of Linux is needed"
# Steps within which an optimiser must have its state: under AMP the first ones are left out until the loss scale fits
MAX_FIRST_STEPS = 20
_GIB = 2**30
_STATUS = Path("/proc/self/status")
# Writing 5 sets the peak back to what is resident now (proc(5))
_CLEAR_REFS = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"


@dataclass(frozen=True)
class Cost:
    """What a trainer costs under a configuration.

    Attributes:
        trainer: Class name.
        parameters: Trainable ones.
        gflops: 10^9 operations of one forward pass of one patch in evaluation, multiply and add counted as two. Counted
            are convolutions and matrix products, those of attention included (padding that a network adds inside,
            too); not norms, activations, softmax, pooling and interpolation.
        peak_memory_gib: GiB (2^30 bytes) at the peak of a training step with the plans' batch, not compiled, the
            optimiser's state held. On a GPU what PyTorch's tensors took, weights included, without CUDA context and
            fragmentation. On the CPU by how much the process's resident memory grew, at most, from just before the
            network was built (what a first step loads once, some 50 MB, and memory that the allocator keeps are in it).
            NaN where it cannot be measured.
        memory_kind: `GPU`, `resident on the CPU`, or why there is no figure.
    """

    trainer: str
    parameters: int
    gflops: float
    peak_memory_gib: float
    memory_kind: str


def measure_cost(
    dataset: str, configuration: str, trainer: str, plans: str = "nnUNetPlans", device: str = "cuda"
) -> Cost:
    """Returns what a trainer costs, measured in a fresh process; no results folder is made or touched.

    Args:
        dataset: Number or name of the planned dataset.
        configuration: Configuration of the plans.
        trainer: Class name, as nnU-Net's `-tr`.
        plans: Name of the plans file without its ending.
        device: `cuda` or `cpu`.

    Raises:
        MisfmError: There is no such trainer, plans or configuration, or a step failed (for lack of memory, say).
    """
    command = [sys.executable, "-m", __name__, dataset, configuration, trainer, plans, device]
    with TemporaryDirectory(prefix="misfm_cost_") as results:
        variables = {"nnUNet_results": results, "nnUNet_compile": "f", "nnUNet_wandb_enabled": "0"}
        finished = subprocess.run(
            command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
    if finished.returncode != 0:
        raise MisfmError(
            f"the cost of {trainer} under {configuration} of {dataset} ({plans}, {device}) could not be measured: "
            f"{_reason(finished.returncode, finished.stderr)}"
        )
    return Cost(**json.loads(finished.stdout.splitlines()[-1]))  # nnU-Net may have said something at its import


def _reason(status: int, errors: str) -> str:
    """Returns why a process ended, from its status and its traceback."""
    lines = [line for line in errors.splitlines() if line.strip()]
    if status < 0 or not lines:
        return f"its process ended with status {status} (-9 is what happens where memory does not suffice)."
    # The last line that is not indented names the error; what may follow it is the rest of its message
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return re.sub(r"^nnunetv2_misfm\.errors\.MisfmError: ", "", named[-1] if named else lines[-1])


def cost_of(trainer: Any) -> Cost:
    """Returns the cost of a trainer that is not yet initialised, in this process.

    Args:
        trainer: Any `nnUNetTrainer`. It is initialised, and its weights are changed by training steps on noise.
    """
    on_gpu = trainer.device.type == "cuda"
    before = 0 if on_gpu else _start_resident()
    trainer.initialize()
    trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
    trainer.network.train()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(trainer.device)
    _train(trainer, random_batch(trainer))
    peak = torch.cuda.max_memory_allocated(trainer.device) if on_gpu else _resident()["VmHWM"] - before
    trainer.set_deep_supervision_enabled(False)
    patch = torch.zeros(1, trainer.num_input_channels, *trainer.configuration_manager.patch_size, device=trainer.device)
    return Cost(
        trainer=type(trainer).__name__,
        parameters=sum(p.numel() for p in trainer.network.parameters() if p.requires_grad),
        gflops=forward_flops(trainer.network, patch) / 1e9,
        peak_memory_gib=peak / _GIB,
        memory_kind=GPU if on_gpu else RESIDENT if _STATUS.is_file() else NOT_MEASURED,
    )


def forward_flops(network: nn.Module, images: Tensor) -> int:
    """Returns the operations of a forward pass in evaluation, as `Cost.gflops` counts them.

    Args:
        network: Left in evaluation.
        images: (B, C, D, H, W), float32, on the network's device.
    """
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images)
    return counter.get_total_flops()


def random_batch(trainer: Any) -> dict[str, Any]:
    """Returns a batch of noise as nnU-Net's loader would give it to an initialised trainer.

    The labels go through nnU-Net's own handling, so regions, an ignore label, deep supervision and the one-hot labels
    of a cascade have their shapes.

    Args:
        trainer: Any initialised `nnUNetTrainer`.

    Returns:
        `data` float32 (B, C, D, H, W), `target` (B, heads' channels, D, H, W) or a list of those, finest first, `keys`.
    """
    labels, patch_size = trainer.label_manager, tuple(trainer.configuration_manager.patch_size)
    handling = trainer.get_validation_transforms(
        trainer._get_deep_supervision_scales(),
        is_cascaded=trainer.is_cascaded,
        foreground_labels=labels.foreground_labels,
        regions=labels.foreground_regions if labels.has_regions else None,
        ignore_label=labels.ignore_label,
    )
    num_label_channels = len(labels.foreground_labels) if trainer.is_cascaded else 0
    samples = []
    for _ in range(trainer.batch_size):
        image = torch.randn(trainer.num_input_channels - num_label_channels, *patch_size)
        values = torch.randint(len(labels.all_labels), (1 + trainer.is_cascaded, *patch_size))
        segmentation = torch.tensor(labels.all_labels, dtype=torch.int16)[values]
        samples.append(handling(image=image, segmentation=segmentation))
    target: Any = [sample["segmentation"] for sample in samples]
    by_scale = isinstance(target[0], list)
    return {
        "data": torch.stack([sample["image"] for sample in samples]),
        "target": [torch.stack(scale) for scale in zip(*target, strict=True)] if by_scale else torch.stack(target),
        "keys": ["noise"] * trainer.batch_size,
    }


def _train(trainer: Any, batch: dict[str, Any]) -> None:
    """Takes two training steps, the second with the optimiser's state in memory.

    Raises:
        MisfmError: The optimiser never took a step.
    """
    for _ in range(MAX_FIRST_STEPS):
        trainer.train_step(dict(batch))
        if trainer.optimizer.state:
            break
    else:
        raise MisfmError(
            f"expected {type(trainer).__name__} to train on noise, but its gradients were not finite in "
            f"{MAX_FIRST_STEPS} steps."
        )
    trainer.train_step(dict(batch))


def _start_resident() -> float:
    """Returns the bytes of this process in memory now, from which its peak is counted on."""
    if not _STATUS.is_file():
        return 0
    if os.access(_CLEAR_REFS, os.W_OK):
        _CLEAR_REFS.write_text(_RESET_PEAK)
    return _resident()["VmRSS"]


def _resident() -> dict[str, float]:
    """Returns `VmRSS` (resident now) and `VmHWM` (its peak) of this process in bytes; NaN where there is no /proc.

    `getrusage` would not do: its peak is handed down from the process that started this one.
    """
    if not _STATUS.is_file():
        return {"VmRSS": float("nan"), "VmHWM": float("nan")}
    found = re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    return {name: 1024 * int(size) for name, size in found}


def main(arguments: list[str]) -> None:
    """Prints the cost of a trainer as one line of JSON; nnU-Net's own output goes to the standard error.

    Args:
        arguments: Dataset, configuration, trainer, plans and device, as `measure_cost` takes them.
    """
    dataset, configuration, name, plans, device = arguments
    append_discovery_folder()
    torch.backends.cudnn.benchmark = device == "cuda"  # as nnU-Net's command does
    with redirect_stdout(sys.stderr):
        trainer = get_trainer_from_args(dataset, configuration, 0, name, plans, device=torch.device(device))
        cost = cost_of(trainer)
    print(json.dumps(asdict(cost)))


if __name__ == "__main__":
    main(sys.argv[1:])
