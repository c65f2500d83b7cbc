import errno
import json
import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from toy import DATASET, toy_architecture, toy_plans

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.configure import configure
from nnunetv2_misfm.plans_file import find_plans
from nnunetv2_misfm.trainers.discovery.nnunetv2_misfm_trainers import (
    nnUNetTrainerBaseline,
    nnUNetTrainerPCTNet,
    nnUNetTrainerPCTNetVFPretrain,
    nnUNetTrainerVFPretrain,
)

PLANS = "nnUNetPlans.json"
WIDTHS = [4, 8, 8, 16, 32]


@pytest.fixture
def workspace(make_workspace: Callable[..., Workspace]) -> Workspace:
    """Plans without cases, which no test here looks at."""
    return make_workspace(num_cases=0)


def resolved(workspace: Workspace, name: str, plans: str = PLANS) -> dict[str, Any]:
    return PlansManager(str(workspace.base / plans)).get_configuration(name).configuration


def written(workspace: Workspace, plans: str = PLANS) -> dict[str, Any]:
    return json.loads((workspace.base / plans).read_text())


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# What is written


def test_every_kind_of_key_resolves_to_what_was_asked_for(workspace: Workspace) -> None:
    before = resolved(workspace, "3d_fullres")
    settings = [
        "num_epochs=50", "initial_lr=1e-4", "optimizer=adamw", "seed=null", f"features_per_stage={WIDTHS}",
        'pretrained_weights="a b.pth"', "volume_fusion.num_levels=8", "volume_fusion.map=grid",
        "volume_fusion.num_boxes=[1,2]", "batch_size=5", "patch_size=[24,16,8]", "batch_dice=true",
        "architecture.features_per_stage=[8,8,8]", "architecture.n_conv_per_stage=[2,1,1]",
    ]  # fmt: skip
    assert configure("555", "3d_fullres", "short", settings) == workspace.base / PLANS
    now = resolved(workspace, "short")
    assert now["misfm"] == {
        "num_epochs": 50, "initial_lr": 1e-4, "optimizer": "adamw", "seed": None, "features_per_stage": WIDTHS,
        "pretrained_weights": "a b.pth", "volume_fusion": {"num_levels": 8, "map": "grid", "num_boxes": [1, 2]},
    }  # fmt: skip
    assert (now["batch_size"], now["patch_size"], now["batch_dice"]) == (5, [24, 16, 8], True)
    architecture = deepcopy(before["architecture"])
    architecture["arch_kwargs"] |= {"features_per_stage": [8, 8, 8], "n_conv_per_stage": [2, 1, 1]}
    assert now["architecture"] == architecture
    rest = before.keys() - {"batch_size", "patch_size", "batch_dice", "architecture"}
    assert {key: now[key] for key in rest} == {key: before[key] for key in rest}
    assert now.keys() - before.keys() == {"misfm", "inherits_from"}


def test_trainers_run_under_the_written_numbers(workspace: Workspace) -> None:
    configure(
        DATASET, "quick", "mine", ["num_epochs=3", "batch_size=5", "volume_fusion.num_epochs=9", "transfer=encoder"]
    )
    made = [
        workspace.trainer(kind, plans=written(workspace), configuration="mine")
        for kind in (nnUNetTrainerBaseline, nnUNetTrainerPCTNet, nnUNetTrainerVFPretrain, nnUNetTrainerPCTNetVFPretrain)
    ]
    assert [t.num_epochs for t in made] == [3, 3, 9, 9]
    assert [t.configuration_manager.batch_size for t in made] == [5, 5, 5, 5]
    assert [t.recipe.transfer for t in made] == [
        "all",
        "encoder",
        "encoder",
        "encoder",
    ]  # the baseline reads lengths alone
    assert {t.recipe.seed for t in made} == {7}  # the parent's


def test_blocks_are_merged_with_the_parents_along_the_whole_line(workspace: Workspace) -> None:
    configure("555", "3d_fullres", "a", ["num_epochs=1", "volume_fusion.num_levels=8", "architecture.n_stages=3"])
    configure("555", "a", "b", ["seed=3", "volume_fusion.map=grid", "architecture.features_per_stage=[8,8,8]"])
    configure("555", "b", "c", ["num_epochs=2", "batch_size=7"])
    assert resolved(workspace, "c")["misfm"] == {
        "num_epochs": 2, "seed": 3, "volume_fusion": {"num_levels": 8, "map": "grid"}
    }  # fmt: skip
    assert resolved(workspace, "c")["architecture"]["arch_kwargs"]["features_per_stage"] == [8, 8, 8]
    assert written(workspace)["configurations"]["c"].keys() == {"inherits_from", "batch_size", "misfm"}
    assert resolved(workspace, "a")["misfm"] == {"num_epochs": 1, "volume_fusion": {"num_levels": 8}}


def test_all_else_in_the_folder_stays_as_it_is(workspace: Workspace) -> None:
    other = {**toy_plans(), "plans_name": "other"}
    (workspace.base / "other.json").write_text(json.dumps(other))
    plans_before, before = written(workspace), files(workspace.preprocessed)
    configure("555", "quick", "mine", ["num_epochs=3"])
    after = files(workspace.preprocessed)
    assert {name for name in after if after[name] != before.get(name)} == {f"{DATASET}/{PLANS}"}
    assert after.keys() == before.keys()  # no temporary file
    now = written(workspace)
    assert now["configurations"].pop("mine")
    assert now == plans_before and list(now["configurations"]) == list(plans_before["configurations"])
    configure("555", "quick", "mine", ["num_epochs=4"], "other")
    assert files(workspace.preprocessed)[f"{DATASET}/{PLANS}"] == after[f"{DATASET}/{PLANS}"]
    assert resolved(workspace, "mine", "other.json")["misfm"]["num_epochs"] == 4


def test_plans_are_replaced_in_one_step_never_overwritten(workspace: Workspace) -> None:
    before = (workspace.base / PLANS).read_bytes()
    os.link(workspace.base / PLANS, workspace.root / "same file")
    configure("555", "quick", "mine", ["num_epochs=3"])
    assert (workspace.root / "same file").read_bytes() == before != (workspace.base / PLANS).read_bytes()


def test_earlier_one_of_the_name_is_replaced_and_leaves_nothing_behind(workspace: Workspace) -> None:
    configure("555", "3d_fullres", "mine", ["num_epochs=3", "seed=1", "batch_size=9"])
    configure("555", "3d_fullres", "mine", ["num_epochs=4"])
    assert written(workspace)["configurations"]["mine"] == {"inherits_from": "3d_fullres", "misfm": {"num_epochs": 4}}


def test_whole_numbers_stand_for_floats_and_none_for_anything(workspace: Workspace) -> None:
    settings = ["spacing=[1,2,2]", "data_identifier=coarse", "architecture.dropout_op=torch.nn.Dropout3d",
                'architecture.dropout_op_kwargs={"p":0.1}']  # fmt: skip
    configure("555", "3d_fullres", "mine", settings)
    assert [type(v) for v in resolved(workspace, "mine")["spacing"]] == [float] * 3
    assert resolved(workspace, "mine")["architecture"]["arch_kwargs"]["dropout_op_kwargs"] == {"p": 0.1}


def test_two_dimensional_configuration_can_be_named_too(make_workspace: Callable[..., Workspace]) -> None:
    flat = toy_architecture(strides=[[1, 1], [2, 2], [2, 2]])
    flat["arch_kwargs"] |= {
        "conv_op": "torch.nn.modules.conv.Conv2d", "kernel_sizes": [[3, 3]] * 3,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    }  # fmt: skip
    workspace = make_workspace(plans=toy_plans(architecture=flat, patch_size=[16, 16]))
    settings = ["num_epochs=3", f"features_per_stage={WIDTHS}", "architecture.features_per_stage=[8,8,8]"]
    configure("555", "3d_fullres", "mine", settings)
    assert resolved(workspace, "mine")["misfm"]["num_epochs"] == 3


# What is refused


def refused(
    workspace: Workspace, sentence: str, *settings: str, parent: str = "3d_fullres", name: str = "mine"
) -> None:
    before = files(workspace.root)
    with pytest.raises(MisfmError, match=sentence) as refusal:
        configure("555", parent, name, settings)
    assert "\n" not in str(refusal.value)
    assert files(workspace.root) == before


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("num_epoch=5", r"unknown key 'num_epoch'; known are accumulate_steps, .*num_epochs, .*\(misfm\), those of "
                        r"hermes, .*volume_fusion \(method.key\), .*batch_size, .*\(nnU-Net\) and"),
        ("misfm={}", "unknown key 'misfm'"),
        ("inherits_from=quick", "unknown key 'inherits_from'"),
        ("volume_fusion=3", "unknown key 'volume_fusion'"),
        ("vf.num_levels=3", "unknown key 'vf.num_levels'"),
        ("volume_fusion.levels=3", "unknown key 'volume_fusion.levels'; known keys in volume_fusion are num_levels"),
        ("volume_fusion.=3", "unknown key 'volume_fusion.'"),
        ("architecture.width=3", "unknown key 'architecture.width'; the plans' network has n_stages, feat"),
        ("num_epochs", "expected settings of the form key=value, got 'num_epochs'"),
        ("=5", "expected settings of the form key=value, got '=5'"),
        ("num_epochs=five", "num_epochs must be of type int, got 'five'"),
        ("num_epochs=", "num_epochs must be of type int, got ''"),
        ("num_epochs=5.5", "num_epochs must be of type int, got 5.5"),
        ("num_epochs=0", "num_epochs must be a number above 0, got 0"),
        ("initial_lr=NaN", "initial_lr must be of type float, got 'NaN'"),
        ("initial_lr=Infinity", "initial_lr must be of type float, got 'Infinity'"),
        ("optimizer=rmsprop", "optimizer must be one of 'sgd', 'adam', 'adamw', got 'rmsprop'"),
        ("volume_fusion.num_boxes=[3]", r"volume_fusion.num_boxes must be a list of 2 int values, got \[3\]"),
        ("volume_fusion.num_levels=0", "volume_fusion.num_levels must be from 1 to 254, got 0"),
        ("features_per_stage=[4,8]", r"features_per_stage must hold 5 numbers for FMUNet, got \[4, 8\]"),
        ("volume_fusion.features_per_stage=[4,8]", "features_per_stage must hold 5 numbers for FMUNet"),
        ("batch_size=2.5", "batch_size expected a value like 2, got 2.5"),
        ("batch_size=true", "batch_size expected a value like 2, got True"),
        ("batch_size=two", "batch_size expected a value like 2, got 'two'"),
        ("batch_size=0", "batch_size expected a value like 2, got 0"),
        ("batch_dice=1", "batch_dice expected a value like False, got 1"),
        ("patch_size=[16,16]", r"patch_size expected a value like \[16, 16, 16\], got \[16, 16\]"),
        ("patch_size=16,16,16", r"patch_size expected a value like \[16, 16, 16\], got '16,16,16'"),
        ("patch_size=[16,16,1.5]", r"patch_size\[2\] expected a value like 16, got 1.5"),
        ("patch_size=[16,0,16]", r"patch_size\[1\] expected a value like 16, got 0"),
        ("architecture.features_per_stage=[4,8]", r"architecture.features_per_stage expected .* got \[4, 8\]"),
        ("architecture.strides=[[1,1,1],[1,2],[2,2,2]]", r"architecture.strides\[1\] expected .* got \[1, 2\]"),
        ("architecture.n_stages=4", "nnUNetTrainerBaseline could not build .* these settings: n_conv_per_stage"),
        ("architecture.conv_op=torch.nn.Conv9d", "nnUNetTrainerBaseline could not build its network from these"),
        ("spacing=[1,1,2]", "spacing asks for other preprocessed cases than those in nnUNetPlans_3d_fullres, .* set d"),
    ],
)  # fmt: skip
def test_faulty_setting_gets_a_sentence_and_nothing_is_written(
    workspace: Workspace, setting: str, sentence: str
) -> None:
    refused(workspace, sentence, setting)
    refused(workspace, sentence, "batch_size=3", setting)


def test_heads_that_do_not_divide_the_released_widths_are_refused(make_workspace: Callable[..., Workspace]) -> None:
    released = toy_plans({"features_per_stage": None, "num_heads": None})
    workspace = make_workspace(plans=released, num_cases=0)
    refused(workspace, "nnUNetTrainerPCTNet could not build .*: num_heads: 3 heads do not divide", "num_heads=[3,8,16]")
    configure("555", "quick", "mine", ["num_heads=[2,8,16]"])
    assert resolved(workspace, "mine")["misfm"]["num_heads"] == [2, 8, 16]


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", "a__b", "-a", ".a", "ä"])
def test_name_that_makes_no_results_folder_is_refused(workspace: Workspace, name: str) -> None:
    refused(workspace, f"expected a --name of letters, digits, .*, got {name!r}", "num_epochs=1", name=name)


def test_planned_configuration_is_never_replaced(workspace: Workspace) -> None:
    for parent in ("3d_fullres", "quick"):
        sentence = "'3d_fullres' is a planned configuration, which stays as it is: choose another --name"
        refused(workspace, sentence, "num_epochs=1", parent=parent, name="3d_fullres")


def test_configuration_cannot_come_to_inherit_from_itself(workspace: Workspace) -> None:
    configure("555", "quick", "child", ["num_epochs=1"])
    for parent in ("quick", "child"):
        sentence = f"'quick' cannot inherit from '{parent}', which rests on it: choose another --name"
        refused(workspace, sentence, "num_epochs=1", parent=parent, name="quick")


def test_unknown_configuration_gets_the_known_ones(workspace: Workspace) -> None:
    sentence = f"expected one of the configurations 3d_fullres, quick of .*{PLANS}, got '3d_lowres'"
    refused(workspace, sentence, "num_epochs=1", parent="3d_lowres")


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"inherits_from": "gone"}, "'bad' of .* inherits from what is not there or itself: .*gone"),
        ({"inherits_from": "bad"}, "'bad' of .* inherits from what is not there or itself: Circular"),
        ({"inherits_from": "3d_fullres", "misfm": [1]}, r"misfm block: expected a dictionary of keys, got \[1\]"),
        ({"inherits_from": "3d_fullres", "misfm": {"epochs": 1}}, "misfm block: unknown key 'epochs'"),
        ({"inherits_from": "3d_fullres", "misfm": {"volume_fusion": 1}}, "volume_fusion must be a dictionary"),
    ],
)
def test_faulty_parent_gets_a_sentence(workspace: Workspace, entry: dict, sentence: str) -> None:
    plans = written(workspace)
    plans["configurations"]["bad"] = entry
    (workspace.base / PLANS).write_text(json.dumps(plans))
    refused(workspace, sentence, "volume_fusion.num_levels=2", parent="bad")


def test_plans_that_are_no_json_get_a_sentence(workspace: Workspace) -> None:
    (workspace.base / PLANS).write_text('{"configurations": ')
    refused(workspace, "nnUNetPlans.json is no JSON .*: mend it or plan again", "num_epochs=1")


def test_full_disk_leaves_the_former_plans(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    refused(
        workspace, "nnUNetPlans.json could not be written .*No space left.*the former file is intact", "num_epochs=1"
    )


# find_plans


def test_plans_are_found_by_number_and_by_name(workspace: Workspace) -> None:
    assert find_plans("555") == find_plans(DATASET) == workspace.base / PLANS


def test_missing_plans_get_the_command_that_makes_them(workspace: Workspace) -> None:
    with pytest.raises(
        MisfmError, match="expected plans at .*nnUNetResEncLPlans.json, found none: run nnUNetv2_plan_and"
    ):
        find_plans("555", "nnUNetResEncLPlans")
    with pytest.raises(MisfmError, match="expected plans at .*Dataset556_None/nnUNetPlans.json, found none"):
        find_plans("Dataset556_None")


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [("556", "Could not find a dataset with the ID 556"), ("toy", "did not start with 'Dataset'")],
)
def test_unknown_dataset_gets_one_sentence(workspace: Workspace, dataset: str, reason: str) -> None:
    with pytest.raises(
        MisfmError, match=f"expected the number or name of a dataset, got '{dataset}': .*{reason}"
    ) as refusal:
        find_plans(dataset)
    assert "\n" not in str(refusal.value)


def test_two_datasets_of_one_number_get_one_sentence(workspace: Workspace) -> None:
    (workspace.preprocessed / "Dataset555_Other").mkdir()
    with pytest.raises(MisfmError, match="got '555': More than one dataset name found for dataset id 555.$"):
        find_plans("555")


def test_missing_variable_gets_a_sentence(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("nnUNet_preprocessed")
    refused(
        workspace, "expected the environment variable nnUNet_preprocessed to name a folder, but it is not set", "a=1"
    )
