import copy
import json
import multiprocessing
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Workspace
from interrupting import make_repeatable
from toy_universe import (
    BRAIN,
    TRUNK,
    TUMOUR,
    make_sources_validatable,
    remove_universal,
    source_json,
    source_plans,
    toy_universe,
    universal_trainer,
    with_audible_priors,
    write_toy_universe,
)

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers import source_evaluation
from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes


@pytest.fixture
def universe(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """The workspace with the universal toy dataset in it."""
    make_repeatable(monkeypatch.setattr)
    write_toy_universe(workspace.preprocessed)
    return workspace


def source_trainer(workspace: Workspace, dataset: str, plans: dict[str, Any] | None = None) -> Any:
    return workspace.trainer(
        nnUNetTrainerHermes,
        plans=plans or source_plans(dataset),
        dataset_json=source_json(dataset),
        configuration="3d_fullres",
    )


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


# ---------------------------------------------------------------------- evaluation and validation


def test_datasets_are_evaluated_every_few_epochs_with_the_averaged_weights(
    universe: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = {"num_epochs": 5, "ema_decay": 0.5, "hermes": {"evaluate_every_epochs": 2, "evaluation_cases": 2}}
    trainer = universal_trainer(universe, block)
    seen: list[Any] = []
    score = source_evaluation.score_cases

    def spy(given: Any, *arguments: Any) -> Any:
        state = {name: tensor.clone() for name, tensor in given.bare_network.state_dict().items()}
        seen.append((given.current_epoch, state, arguments[0].identifiers))
        return score(given, *arguments)

    monkeypatch.setattr(source_evaluation, "score_cases", spy)
    end_epoch = nnUNetTrainerHermes.on_epoch_end

    def on_epoch_end() -> None:
        average = {name: tensor.clone() for name, tensor in trainer.average.average().items()}
        raw = copy.deepcopy(trainer.network.state_dict())
        end_epoch(trainer)
        assert all(torch.equal(tensor, raw[name]) for name, tensor in trainer.network.state_dict().items())
        if seen and seen[-1][0] == trainer.current_epoch - 1:
            assert all(torch.equal(tensor, seen[-1][1][name]) for name, tensor in average.items())
            assert not all(torch.equal(tensor, average[name]) for name, tensor in raw.items())

    trainer.on_epoch_end = on_epoch_end
    trainer.run_training()
    assert [epoch for epoch, *_ in seen] == [1, 3]
    assert seen[0][2] == ["041_case_5", "042_case_2", "043_case_1"]  # the validation cases
    table = (Path(trainer.output_folder) / "evaluation_per_dataset.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in table[1:]} == {"1", "3"}
    assert log_of(trainer).count("Evaluation of whole cases, Dataset043_Tumour: mean Dice") == 2


def test_a_new_training_begins_a_new_table(universe: Workspace) -> None:
    for _ in range(2):
        trainer = universal_trainer(universe, {"hermes": {"evaluate_every_epochs": 1}})
        trainer.run_training()
    table = (Path(trainer.output_folder) / "evaluation_per_dataset.csv").read_text().splitlines()
    assert len(table) == len(set(table)) <= 1 + 6


def summaries(universe: Workspace) -> dict[str, Any]:
    files = (universe.root / "results").glob("*/*/fold_0/validation/summary.json")
    return {file.parts[-5]: json.loads(file.read_text()) for file in files}


@pytest.fixture
def validated(universe: Workspace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer after its final validation; nnU-Net's processes are threads."""
    in_threads = SimpleNamespace(Pool=ThreadPool, get_context=multiprocessing.get_context)
    monkeypatch.setattr(multiprocessing, "get_context", lambda *_: in_threads)
    make_sources_validatable(universe.preprocessed)
    trainer = universal_trainer(universe)
    trainer.on_train_start()
    with_audible_priors(trainer.network)
    trainer.on_train_end()
    trainer.perform_actual_validation()
    return trainer


def model_folder(universe: Workspace, dataset: str) -> Path:
    return universe.root / "results" / dataset / "nnUNetTrainerHermes__nnUNetPlansOf950__quick"


def test_final_validation_writes_a_summary_per_source_into_its_model_folder(
    universe: Workspace, validated: Any
) -> None:
    found = summaries(universe)
    assert {name: list(summary["mean"]) for name, summary in found.items()} == {
        BRAIN: ["1", "2"],
        TRUNK: ["1", "2"],
        TUMOUR: ["(1, 2)", "2"],
    }
    for dataset, case in {BRAIN: "case_5", TRUNK: "case_2", TUMOUR: "case_1"}.items():
        (of_case,) = found[dataset]["metric_per_case"]
        assert Path(of_case["reference_file"]).parts[-3:] == (dataset, "gt_segmentations", f"{case}.nii.gz")
        validation = model_folder(universe, dataset) / "fold_0" / "validation"
        assert f"Validation of {dataset}: {validation}" in log_of(validated)
    with pytest.raises(MisfmError, match="in the convention of one of its source datasets"):
        validated.network(torch.zeros(1, 1, 16, 16, 16))


def test_validating_a_model_folder_alone_finds_the_same(universe: Workspace, validated: Any) -> None:
    for dataset, found in summaries(universe).items():
        folder = model_folder(universe, dataset)
        plans = json.loads((folder / "plans.json").read_text())
        again = source_trainer(universe, dataset, plans)  # as `nnUNetv2_train ... --val` does
        again.load_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
        again.perform_actual_validation()
        summary = json.loads((Path(again.output_folder) / "validation" / "summary.json").read_text())
        assert summary["mean"] == found["mean"]


# ---------------------------------------------------------------------- a source's plans


def test_a_source_validates_on_its_part_of_the_universal_split(universe: Workspace) -> None:
    trainer = source_trainer(universe, TRUNK)
    assert trainer.do_split() == (["case_0", "case_1"], ["case_2"])
    assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[3] == ()
    assert trainer.inference_allowed_mirroring_axes == (0, 1)
    assert universal_trainer(universe).do_split()[1] == ["041_case_5", "042_case_2", "043_case_1"]
    split = [{"train": ["case_1"], "val": ["case_0"]}]
    (universe.preprocessed / TRUNK / "splits_final.json").write_text(json.dumps(split))
    remove_universal(universe.preprocessed)
    assert trainer.do_split() == (["case_1"], ["case_0"])


def test_a_source_without_a_validation_case_is_passed_over(universe: Workspace) -> None:
    file = universe.preprocessed / toy_universe().dataset / "splits_final.json"
    file.write_text(json.dumps([{"train": ["041_case_0"], "val": []}]))
    trainer = universal_trainer(universe)
    trainer.initialize()
    trainer.perform_actual_validation()
    assert all(f"{dataset} has no validation case in fold 0." in log_of(trainer) for dataset in (BRAIN, TRUNK, TUMOUR))
    assert summaries(universe) == {}


def test_training_under_a_sources_plans_names_the_right_command(universe: Workspace) -> None:
    with pytest.raises(MisfmError) as caught:
        source_trainer(universe, TRUNK).run_training()
    assert str(caught.value) == (
        "nnUNetPlansOf950 of Dataset042_Trunk only answer for a universal model: train Dataset950_Toy with "
        "nnUNetv2_train 950 3d_fullres 0 -tr nnUNetTrainerHermes -p nnUNetPlans."
    )


# ---------------------------------------------------------------------- what a run was trained on


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def spacing(plans: dict[str, Any]) -> None:
    plans["configurations"]["3d_fullres"]["spacing"] = [3.0, 1.0, 1.0]


def swapped(plans: dict[str, Any]) -> None:
    plans["misfm_universal"]["sources"][0]["values"] = [[2], [1]]


def renamed(dataset_json: dict[str, Any]) -> None:
    dataset_json["labels"]["other"] = dataset_json["labels"].pop("organ")


@pytest.mark.parametrize(
    ("name", "change"), [("nnUNetPlansOf950", spacing), ("nnUNetPlansOf950", swapped), ("dataset", renamed)]
)
def test_a_source_that_changed_since_it_was_trained_on_stops_resume_and_validation(
    universe: Workspace, monkeypatch: pytest.MonkeyPatch, name: str, change: Callable
) -> None:
    monkeypatch.setenv("nnUNet_misfm_skip_validation", "1")
    trainer = universal_trainer(universe)
    trainer.run_training()
    file = str(Path(trainer.output_folder) / "checkpoint_final.pth")
    changed(universe.preprocessed / BRAIN / f"{name}.json", change)
    monkeypatch.delenv("nnUNet_misfm_skip_validation")
    for step in ("on_train_start", "perform_actual_validation"):
        again = universal_trainer(universe)
        again.load_checkpoint(file)
        with pytest.raises(MisfmError, match=f"{BRAIN} has been joined, planned or labelled in another way since"):
            getattr(again, step)()


def test_model_folders_hold_what_was_trained_on_whatever_happens_meanwhile(
    universe: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_misfm_skip_validation", "1")
    trainer = universal_trainer(universe)
    trainer.on_train_start()
    changed(universe.preprocessed / BRAIN / "nnUNetPlansOf950.json", spacing)
    trainer.on_train_end()
    model = universe.root / "results" / BRAIN / "nnUNetTrainerHermes__nnUNetPlansOf950__quick"
    plans = json.loads((model / "plans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["spacing"] == [1.0, 1.0, 1.0]


def test_a_missing_source_is_told_before_the_first_epoch(universe: Workspace) -> None:
    (universe.preprocessed / TRUNK / "nnUNetPlansOf950.json").unlink()
    with pytest.raises(MisfmError, match="run nnUNetv2_misfm universal again"):
        universal_trainer(universe).on_train_start()


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_fold_without_cases_is_one_sentence(universe: Workspace, part: str) -> None:
    splits = universe.preprocessed / "Dataset950_Toy" / "splits_final.json"
    whole = json.loads(splits.read_text())
    splits.write_text(json.dumps([{**whole[0], part: []}]))
    kind = {"train": "training", "val": "validation"}[part]
    with pytest.raises(MisfmError, match=f"fold 0 of Dataset950_Toy has no {kind} case: train the fold 'all'"):
        universal_trainer(universe).on_train_start()


def test_a_patch_of_one_voxel_at_the_bottleneck_is_refused(universe: Workspace) -> None:
    with pytest.raises(MisfmError, match="more than one voxel at the deepest level"):
        universal_trainer(universe, patch_size=[4, 4, 4])


def test_pct_net_plans_train_a_universal_model_too(universe: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("nnUNet_misfm_skip_validation", "1")
    arguments = {"features_per_stage": [4, 4, 8, 16, 32], "num_heads": [1, 1, 1], "strides": [[1] * 3, *[[2] * 3] * 4]}
    architecture = {
        "network_class_name": "nnunetv2_misfm.architectures.PCTNet",
        "arch_kwargs": arguments,
        "_kw_requires_import": [],
    }
    trainer = universal_trainer(universe, architecture=architecture, patch_size=[20, 20, 20])
    trainer.initialize()
    before = {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}
    trainer.run_training()
    learned = {name for name, tensor in trainer.network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"encoder.stages.4.block.swin", "decoder.stages.0.up", "fusions.encoder_4.task_tokens"} <= _prefixes(learned)
    assert not any(name.startswith("decoder.seg_layers") for name in before)


def _prefixes(names: set[str]) -> set[str]:
    return {".".join(name.split(".")[:end]) for name in names for end in range(1, name.count(".") + 2)}
