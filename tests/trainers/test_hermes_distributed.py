"""A universal training of two processes on the CPU, through nnU-Net's own `run_ddp` (hermes_ddp_worker.py)."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from launcher import free_port
from toy_universe import (
    BRAIN,
    TRUNK,
    TUMOUR,
    UNIVERSAL,
    given_batch,
    make_sources_validatable,
    source_json,
    uneven_universe,
    universal_plans,
    universal_trainer,
    write_toy_universe,
)

from nnunetv2_misfm.installation import discovery_folder
from nnunetv2_misfm.universe import PLANS_KEY

pytestmark = pytest.mark.slow

NUM_STEPS = 3
# Datasets of one and of two tasks, in either order: the ranks' numbers of pairs differ
BATCHES = [given_batch("041_a", "042_b"), given_batch("043_a", "041_b"), given_batch("042_a", "043_b")]
LENGTH = {"num_iterations_per_epoch": NUM_STEPS, "num_val_iterations_per_epoch": 2}


def plans_of_scenarios() -> dict[str, Any]:
    sgd = {"optimizer": "sgd", "initial_lr": 0.01, "warmup_epochs": 0}  # Adam makes whole steps of mere rounding
    evaluated = {"hermes": {"evaluate_every_epochs": 1}}
    plans = {**universal_plans({**LENGTH, "num_epochs": 2, **evaluated}), PLANS_KEY: uneven_universe().as_dict()}
    quick = plans["configurations"]["quick"]
    given = {**quick["misfm"], "num_epochs": 1, "hermes": {"evaluate_every_epochs": 0}, **sgd}
    plans["configurations"]["given"] = {**quick, "misfm": given}
    return plans


@dataclass
class Runs:
    """What the two ranks left behind."""

    root: Path
    output: str

    def accounts(self, scenario: str) -> list[dict[str, Any]]:
        files = [self.root / f"{scenario}_{rank}.json" for rank in (0, 1)]
        assert all(file.is_file() for file in files), self.output[-4000:]
        accounts = [json.loads(file.read_text()) for file in files]
        assert not any(a["error"] for a in accounts), [a["error"] for a in accounts]
        return accounts

    def fold(self, dataset: str = UNIVERSAL, plans: str = "nnUNetPlans") -> Path:
        return self.root / "learning" / dataset / f"nnUNetTrainerHermes__{plans}__quick" / "fold_0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both ranks after both scenarios."""
    root = tmp_path_factory.mktemp("distributed")
    write_toy_universe(root / "preprocessed", plans_of_scenarios())
    make_sources_validatable(root / "preprocessed")
    organ_alone = {**source_json(BRAIN), "labels": {"background": 0, "organ": 1}}
    (root / "preprocessed" / BRAIN / "dataset.json").write_text(json.dumps(organ_alone))
    batches = root / "given_batches.pt"
    torch.save(BATCHES, batches)
    common = {"dataset": UNIVERSAL, "trainer": "nnUNetTrainerHermes"}
    scenarios = [
        {**common, "name": "learning", "results": "learning", "configuration": "quick"},
        {**common, "name": "given", "results": "given", "configuration": "given", "batches": str(batches)},
    ]
    (root / "scenarios.json").write_text(json.dumps(scenarios))
    folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed")}
    settings = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    environment = {**os.environ, **folders, **settings, **meeting, "nnUNet_extTrainer": str(discovery_folder())}
    command = [sys.executable, str(Path(__file__).with_name("hermes_ddp_worker.py")), str(root / "scenarios.json")]
    outputs, processes = [root / f"output_{rank}.txt" for rank in (0, 1)], []
    for rank, output in enumerate(outputs):
        with output.open("w") as stream:
            variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=variables, stdout=stream, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            process.wait(timeout=600)
    finally:
        for process in processes:
            process.kill()
    return Runs(root, "\n".join(output.read_text() for output in outputs))


@pytest.mark.parametrize("scenario", ["learning", "given"])
def test_parameters_are_bit_equal_after_each_epoch(runs: Runs, scenario: str) -> None:
    first, second = runs.accounts(scenario)
    assert first["parameters"] == second["parameters"] and first["buffers"] == second["buffers"]
    assert len(set(first["parameters"])) == len(first["epochs"]) == {"learning": 2, "given": 1}[scenario]


@pytest.mark.parametrize("scenario", ["learning", "given"])
def test_ranks_log_the_same(runs: Runs, scenario: str) -> None:
    first, second = (
        {name: np.array(values) for name, values in account["logged"].items()} for account in runs.accounts(scenario)
    )
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    assert first["dice_per_class_or_region"].shape[1] == 5 and np.isfinite(first["train_losses"]).all()


def test_two_ranks_with_one_sample_each_equal_one_rank_with_both(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = runs.accounts("given")[0]["logged"]
    monkeypatch.setenv("nnUNet_preprocessed", str(runs.root / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setattr("nnunetv2_misfm.trainers.hermes.mirrored", lambda image, labels, sources: (image, labels))
    trainer = universal_trainer(Workspace(tmp_path), plans=plans_of_scenarios(), configuration="given")
    trainer.initialize()
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    pairs = [int(trainer.prepare_batch(batch, training=True)["target"].present.sum()) for batch in BATCHES]
    assert pairs == [3, 3, 4]
    losses = [trainer.train_step(batch)["loss"] for batch in BATCHES]
    distributed = torch.load(runs.root / "given_ddp.pt")
    moved = 0.0
    for name, tensor in trainer.network.state_dict().items():
        torch.testing.assert_close(distributed[name], tensor, rtol=0, atol=1e-5)
        moved = max(moved, float((tensor - before[name]).abs().max()))
    assert moved > 1e-3
    assert logged["train_losses"][0] == pytest.approx(np.mean(losses), abs=1e-5)


def test_both_ranks_evaluate_a_share_of_the_cases_and_one_writes(runs: Runs) -> None:
    with (runs.fold() / "evaluation_per_dataset.csv").open() as file:
        table = list(csv.DictReader(file))
    tasks = ["41:organ", "42:left kidney", "41:organ", "43:whole", "43:core"]
    assert [(row["epoch"], row["task"], row["cases"]) for row in table] == [(e, t, "1") for e in "01" for t in tasks]
    log = "".join(file.read_text() for file in runs.fold().glob("training_log*"))
    assert log.count(f"Evaluation of whole cases, {TUMOUR}: mean Dice") == 2


def test_one_rank_writes_the_model_folders(runs: Runs) -> None:
    first, second = runs.accounts("learning")
    for dataset in (BRAIN, TRUNK, TUMOUR):
        file = runs.fold(dataset, "nnUNetPlansOf950") / "checkpoint_final.pth"
        assert torch.load(file, weights_only=True)["misfm_meta"]["source_of"] == UNIVERSAL
    assert any(name.startswith(TUMOUR) for name in first["written"]) and second["written"] == []
