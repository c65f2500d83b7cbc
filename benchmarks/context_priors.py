"""What context priors cost: a training step beside the bare network's, and prediction by the number of tasks.

    python benchmarks/context_priors.py --threads 2
    python benchmarks/context_priors.py --device cuda --patch 128x128x128 --batch 2 --rounds 10 --repetitions 10

Networks: nnU-Net's ResidualEncoderUNet in the widths of ResEnc M, and PCT-Net, bare and with the priors of Hermes. The
step is forward, binary cross-entropy over the tasks of a sample, backward and nnU-Net's SGD; the bare network has one
output per task, no deep supervision, and the same images and targets. Every measurement of a step runs in a process of
its own, which measures peak memory above what the process held before (CPU: resident memory; CUDA:
torch.cuda.max_memory_allocated). Prediction is a forward pass of one patch in one process, the model answering for
datasets of several numbers of tasks in turn; "bare" is the network without priors and with one class. Every round
measures everything once, so that a machine whose speed drifts does so for all; figures are median (lowest to highest)
over the rounds, each that of its repetitions' median, and ratios are those within a round; CPU seconds are summed over
the threads and say more than wall seconds on a machine with other work. On CUDA the networks run under autocast to
float16, as nnU-Net trains them. The defaults take some ten minutes on two cores.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from networks import MALLOC, line, repeat, spread
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_misfm.architectures.context_prior import Context, ContextPriorNetwork, Sample

# The published pools: 71 tasks of eleven datasets, six modalities
NUM_TASKS, NUM_MODALITIES = 71, 6
BARE, PRIORS = "bare", "with priors"
# nnU-Net's ResEnc M (nnUNetPlannerResEncM) for a patch that pools by 16 in depth
RESIDUAL_ENCODER_UNET: dict[str, Any] = {
    "class": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    "kwargs": {
        "n_stages": 6,
        "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * 6,
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 4, [1, 2, 2]],
        "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
        "n_conv_per_stage_decoder": [1] * 5,
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "kwargs_to_import": ["conv_op", "norm_op", "nonlin"],
}
NETWORKS = {
    "ResidualEncoderUNet": RESIDUAL_ENCODER_UNET,
    "PCTNet": {
        "class": "nnunetv2_misfm.architectures.pct_net.PCTNet",
        "kwargs": {"features_per_stage": [24, 48, 128, 256, 512]},
        "kwargs_to_import": [],
    },
}


def build(name: str, kind: str, num_tasks: int, narrow: int) -> nn.Module:
    """Returns a network, bare with an output per task or with priors of at least so many tasks."""
    network = NETWORKS[name]
    widths = [width // narrow for width in network["kwargs"]["features_per_stage"]]
    kwargs, imported = {**network["kwargs"], "features_per_stage": widths}, network["kwargs_to_import"]
    if name == "PCTNet" and narrow > 1:
        kwargs["num_heads"] = [1, 1, 1]
    if kind == BARE:
        return get_network_from_plans(network["class"], kwargs, imported, 1, num_tasks, deep_supervision=False)
    described = {"class": network["class"], "kwargs": kwargs, "kwargs_to_import": imported}
    pool = max(NUM_TASKS, num_tasks)
    return ContextPriorNetwork(1, pool, num_modalities=NUM_MODALITIES, network=described)


def measure_step(name: str, kind: str, options: argparse.Namespace) -> dict[str, float]:
    """Returns wall and CPU seconds of a step and bytes of its peak memory, in this process."""
    device, tasks, patch = torch.device(options.device), options.step_tasks, map(int, options.patch.split("x"))
    torch.manual_seed(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    network = build(name, kind, tasks, options.narrow).to(device).train()
    image = torch.randn(options.batch, 1, *patch)
    target = (torch.rand(options.batch, tasks, *image.shape[2:]) < 0.1).float().to(device)
    shape = (options.batch, tasks)
    context = Context(
        torch.randint(NUM_TASKS, shape), torch.ones(shape, dtype=torch.bool),
        torch.randint(NUM_MODALITIES, (options.batch,)),
    )  # fmt: skip
    batch = Sample(image, context).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.99, nesterov=True, weight_decay=3e-5)
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.float16 if on_gpu else None, enabled=on_gpu):
            loss = loss_of(network(batch if kind == PRIORS else batch.image), target, context.modality.to(device))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    wall, cpu = (statistics.median(times) for times in zip(*repeat(step, options), strict=True))
    if on_gpu:
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"seconds": wall, "cpu": cpu, "peak": peak, "parameters": parameters}


def loss_of(answer: Any, target: Tensor, modality: Tensor) -> Tensor:
    """Returns binary cross-entropy over tasks and, of an answer with a modality, a hundredth of its cross-entropy."""
    if isinstance(answer, Tensor):
        return functional.binary_cross_entropy_with_logits(answer, target)
    loss = functional.binary_cross_entropy_with_logits(answer.logits, target)
    return loss + 0.01 * functional.cross_entropy(answer.modality, modality)


@torch.inference_mode()
def measure_prediction(name: str, options: argparse.Namespace) -> list[dict[str, float]]:
    """Returns, for every round, seconds of a patch for the bare network and for every number of tasks."""
    device, patch = torch.device(options.device), map(int, options.patch.split("x"))
    torch.manual_seed(0)
    bare = build(name, BARE, 1, options.narrow).to(device).eval()
    network: Any = build(name, PRIORS, max(options.tasks), options.narrow).to(device).eval()
    image = torch.randn(1, 1, *patch, device=device)
    on_gpu = device.type == "cuda"

    def seconds(call: nn.Module) -> float:
        with torch.autocast(device.type, torch.float16 if on_gpu else None, enabled=on_gpu):
            return statistics.median(wall for wall, _ in repeat(lambda: call(image), options))

    rounds = []
    for _ in range(options.rounds):
        found = {BARE: seconds(bare)}
        for number in options.tasks:
            network.answer_for(range(number))
            found[str(number)] = seconds(network)
        rounds.append(found)
    return rounds


def child(options: argparse.Namespace, *what: str) -> Any:
    """Returns what a process of its own measures."""
    command = [sys.executable, __file__, *sys.argv[1:], "--child", *what]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    environment |= MALLOC[options.malloc]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def times_and_ratios(runs: list[tuple[dict[str, float], dict[str, float]]], measure: str) -> tuple[str, str]:
    """Returns the spread over the rounds of a network's measure, and of its ratio to the bare network's."""
    return spread([run[measure] for run, _ in runs]), spread([run[measure] / base[measure] for run, base in runs])


def step_table(rounds: list[dict[str, dict[str, dict[str, float]]]]) -> str:
    """Returns the table of steps, of each round's figures by network and kind."""
    columns = [
        "network", "step s", "ratio to bare by round", "step CPU s", "ratio by round", "peak MB", "ratio",
        "parameters M",
    ]  # fmt: skip
    lines = [line(columns), line(["---"] * len(columns))]
    for name in rounds[0]:
        for kind in (BARE, PRIORS):
            runs = [(found[name][kind], found[name][BARE]) for found in rounds]
            peaks = [statistics.median(run[which]["peak"] for run in runs) for which in (0, 1)]
            cells = [
                f"{name}, {kind}",
                *times_and_ratios(runs, "seconds"),
                *times_and_ratios(runs, "cpu"),
                f"{peaks[0] / 1e6:.0f}",
                f"{peaks[0] / peaks[1]:.3g}",
                f"{runs[0][0]['parameters'] / 1e6:.1f}",
            ]
            lines.append(line(cells))
    return "\n".join(lines)


def prediction_table(found: dict[str, list[dict[str, float]]], tasks: list[int]) -> str:
    """Returns the table of prediction, of each network's rounds."""
    columns = ["tasks"] + [cell for name in found for cell in (f"{name}, s", f"ratio to {tasks[0]} by round")]
    lines = [line(columns), line(["---"] * len(columns))]
    for row in (BARE, *map(str, tasks)):
        cells = [row]
        for rounds in found.values():
            cells.append(spread([times[row] for times in rounds]))
            cells.append(spread([times[row] / times[str(tasks[0])] for times in rounds]))
        lines.append(line(cells))
    return "\n".join(lines)


def hardware(options: argparse.Namespace) -> str:
    """Returns machine, software and setting in a line."""
    if options.device == "cuda":
        device = f"{torch.cuda.get_device_name()}, autocast to float16"
    else:
        models = [row for row in Path("/proc/cpuinfo").read_text().splitlines() if row.startswith("model name")]
        model = models[0].partition(": ")[2] if models else platform.machine()
        device = f"{model}, {torch.get_num_threads()} threads, float32, {options.malloc} malloc"
    return (
        f"{device}, torch {torch.__version__}, Python {platform.python_version()}; patch {options.patch}, batch "
        f"{options.batch}, {options.step_tasks} tasks per sample; {options.rounds} rounds of {options.repetitions}"
    )


def compare(options: argparse.Namespace) -> None:
    """Measures in rounds and prints the tables."""
    print(hardware(options), flush=True)
    rounds = [
        {name: {kind: child(options, name, kind) for kind in (BARE, PRIORS)} for name in options.networks}
        for _ in range(options.rounds)
    ]
    print(f"\nA training step:\n\n{step_table(rounds)}", flush=True)
    found = {name: child(options, name, "prediction") for name in options.networks}
    print(f"\nA forward pass of one patch:\n\n{prediction_table(found, options.tasks)}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patch", default="64x96x96", help="DxHxW (default: 64x96x96)")
    parser.add_argument("--batch", type=int, default=1, help="of a step (default: 1)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--malloc", default="tuned", choices=tuple(MALLOC), help="glibc's (default: tuned)")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=tuple(NETWORKS))
    parser.add_argument("--step-tasks", type=int, default=15, help="tasks per sample in a step (default: 15)")
    parser.add_argument("--tasks", type=int, nargs="+", default=[1, 2, 5, 10, 20, 50, 100], help="in prediction")
    parser.add_argument("--narrow", type=int, default=1, help="what divides all widths, for a quick try")
    parser.add_argument("--repetitions", type=int, default=1, help="in every round, after one that does not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = True  # as nnU-Net sets it
    if not options.child:
        compare(options)
    elif options.child[1] == "prediction":
        print(json.dumps(measure_prediction(options.child[0], options)))
    else:
        print(json.dumps(measure_step(*options.child, options)))


if __name__ == "__main__":
    main()
