"""The README's commands on tiny data: nnU-Net's scripts where a process matters, its `run_training` elsewhere.

Dataset 900 is unlabelled (its label is a body mask), 901 has two labels. All commands run once, two at a time, in the
fixture `done`; the tests look at what they left behind.
"""

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from commands import ORGANS, PCT_PRETRAIN, PCT_VF, POOL, SHAPE, World, parallel, plan_and_configure, write_dataset
from nnunetv2.run.run_training import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.weights.checkpoint import file_sha256

pytestmark = pytest.mark.slow

RIVALS = ("MIM", "ModelsGenesis", "PatchSwapping")
RIVAL, RIVAL_PRETRAIN = "nnUNetTrainerMIM", "nnUNetTrainerMIMPretrain"  # by nnU-Net's command, the others in-process
# Fine-tuning -> its pretraining; both run
OTHER_PAIRS = {
    f"nnUNetTrainer{name}": f"nnUNetTrainer{name}Pretrain"
    for name in ("VF", "FMUNetVF", *RIVALS, *(f"PCTNet{rival}" for rival in RIVALS))
}
OTHER_TRAINERS = ("nnUNetTrainerPCTNet", "nnUNetTrainerFMUNet", "nnUNetTrainerBaseline", *OTHER_PAIRS)
COMPARATORS = ("nnUNetTrainerSwinUNETR", "nnUNetTrainerUNETR")  # large; trained in trainers/test_monai_networks.py
UNIVERSAL = "nnUNetTrainerHermes"  # of many datasets: test_end_to_end_universal.py
FOUR_ROUTES = (
    "nnUNetTrainerPCTNetVF expected pretrained weights and found none by any of its four routes: 1. -pretrained_weights"
)
# PyTorch meets the cut in other ways at other sizes; this one it reports as an error of the operating system
TRUNCATED_SIZE = 5000
START_METHODS = ("fork", "spawn", "forkserver")
# What a user's own program does that starts nnU-Net with another way of starting data workers. The final validation
# asks for spawn whatever is set, so it is left out.
WORKERS_SCRIPT = """
import multiprocessing, sys
from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

start_epoch = nnUNetTrainer.on_train_epoch_start


def count_workers(trainer):
    alive = len(multiprocessing.active_children())
    print(f"{alive} workers of {type(trainer).__name__} by {multiprocessing.get_start_method()}", flush=True)
    start_epoch(trainer)


if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    nnUNetTrainer.on_train_epoch_start = count_workers
    nnUNetTrainer.perform_actual_validation = lambda trainer, save_probabilities: None
    for name in ("nnUNetTrainerPCTNetVFPretrain", "nnUNetTrainerPCTNetVF"):
        sys.argv = ["nnUNetv2_train", "901", "quick", "0", "-tr", name, "-device", "cpu"]
        run_training_entry()
"""


def prepare_pool(world: World) -> None:
    plan_and_configure(world, "900")
    world.train("pretrain 900", PCT_PRETRAIN, target=("900", "quick", "all"))


def prepare_organs(world: World) -> None:
    plan_and_configure(world, "901")
    plans_file = world.root / "preprocessed" / ORGANS / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    plans["configurations"]["faulty"] = {"inherits_from": "quick", "misfm": {"num_epoch": 2}}
    plans_file.write_text(json.dumps(plans))
    world.train("no weights", PCT_VF)
    world.train("pretrain 901", PCT_PRETRAIN)


def readme_chain(world: World) -> None:
    """Fine-tunes from dataset 900, predicts in three ways, validates again."""
    here, other = {"nnUNet_results": world.root / "chain"}, {"nnUNet_raw": None, "nnUNet_preprocessed": None}
    world.train("fine-tune", PCT_VF, "-pretrained_weights", world.pool_weights, **here)
    model, images = world.fold(PCT_VF, "chain"), world.root / "raw" / ORGANS / "imagesTs"
    how = ("-f", "0", "-i", images, "-device", "cpu", "--save_probabilities")
    # without worker processes, which the other command cannot do without
    by_name = ("nnUNetv2_predict", "-d", "901", "-c", "quick", "-tr", PCT_VF, *how, "-npp", "0", "-nps", "0")
    by_folder = ("nnUNetv2_predict_from_modelfolder", "-m", model.parent, *how, "-npp", "1", "-nps", "1")
    world.run("predict", *by_name, "-o", world.root / "predict", **here)
    world.run("predict from folder", *by_folder, "-o", world.root / "predict from folder", **other, nnUNet_results=None)
    export = ("nnUNetv2_export_model_to_zip", "-d", "901", "-c", "quick", "-tr", PCT_VF, "-f", "0")
    world.run("export", *export, "-o", world.root / "model.zip", **here)
    other["nnUNet_results"] = world.root / "elsewhere"
    world.run("install", "nnUNetv2_install_pretrained_model_from_zip", world.root / "model.zip", **other)
    world.run("predict elsewhere", *by_name, "-o", world.root / "predict elsewhere", **other)
    (model / "validation" / "summary.json").rename(model / "validation" / "first.json")
    world.train("validate", PCT_VF, "--val", **here, nnUNet_misfm_weights="nowhere.pth")


def rival_chain(world: World) -> None:
    """Pretrains and fine-tunes the plans' network by a rival."""
    world.train("pretrain by a rival", RIVAL_PRETRAIN)
    world.train("fine-tune a rival", RIVAL)


def start_workers(world: World, method: str) -> None:
    """Pretrains and fine-tunes with two data workers."""
    script = world.root / f"train_by_{method}.py"
    script.write_text(WORKERS_SCRIPT)
    world.run(method, "python", script, method, nnUNet_n_proc_DA="2", nnUNet_results=world.root / method)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world after all commands."""
    world = World(tmp_path_factory.mktemp("nnunet"))
    write_dataset(world.root / "raw" / POOL, labelled=False)
    write_dataset(world.root / "raw" / ORGANS, labelled=True)
    for folder in ("preprocessed", "results", "chain", "elsewhere"):
        (world.root / folder).mkdir()
    parallel(lambda: prepare_pool(world), lambda: prepare_organs(world))
    truncated = world.root / "truncated.pth"
    truncated.write_bytes(world.weights.read_bytes()[:TRUNCATED_SIZE] if world.weights.is_file() else b"")
    job = functools.partial(functools.partial, world.train)
    parallel(
        functools.partial(readme_chain, world),
        functools.partial(rival_chain, world),
        *(functools.partial(start_workers, world, method) for method in START_METHODS),
        job("finished run", PCT_VF),
        job("variable", PCT_VF, nnUNet_misfm_weights=world.weights, nnUNet_results=world.root / "variable"),
        job("truncated", PCT_VF, nnUNet_misfm_weights=truncated, nnUNet_results=world.root / "truncated"),
        job("unknown key", PCT_VF, target=("901", "faulty", "0")),
        job("2d", PCT_VF, target=("901", "2d", "0")),
        job("no results variable", PCT_VF, nnUNet_results=None),
        job("no preprocessed variable", PCT_VF, nnUNet_preprocessed=None),
    )
    return world


@pytest.fixture
def train(done: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains as nnU-Net's command does, in this process and without the final validation; returns the fold's folder."""
    for name, value in {**done.variables, "nnUNet_results": str(tmp_path / "results")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("nnUNet_misfm_weights", raising=False)
    monkeypatch.setattr(nnUNetTrainer, "perform_actual_validation", lambda trainer, save_probabilities: None)

    def train(trainer: str, **options: Any) -> Path:
        run_training("901", "quick", 0, trainer, device=torch.device("cpu"), **options)
        return tmp_path / "results" / ORGANS / f"{trainer}__nnUNetPlans__quick" / "fold_0"

    return train


@pytest.fixture
def interrupted(train: Callable[..., Path], done: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a fine-tuning that stopped in its second epoch, with checkpoints latest and best of the first."""

    def start_epoch(trainer: Any, start: Callable = nnUNetTrainer.on_train_epoch_start) -> None:
        trainer.save_every = 1
        if trainer.current_epoch == 1:
            raise KeyboardInterrupt
        start(trainer)

    monkeypatch.setenv("nnUNet_misfm_weights", str(done.weights))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nnUNetTrainer, "on_train_epoch_start", start_epoch)
        train(PCT_VF)
    monkeypatch.setenv("nnUNet_misfm_weights", "nowhere.pth")  # a resumed run must not look for it
    (folder,) = Path(os.environ["nnUNet_results"]).rglob("fold_0")
    for log in folder.glob("training_log*"):
        log.rename(folder / "first_log.txt")
    assert {"checkpoint_latest.pth", "checkpoint_best.pth"} == {p.name for p in folder.glob("*.pth")}
    return folder


def log_of(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("training_log*.txt")))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:TRUNCATED_SIZE])


def probabilities(folder: Path) -> np.ndarray:
    (file,) = folder.glob("*.npz")
    return np.load(file)["probabilities"]


@pytest.mark.parametrize(
    "step",
    ["plan 900", "plan 901", "configure 900", "configure 901", "pretrain 900", "pretrain 901", "fine-tune", "predict",
     "predict from folder", "export", "install", "predict elsewhere", "validate", "finished run", "variable",
     "pretrain by a rival", "fine-tune a rival", *START_METHODS],
)  # fmt: skip
def test_command_succeeds(done: World, step: str) -> None:
    assert done.finished[step].returncode == 0, done.finished[step].stdout[-2000:] + done.finished[step].stderr[-4000:]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("no weights", FOUR_ROUTES),
        ("truncated", "truncated.pth is truncated or no PyTorch checkpoint"),
        ("unknown key", "misfm block: unknown key 'num_epoch'; known keys are num_epochs, num_iterations_per_epoch"),
        ("2d", "NotImplementedError: nnUNetTrainerPCTNetVF expected a 3D configuration, got one with the 2D patch"),
        ("no results variable", "expected the environment variable nnUNet_results to name a folder, but it is not set"),
        ("no preprocessed variable", "nnUNet_preprocessed is not defined"),  # nnU-Net's own sentence
    ],
)
def test_command_fails_with_a_sentence_before_the_first_epoch(done: World, step: str, sentence: str) -> None:
    finished = done.finished[step]
    assert finished.returncode != 0
    assert sentence in finished.stderr.strip().splitlines()[-1]
    assert "Epoch 0" not in finished.stdout


def test_no_weights_error_gives_the_command_that_pretrains(done: World) -> None:
    command = done.finished["no weights"].stderr.strip().split("To pretrain: ")[1]
    assert command == f"nnUNetv2_train {ORGANS} quick all -tr {PCT_PRETRAIN} -p nnUNetPlans"


@pytest.mark.parametrize(
    ("results", "route"),
    [
        ("chain", "-pretrained_weights"),
        ("results", f"a finished run of {PCT_PRETRAIN} on this dataset"),
        ("variable", "the variable nnUNet_misfm_weights"),
    ],
)
def test_run_says_which_weights_it_took_and_why(done: World, results: str, route: str) -> None:
    folder, file = done.fold(PCT_VF, results), done.pool_weights if results == "chain" else done.weights
    account = json.loads((folder / "pretrained_weights.json").read_text())
    assert (account["route"], account["file"], account["sha256"]) == (route, str(file), file_sha256(file))
    heads = [name for name in account["fresh"] if ".seg_layers." in name]
    assert account["share"] == 1 and account["adapted"] == {} and len(heads) == len(account["fresh"]) == 8
    network = torch.load(folder / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert {*account["moved"], *heads} == set(network)
    (line,) = (line for line in log_of(folder).splitlines() if "Pretrained weights:" in line)
    assert str(file) in line and f"by {route}" in line.replace("by nnU-Net's -pre", "by -pre")


def test_rival_leaves_what_nnunet_leaves_and_its_fine_tuning_finds_it(done: World) -> None:
    pretrained, folder = done.fold(RIVAL_PRETRAIN), done.fold(RIVAL)
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png"} <= {p.name for p in pretrained.iterdir()}
    checkpoint = torch.load(pretrained / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["misfm_meta"]["method"] == "masked_image_modelling"
    assert checkpoint["logging"]["mean_fg_dice"] == [-loss for loss in checkpoint["logging"]["val_losses"]]
    account = json.loads((folder / "pretrained_weights.json").read_text())
    assert account["file"] == str(pretrained / "checkpoint_final.pth") and account["share"] == 1
    assert account["route"] == f"a finished run of {RIVAL_PRETRAIN} on this dataset"


def test_model_predicts_the_same_by_name_from_its_folder_and_installed_elsewhere(done: World) -> None:
    expected = probabilities(done.root / "predict")
    assert expected.shape == (3, *SHAPE) and expected.std() > 0.01
    for folder in ("predict from folder", "predict elsewhere"):
        np.testing.assert_array_equal(probabilities(done.root / folder), expected)
        pair = [sitk.GetArrayFromImage(sitk.ReadImage(done.root / f / "case_6.nii.gz")) for f in ("predict", folder)]
        np.testing.assert_array_equal(*pair)
    assert "Dataset901_Organs" in {path.name for path in (done.root / "elsewhere").iterdir()}


def test_val_repeats_the_validation_and_loads_nothing(done: World) -> None:
    folder = done.fold(PCT_VF, "chain")
    first, second = (json.loads((folder / "validation" / f"{n}.json").read_text()) for n in ("first", "summary"))
    assert first["foreground_mean"] == second["foreground_mean"] and len(first["metric_per_case"]) == 2
    assert log_of(folder).count("Pretrained weights:") == 1  # the fine-tuning's own


@pytest.mark.parametrize("method", START_METHODS)
def test_data_workers_start(done: World, method: str) -> None:
    output = done.finished[method].stdout
    assert all(f"3 workers of {trainer} by {method}" in output for trainer in (PCT_PRETRAIN, PCT_VF))
    assert (done.fold(PCT_VF, method) / "checkpoint_final.pth").is_file()


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_best.pth"])
@pytest.mark.parametrize("trainer", [PCT_VF, PCT_PRETRAIN])
def test_checkpoint_is_plain_data_from_which_the_network_can_be_rebuilt(done: World, name: str, trainer: str) -> None:
    checkpoint = torch.load(done.fold(trainer) / name, weights_only=True)
    assert checkpoint["trainer_name"] == trainer
    meta = checkpoint["misfm_meta"]
    assert meta.keys() >= {"method", "recipe", "network", "data", "versions", "citations"}
    assert meta["method"] == ("supervised" if trainer == PCT_VF else "volume_fusion")
    assert meta["versions"].keys() >= {"nnunetv2-misfm", "nnunetv2", "torch"} and "MIS-FM" in meta["citations"][-1]
    assert list(meta["recipe"]["features_per_stage"]) == [4, 4, 8, 16, 32]
    network = meta["network"]
    assert network["class"].startswith("nnunetv2_misfm.architectures.")
    sizes = {"input_channels": network["input_channels"], "num_classes": network["num_classes"]}
    rebuilt = locate(network["class"])(**sizes, **network["kwargs"], deep_supervision=False)
    rebuilt.load_state_dict(checkpoint["network_weights"])
    heads = 3 if trainer == PCT_VF else 5
    assert rebuilt.eval()(torch.zeros(1, 1, *SHAPE)).shape == (1, heads, *SHAPE)


@pytest.mark.parametrize("trainer", OTHER_TRAINERS)
def test_every_other_trainer_that_nnunet_finds_trains(train: Callable[..., Path], trainer: str) -> None:
    others = {PCT_PRETRAIN, PCT_VF, *OTHER_PAIRS.values(), *COMPARATORS, UNIVERSAL}
    assert others | set(OTHER_TRAINERS) == set(nnunetv2_misfm_trainers.__all__)
    pretrained = train(OTHER_PAIRS[trainer]) / "checkpoint_final.pth" if trainer in OTHER_PAIRS else None
    folder = train(trainer)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["current_epoch"] == 2 and np.isfinite(checkpoint["logging"]["train_losses"]).all()
    account = checkpoint["misfm_meta"]["pretrained_weights"]
    assert account["file"] == str(pretrained) if pretrained else account is None
    assert (folder / "progress.png").is_file()


@pytest.mark.parametrize("trainer", [PCT_PRETRAIN, *(f"nnUNetTrainerPCTNet{rival}Pretrain" for rival in RIVALS)])
def test_seed_repeats_a_pretraining_exactly(train: Callable[..., Path], trainer: str) -> None:
    runs = []
    for _ in range(2):
        torch.seed()  # as in a fresh process
        log = torch.load(train(trainer) / "checkpoint_final.pth", weights_only=True)["logging"]
        runs.append((log["train_losses"], log["val_losses"]))
    assert runs[0] == runs[1]


def test_continuing_in_an_empty_folder_takes_the_routes(
    train: Callable[..., Path], done: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MisfmError, match=FOUR_ROUTES):
        train(PCT_VF, continue_training=True)
    monkeypatch.setenv("nnUNet_misfm_weights", str(done.weights))
    folder = train(PCT_VF, continue_training=True)
    assert json.loads((folder / "pretrained_weights.json").read_text())["file"] == str(done.weights)


def test_flag_is_the_only_source_when_the_variable_is_set_too(
    train: Callable[..., Path], done: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_misfm_weights", str(done.weights))
    start, at_start = nnUNetTrainer.on_train_start, {}

    def on_train_start(trainer: Any) -> None:
        at_start.update({name: tensor.clone() for name, tensor in trainer.network.state_dict().items()})
        start(trainer)

    monkeypatch.setattr(nnUNetTrainer, "on_train_start", on_train_start)
    folder = train(PCT_VF, pretrained_weights=str(done.pool_weights))
    expected = torch.load(done.pool_weights, weights_only=True)["network_weights"]
    assert all(torch.equal(at_start[name], expected[name]) for name in expected if ".seg_layers." not in name)
    assert json.loads((folder / "pretrained_weights.json").read_text())["route"] == "-pretrained_weights"
    assert str(done.weights) not in log_of(folder)


def test_continuing_goes_on_from_the_last_epoch_and_loads_no_pretrained_weights(
    train: Callable[..., Path], interrupted: Path
) -> None:
    account = (interrupted / "pretrained_weights.json").read_text()
    train(PCT_VF, continue_training=True)
    checkpoint = torch.load(interrupted / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["current_epoch"] == 2 and len(checkpoint["logging"]["train_losses"]) == 2
    assert checkpoint["misfm_meta"]["pretrained_weights"] == json.loads(account)
    log = log_of(interrupted)
    assert re.findall(r"Epoch (\d+)", log) == ["1"] and "WARNING" not in log and "Pretrained weights:" not in log


@pytest.mark.parametrize("name", ["checkpoint_latest.pth", "checkpoint_final.pth"])
def test_continuing_from_a_truncated_checkpoint_falls_back_with_a_warning(
    train: Callable[..., Path], interrupted: Path, name: str
) -> None:
    if name == "checkpoint_final.pth":
        train(PCT_VF, continue_training=True)
        (interrupted / "checkpoint_latest.pth").unlink(missing_ok=True)
    best = interrupted / "checkpoint_best.pth"
    epoch = torch.load(best, weights_only=True)["current_epoch"]
    truncate(interrupted / name)
    train(PCT_VF, continue_training=True)
    log = log_of(interrupted)
    assert f"WARNING: {interrupted / name} is truncated or no PyTorch checkpoint" in log
    assert f"Going on from {best} (epoch {epoch}) instead." in log
    assert torch.load(interrupted / "checkpoint_final.pth", weights_only=True)["current_epoch"] == 2


def test_val_of_a_truncated_checkpoint_fails_with_a_sentence(train: Callable[..., Path], interrupted: Path) -> None:
    train(PCT_VF, continue_training=True)
    truncate(interrupted / "checkpoint_final.pth")
    with pytest.raises(MisfmError, match=r"checkpoint_final.pth is truncated or no PyTorch checkpoint"):
        train(PCT_VF, only_run_validation=True)


def test_checkpoint_of_another_network_is_refused_by_every_route(
    train: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = train("nnUNetTrainerBaseline") / "checkpoint_final.pth"
    with pytest.raises(AssertionError, match="is missing in the pretrained model weights"):  # nnU-Net's own sentence
        train(PCT_VF, pretrained_weights=str(other))
    monkeypatch.setenv("nnUNet_misfm_weights", str(other))
    with pytest.raises(MisfmError, match=r"expected weights of the same network, but only 0.0 % of its parameters fit"):
        train(PCT_VF)
