import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "context_priors.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return importlib.import_module("context_priors")


def test_every_row_is_measured() -> None:
    command = [
        sys.executable, str(SCRIPT), "--patch", "16x32x32", "--batch", "2", "--narrow", "8", "--networks", "PCTNet",
        "--tasks", "2", "80", "--rounds", "1", "--step-tasks", "3",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr[-3000:]
    rows = re.findall(r"^\| ([^|]*) \| ([\d.e-]+) \(", run.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["PCTNet, bare", "PCTNet, with priors", "bare", "2", "80"]
    assert all(float(value) > 0 for _, value in rows)
    assert "patch 16x32x32, batch 2, 3 tasks per sample; 1 rounds of 1" in run.stdout.splitlines()[0]


@pytest.mark.parametrize("name", ["ResidualEncoderUNet", "PCTNet"])
def test_bare_and_with_priors_are_one_network_but_for_heads_and_priors(benchmark: ModuleType, name: str) -> None:
    with torch.device("meta"):
        bare, ours = (benchmark.build(name, kind, 15, 1) for kind in (benchmark.BARE, benchmark.PRIORS))
    theirs = {key for key in bare.state_dict() if ".seg_layers." not in key}
    assert theirs == {key for key in ours.state_dict() if key.startswith(("encoder.", "decoder."))}
    assert {len(fusion.task_tokens) for fusion in ours.fusions.values()} == {71}


def test_ratios_are_those_within_a_round(benchmark: ModuleType) -> None:
    def figures(seconds: float, peak: float) -> dict[str, float]:
        return {"seconds": seconds, "cpu": 2 * seconds**2, "peak": peak, "parameters": 5e6}

    def found(bare: float, priors: float) -> dict[str, dict[str, dict[str, float]]]:
        seconds = {benchmark.BARE: bare, benchmark.PRIORS: priors}
        peaks = {benchmark.BARE: 2e9, benchmark.PRIORS: 3e9}
        return {"Net": {kind: figures(seconds[kind], peaks[kind]) for kind in seconds}}

    lines = benchmark.step_table([found(1, 2), found(10, 12), found(4, 6)]).splitlines()
    assert lines[2] == "| Net, bare | 4 (1 to 10) | 1 (1 to 1) | 32 (2 to 200) | 1 (1 to 1) | 2000 | 1 | 5.0 |"
    times = "6 (2 to 12) | 1.5 (1.2 to 2) | 72 (8 to 288) | 2.25 (1.44 to 4)"
    assert lines[3] == f"| Net, with priors | {times} | 3000 | 1.5 | 5.0 |"
    rounds = [{"bare": 1.0, "2": 2.0, "9": 3.0}, {"bare": 5.0, "2": 4.0, "9": 8.0}]
    lines = benchmark.prediction_table({"Net": rounds}, [2, 9]).splitlines()
    assert lines[0] == "| tasks | Net, s | ratio to 2 by round |"
    assert lines[2] == "| bare | 3 (1 to 5) | 0.875 (0.5 to 1.25) |"
    assert lines[4] == "| 9 | 5.5 (3 to 8) | 1.75 (1.5 to 2) |"
