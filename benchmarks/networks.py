"""Time, memory and arithmetic of a training step and a forward pass, side by side in one run.

    python benchmarks/networks.py --size 1x1x64x128x128 --device cpu --threads 2
    python benchmarks/networks.py --device cuda --precision float16 --networks "PCTNet reference" "PCTNet compiled"

Networks: PCT-Net, PCT-Net as the released code works (reference), FMUNet, and nnU-Net's PlainConvUNet and
ResidualEncoderUNet. Every network runs in a process of its own, in rounds: each round runs all networks once, so that a
machine whose speed drifts does so for all. The step is forward, Dice + cross-entropy and backward without an optimiser
and without deep supervision. Figures: median (lowest to highest) over all rounds' repetitions in seconds of wall time;
CPU seconds per step over the threads; peak memory (CPU: resident memory of the process, libraries included, that of the
forward pass alone in a process of its own; CUDA: torch.cuda.max_memory_allocated); parameters; FLOPs (2 x MAC) by
PyTorch's counter; and the rate as a share of the machine's ceiling, the best that a 3x3x3 convolution of 128 channels
or a matrix product reached in this run. Ratios are those of the medians within a round; "default" and "tuned" are
settings of glibc's malloc.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from reference_pct_net import REFERENCES, reference_pct_net
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from nnunetv2_misfm.architectures import FMUNet, PCTNet
from nnunetv2_misfm.weights.released import STRIDES

NUM_CLASSES = 5
UNET: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": nn.Conv3d,
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 4, [1, 2, 2]],
    "conv_bias": True,
    "norm_op": nn.InstanceNorm3d,
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "nonlin": nn.LeakyReLU,
    "nonlin_kwargs": {"inplace": True},
    "deep_supervision": False,
}
NETWORKS = ("PlainConvUNet", "PCTNet", "PCTNet reference", "FMUNet", "ResidualEncoderUNet")
COMPILED = " compiled"
# glibc's variables: "tuned" keeps the memory of freed tensors
MALLOC = {"default": {}, "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"}}
# What each measure is worth: PCT-Net with one kind of module as in the reference
UNDONE = tuple(f"PCTNet with reference {module.__name__}" for module in REFERENCES)
NO_ATTENTION_DROPOUT = "PCTNet without attention dropout"


def build(name: str, options: argparse.Namespace) -> nn.Module:
    """Returns a network of its default widths."""
    name = name.removesuffix(COMPILED)
    channels = int(options.size.split("x")[1])
    strides = STRIDES[options.resolution_mode]
    if name == "PlainConvUNet":
        return PlainConvUNet(channels, num_classes=NUM_CLASSES, n_conv_per_stage=2, n_conv_per_stage_decoder=2, **UNET)
    if name == "ResidualEncoderUNet":  # nnU-Net's ResEnc M and L (ResidualEncoderUNetPlanner)
        blocks = {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1] * 5}
        return ResidualEncoderUNet(channels, num_classes=NUM_CLASSES, **blocks, **UNET)
    if name == "FMUNet":
        return FMUNet(channels, NUM_CLASSES, strides=strides, deep_supervision=False)
    arguments = {"attention_dropout": 0.0} if name == NO_ATTENTION_DROPOUT else {}
    network = PCTNet(channels, NUM_CLASSES, strides=strides, deep_supervision=False, **arguments)
    if name == "PCTNet reference":
        return reference_pct_net(network)
    return reference_pct_net(network, name.rpartition(" ")[2]) if name in UNDONE else network


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns Dice + cross-entropy of logits (B, C, D, H, W) and labels (B, D, H, W)."""
    probabilities = logits.float().softmax(1)
    truth = functional.one_hot(labels, NUM_CLASSES).movedim(-1, 1).float()
    overlap, total = (probabilities * truth).sum((0, 2, 3, 4)), (probabilities + truth).sum((0, 2, 3, 4))
    return functional.cross_entropy(logits.float(), labels) + 1 - (2 * overlap / (total + 1e-5)).mean()


def repeat(run: Callable[[], object], options: argparse.Namespace) -> list[tuple[float, float]]:
    """Returns wall and CPU seconds of every repetition after one that does not count."""
    times = []
    for repetition in range(options.repetitions + 1):
        if options.device == "cuda" and repetition == 1:
            torch.cuda.reset_peak_memory_stats()
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        if options.device == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return times[1:]


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one network in this process."""
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = build(name, options).to(options.device).train(options.phase == "step")
    batch, channels, *patch = map(int, options.size.split("x"))
    image = torch.randn(batch, channels, *patch, device=options.device)
    labels = torch.randint(NUM_CLASSES, (batch, *patch), device=options.device)
    call = torch.compile(network) if name.endswith(COMPILED) else network
    torch.backends.cudnn.benchmark = True  # as nnU-Net sets it
    half = options.precision != "float32"

    def forward() -> Tensor:
        with torch.autocast(options.device, getattr(torch, options.precision) if half else None, enabled=half):
            return call(image)

    def step() -> None:
        network.zero_grad(set_to_none=True)
        loss_of(forward(), labels).backward()

    figures: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters())}
    if options.phase == "step":
        times = repeat(step, options)
    else:
        with torch.inference_mode():
            times = repeat(forward, options)
    if options.device == "cuda":
        figures["peak"] = torch.cuda.max_memory_allocated()
    else:
        figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures["wall"], figures["cpu"] = [wall for wall, _ in times], [cpu for _, cpu in times]
    return figures


def count_flops(name: str, options: argparse.Namespace) -> tuple[float, float]:
    """Returns FLOPs of a forward pass and of a step, counted on shapes alone."""
    batch, channels, *patch = map(int, options.size.split("x"))
    with torch.device("meta"):
        network = build(name, options).train()
        image = torch.empty(batch, channels, *patch)
        with FlopCounterMode(display=False) as counter:
            logits = network(image)
            forward = counter.get_total_flops()
            logits.sum().backward()
    return forward, counter.get_total_flops()


def ceiling(options: argparse.Namespace) -> dict[str, float]:
    """Returns FLOPs per second of a 3x3x3 convolution of 128 channels (forward and backward) and a matrix product."""
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype, device = getattr(torch, options.precision), options.device
    convolution = nn.Conv3d(128, 128, 3, padding=1, device=device, dtype=dtype)
    grid = torch.randn(1, 128, 32, 32, 32, device=device, dtype=dtype, requires_grad=True)
    matrix = torch.randn(4096, 4096, device=device, dtype=dtype)
    convolve = min(wall for wall, _ in repeat(lambda: convolution(grid).sum().backward(), options))
    multiply = min(wall for wall, _ in repeat(lambda: matrix @ matrix, options))
    return {"conv3d": 3 * 2 * 128 * 128 * 27 * 32**3 / convolve, "matmul": 2 * 4096**3 / multiply}


def child(options: argparse.Namespace, what: str, phase: str) -> dict[str, Any]:
    """Returns what a process of its own measures."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", what, "--phase", phase]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= MALLOC[options.malloc]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> str:
    """Returns median (lowest to highest)."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


def line(cells: list[str]) -> str:
    """Returns a line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def compare(options: argparse.Namespace) -> None:
    """Measures all networks in rounds and prints the tables."""
    setting = {key: value for key, value in vars(options).items() if key not in ("child", "phase")}
    gpu = torch.cuda.get_device_name() if options.device == "cuda" else None
    print(json.dumps({**setting, "torch": torch.__version__, "python": platform.python_version(), "gpu": gpu}))
    ceilings = child(options, "ceiling", "step")
    best = max(ceilings.values())
    print(", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in ceilings.items()))
    rounds: dict[str, list[dict[str, dict[str, Any]]]] = {name: [] for name in options.networks}
    for _ in range(options.rounds):
        for name in options.networks:
            rounds[name].append({phase: child(options, name, phase) for phase in ("step", "forward")})
    base = rounds[options.networks[0]]
    columns = [
        "network", "malloc", "step s", f"ratio to {options.networks[0]} by round", "step CPU s", "step peak MB",
        "forward s", "forward peak MB", "parameters M", "GFLOP forward / step", "share of ceiling",
    ]  # fmt: skip
    print(line(columns), line(["---"] * len(columns)), sep="\n")
    for name, runs in rounds.items():
        steps, forwards = ([t for run in runs for t in run[phase]["wall"]] for phase in ("step", "forward"))
        pairs = zip(runs, base, strict=True)
        ratios = [statistics.median(a["step"]["wall"]) / statistics.median(b["step"]["wall"]) for a, b in pairs]
        peaks = [max(run[phase]["peak"] for run in runs) / 1e6 for phase in ("step", "forward")]
        flops = count_flops(name, options)
        share = flops[1] / statistics.median(steps) / best
        cpu = statistics.median(t for run in runs for t in run["step"]["cpu"])
        parameters = f"{runs[0]['step']['parameters'] / 1e6:.1f}"
        cells = [
            name, options.malloc, spread(steps), spread(ratios), f"{cpu:.1f}", f"{peaks[0]:.0f}", spread(forwards),
            f"{peaks[1]:.0f}", parameters, f"{flops[0] / 1e9:.0f} / {flops[1] / 1e9:.0f}", f"{share:.0%}",
        ]  # fmt: skip
        print(line(cells))


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="1x1x64x128x128", help="BxCxDxHxW")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--precision", default="float32", choices=("float32", "float16", "bfloat16"), help="of autocast"
    )
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--malloc", default="default", choices=tuple(MALLOC), help="glibc's")
    parser.add_argument(
        "--networks",
        nargs="+",
        default=list(NETWORKS),
        choices=(*NETWORKS, *(name + COMPILED for name in NETWORKS), *UNDONE, NO_ATTENTION_DROPOUT),
        help="the first is the base",
    )
    parser.add_argument("--resolution-mode", type=int, default=1, choices=(0, 1, 2), help="of PCT-Net and FMUNet")
    parser.add_argument("--repetitions", type=int, default=3, help="in every round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--phase", default="step", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == "ceiling":
        print(json.dumps(ceiling(options)))
    elif options.child:
        print(json.dumps(measure(options.child, options)))
    else:
        compare(options)


if __name__ == "__main__":
    main()
