"""Estimated against measured peak memory of a training step, for PCT-Net and nnU-Net's PlainConvUNet.

    python benchmarks/memory.py --size 1x1x64x128x128 --size 2x1x48x96x96 --device cpu

Each row runs in a fresh process: on the CPU the peak of the resident memory above what it was before the network was
made, on CUDA torch.cuda.max_memory_allocated (without the context). The step is that of nnunetv2_misfm.planning.memory,
after an optimiser step that fills its state. malloc is the system's default one, which keeps holes between tensors of
up to 32 MB; with --malloc mapped every tensor goes back to the system when it is freed, which is what the estimate
counts.
"""

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.planning.memory import training_memory, training_step
from nnunetv2_misfm.trainers.five_levels import five_level_strides

NUM_CLASSES = 3
# What a thin-slice plan pools: in-plane first
ANISOTROPIC = [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
ISOTROPIC = [[1, 1, 1]] + [[2, 2, 2]] * 5
# glibc's variables; the threshold in bytes lies below any tensor that counts
MALLOC: dict[str, dict[str, str]] = {"default": {}, "mapped": {"MALLOC_MMAP_THRESHOLD_": "65536"}}


def network(name: str, channels: int, anisotropic: bool) -> Callable[[], nn.Module]:
    """Returns what makes a network of its default widths."""
    strides = ANISOTROPIC if anisotropic else ISOTROPIC
    if name == "PCTNet":
        return lambda: PCTNet(channels, NUM_CLASSES, strides=five_level_strides(strides))
    kernels = [[1, 3, 3] if anisotropic and level < 2 else [3, 3, 3] for level in range(len(strides))]
    return lambda: PlainConvUNet(
        channels, len(strides), (32, 64, 128, 256, 320, 320), nn.Conv3d, kernels, strides, 2, NUM_CLASSES, 2,
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU, nonlin_kwargs={"inplace": True}, deep_supervision=True,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    """Runs a step in this process and prints its peak memory in bytes."""
    device = torch.device(options.device)
    batch, channels, *patch = map(int, options.size[0].split("x"))
    torch.manual_seed(0)
    make_network = network(options.network[0], channels, options.anisotropic)
    # Loads the libraries' code, which is no part of the step
    training_step(make_network().to(device), torch.randn(1, channels, 32, 32, 64, device=device), options.precision)
    ctypes.CDLL(None).malloc_trim(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    net = network(options.network[0], channels, options.anisotropic)().to(device).train()
    optimizer = {
        "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0, momentum=0.99),
        "adam": lambda parameters: torch.optim.Adam(parameters, lr=0),
    }[options.optimizer](net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    training_step(net, torch.randn(batch, channels, *patch, device=device), options.precision)
    optimizer.step()
    if device.type == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)


def row(options: argparse.Namespace, name: str, size: str) -> str:
    """Returns a line of the table: both figures, and the share by which the estimate is off."""
    batch, channels, *patch = map(int, size.split("x"))
    start = time.perf_counter()
    estimate = training_memory(
        network(name, channels, options.anisotropic), channels, patch, batch,
        device=options.device, precision=options.precision, optimizer=options.optimizer,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    command = [sys.executable, __file__, "--measure", "--size", size, "--network", name, "--device", options.device]
    command += ["--precision", options.precision, "--optimizer", options.optimizer]
    command += ["--anisotropic"] if options.anisotropic else []
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= MALLOC[options.malloc]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured = int(done.stdout.split()[-1])
    setting = f"{options.precision}, {options.optimizer}, {options.malloc} malloc"
    strides = "anisotropic" if options.anisotropic else "isotropic"
    return (
        f"| {name} | {size} | {strides} | {setting} | {estimate / 1e6:.0f} | "
        f"{measured / 1e6:.0f} | {estimate / measured - 1:+.1%} | {seconds:.1f} |"
    )


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", action="append", required=True, help="BxCxDxHxW; may be given several times")
    parser.add_argument("--network", action="append", choices=("PCTNet", "PlainConvUNet"), help="default: both")
    parser.add_argument("--anisotropic", action="store_true", help="strides (1, 2, 2) at the first two pools")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--optimizer", default="adam", choices=("sgd", "adam"))
    parser.add_argument("--malloc", default="default", choices=tuple(MALLOC), help="of the CPU")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options)
        return
    print(json.dumps({"torch": torch.__version__, "device": options.device, "threads": torch.get_num_threads()}))
    print("| network | size | strides | setting | estimate MB | measured MB | estimate off by | estimate takes s |")
    print("|---|---|---|---|---|---|---|---|")
    for size in options.size:
        for name in options.network or ("PCTNet", "PlainConvUNet"):
            print(row(options, name, size), flush=True)


if __name__ == "__main__":
    main()
