import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import Workspace
from toy import DATASET

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "pretraining.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("pretraining")


@pytest.mark.parametrize("workers", ["0", "1"])
def test_every_row_is_measured_on_a_preprocessed_dataset(workspace: Workspace, workers: str) -> None:
    workspace.plans()
    command = [
        sys.executable, str(SCRIPT), DATASET, "quick", "-tr", "nnUNetTrainerVFPretrain", "--device", "cpu",
        "--workers", workers, "--steps", "2", "--batches", "2", "--rounds", "2",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    rows = re.findall(r"^\| ([a-z][^|]*) \| ([\d.e+]+) \(", run.stdout, re.MULTILINE)
    names = [
        "whole run", "loader", "step with task", "step alone", "one core, ours, reading alone", "one core, ours, all",
        "one core, nnU-Net's",
    ]  # fmt: skip
    assert [name for name, _ in rows] == names and all(float(value) > 0 for _, value in rows)
    assert not list(workspace.results.parent.iterdir())  # only the temporary folder was written


def test_ratios_are_those_within_a_round(benchmark: ModuleType) -> None:
    found = {
        benchmark.WHOLE: [8.0, 4.0], benchmark.ALONE: [10.0, 5.0], benchmark.WITH_TASK: [8.0, 8.0],
        benchmark.LOADER: [30.0, 60.0], benchmark.READ: [12.0, 10.0], benchmark.OURS: [6.0, 6.0],
        benchmark.NNUNETS: [2.0, 1.0], "waiting": [0.25, 0.75],
    }  # fmt: skip
    text = benchmark.report(SimpleNamespace(workers=3), found)
    assert "whole run / step alone: 0.8 (0.8 to 0.8); / step with task: 0.75 (0.5 to 1)" in text
    assert "waiting for data in the whole run: 50.0% (25.0% to 75.0%)" in text
    assert "loader per worker: 15 (10 to 20) samples/s" in text
    assert "reading alone 8 (6 to 10), all of ours 4.5 (3 to 6)" in text
