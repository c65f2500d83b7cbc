"""One universal model against one stock model per dataset, at the same total number of steps, in one table.

    python benchmarks/universal.py -o FOLDER --hippocampus .../Dataset004_Hippocampus --labelled .../ct_labelled

Makes the datasets of universal_data.py below FOLDER, joins them with `nnUNetv2_misfm universal`, and trains by
nnU-Net's own commands: nnUNetTrainerHermes once for `--steps` steps, and nnUNetTrainerBaseline (stock nnU-Net in a
length of one's choice) on every dataset for an equal share of them, under the same plans: spacing, patch, batch and
network. Both validate on the same held-out cases with nnU-Net's final validation; the table holds the Dice of its
summary.json files.
With several seeds everything is trained once per seed. What is already trained is not trained again.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
from pathlib import Path

import numpy as np
import torch
from universal_data import DATASETS, make_datasets

UNIVERSAL, NAME = 950, "Universal"
SHARED = "nnUNetPlansOf950"
EPOCH = 50  # steps


def run(*command: str) -> None:
    """Runs a command and shows it; raises where it fails."""
    print("$", " ".join(command), flush=True)
    subprocess.run(command, check=True)


def join(options: argparse.Namespace) -> None:
    """Writes the datasets and joins them, unless that was done before."""
    if (options.output / "preprocessed" / f"Dataset{UNIVERSAL}_{NAME}").is_dir():
        return
    make_datasets(options.output / "raw", options.hippocampus, options.labelled)
    sizes = [str(n) for n in options.patch]
    run(
        "nnUNetv2_misfm", "universal", "-d", *map(str, DATASETS), "--dataset", str(UNIVERSAL), "--name", NAME,
        "--same", "111:liver=112:liver", "--spacing", *[str(options.spacing)] * 3, "--patch-size", *sizes,
        "--batch-size", str(options.batch), "--features", *map(str, options.features), "-np", "2",
    )  # fmt: skip


def train(options: argparse.Namespace, dataset: int, trainer: str, plans: str, steps: int, seed: int) -> None:
    """Trains and validates by nnU-Net's command, unless its validation is there."""
    method = trainer.removeprefix("nnUNetTrainer").lower()
    name = f"{method}_{steps}_{seed}"
    if summary(options, dataset if method == "baseline" else next(iter(DATASETS)), trainer, name).is_file():
        return
    settings = [f"num_epochs={steps // EPOCH}", f"num_iterations_per_epoch={EPOCH}", f"seed={seed}"]
    more = ["num_val_iterations_per_epoch=5", "hermes.evaluate_every_epochs=10", *options.settings]
    run(
        "nnUNetv2_misfm", "configure", "-d", str(dataset), "-c", "3d_fullres", "-p", plans, "--name", name, *settings,
        *(more if method == "hermes" else more[:1]),
    )  # fmt: skip
    run("nnUNetv2_train", str(dataset), name, str(options.fold), "-tr", trainer, "-p", plans, "-device", options.device)


def summary(options: argparse.Namespace, dataset: int, trainer: str, configuration: str) -> Path:
    """Returns where the final validation of a dataset writes its scores."""
    run_folder = f"{trainer}__{SHARED}__{configuration}"
    base = options.output / "results" / DATASETS[dataset] / run_folder
    return base / f"fold_{options.fold}" / "validation" / "summary.json"


def scores(options: argparse.Namespace, dataset: int, trainer: str, steps: int) -> dict[str, list[float]]:
    """Returns mean validation Dice of each class, one value per seed."""
    labels = json.loads((options.output / "raw" / DATASETS[dataset] / "dataset.json").read_text())["labels"]
    method = trainer.removeprefix("nnUNetTrainer").lower()
    found: dict[str, list[float]] = {name: [] for name in labels if name != "background"}
    for seed in options.seeds:
        means = json.loads(summary(options, dataset, trainer, f"{method}_{steps}_{seed}").read_text())["mean"]
        for name, values in found.items():
            values.append(100 * means[str(labels[name])]["Dice"])
    return found


def shown(values: list[float]) -> str:
    """Returns mean, and lowest and highest where there are several."""
    spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def table(options: argparse.Namespace) -> str:
    """Returns the comparison as Markdown."""
    share = options.steps // len(DATASETS)
    lines = [
        f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {options.device}; "
        f"{len(options.seeds)} seeds, fold {options.fold}; {options.steps} steps of the universal model, {share} of "
        f"each stock model; patch {options.patch}, batch {options.batch}, channels {options.features}, "
        f"spacing {options.spacing} mm.",
        "",
        "| dataset | class | held-out cases | stock, Dice % | universal, Dice % | difference |",
        "|---|---|---|---|---|---|",
    ]
    differences = []
    for dataset, name in DATASETS.items():
        stock = scores(options, dataset, "nnUNetTrainerBaseline", share)
        ours = scores(options, dataset, "nnUNetTrainerHermes", options.steps)
        configuration = f"hermes_{options.steps}_{options.seeds[0]}"
        cases = json.loads(summary(options, dataset, "nnUNetTrainerHermes", configuration).read_text())
        for label in stock:
            difference = statistics.mean(ours[label]) - statistics.mean(stock[label])
            differences.append(difference)
            held_out = len(cases["metric_per_case"])
            lines.append(
                f"| {name} | {label} | {held_out} | {shown(stock[label])} | {shown(ours[label])} | {difference:+.1f} |"
            )
    lines += ["", f"Mean difference over classes: {np.mean(differences):+.1f} Dice points."]
    return "\n".join(lines)


def main() -> None:
    """Runs everything and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for data, models and results")
    parser.add_argument("--hippocampus", type=Path, required=True, help="raw dataset 4")
    parser.add_argument("--labelled", type=Path, required=True, help="folder of the labelled scans")
    parser.add_argument("--steps", type=int, default=3000, help="of the universal model")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--patch", type=int, nargs=3, default=[32, 40, 40])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--features", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--spacing", type=float, default=1.5, help="mm (the paper's)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--settings", nargs="*", default=[], help="key=value of the universal model's misfm block")
    options = parser.parse_args()
    options.output = options.output.resolve()
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(options.output / name)
        (options.output / name).mkdir(parents=True, exist_ok=True)
    join(options)
    share = options.steps // len(DATASETS) // EPOCH * EPOCH
    if share * len(DATASETS) != options.steps:
        parser.error(f"expected --steps that {len(DATASETS)} datasets share in epochs of {EPOCH}, got {options.steps}")
    for seed in options.seeds:
        train(options, UNIVERSAL, "nnUNetTrainerHermes", "nnUNetPlans", options.steps, seed)
        for dataset in DATASETS:
            train(options, dataset, "nnUNetTrainerBaseline", SHARED, share, seed)
    print(table(options))


if __name__ == "__main__":
    main()
