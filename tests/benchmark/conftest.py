"""A toy dataset with a test folder, and a stand-in that leaves in no time what nnU-Net's commands leave."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import Workspace

# Called as nnUNetv2_train or nnUNetv2_predict would be. FAIL holds trainers that fail, CUT those that end before their
# last epoch the first time, HANG those that never end, nor does the worker that they start; both hold a lock. A
# prediction is the truth, or the image where there is none; CUT_PREDICTION leaves half of the last one.
STAND_IN = """
import fcntl, json, os, pathlib, shutil, sys, time
preprocessed, results = (pathlib.Path(os.environ["nnUNet_" + name]) for name in ("preprocessed", "results"))
program, arguments = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open(os.environ["STAND_IN_LOG"], "a") as log:
    print(program, *arguments, "GPU", os.environ.get("CUDA_VISIBLE_DEVICES"), file=log)
value = lambda flag: arguments[arguments.index(flag) + 1]
trainer, plans = value("-tr"), value("-p")
dataset, configuration, fold = arguments[:3] if program == "nnUNetv2_train" else map(value, ("-d", "-c", "-f"))
model = results / dataset / f"{trainer}__{plans}__{configuration}"
folder = model / f"fold_{fold}"
base = preprocessed / dataset
if program == "nnUNetv2_predict":
    target = pathlib.Path(value("-o"))
    target.mkdir(parents=True, exist_ok=True)
    ending = "_0000.nii.gz"
    for image in sorted(pathlib.Path(value("-i")).glob("*" + ending)):
        prediction = target / (image.name.removesuffix(ending) + ".nii.gz")
        if prediction.exists() and "--continue_prediction" in arguments:
            continue
        truth = image.parent.parent / "labelsTs" / prediction.name
        shutil.copy(truth if truth.exists() else image, prediction)
    if os.environ.get("CUT_PREDICTION"):
        prediction.write_bytes(prediction.read_bytes()[:-40])
        sys.exit(9)
    sys.exit()
if trainer in os.environ.get("FAIL", "").split():
    print("RuntimeError: CUDA out of memory")
    sys.exit(1)
folder.mkdir(parents=True, exist_ok=True)
for source in (base / f"{plans}.json", base / "dataset.json"):
    shutil.copy(source, model / source.name.replace(plans, "plans"))
print("2026-01-01 00:00:00.0: Epoch 0", flush=True)
if trainer in os.environ.get("HANG", "").split():
    lock = open(os.environ["STAND_IN_LOG"] + ".lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    if os.fork():
        lock.write("hangs")
        lock.flush()
    time.sleep(60)
    sys.exit()
if trainer in os.environ.get("CUT", "").split() and "--c" not in arguments:
    shutil.copyfile(os.environ["STAND_IN_CHECKPOINT"], folder / "checkpoint_best.pth")
    sys.exit(9)
if "--val" not in arguments:
    shutil.copyfile(os.environ["STAND_IN_CHECKPOINT"], folder / "checkpoint_final.pth")
if os.environ.get("nnUNet_misfm_skip_validation") != "1":
    truths = base / "gt_segmentations"
    if fold == "all":
        cases = [file.name.removesuffix(".nii.gz") for file in truths.glob("*.nii.gz")]
    else:
        cases = json.loads((base / "splits_final.json").read_text())[int(fold)]["val"]
    (folder / "validation").mkdir(exist_ok=True)
    for case in cases:
        shutil.copy(truths / f"{case}.nii.gz", folder / "validation")
    (folder / "validation" / "summary.json").write_text("{}")
"""
# What nnU-Net logs of three epochs, and keeps in its checkpoints
LOGGING = {
    "train_losses": [1.0, 0.5, np.float32(0.25)],
    "val_losses": [1.1, 0.6, 0.3],
    "mean_fg_dice": [0.0, 0.4, np.float64(0.6)],
    "epoch_start_timestamps": [100.0, 110.0, 130.0],
    "epoch_end_timestamps": [104.0, 117.0, 139.0],
}


@pytest.fixture
def workspace(make_workspace: Callable[..., Workspace]) -> Workspace:
    """A toy dataset of eight cases in two folds, whose labels are files too, and a test folder of two others."""
    made = make_workspace(num_cases=8)
    names = [f"case_{number}" for number in range(8)]
    folds = [{"train": names[:6], "val": names[6:]}, {"train": names[2:], "val": names[:2]}]
    (made.base / "splits_final.json").write_text(json.dumps(folds))
    for number in range(8):
        write_labels(made.base / "gt_segmentations" / f"case_{number}.nii.gz", number)
    for number in (20, 21):
        write_labels(made.root / "test" / "labelsTs" / f"other_{number}.nii.gz", number)
        write_labels(made.root / "test" / "imagesTs" / f"other_{number}_0000.nii.gz", number)
    return made


def write_labels(file: Path, seed: int) -> None:
    labels = np.zeros((10, 12, 14), np.uint8)
    start = seed % 4
    labels[start : start + 4, 2:6, 2:6], labels[start : start + 4, 7:10, 3 : 8 + seed // 5] = 1, 2
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(file))


@pytest.fixture
def stand_in(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts the stand-in in nnU-Net's place; returns what reads the commands that were run so far."""
    log, checkpoint = tmp_path / "stand_in.log", tmp_path / "stand_in.pth"
    torch.save({"logging": LOGGING, "network_weights": {}}, checkpoint)
    monkeypatch.setenv("STAND_IN_LOG", str(log))
    monkeypatch.setenv("STAND_IN_CHECKPOINT", str(checkpoint))
    for name in ("nnUNetv2_train", "nnUNetv2_predict"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(f"#!{sys.executable}\n{STAND_IN}")
        script.chmod(0o755)
    monkeypatch.setattr("nnunetv2_misfm.benchmark.run.find_script", lambda name: str(tmp_path / "bin" / name))
    return lambda: log.read_text().splitlines() if log.exists() else []
