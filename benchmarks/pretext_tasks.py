"""Time of making a pretext task's input and target, per sample, for every pretraining method, side by side in one run.

    python benchmarks/pretext_tasks.py --device cpu --threads 2
    python benchmarks/pretext_tasks.py --device cuda

Rows: the floor, one fused pass over the batch (torch.lerp of two batches, voxel by voxel, into memory at hand); the
methods under their default recipes on a batch of normalised noise; Models Genesis as published (NumPy, one thread); and
a training step of PCT-Net at its released widths (forward, mean squared error, backward; no deep supervision, no
optimiser). All rows are measured once in every round, so that a machine whose speed drifts does so for all.
Milliseconds per sample are median (lowest to highest) over the rounds of the mean over a round's repetitions, since the
methods draw what they do; ratios are those within a round.
"""

import argparse
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import reference_models_genesis
import torch

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.pretext import PretextTrainer

FLOOR, PUBLISHED, STEP = "floor: one fused pass", "Models Genesis as published", "PCT-Net step"
MALLOC = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_")


def methods() -> dict[str, type[PretextTrainer]]:
    """Returns a trainer of every pretraining method, by the method's name."""
    trainers = [getattr(nnunetv2_misfm_trainers, name) for name in nnunetv2_misfm_trainers.__all__]
    found: dict[str, type[PretextTrainer]] = {}
    for trainer in trainers:
        if issubclass(trainer, PretextTrainer):
            found.setdefault(trainer.method.method, trainer)
    return found


def rows(options: argparse.Namespace) -> dict[str, tuple[Callable[[], object], int, int]]:
    """Returns what is timed: name -> (call, samples of a call, calls of a round)."""
    shape = tuple(map(int, options.size.split("x")))
    volumes = torch.randn(options.batch, 1, *shape, device=options.device)
    other, weight, result = (torch.rand_like(volumes) for _ in range(3))
    generator = torch.Generator().manual_seed(0)
    timed: dict[str, tuple[Callable[[], object], int, int]] = {
        FLOOR: (partial(torch.lerp, volumes, other, weight, out=result), options.batch, options.repetitions)
    }
    for name, trainer in methods().items():
        call = partial(trainer.make_task, volumes, trainer.method(), generator)
        timed[name] = (call, options.batch, options.repetitions)
    if not options.skip_published:
        unit = np.random.rand(*shape).astype(np.float32)
        timed[PUBLISHED] = (partial(reference_models_genesis.corrupt, unit), 1, options.repetitions)
    if not options.skip_step:
        network = PCTNet(1, 1, deep_supervision=False).to(options.device).train()
        half = options.device == "cuda"

        def step() -> None:
            network.zero_grad(set_to_none=True)
            with torch.autocast(options.device, torch.float16 if half else None, enabled=half):
                error = (network(volumes).float() - volumes).square().mean()
            error.backward()

        timed[STEP] = (step, options.batch, 10 if half else 1)
    return timed


def milliseconds(call: Callable[[], object], samples: int, calls: int, device: str) -> float:
    """Returns the mean time per sample."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start) / (samples * calls)


def spread(values: list[float], digits: int) -> str:
    """Returns median (lowest to highest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    """Measures and prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="64x128x128", help="D x H x W of the patch (default: 64x128x128)")
    parser.add_argument("--batch", type=int, default=4, help="default: 4, as in pretraining")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch on the CPU (default: 2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repetitions", type=int, default=20, help="batches of a method in a round (default: 20)")
    parser.add_argument("--skip-published", action="store_true", help="leave out the published procedure")
    parser.add_argument("--skip-step", action="store_true", help="leave out PCT-Net's step")
    options = parser.parse_args()
    if options.batch < 2:
        parser.error("expected --batch of at least 2: Volume Fusion fuses samples of a batch")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    timed = rows(options)
    for call, _, _ in timed.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(options.rounds):
        for name, (call, samples, calls) in timed.items():
            times[name].append(milliseconds(call, samples, calls, options.device))
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    malloc = "tuned" if all(name in os.environ for name in MALLOC) else "default"
    print(
        f"{options.size}, batch {options.batch}, {machine}, {options.threads} threads, malloc {malloc}, "
        f"torch {torch.__version__}, {options.rounds} rounds of {options.repetitions}\n"
    )
    print("| row | ms per sample | times the floor | share of PCT-Net's step | published Models Genesis / it |")
    print("|---|---|---|---|---|")
    for name, values in times.items():
        cells = [f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"]
        cells.append(spread([a / b for a, b in zip(values, times[FLOOR], strict=True)], 1))
        share = [100 * a / b for a, b in zip(values, times.get(STEP, []), strict=False)]
        cells.append(f"{spread(share, 2)} %" if share else "not run")
        faster = [b / a for a, b in zip(values, times.get(PUBLISHED, []), strict=False)]
        cells.append(spread(faster, 1) if faster and name == "models_genesis" else "")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
