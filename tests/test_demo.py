"""The demo's fast parts: folders, command lines, environment, a failing command, table and picture.

`make demo` runs the whole.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_misfm import demo
from nnunetv2_misfm.data.phantoms import write_phantom_dataset
from nnunetv2_misfm.demo import Command, choose_device, demo_commands, demo_environment, prepare_output, run_command
from nnunetv2_misfm.demo_report import Run, best_plane, body_box, dice_table, draw_picture, read_dice, write_results
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import discovery_folder


def script(folder: Path, name: str, body: str) -> None:
    file = folder / name
    file.write_text(f"#!{sys.executable}\n{body}\n")
    file.chmod(0o755)


def summary(folder: Path, dice: dict[str, list[float]]) -> Path:
    """What nnUNetv2_evaluate_folder writes: per class the Dice of every case."""
    folder.mkdir(parents=True, exist_ok=True)
    num_cases = len(next(iter(dice.values())))
    cases = [
        {
            "prediction_file": str(folder / f"phantom_{case:03d}.nii.gz"),
            "metrics": {label: {"Dice": values[case]} for label, values in dice.items()},
        }
        for case in range(num_cases)
    ]
    mean = {label: {"Dice": sum(values) / len(values)} for label, values in dice.items()}
    (folder / "summary.json").write_text(json.dumps({"metric_per_case": cases, "mean": mean}))
    return folder / "summary.json"


def test_an_output_folder_of_the_demo_is_emptied_and_other_files_in_it_are_kept(tmp_path: Path):
    output = tmp_path / "new" / "demo"
    prepare_output(output)
    (output / "nnUNet_results" / "old").mkdir()
    (output / "results.md").write_text("old")
    (output / "notes.txt").write_text("mine")
    prepare_output(output)
    names = sorted(path.name for path in output.iterdir() if path.name != demo.MARKER)
    assert names == ["logs", "nnUNet_preprocessed", "nnUNet_raw", "nnUNet_results", "notes.txt", "predictions"]
    assert not any((output / "nnUNet_results").iterdir())


def test_a_folder_that_the_demo_did_not_make_is_refused_untouched(tmp_path: Path):
    precious = tmp_path / "nnUNet_results" / "model.pth"
    precious.parent.mkdir()
    precious.write_text("weeks of work")
    with pytest.raises(MisfmError, match="output: expected a new or empty folder.*choose another --output"):
        prepare_output(tmp_path)
    assert precious.read_text() == "weeks of work" and len(list(tmp_path.iterdir())) == 1


def test_an_empty_folder_is_accepted(tmp_path: Path):
    prepare_output(tmp_path)
    assert (tmp_path / "logs").is_dir()


def test_the_commands_are_the_whole_job_in_order(tmp_path: Path):
    commands = demo_commands(tmp_path, "cpu")
    assert [command.arguments[0] for command in commands] == [
        "nnUNetv2_plan_and_preprocess",
        *["nnUNetv2_misfm"] * 2,
        *["nnUNetv2_train"] * 4,
        *["nnUNetv2_predict", "nnUNetv2_evaluate_folder"] * 3,
    ]
    trained = [command.arguments for command in commands if command.arguments[0] == "nnUNetv2_train"]
    assert [(line[1], line[line.index("-tr") + 1]) for line in trained] == [
        ("900", "nnUNetTrainerPCTNetVFPretrain"),
        ("901", "nnUNetTrainerBaseline"),
        ("901", "nnUNetTrainerPCTNet"),
        ("901", "nnUNetTrainerPCTNetVF"),
    ]
    weights = tmp_path / "nnUNet_results" / "Dataset900_PhantomPool"
    weights = weights / "nnUNetTrainerPCTNetVFPretrain__nnUNetPlans__demo" / "fold_all" / "checkpoint_final.pth"
    assert list(trained[-1][-2:]) == ["-pretrained_weights", str(weights)]
    assert not any("-pretrained_weights" in line for line in trained[:-1])


def test_the_device_reaches_every_command_that_computes(tmp_path: Path):
    for command in demo_commands(tmp_path, "cuda"):
        computes = command.arguments[0] in ("nnUNetv2_train", "nnUNetv2_predict")
        assert ("-device cuda" in str(command)) == computes


def test_all_three_trainers_train_on_the_same_configuration_and_predict_the_held_out_scans(tmp_path: Path):
    commands = [str(command) for command in demo_commands(tmp_path, "cpu")]
    for trainer in demo.TRAINERS:
        (train,) = (line for line in commands if f"nnUNetv2_train 901 demo 0 -tr {trainer} " in line)
        (predict,) = (line for line in commands if line.startswith("nnUNetv2_predict") and f"-tr {trainer} " in line)
        assert f"-i {tmp_path}/nnUNet_raw/Dataset901_PhantomOrgans/imagesTs" in predict and " -f 0 " in predict


def test_a_printed_command_can_be_pasted_into_a_shell():
    command = Command("", ["nnUNetv2_misfm", "patch_size=[24,48]", "a b"], {"nnUNet_n_proc_DA": "1"})
    assert str(command) == "nnUNet_n_proc_DA=1 nnUNetv2_misfm 'patch_size=[24,48]' 'a b'"


def test_the_environment_names_the_demos_folders_and_keeps_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("nnUNet_extTrainer", "/theirs")
    monkeypatch.setenv("nnUNet_raw", "/elsewhere")
    monkeypatch.setenv("A_USERS_OWN", "kept")
    environment = demo_environment(tmp_path, "cpu")
    assert environment["nnUNet_extTrainer"] == f"/theirs{os.pathsep}{discovery_folder()}"
    assert environment["A_USERS_OWN"] == "kept"
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        assert environment[name] == str(tmp_path / name)
    assert environment["MALLOC_MMAP_MAX_"] == "0" and environment["MALLOC_TRIM_THRESHOLD_"] == "68719476736"
    assert environment["OMP_NUM_THREADS"] == str(os.cpu_count()) and environment["nnUNet_compile"] == "f"
    assert environment["nnUNet_n_proc_DA"] == "0"
    assert int(demo_environment(tmp_path, "cuda")["nnUNet_n_proc_DA"]) >= 1


def test_our_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for value in ("", str(discovery_folder())):
        monkeypatch.setenv("nnUNet_extTrainer", value)
        assert demo_environment(tmp_path, "cpu")["nnUNet_extTrainer"] == str(discovery_folder())


def test_planning_is_given_a_data_worker_because_nnunet_fails_without(tmp_path: Path):
    plan, *others = demo_commands(tmp_path, "cpu")
    assert plan.variables == {"nnUNet_n_proc_DA": "1"} and not any(other.variables for other in others)


def test_a_command_gets_its_variables_and_its_output_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    body = "import os, sys; print(os.environ['A'] + os.environ['B']); print(sys.argv[1], file=sys.stderr)"
    script(tmp_path, "misfm_probe", body)
    environment = {"PATH": str(tmp_path), "A": "from the demo, ", "B": "overridden"}
    monkeypatch.setenv("PATH", str(tmp_path))
    command = Command("", ["misfm_probe", "argument"], {"B": "from the command"})
    assert run_command(command, environment, tmp_path / "log") > 0
    log = (tmp_path / "log").read_text()
    assert log.splitlines()[0] == "$ B='from the command' misfm_probe argument"
    assert "from the demo, from the command" in log and "argument" in log.splitlines()[1:]


def test_a_failing_command_is_named_with_its_status_and_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    script(tmp_path, "misfm_probe", "raise SystemExit(3)")
    monkeypatch.setenv("PATH", str(tmp_path))
    log = tmp_path / "04_misfm_probe.log"
    with pytest.raises(MisfmError, match=f"`misfm_probe -x` ended with status 3; its output is in {log}"):
        run_command(Command("", ["misfm_probe", "-x"]), {}, log)


def test_a_missing_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MisfmError, match="expected the command misfm_absent in .* or on PATH, found none; install"):
        run_command(Command("", ["misfm_absent"]), {}, tmp_path / "log")


@pytest.mark.parametrize(("there", "chosen"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_the_gpu_where_there_is_one(there: bool, chosen: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert choose_device("auto") == chosen
    assert choose_device("cpu") == "cpu"


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(MisfmError, match="device: expected a GPU for cuda.*use auto or cpu"):
        choose_device("cuda")
    with pytest.raises(MisfmError, match="device: expected auto, cpu or cuda, got 'tpu'"):
        choose_device("tpu")


def test_the_table_holds_means_by_hand(tmp_path: Path):
    first = summary(tmp_path / "a", {"1": [0.5, 0.7], "2": [0.9, 0.9], "3": [0.3, 0.1]})
    second = summary(tmp_path / "b", {"1": [1.0, 1.0], "2": [0.0, 0.0], "3": [0.5, 0.5]})
    assert read_dice(first) == (pytest.approx({"liver": 0.6, "kidneys": 0.9, "spine": 0.2}), 2)
    table = dice_table({"nnUNetTrainerBaseline": first, "nnUNetTrainerPCTNetVF": second})
    assert table.splitlines() == [
        "| trainer | network | liver | kidneys | spine | mean | n |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| nnUNetTrainerBaseline | stock nnU-Net | 0.600 | 0.900 | 0.200 | 0.567 | 2 |",
        "| nnUNetTrainerPCTNetVF | PCT-Net from Volume Fusion | 1.000 | 0.000 | 0.500 | 0.500 | 2 |",
    ]


def test_the_results_say_what_was_run_and_that_it_proves_nothing(tmp_path: Path):
    runs = [Run("Plan", f"nnUNetv2_plan_and_preprocess -o {tmp_path}/logs", 12.4)]
    variables = {"nnUNet_raw": f"{tmp_path}/nnUNet_raw", "nnUNet_compile": "f"}
    write_results(tmp_path / "results.md", "| a table |", ["Two epochs."], runs, variables)
    lines = (tmp_path / "results.md").read_text().splitlines()
    assert "| a table |" in lines and "- Two epochs." in lines
    assert "| Plan | 12 | `nnUNetv2_plan_and_preprocess -o ./logs` |" in lines
    assert 'export nnUNet_raw="$PWD/nnUNet_raw"' in lines and 'export nnUNet_compile="f"' in lines
    (warning,) = (line for line in lines if "says nothing about the methods" in line)
    assert "fixed length of 1000 epochs" in warning


def test_the_plane_drawn_shows_every_organ():
    labels = np.zeros((5, 4, 4), int)
    labels[:4, 0] = 1
    labels[1:3, 1] = 2
    labels[2:, 2] = 3
    assert best_plane(labels) == 2


def test_the_box_of_the_body_has_a_margin_and_ends_with_the_plane():
    plane_hu = np.full((20, 30), -1000)
    plane_hu[5:9, 1:29] = -80
    assert body_box(plane_hu) == (slice(3, 11), slice(0, 31))
    assert plane_hu[body_box(plane_hu)].shape == (8, 30)


def test_the_picture_colours_the_organs_that_nnunet_predicted(tmp_path: Path):
    dataset = write_phantom_dataset(tmp_path, 901, "Organs", num_training=0, num_test=1, seed=0, labelled=True)
    truth = sitk.ReadImage(str(dataset / "labelsTs" / "phantom_000.nii.gz"))
    coloured = {}
    for name, prediction in {"right": truth, "empty": truth * 0}.items():
        summary(tmp_path / name, {"1": [0.5], "2": [0.5], "3": [0.5]})
        sitk.WriteImage(prediction, str(tmp_path / name / "phantom_000.nii.gz"))
        draw_picture(tmp_path / f"{name}.png", dataset, {"nnUNetTrainerPCTNet": tmp_path / name})
        picture = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / f"{name}.png")))[..., :3].astype(int)
        assert picture.shape[1] > 2 * picture.shape[0]  # three panels side by side
        coloured[name] = (np.ptp(picture, axis=-1) > 40).sum()
    # the truth's panel and the legend are coloured in both
    assert coloured["right"] > 1.5 * coloured["empty"] > 500
