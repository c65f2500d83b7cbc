import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace

import nnunetv2_misfm
import nnunetv2_misfm.demo
import nnunetv2_misfm.planning.adapt
import nnunetv2_misfm.planning.configure
import nnunetv2_misfm.planning.plan
import nnunetv2_misfm.preview
import nnunetv2_misfm.weights.convert
from nnunetv2_misfm import installation
from nnunetv2_misfm.benchmark import benchmark, gather, report
from nnunetv2_misfm.benchmark.prepare import Request
from nnunetv2_misfm.benchmark.run import Options
from nnunetv2_misfm.cli import main
from nnunetv2_misfm.data import import_dataset, preprocess
from nnunetv2_misfm.data.import_dataset import Workers
from nnunetv2_misfm.data.outcome import Settings
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import Finding

Capture = pytest.CaptureFixture[str]
COMMANDS = (
    *("path", "enable", "disable", "check", "import", "preprocess", "configure", "plan"),
    *("universal", "priors", "preview", "convert"),
    *("benchmark", "report", "demo"),
)


class Recorder:
    """Stands in for a function and keeps its arguments."""

    def __init__(self, result: Any = None) -> None:
        self.result, self.calls = result, []

    def __call__(self, *arguments: Any) -> Any:
        self.calls.append(arguments)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def exit_of(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_path_prints_the_discovery_folder_alone(capsys: Capture) -> None:
    assert main(["path"]) == 0
    printed = capsys.readouterr()
    assert printed == (f"{Path(nnunetv2_misfm.__file__).parent / 'trainers' / 'discovery'}\n", "")


def test_path_and_help_load_neither_torch_nor_nnunet() -> None:
    code = (
        "import sys; from nnunetv2_misfm.cli import main\n"
        "status = main(sys.argv[1:])\n"
        "print(status, sorted({'torch', 'numpy', 'nnunetv2', 'matplotlib'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, "path"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{installation.discovery_folder()}\n0 []\n"


@pytest.mark.parametrize(("arguments", "said"), [
    ([], "the following arguments are required: COMMAND"),
    (["paths"], "invalid choice: 'paths'"),
    (["path", "now"], "unrecognized arguments: now"),
    (["configure", "-d", "4", "-c", "3d_fullres", "num_epochs=5"], "the following arguments are required: --name"),
    (["configure", "-d", "4", "-c", "3d_fullres", "--name", "x"], "the following arguments are required: key=value"),
    (["plan"], "the following arguments are required: -d/--datasets"),
    (["preview", "-d", "4", "-c", "3d_fullres"], "the following arguments are required: -o/--output"),
    (["preview", "-d", "4", "-c", "3d_fullres", "-o", "x", "-n", "two"], "invalid int value: 'two'"),
    (["convert"], "the following arguments are required: FILE"),
    (["convert", "f.pt", "--resolution-mode", "3"], "invalid choice: 3"),
    (["demo", "-device", "tpu"], "invalid choice: 'tpu'"),
])  # fmt: skip
def test_wrong_usage_exits_with_2_and_says_what_is_wrong(capsys: Capture, arguments: list[str], said: str) -> None:
    assert exit_of(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err


def test_help_lists_every_command_and_version_is_the_packages(capsys: Capture) -> None:
    assert exit_of(["--help"]) == 0
    listed = capsys.readouterr().out
    assert re.findall(r"^    (\w+)", listed, re.MULTILINE) == list(COMMANDS)
    for command in COMMANDS:
        assert exit_of([command, "--help"]) == 0
        assert f"usage: nnUNetv2_misfm {command}" in capsys.readouterr().out
    assert exit_of(["--version"]) == 0
    assert capsys.readouterr().out == f"{nnunetv2_misfm.__version__}\n"


@pytest.mark.parametrize("error", [MisfmError("a sentence."), NotImplementedError("a sentence.")])
@pytest.mark.parametrize("command", ["enable", "disable", "check"])
def test_users_errors_become_one_line_and_status_2(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str, error: Exception
) -> None:
    monkeypatch.setattr(installation, command, Recorder(error))
    assert main([command]) == 2
    assert capsys.readouterr() == ("", f"nnUNetv2_misfm {command}: a sentence.\n")


def test_our_own_faults_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "check", Recorder(RuntimeError("a fault of ours")))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        main(["check"])


# check, enable, disable


def test_check_prints_each_finding_and_what_to_do_about_faults(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [
        Finding(True, "torch is there", "never said"),
        Finding(False, "nnUNet_raw is not set.", "Run export it"),
    ]
    monkeypatch.setattr(installation, "check", Recorder(findings))
    assert main(["check"]) == 1
    assert capsys.readouterr() == ("ok    torch is there\nFAIL  nnUNet_raw is not set.\n      Run export it\n", "")


def test_check_without_faults_has_status_0(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "check", Recorder([Finding(True, "a"), Finding(True, "b")]))
    assert main(["check"]) == 0
    assert capsys.readouterr().out == "ok    a\nok    b\n"


def test_enable_and_disable_name_the_files(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = Path("/site/hook.pth")
    monkeypatch.setattr(installation, "enable", Recorder(hook))
    assert main(["enable"]) == 0
    assert capsys.readouterr().out == (
        "nnU-Net now finds the trainers in this environment (/site/hook.pth); undo: nnUNetv2_misfm disable\n"
    )
    for removed, said in (
        ([hook, Path("/b.pth")], "removed /site/hook.pth, /b.pth"),
        ([], "nothing to remove: it was not"),
    ):
        monkeypatch.setattr(installation, "disable", Recorder(removed))
        assert main(["disable"]) == 0
        assert capsys.readouterr().out.startswith(said)


# Commands that are thin over a function


@pytest.mark.parametrize(
    ("arguments", "module", "function", "called_with", "said"),
    [
        (["configure", "-d", "4", "-c", "3d_fullres", "--name", "x", "seed=-1", "a.b=[1, 2]"],
         nnunetv2_misfm.planning.configure, "configure",
         ("4", "3d_fullres", "x", ["seed=-1", "a.b=[1, 2]"], "nnUNetPlans"),
         "wrote configuration x (inherits from 3d_fullres) into done\n"),
        (["configure", "--dataset", "Dataset004_A", "--configuration", "c", "--plans", "other", "--name", "x", "a=b=c"],
         nnunetv2_misfm.planning.configure, "configure", ("Dataset004_A", "c", "x", ["a=b=c"], "other"),
         "wrote configuration x (inherits from c) into done\n"),
        (["plan", "-d", "4"],
         nnunetv2_misfm.planning.plan, "plan", ("4", 8.0, "nnUNetPCTNetPlans"), "done\n"),
        (["plan", "-d", "4", "--gpu-memory-gb", "11.5", "--overwrite-plans-name", "x"],
         nnunetv2_misfm.planning.plan, "plan", ("4", 11.5, "x"), "done\n"),
        (["preview", "-d", "4", "-c", "3d_fullres", "-o", "a/b.png"],
         nnunetv2_misfm.preview, "preview",
         ("4", "3d_fullres", Path("a/b.png"), "nnUNetPlans", 2, 0, "nnUNetTrainerVFPretrain", None), "done\n"),
        (["preview", "-d", "4", "-c", "x", "-o", "b.png", "-p", "other", "-n", "5", "--seed", "7",
          "-tr", "nnUNetTrainerMIMPretrain", "--checkpoint", "a/f.pth"],
         nnunetv2_misfm.preview, "preview",
         ("4", "x", Path("b.png"), "other", 5, 7, "nnUNetTrainerMIMPretrain", Path("a/f.pth")), "done\n"),
        (["convert", "a/f.pt"], nnunetv2_misfm.weights.convert, "convert", (Path("a/f.pt"), None, None), "done\n"),
        (["convert", "f.pt", "-o", "b.pth", "--resolution-mode", "0"],
         nnunetv2_misfm.weights.convert, "convert", (Path("f.pt"), Path("b.pth"), 0), "done\n"),
        (["convert", "f.pt", "--dataset", "4", "-c", "x"],
         nnunetv2_misfm.planning.adapt, "adapt", (Path("f.pt"), "4", "x", "nnUNetPlans", None, None), "done\n"),
        (["convert", "f.pt", "-d", "4", "-c", "x", "-p", "other", "-o", "b.pth", "--resolution-mode", "2"],
         nnunetv2_misfm.planning.adapt, "adapt", (Path("f.pt"), "4", "x", "other", Path("b.pth"), 2), "done\n"),
        (["demo"], nnunetv2_misfm.demo, "run_demo", (Path("demo_results"), "auto"), ""),
        (["demo", "-o", "there", "-device", "cpu"], nnunetv2_misfm.demo, "run_demo", (Path("there"), "cpu"), ""),
    ],
)  # fmt: skip
def test_command_hands_its_arguments_to_the_function(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, arguments: list[str], module: Any, function: str,
    called_with: tuple, said: str,
) -> None:  # fmt: skip
    recorder = Recorder("done")
    monkeypatch.setattr(module, function, recorder)
    assert main(arguments) == 0
    assert recorder.calls == [called_with]
    assert capsys.readouterr() == (said, "")
    monkeypatch.setattr(module, function, Recorder(MisfmError("a sentence.")))
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"nnUNetv2_misfm {arguments[0]}: a sentence.\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-c", "3d_fullres"], "expected -c and -p together with --dataset, got them alone: add --dataset ID."),
        (["-p", "nnUNetPlans"], "expected -c and -p together with --dataset, got them alone: add --dataset ID."),
        (["-d", "4"], "expected the configuration to adapt to with --dataset, got none: add -c 3d_fullres, say."),
    ],
)
def test_convert_wants_dataset_and_configuration_together(capsys: Capture, options: list[str], said: str) -> None:
    assert main(["convert", "f.pt", *options]) == 2
    assert capsys.readouterr() == ("", f"nnUNetv2_misfm convert: {said}\n")


@pytest.mark.parametrize("command", COMMANDS[4:])
def test_unsupported_nnunet_is_told_before_anything_of_it_is_used(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(installation, "require_supported_nnunet", Recorder(MisfmError("nnunetv2 2.5 is installed.")))
    needed = {"configure": ["-d", "4", "-c", "c", "--name", "n", "a=1"], "preview": ["-d", "4", "-c", "c", "-o", "o"]}
    needed |= {
        "plan": ["-d", "4"],
        "convert": ["f.pt"],
        "preprocess": ["-d", "4"],
        "import": ["--input", "a", "-d", "4"],
        "benchmark": ["-d", "4", "-c", "c", "--trainers", "nnUNetTrainer"],
        "report": ["-d", "4", "-o", "o"],
        "universal": ["-d", "4", "--dataset", "950"],
        "priors": ["f.pth", "-o", "o"],
    }
    assert main([command, *needed.get(command, [])]) == 2
    assert capsys.readouterr().err == f"nnUNetv2_misfm {command}: nnunetv2 2.5 is installed.\n"


def test_import_hands_on_its_options_and_prints_the_summary(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        import_dataset, "import_scans", lambda *given, **named: calls.append((given, named)) or "a summary"
    )
    assert main(["import", "--input", "a", "b", "--dataset", "900"]) == 0
    options = "--name CTPool --modality CT --scheduler tcp://h:1 --link --split-time-series --resample-sheared"
    assert main(["import", "--input", "a", "-d", "7", *options.split(), "--keep-duplicates", "--min-size", "9"]) == 0
    assert main(["import", "--input", "a", "-d", "7", "--split-by-modality", "--workers", "3"]) == 0
    chosen = Settings("CT", 9, split_time_series=True, resample_sheared=True, keep_duplicates=True, link=True)
    assert calls == [
        (([Path("a"), Path("b")], 900, "Unlabelled", Settings("auto"), Workers()), {"split_by_modality": False}),
        (([Path("a")], 7, "CTPool", chosen, Workers(None, "tcp://h:1")), {"split_by_modality": False}),
        (([Path("a")], 7, "Unlabelled", Settings("auto"), Workers(3)), {"split_by_modality": True}),
    ]
    assert capsys.readouterr().out == "a summary\n" * 3


def test_preprocess_hands_on_its_options(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder("done")
    monkeypatch.setattr(preprocess, "preprocess", recorder)
    assert main(["preprocess", "-d", "900", "Dataset901_Pool"]) == 0
    assert main(["preprocess", "-d", "900", "-c", "a", "b", "-p", "mine", "--scheduler", "tcp://h:1"]) == 0
    assert recorder.calls == [
        ("900", ["3d_fullres"], "nnUNetPlans", None, None),
        ("Dataset901_Pool", ["3d_fullres"], "nnUNetPlans", None, None),
        ("900", ["a", "b"], "mine", None, "tcp://h:1"),
    ]
    assert capsys.readouterr().out == "done\n" * 3


def test_benchmark_hands_on_its_options(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(("done", 1))
    monkeypatch.setattr(benchmark, "benchmark", recorder)
    few = ["benchmark", "-d", "4", "-c", "3d_fullres", "--trainers", "nnUNetTrainer"]
    assert main(few) == 1
    many = (
        "--folds 0 all --train-cases 5 all --seeds 1 2 --epochs 7 --set batch_size=2 --weights A=b.pth --test t -p mine"
    )
    how = "--tolerance 2 --device cpu --jobs 3 --gpus 8 --disable-tta --skip-validation --dry-run --name x"
    assert main([*few, *many.split(), *how.split()]) == 1
    assert main([*few, "--gpus", "8"]) == 1
    request = Request(
        *("4", "3d_fullres", ["nnUNetTrainer"], "mine", [0, "all"], [5, "all"], [1, 2]),
        *(["num_epochs=7", "batch_size=2"], Path("t"), {"A": Path("b.pth")}, "x", 2.0, False),
        " ".join(["nnUNetv2_misfm", *few, many, how]),
    )
    default = Request("4", "3d_fullres", ["nnUNetTrainer"], folds=[0], train_cases=["all"], seeds=[0], settings=[])
    line = " ".join(["nnUNetv2_misfm", *few])
    assert recorder.calls == [
        (replace(default, command=line), Options(), False),
        (request, Options("cpu", 3, skip_validation=True), True),
        (replace(default, command=f"{line} --gpus 8"), Options(jobs=8), False),
    ]
    assert capsys.readouterr() == ("done\n" * 3, "")


def test_report_hands_on_its_options(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    gathering, writing = Recorder("results"), Recorder(Path("there/report.html"))
    monkeypatch.setattr(gather, "gather", gathering)
    monkeypatch.setattr(report, "write_report", writing)
    assert main(["report", "-d", "4", "-o", "there"]) == 0
    assert main(["report", "-d", "4", "-o", "there", "--name", "x", "--on", "validation"]) == 0
    assert gathering.calls == [("4", "benchmark", None), ("4", "x", "validation")]
    assert writing.calls == [("results", Path("there"))] * 2
    assert capsys.readouterr() == ("wrote there/report.html\n" * 2, "")


@pytest.mark.parametrize("wrong", [["--train-cases", "few"], ["--folds", "-1"], ["--gpus", "0"], ["--device", "tpu"]])
def test_benchmark_refuses_impossible_options(capsys: Capture, wrong: list[str]) -> None:
    assert exit_of(["benchmark", "-d", "4", "-c", "c", "--trainers", "nnUNetTrainer", *wrong]) == 2
    assert "expected" in (said := capsys.readouterr().err) or "invalid choice" in said


@pytest.mark.parametrize("wrong", [["--workers", "0"], ["--min-size", "-3"], ["--workers", "2", "--scheduler", "x"]])
def test_import_refuses_impossible_options(capsys: Capture, wrong: list[str]) -> None:
    assert exit_of(["import", "--input", "a", "-d", "7", *wrong]) == 2
    assert "expected 1 or more" in (said := capsys.readouterr().err) or "not allowed with" in said


def test_ctrl_c_is_one_line_and_the_status_that_shells_know(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*given: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_dataset, "import_scans", stopped)
    assert main(["import", "--input", "a", "-d", "7"]) == 130
    said = capsys.readouterr().err
    assert said == "nnUNetv2_misfm import: stopped; the same command goes on where it was.\n"


def test_users_error_deep_down_is_one_line_and_status_2(capsys: Capture, workspace: Workspace) -> None:
    assert main(["configure", "-d", "555", "-c", "3d_fullres", "--name", "mine", "num_epoch=5"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("nnUNetv2_misfm configure: unknown key 'num_epoch'; known are")


def test_configure_and_preview_work_from_the_command_line(capsys: Capture, workspace: Workspace) -> None:
    assert main(["configure", "-d", "555", "-c", "3d_fullres", "--name", "mine", "volume_fusion.num_levels=2"]) == 0
    picture = workspace.root / "picture.png"
    assert main(["preview", "-d", "555", "-c", "mine", "-o", str(picture), "-n", "1"]) == 0
    said = f"wrote configuration mine (inherits from 3d_fullres) into {workspace.base}/nnUNetPlans.json\n{picture}\n"
    assert capsys.readouterr() == (said, "")
    assert picture.stat().st_size > 10_000
    workspace.plans(patch_size=[16, 16])
    assert main(["preview", "-d", "555", "-c", "quick", "-o", str(picture)]) == 2
    assert "expected a 3D configuration, got one with the 2D patch" in capsys.readouterr().err
