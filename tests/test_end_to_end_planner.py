"""PCT-Net's plans on tiny data: nnU-Net's own scripts train and predict it, in an environment that knows no trainer."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from commands import ORGANS, SHAPE, World, write_dataset

pytestmark = pytest.mark.slow

PLANS, STOCK = "nnUNetPCTNetPlans", "nnUNetTrainer_1epoch"
WIDTHS = [4, 4, 8, 16, 32]
# An epoch of nnU-Net's own trainers has 250 iterations
NARROW = (f"architecture.features_per_stage={WIDTHS}", "architecture.window_shrink=cube", "patch_size=[16,16,16]")
SHORT = ("num_epochs=1", "num_iterations_per_epoch=2", "num_val_iterations_per_epoch=1", "seed=3")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world after all commands."""
    world = World(tmp_path_factory.mktemp("nnunet"))
    write_dataset(world.root / "raw" / ORGANS, labelled=True)
    for folder in ("preprocessed", "results"):
        (world.root / folder).mkdir()
    planning = {"nnUNet_n_proc_DA": "1"}  # nnU-Net's planner asks PyTorch for as many threads
    world.run(
        "default plans", "nnUNetv2_plan_and_preprocess", "-d", "901", "-c", "3d_fullres", "-npfp", "1", "-np", "1",
        **planning,
    )  # fmt: skip
    fingerprint = world.root / "preprocessed" / ORGANS / "dataset_fingerprint.json"
    fingerprint.rename(fingerprint.with_name("extracted_by_nnunet.json"))
    world.run("plan", "nnUNetv2_misfm", "plan", "-d", "901", "--gpu-memory-gb", "4")
    configure = ("nnUNetv2_misfm", "configure", "-d", "901", "-p", PLANS)
    world.run("narrow", *configure, "-c", "3d_fullres", "--name", "narrow", *NARROW)
    world.run("short", *configure, "-c", "narrow", "--name", "short", *SHORT)
    alone = {"nnUNet_extTrainer": None}
    world.run("train", "nnUNetv2_train", "901", "narrow", "0", "-tr", STOCK, "-p", PLANS, "-device", "cpu", **alone)
    images = world.root / "raw" / ORGANS / "imagesTs"
    world.run(
        "predict", "nnUNetv2_predict", "-d", "901", "-c", "narrow", "-f", "0", "-tr", STOCK, "-p", PLANS, "-i", images,
        "-o", world.root / "predicted", "-device", "cpu", "-npp", "0", "-nps", "0", "--save_probabilities", **alone,
    )  # fmt: skip
    ours = ("nnUNetv2_train", "901", "short", "0", "-tr", "nnUNetTrainerPCTNet", "-p", PLANS, "-device", "cpu")
    world.run("our trainer", *ours)
    return world


def base(world: World) -> Path:
    return world.root / "preprocessed" / ORGANS


@pytest.mark.parametrize("step", ["default plans", "plan", "narrow", "short", "train", "predict", "our trainer"])
def test_command_succeeds(done: World, step: str) -> None:
    assert done.finished[step].returncode == 0, done.finished[step].stdout[-2000:] + done.finished[step].stderr[-4000:]


def test_missing_fingerprint_is_extracted_by_nnunet(done: World) -> None:
    extracted, again = (base(done) / f"{name}.json" for name in ("extracted_by_nnunet", "dataset_fingerprint"))
    assert json.loads(again.read_text()) == json.loads(extracted.read_text())


def test_plans_share_the_default_plans_cases_and_tell_what_was_planned(done: World) -> None:
    ours, default = (json.loads((base(done) / f"{n}.json").read_text()) for n in (PLANS, "nnUNetPlans"))
    planned = ours["configurations"]["3d_fullres"]
    assert ours["configurations"].keys() == {"3d_fullres", "narrow", "short"}
    assert planned["data_identifier"] == default["configurations"]["3d_fullres"]["data_identifier"]
    assert planned["patch_size"] == [24, 32, 24] and planned["batch_size"] == 2  # 24 x 28 x 24 voxels, pools of 8
    file, line = done.finished["plan"].stdout.splitlines()  # nothing is left to preprocess
    assert file == f"wrote {base(done) / PLANS}.json"
    assert line.startswith("3d_fullres: patch 24 x 32 x 24, batch 2, estimated memory ")


def test_stock_trainer_trained_the_planned_network(done: World) -> None:
    folder = done.root / "results" / ORGANS / f"{STOCK}__{PLANS}__narrow" / "fold_0"
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=False)  # nnU-Net's own holds NumPy numbers
    assert checkpoint["trainer_name"] == STOCK and checkpoint["current_epoch"] == 1
    assert checkpoint["network_weights"]["encoder.stem.weight"].shape == (WIDTHS[0], 1, 3, 3, 3)
    assert np.isfinite(checkpoint["logging"]["train_losses"]).all()
    assert len(json.loads((folder / "validation" / "summary.json").read_text())["metric_per_case"]) == 2


def test_stock_prediction_runs_the_planned_network(done: World) -> None:
    (file,) = (done.root / "predicted").glob("*.nii.gz")
    segmentation = sitk.GetArrayFromImage(sitk.ReadImage(file))
    probabilities = np.load(file.with_name("case_6.npz"))["probabilities"]
    assert segmentation.shape == SHAPE and probabilities.shape == (3, *SHAPE) and probabilities.std() > 0.01
    np.testing.assert_array_equal(probabilities.argmax(0), segmentation)


def test_our_trainer_takes_the_plans_network_with_every_argument(done: World) -> None:
    folder = done.root / "results" / ORGANS / f"nnUNetTrainerPCTNet__{PLANS}__short" / "fold_0"
    network = torch.load(folder / "checkpoint_final.pth", weights_only=True)["misfm_meta"]["network"]
    planned = json.loads((base(done) / f"{PLANS}.json").read_text())["configurations"]["narrow"]["architecture"]
    assert network["class"] == planned["network_class_name"] == "nnunetv2_misfm.architectures.PCTNet"
    assert network["kwargs"] == planned["arch_kwargs"]
    assert (network["kwargs"]["features_per_stage"], network["kwargs"]["window_shrink"]) == (WIDTHS, "cube")
