"""The README's commands on tiny data: real nnU-Net processes where a process matters, nnU-Net's `run_training` elsewhere.

Two datasets of 24 x 28 x 24 voxels: 900 is unlabelled (its label is a body mask), 901 has two labels. All commands run
once, two at a time, in the fixture `done`; the tests look at what they left behind.
"""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from pydoc import locate
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.run.run_training import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.weights.checkpoint import file_sha256

pytestmark = pytest.mark.slow

SHAPE = (24, 28, 24)
POOL, ORGANS = "Dataset900_Pool", "Dataset901_Organs"
PCT_PRETRAIN, PCT_VF = "nnUNetTrainerPCTNetVFPretrain", "nnUNetTrainerPCTNetVF"
QUICK = (
    "num_epochs=2", "num_iterations_per_epoch=2", "num_val_iterations_per_epoch=1", "seed=3", "batch_size=2",
    "features_per_stage=[4,4,8,16,32]", "architecture.features_per_stage=[4,8,16]",
)  # fmt: skip
FOUR_ROUTES = (
    "nnUNetTrainerPCTNetVF expected pretrained weights and found none by any of its four routes: 1. -pretrained_weights"
)
START_METHODS = ("fork", "spawn", "forkserver")
# What a user's own program does that starts nnU-Net with another way of starting data workers. The final validation
# asks for spawn whatever is set, so it is left out.
WORKERS_SCRIPT = """
import multiprocessing, sys

if __name__ == "__main__":
    from nnunetv2.run.run_training import run_training_entry
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    multiprocessing.set_start_method(sys.argv[1])
    start_epoch = nnUNetTrainer.on_train_epoch_start

    def count_workers(trainer):
        alive = len(multiprocessing.active_children())
        print(f"{alive} workers of {type(trainer).__name__} by {multiprocessing.get_start_method()}", flush=True)
        start_epoch(trainer)

    nnUNetTrainer.on_train_epoch_start = count_workers
    nnUNetTrainer.perform_actual_validation = lambda trainer, save_probabilities: None
    for name in ("nnUNetTrainerPCTNetVFPretrain", "nnUNetTrainerPCTNetVF"):
        sys.argv = ["nnUNetv2_train", "901", "quick", "0", "-tr", name, "-device", "cpu"]
        run_training_entry()
"""


def write_dataset(folder: Path, seed: int, labelled: bool) -> None:
    """Six training cases and one test case: an ellipsoid body with two bright ellipsoids of jittered place."""

    def ellipsoid(centre: np.ndarray, semi_axes: tuple[int, int, int]) -> np.ndarray:
        offsets = (np.indices(SHAPE) - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(semi_axes, (3, 1, 1, 1))
        return (offsets**2).sum(0) <= 1

    for case in range(7):
        generator = np.random.default_rng((seed, case))
        middle = np.array(SHAPE) / 2
        body = ellipsoid(middle, (11, 13, 11))
        image, labels = 100 * body + generator.normal(0, 10, SHAPE), np.zeros(SHAPE, np.uint8)
        for label, shift in ((1, -5), (2, 5)):
            organ = ellipsoid(middle + shift + generator.uniform(-1, 1, 3), (4, 5, 4))
            image[organ] += 60 * label
            labels[organ] = label
        part = "Tr" if case < 6 else "Ts"
        files = {f"images{part}/case_{case}_0000": image.astype(np.float32)}
        files[f"labels{part}/case_{case}"] = labels if labelled else body.astype(np.uint8)
        for name, array in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / f"{name}.nii.gz"))
    names = ["background", "organ", "lesion"] if labelled else ["background", "body"]
    description = {"channel_names": {"0": "MRI"}, "labels": {n: i for i, n in enumerate(names)}, "numTraining": 6}
    declared = {} if labelled else {"misfm": {"labels": "body_mask"}}
    (folder / "dataset.json").write_text(json.dumps({**description, "file_ending": ".nii.gz", **declared}))


@dataclass
class World:
    """Folders, variables, and what every command came to (by a name that the tests know)."""

    root: Path
    finished: dict[str, subprocess.CompletedProcess] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        folders = {f"nnUNet_{name}": str(self.root / name) for name in ("raw", "preprocessed", "results")}
        discovery = str(Path(nnunetv2_misfm_trainers.__file__).parent)
        one_process = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
        malloc = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)}
        return {**folders, "nnUNet_extTrainer": discovery, **one_process, **malloc, "OMP_WAIT_POLICY": "passive"}

    def run(self, step: str, *command: str | Path, **variables: str | Path | None) -> None:
        """Runs a script of this environment, or this Python; a variable of value None is unset."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
        environment = {**inherited, **self.variables, **variables}
        program, *arguments = map(str, command)
        self.finished[step] = subprocess.run(
            [str(Path(sys.executable).parent / program), *arguments],
            env={name: str(value) for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def train(
        self,
        step: str,
        trainer: str,
        *options: str | Path,
        target: tuple[str, str, str] = ("901", "quick", "0"),
        **variables: str | Path | None,
    ) -> None:
        """Runs `nnUNetv2_train DATASET CONFIGURATION FOLD -tr TRAINER OPTIONS` on the CPU."""
        self.run(step, "nnUNetv2_train", *target, "-tr", trainer, *options, "-device", "cpu", **variables)

    def fold(self, trainer: str, *, dataset: str = ORGANS, fold: str = "0", results: str = "results") -> Path:
        return self.root / results / dataset / f"{trainer}__nnUNetPlans__quick" / f"fold_{fold}"

    def plans_file(self, dataset: str) -> Path:
        return self.root / "preprocessed" / dataset / "nnUNetPlans.json"


def parallel(*jobs: Callable[[], None]) -> None:
    """Runs jobs two at a time, and raises what one of them raises."""
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def prepare(world: World, dataset: str) -> None:
    """Plans, preprocesses, configures and pretrains PCT-Net on a dataset."""
    number = dataset[7:10]
    plan = ("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "3d_fullres", "-npfp", "1", "-np", "1")
    # without data workers nnU-Net's planner asks PyTorch for no thread at all, an error
    world.run(f"plan {number}", *plan, "--verify_dataset_integrity", nnUNet_n_proc_DA="1")
    configure = ("nnUNetv2_misfm", "configure", "-d", number, "-c", "3d_fullres", "--name", "quick")
    world.run(f"configure {number}", *configure, *QUICK)
    if dataset == ORGANS:
        plans = json.loads(world.plans_file(ORGANS).read_text())
        plans["configurations"]["faulty"] = {"inherits_from": "quick", "misfm": {"num_epoch": 2}}
        world.plans_file(ORGANS).write_text(json.dumps(plans))
        world.train("no weights", PCT_VF)
    world.train(f"pretrain {number}", PCT_PRETRAIN, target=(number, "quick", "all"))


def readme_chain(world: World) -> None:
    """Fine-tunes from dataset 900, predicts in three ways, validates again."""
    weights = world.fold(PCT_PRETRAIN, dataset=POOL, fold="all") / "checkpoint_final.pth"
    world.train("fine-tune", PCT_VF, "-pretrained_weights", weights, nnUNet_results=world.root / "chain")
    model = world.fold(PCT_VF, results="chain")
    images = world.root / "raw" / ORGANS / "imagesTs"
    here, other = {"nnUNet_results": world.root / "chain"}, {"nnUNet_raw": None, "nnUNet_preprocessed": None}
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


def start_workers(world: World, method: str) -> None:
    """Pretrains and fine-tunes with two data workers."""
    script = world.root / f"train_by_{method}.py"
    script.write_text(WORKERS_SCRIPT)
    results = world.root / method
    world.run(method, "python", script, method, nnUNet_n_proc_DA="2", nnUNet_results=results)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world after all commands."""
    world = World(tmp_path_factory.mktemp("nnunet"))
    write_dataset(world.root / "raw" / POOL, 900, labelled=False)
    write_dataset(world.root / "raw" / ORGANS, 901, labelled=True)
    for folder in ("preprocessed", "results", "chain", "elsewhere"):
        (world.root / folder).mkdir()
    parallel(lambda: prepare(world, POOL), lambda: prepare(world, ORGANS))
    weights = world.fold(PCT_PRETRAIN, fold="all") / "checkpoint_final.pth"
    truncated = world.root / "truncated.pth"
    truncated.write_bytes(weights.read_bytes()[:5000] if weights.is_file() else b"")

    job = functools.partial(functools.partial, world.train)

    parallel(
        functools.partial(readme_chain, world),
        *(functools.partial(start_workers, world, method) for method in START_METHODS),
        job("finished run", PCT_VF),
        job("variable", PCT_VF, nnUNet_misfm_weights=weights, nnUNet_results=world.root / "variable"),
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

    monkeypatch.setenv("nnUNet_misfm_weights", str(done.fold(PCT_PRETRAIN, fold="all") / "checkpoint_final.pth"))
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
    file.write_bytes(file.read_bytes()[:5000])


def probabilities(folder: Path) -> np.ndarray:
    (file,) = folder.glob("*.npz")
    return np.load(file)["probabilities"]


@pytest.mark.parametrize(
    "step",
    ["plan 900", "plan 901", "configure 900", "configure 901", "pretrain 900", "pretrain 901", "fine-tune", "predict",
     "predict from folder", "export", "install", "predict elsewhere", "validate", "finished run", "variable",
     *START_METHODS],
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
    ("results", "source", "route", "reason"),
    [
        ("chain", POOL, "-pretrained_weights", "by nnU-Net's -pretrained_weights"),
        ("results", ORGANS, f"a finished run of {PCT_PRETRAIN} on this dataset", f"by a finished run of {PCT_PRETRAIN}"),
        ("variable", ORGANS, "the variable nnUNet_misfm_weights", "by the variable nnUNet_misfm_weights"),
    ],
)
def test_run_says_which_weights_it_took_and_why(done: World, results: str, source: str, route: str, reason: str) -> None:
    folder, file = done.fold(PCT_VF, results=results), done.fold(PCT_PRETRAIN, dataset=source, fold="all")
    file /= "checkpoint_final.pth"
    account = json.loads((folder / "pretrained_weights.json").read_text())
    heads = [name for name in account["fresh"] if ".seg_layers." in name]
    assert (account["route"], account["file"], account["sha256"]) == (route, str(file), file_sha256(file))
    assert account["share"] == 1 and account["adapted"] == {} and len(heads) == len(account["fresh"]) == 8
    network = torch.load(folder / "checkpoint_final.pth", weights_only=True)["network_weights"]
    assert {*account["moved"], *heads} == set(network)
    lines = [line for line in log_of(folder).splitlines() if "Pretrained weights:" in line]
    assert len(lines) == 1 and str(file) in lines[0] and reason in lines[0]


def test_model_predicts_the_same_by_name_from_its_folder_and_installed_elsewhere(done: World) -> None:
    expected = probabilities(done.root / "predict")
    assert expected.shape == (3, *SHAPE) and expected.std() > 0.01
    for folder in ("predict from folder", "predict elsewhere"):
        np.testing.assert_array_equal(probabilities(done.root / folder), expected)
        pair = [sitk.GetArrayFromImage(sitk.ReadImage(done.root / f / "case_6.nii.gz")) for f in ("predict", folder)]
        np.testing.assert_array_equal(*pair)
    assert "Dataset901_Organs" in {path.name for path in (done.root / "elsewhere").iterdir()}


def test_val_repeats_the_validation_and_loads_nothing(done: World) -> None:
    folder = done.fold(PCT_VF, results="chain")
    first, second = (json.loads((folder / "validation" / f"{n}.json").read_text()) for n in ("first", "summary"))
    assert first["foreground_mean"] == second["foreground_mean"] and len(first["metric_per_case"]) == 2
    assert log_of(folder).count("Pretrained weights:") == 1  # the fine-tuning's own


@pytest.mark.parametrize("method", START_METHODS)
def test_data_workers_start(done: World, method: str) -> None:
    output = done.finished[method].stdout
    assert f"2 workers of {PCT_PRETRAIN} by {method}" in output  # its validation batches are made in the process itself
    assert f"3 workers of {PCT_VF} by {method}" in output
    assert (done.fold(PCT_VF, results=method) / "checkpoint_final.pth").is_file()


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_best.pth"])
@pytest.mark.parametrize("trainer", [PCT_VF, PCT_PRETRAIN])
def test_checkpoint_is_plain_data_from_which_the_network_can_be_rebuilt(done: World, name: str, trainer: str) -> None:
    folder = done.fold(PCT_VF) if trainer == PCT_VF else done.fold(PCT_PRETRAIN, fold="all")
    checkpoint = torch.load(folder / name, weights_only=True)
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


@pytest.mark.parametrize("trainer", ["nnUNetTrainerPCTNet", "nnUNetTrainerBaseline", "nnUNetTrainerVF"])
def test_every_other_trainer_that_nnunet_finds_trains(train: Callable[..., Path], trainer: str) -> None:
    others = {PCT_PRETRAIN, PCT_VF, "nnUNetTrainerVFPretrain"}
    assert others | {"nnUNetTrainerPCTNet", "nnUNetTrainerBaseline", "nnUNetTrainerVF"} == set(
        nnunetv2_misfm_trainers.__all__
    )
    pretrained = train("nnUNetTrainerVFPretrain") / "checkpoint_final.pth" if trainer == "nnUNetTrainerVF" else None
    folder = train(trainer)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["current_epoch"] == 2 and np.isfinite(checkpoint["logging"]["train_losses"]).all()
    if pretrained:
        assert json.loads((folder / "pretrained_weights.json").read_text())["file"] == str(pretrained)
    else:
        assert not (folder / "pretrained_weights.json").exists()


def test_seed_repeats_a_pretraining_exactly(train: Callable[..., Path]) -> None:
    losses = []
    for _ in range(2):
        torch.seed()  # as in a fresh process
        folder = train(PCT_PRETRAIN)
        losses.append(torch.load(folder / "checkpoint_final.pth", weights_only=True)["logging"]["train_losses"])
    assert losses[0] == losses[1]


def test_continuing_in_an_empty_folder_takes_the_routes(
    train: Callable[..., Path], done: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(MisfmError, match=FOUR_ROUTES):
        train(PCT_VF, continue_training=True)
    weights = done.fold(PCT_PRETRAIN, fold="all") / "checkpoint_final.pth"
    monkeypatch.setenv("nnUNet_misfm_weights", str(weights))
    folder = train(PCT_VF, continue_training=True)
    assert json.loads((folder / "pretrained_weights.json").read_text())["file"] == str(weights)


def test_flag_is_the_only_source_when_the_variable_is_set_too(
    train: Callable[..., Path], done: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, others = (done.fold(PCT_PRETRAIN, dataset=d, fold="all") / "checkpoint_final.pth" for d in (POOL, ORGANS))
    monkeypatch.setenv("nnUNet_misfm_weights", str(others))
    start, at_start = nnUNetTrainer.on_train_start, {}

    def on_train_start(trainer: Any) -> None:
        at_start.update({name: tensor.clone() for name, tensor in trainer.network.state_dict().items()})
        start(trainer)

    monkeypatch.setattr(nnUNetTrainer, "on_train_start", on_train_start)
    folder = train(PCT_VF, pretrained_weights=str(weights))
    expected = torch.load(weights, weights_only=True)["network_weights"]
    assert all(torch.equal(at_start[name], expected[name]) for name in expected if ".seg_layers." not in name)
    assert json.loads((folder / "pretrained_weights.json").read_text())["route"] == "-pretrained_weights"
    assert str(others) not in log_of(folder)


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
