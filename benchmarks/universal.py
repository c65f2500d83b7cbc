"""One universal model against one stock model per dataset, at the same total number of steps, in one table.

    python benchmarks/universal.py -o FOLDER --hippocampus .../Dataset004_Hippocampus --labelled .../ct_labelled

Makes the datasets of universal_data.py below FOLDER, joins them with `nnUNetv2_misfm universal`, and trains by
nnU-Net's own commands: nnUNetTrainerHermes once for `--steps` steps, and nnUNetTrainerBaseline (stock nnU-Net in a
length of one's choice) on every dataset for an equal share of them, under the same plans: spacing, patch, batch and
network. Both predict the same held-out cases with nnUNetv2_predict, without mirroring; the table holds the Dice of
nnUNetv2_evaluate_folder.
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
HERMES, STOCK = "nnUNetTrainerHermes", "nnUNetTrainerBaseline"
FINAL = "checkpoint_final.pth"
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
    """Trains by nnU-Net's command, unless that is done; the final validation, with its mirroring, is left out."""
    name = run_name(trainer, steps, seed)
    folder = DATASETS.get(dataset, f"Dataset{UNIVERSAL}_{NAME}")
    if (options.output / "results" / folder / f"{trainer}__{plans}__{name}/fold_{options.fold}" / FINAL).is_file():
        return
    settings = [f"num_epochs={steps // EPOCH}", f"num_iterations_per_epoch={EPOCH}", f"seed={seed}"]
    settings.append("num_val_iterations_per_epoch=5")
    if trainer == HERMES:
        settings += ["hermes.evaluate_every_epochs=0", *options.settings]
    target = ("-d", str(dataset), "-c", "3d_fullres", "-p", plans)
    run("nnUNetv2_misfm", "configure", *target, "--name", name, *settings)
    run("nnUNetv2_train", str(dataset), name, str(options.fold), "-tr", trainer, "-p", plans, "-device", options.device)


def test(options: argparse.Namespace, dataset: int, trainer: str, steps: int, seed: int) -> None:
    """Predicts a dataset's held-out cases and compares them with the truth, both by nnU-Net's commands."""
    name, source = run_name(trainer, steps, seed), options.output / "raw" / DATASETS[dataset]
    if (summary := summary_of(options, dataset, trainer, steps, seed)).is_file():
        return
    splits = json.loads((options.output / "preprocessed" / DATASETS[dataset] / "splits_final.json").read_text())
    images, truth = (options.output / "held out" / DATASETS[dataset] / part for part in ("images", "labels"))
    for folder, of, ending in ((images, "imagesTr", "_0000.nii.gz"), (truth, "labelsTr", ".nii.gz")):
        folder.mkdir(parents=True, exist_ok=True)
        for case in splits[options.fold]["val"]:
            (folder / f"{case}{ending}").unlink(missing_ok=True)
            (folder / f"{case}{ending}").symlink_to(source / of / f"{case}{ending}")
    run(
        "nnUNetv2_predict", "-d", str(dataset), "-c", name, "-tr", trainer, "-p", SHARED, "-f", str(options.fold),
        "-i", str(images), "-o", str(summary.parent), "--disable_tta", "-device", options.device, "-npp", "1",
        "-nps", "1",
    )  # fmt: skip
    described = ("-djfile", str(source / "dataset.json"), "-pfile", str(summary.parent / "plans.json"))
    run("nnUNetv2_evaluate_folder", str(truth), str(summary.parent), *described)


def run_name(trainer: str, steps: int, seed: int) -> str:
    """Returns the name of a run's configuration."""
    return f"{trainer.removeprefix('nnUNetTrainer').lower()}_{steps}_{seed}"


def summary_of(options: argparse.Namespace, dataset: int, trainer: str, steps: int, seed: int) -> Path:
    """Returns where the scores of a run on a dataset lie."""
    predictions = options.output / "predictions" / f"{run_name(trainer, steps, seed)}_fold_{options.fold}"
    return predictions / DATASETS[dataset] / "summary.json"


def scores(options: argparse.Namespace, dataset: int, trainer: str, steps: int) -> dict[str, list[float]]:
    """Returns the mean Dice of each class over the held-out cases, one value per seed."""
    labels = json.loads((options.output / "raw" / DATASETS[dataset] / "dataset.json").read_text())["labels"]
    found: dict[str, list[float]] = {name: [] for name in labels if name != "background"}
    for seed in options.seeds:
        means = json.loads(summary_of(options, dataset, trainer, steps, seed).read_text())["mean"]
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
        stock = scores(options, dataset, STOCK, share)
        ours = scores(options, dataset, HERMES, options.steps)
        cases = json.loads(summary_of(options, dataset, HERMES, options.steps, options.seeds[0]).read_text())
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
    parser.add_argument("--datasets", type=int, nargs="+", help="of these alone, to share the work; without the table")
    parser.add_argument("--settings", nargs="*", default=[], help="key=value of the universal model's misfm block")
    options = parser.parse_args()
    options.output = options.output.resolve()
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(options.output / name)
        (options.output / name).mkdir(parents=True, exist_ok=True)
    os.environ["nnUNet_misfm_skip_validation"] = "1"
    join(options)
    datasets = options.datasets or list(DATASETS)
    share = options.steps // len(DATASETS) // EPOCH * EPOCH
    if share * len(DATASETS) != options.steps:
        parser.error(f"expected --steps that {len(DATASETS)} datasets share in epochs of {EPOCH}, got {options.steps}")
    for seed in options.seeds:
        train(options, UNIVERSAL, HERMES, "nnUNetPlans", options.steps, seed)
        for dataset in datasets:
            test(options, dataset, HERMES, options.steps, seed)
            train(options, dataset, STOCK, SHARED, share, seed)
            test(options, dataset, STOCK, share, seed)
    if datasets == list(DATASETS):
        print(table(options))


if __name__ == "__main__":
    main()
