"""The README's commands on real MR scans, where ../shared holds them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from commands import PCT_PRETRAIN, PCT_VF, World

pytestmark = pytest.mark.slow

DATASET = "Dataset004_Hippocampus"
NUM_TRAINING = 6
QUICK = (
    *("num_epochs=1", "num_iterations_per_epoch=2", "num_val_iterations_per_epoch=1", "batch_size=2"),
    "features_per_stage=[8,8,16,16,32]",
    "num_heads=[1,1,1]",
)


def copy_cases(shared: Path, raw: Path) -> None:
    """Copies a few labelled cases and one for prediction into a temporary nnUNet_raw."""
    source = shared / "data" / "nnUNet_raw" / DATASET
    names = sorted(file.name.removesuffix(".nii.gz") for file in (source / "labelsTr").glob("*.nii.gz"))
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / DATASET / folder).mkdir(parents=True)
    for name in names[:NUM_TRAINING]:
        shutil.copy(source / "imagesTr" / f"{name}_0000.nii.gz", raw / DATASET / "imagesTr")
        shutil.copy(source / "labelsTr" / f"{name}.nii.gz", raw / DATASET / "labelsTr")
    shutil.copy(source / "imagesTr" / f"{names[NUM_TRAINING]}_0000.nii.gz", raw / DATASET / "imagesTs")
    entries = json.loads((source / "dataset.json").read_text())
    (raw / DATASET / "dataset.json").write_text(json.dumps({**entries, "numTraining": NUM_TRAINING}))


def test_hippocampus_is_pretrained_fine_tuned_and_predicted(shared: Path, tmp_path: Path) -> None:
    world = World(tmp_path)
    copy_cases(shared, tmp_path / "raw")
    images, output = tmp_path / "raw" / DATASET / "imagesTs", tmp_path / "predicted"
    commands = {
        "plan": ("nnUNetv2_plan_and_preprocess", "-d", "4", "-c", "3d_fullres", "-npfp", "1", "-np", "1"),
        "configure": ("nnUNetv2_misfm", "configure", "-d", "4", "-c", "3d_fullres", "--name", "quick", *QUICK),
        "pretrain": ("nnUNetv2_train", "4", "quick", "all", "-tr", PCT_PRETRAIN, "-device", "cpu"),
        "fine-tune": ("nnUNetv2_train", "4", "quick", "0", "-tr", PCT_VF, "-device", "cpu"),
        "predict": (
            *("nnUNetv2_predict", "-d", "4", "-c", "quick", "-tr", PCT_VF, "-f", "0", "-device", "cpu"),
            *("-i", images, "-o", output, "-npp", "1", "-nps", "1", "--disable_tta"),
        ),
    }
    for step, command in commands.items():
        world.run(step, *command, nnUNet_n_proc_DA="1" if step == "plan" else "0")
        assert world.finished[step].returncode == 0, world.finished[step].stderr
    run = tmp_path / "results" / DATASET / f"{PCT_VF}__nnUNetPlans__quick" / "fold_0"
    account = json.loads((run / "pretrained_weights.json").read_text())
    assert account["route"].startswith(f"a finished run of {PCT_PRETRAIN}") and account["share"] == 1
    (image,), (prediction,) = images.iterdir(), output.glob("*.nii.gz")
    scan, labels = sitk.ReadImage(str(image)), sitk.ReadImage(str(prediction))
    assert labels.GetSize() == scan.GetSize() and labels.GetSpacing() == pytest.approx(scan.GetSpacing())
    assert set(np.unique(sitk.GetArrayFromImage(labels))) <= {0, 1, 2}
