"""The whole job on phantoms, through nnU-Net's own commands: pretrain without labels, fine-tune, predict, compare.

Every step is a command that a user could type; it is printed before it runs and its output is kept in a log. Sizes
and lengths are chosen so that two CPU cores need about six minutes, which shows that all parts work together and
nothing about how good a method is.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from nnunetv2_misfm._startup import SEARCH_PATH_VARIABLE
from nnunetv2_misfm.data.phantoms import write_phantom_dataset
from nnunetv2_misfm.demo_report import Run, dice_table, draw_picture, write_results
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.scripts import Command, describe_machine, find_script, search_path

POOL_ID, POOL_NAME = 900, "PhantomPool"
ORGANS_ID, ORGANS_NAME = 901, "PhantomOrgans"
CONFIGURATION = "demo"
PRETRAINER = "nnUNetTrainerPCTNetVFPretrain"
TRAINERS = ("nnUNetTrainerBaseline", "nnUNetTrainerPCTNet", "nnUNetTrainerPCTNetVF")
# Five training cases are the fewest of which nnU-Net makes its five folds; fold 0 validates on one of them, which
# takes a fifth of the time that the fold `all` would spend on validation.
FOLD = "0"
NUM_POOL, NUM_TRAINING, NUM_TEST = 12, 5, 4
SEED = 0

# Chosen by measurement on two CPU cores. Coarser voxels than the scans' own (nnU-Net resamples, and back after
# prediction), a small patch, and a third of the released PCT-Net's channels at the finest level.
TARGET_SPACING_MM = ("5", "3", "3")
NETWORK = ("patch_size=[16,32,32]", "features_per_stage=[8,16,32,64,128]", "num_heads=[1,2,4]", f"seed={SEED}")
PLANS_NETWORK = ("architecture.features_per_stage=[8,16,32,64]",)  # the plans' network has four stages here
PRETRAINING = ("batch_size=4", "num_epochs=6", "num_iterations_per_epoch=25", "num_val_iterations_per_epoch=2")
TRAINING = ("batch_size=2", "num_epochs=10", "num_iterations_per_epoch=30", "num_val_iterations_per_epoch=2")

SETTINGS_TEXT = (
    f"Resampled to {' x '.join(TARGET_SPACING_MM)} mm. Pretraining: {' '.join((*NETWORK, *PRETRAINING))}. Training: "
    f"{' '.join((*NETWORK, *TRAINING))}, the same for all three trainers; the plans' network has the same channels."
)

MARKER = ".made_by_nnunetv2_misfm_demo"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "predictions", "logs")
RESULTS, PICTURE = "results.md", "picture.png"
# Data workers per GPU: ours, more than so short a run can keep busy
MOST_WORKERS = 8


def run_demo(output: Path, device: str) -> Path:
    """Run the demo and print its table; the second run in the same place starts over.

    Args:
        output: folder for everything; made if absent. What a former demo left there is deleted, all else is kept.
        device: cpu, cuda, or auto for cuda where there is one.

    Returns:
        `output` as an absolute path; it holds results.md and picture.png.

    Raises:
        MisfmError: no such device, a folder that the demo did not make, or a command that failed.
    """
    started = time.monotonic()
    device = choose_device(device)
    output = output.resolve()
    prepare_output(output)
    raw = output / "nnUNet_raw"
    print(f"Writing phantoms: {NUM_POOL} unlabelled, {NUM_TRAINING} labelled for training, {NUM_TEST} for testing")
    write_phantom_dataset(raw, POOL_ID, POOL_NAME, num_training=NUM_POOL, seed=SEED, labelled=False)
    organs = write_phantom_dataset(
        raw, ORGANS_ID, ORGANS_NAME, num_training=NUM_TRAINING, num_test=NUM_TEST, seed=SEED, labelled=True
    )
    environment = demo_environment(output, device)
    commands = demo_commands(output, device)
    runs = []
    for number, command in enumerate(commands, 1):
        print(f"\n[{number}/{len(commands)}] {command.title}\n$ {command}", flush=True)
        log = output / "logs" / f"{number:02d}_{Path(command.arguments[0]).name}.log"
        seconds = run_command(command, environment, log)
        runs.append(Run(command.title, str(command), seconds))
        print(f"  {seconds:.0f} s, log: {log}", flush=True)
    predictions = {trainer: output / "predictions" / trainer for trainer in TRAINERS}
    table = dice_table({trainer: folder / "summary.json" for trainer, folder in predictions.items()})
    draw_picture(output / PICTURE, organs, predictions)
    took = f"The whole demo took {(time.monotonic() - started) / 60:.1f} minutes on {describe_machine(device)}."
    set_for_demo = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    write_results(output / RESULTS, table, [SETTINGS_TEXT, took], runs, set_for_demo)
    print(f"\n{table}\n\n{took}")
    print(f"Table and what was run: {output / RESULTS}\nPicture: {output / PICTURE}\nAll else: {output}")
    return output


def choose_device(device: str) -> str:
    """Return cpu or cuda.

    Args:
        device: cpu, cuda or auto.

    Raises:
        MisfmError: cuda was asked for and there is none, or an unknown word.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise MisfmError(f"device: expected auto, cpu or cuda, got {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise MisfmError("device: expected a GPU for cuda, but PyTorch finds none; use auto or cpu.")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def prepare_output(output: Path) -> None:
    """Make the demo's empty folders, after deleting those that a former demo made in the same place.

    Raises:
        MisfmError: the place holds something and lacks the demo's marker file.
    """
    marker = output / MARKER
    if output.exists() and not marker.is_file() and (not output.is_dir() or any(output.iterdir())):
        raise MisfmError(
            f"output: expected a new or empty folder or one that this demo made, got {output}, which lacks the "
            f"demo's marker {MARKER}; choose another --output."
        )
    output.mkdir(parents=True, exist_ok=True)
    marker.write_text("The demo of nnunetv2_misfm deletes its own folders here when it runs again.\n")
    for name in FOLDERS:
        if (output / name).exists():
            shutil.rmtree(output / name)
        (output / name).mkdir()
    for name in (RESULTS, PICTURE):
        (output / name).unlink(missing_ok=True)


def demo_environment(output: Path, device: str) -> dict[str, str]:
    """Return the environment of the demo's commands: this process's, with what follows set.

    Folders in `output`; our trainers behind those of the user; no compilation, which costs more than so short a run
    can save; one process where nnU-Net would start eight, each of which loads PyTorch; on the CPU no data workers,
    which also makes runs repeat exactly. The malloc variables (glibc, read when a process starts) keep freed memory
    instead of handing it back after every tensor: less system time. Threads that wait sleep: where other
    programs want the cores too, spinning ones made a training step seven times slower.

    Args:
        output: the demo's folder.
        device: cpu or cuda.
    """
    num_cores = os.cpu_count() or 1
    return {
        **os.environ,
        **{name: str(output / name) for name in FOLDERS if name.startswith("nnUNet_")},
        SEARCH_PATH_VARIABLE: search_path(),
        "nnUNet_n_proc_DA": "0" if device == "cpu" else str(min(MOST_WORKERS, num_cores)),
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "OMP_NUM_THREADS": str(num_cores) if device == "cpu" else "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30),
    }


def demo_commands(output: Path, device: str) -> list[Command]:
    """Return the demo's commands in the order in which they run.

    Args:
        output: the demo's folder, absolute.
        device: cpu or cuda.
    """
    pool, organs = str(POOL_ID), str(ORGANS_ID)
    plan = ["nnUNetv2_plan_and_preprocess", "-d", pool, organs, "-c", "3d_fullres"]
    plan += ["--verify_dataset_integrity", "-npfp", "1", "-np", "1", "-overwrite_target_spacing", *TARGET_SPACING_MM]
    configure = ["nnUNetv2_misfm", "configure", "-c", "3d_fullres", "--name", CONFIGURATION]
    pretrain = ["nnUNetv2_train", pool, CONFIGURATION, "all", "-tr", PRETRAINER, "-device", device]
    commands = [
        # nnU-Net's planner asks PyTorch for as many threads as there are data workers, and none is an error
        Command("Plan and preprocess both datasets", plan, {"nnUNet_n_proc_DA": "1"}),
        Command("A short configuration for pretraining", [*configure, "-d", pool, *NETWORK, *PRETRAINING]),
        Command(
            "A short configuration for training",
            [*configure, "-d", organs, *NETWORK, *TRAINING, *PLANS_NETWORK],
        ),
        Command("Pretrain PCT-Net with Volume Fusion on the unlabelled scans", pretrain),
    ]
    for trainer in TRAINERS:
        train = ["nnUNetv2_train", organs, CONFIGURATION, FOLD, "-tr", trainer, "-device", device]
        if trainer == "nnUNetTrainerPCTNetVF":
            train += ["-pretrained_weights", str(pretrained_weights(output))]
        commands.append(Command(f"Train {trainer} on the labelled scans", train))
    for trainer in TRAINERS:
        commands += _prediction_commands(output, trainer, device)
    return commands


def pretrained_weights(output: Path) -> Path:
    """Return the checkpoint in which pretraining ends."""
    run = f"{PRETRAINER}__nnUNetPlans__{CONFIGURATION}"
    return output / "nnUNet_results" / f"Dataset{POOL_ID}_{POOL_NAME}" / run / "fold_all" / "checkpoint_final.pth"


def run_command(command: Command, environment: Mapping[str, str], log: Path) -> float:
    """Run a command, its output going into a log, and return the seconds it took.

    Args:
        command: its first argument is the name of a script of this Python's environment, or one on PATH.
        environment: all variables, to which the command's own are added.
        log: file to write.

    Raises:
        MisfmError: there is no such script, or it failed.
    """
    script = find_script(command.arguments[0])
    started = time.monotonic()
    with log.open("w") as stream:
        stream.write(f"$ {command}\n")
        stream.flush()
        finished = subprocess.run(
            [script, *command.arguments[1:]],
            env={**environment, **command.variables},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    if finished.returncode != 0:
        raise MisfmError(
            f"the demo expected its commands to succeed, but `{command}` ended with status {finished.returncode}; "
            f"its output is in {log}."
        )
    return time.monotonic() - started


def _prediction_commands(output: Path, trainer: str, device: str) -> list[Command]:
    dataset = output / "nnUNet_raw" / f"Dataset{ORGANS_ID}_{ORGANS_NAME}"
    predictions = output / "predictions" / trainer
    predict = ["nnUNetv2_predict", "-d", str(ORGANS_ID), "-c", CONFIGURATION, "-tr", trainer, "-f", FOLD]
    predict += ["-i", str(dataset / "imagesTs"), "-o", str(predictions), "-device", device]
    # In one process, as above, and without mirroring, which would take eight times as long
    predict += ["-npp", "0", "-nps", "0", "--disable_tta"]
    evaluate = ["nnUNetv2_evaluate_folder", str(dataset / "labelsTs"), str(predictions), "-np", "1"]
    evaluate += ["-djfile", str(dataset / "dataset.json"), "-pfile", str(predictions / "plans.json")]
    return [
        Command(f"Predict the held-out scans with {trainer}", predict),
        Command(f"Compare the predictions of {trainer} with the truth", evaluate),
    ]
