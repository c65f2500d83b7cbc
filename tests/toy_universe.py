"""A tiny universal dataset of three sources, written without any command (those run in the end-to-end tests)."""

import json
import shutil
from pathlib import Path
from typing import Any

from toy import toy_case, toy_dataset_json, toy_plans, write_case

from nnunetv2_misfm.universe import PLANS_KEY, Source, Universe

UNIVERSAL = "Dataset950_Toy"
BRAIN, TRUNK, TUMOUR = "Dataset041_Brain", "Dataset042_Trunk", "Dataset043_Tumour"
LABELS: dict[str, dict[str, Any]] = {
    BRAIN: {"background": 0, "organ": 1, "lesion": 2},
    TRUNK: {"background": 0, "left kidney": 1, "organ": 2},
    TUMOUR: {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
}
SIZES = {BRAIN: 6, TRUNK: 3, TUMOUR: 2}


def toy_universe() -> Universe:
    """Tasks 0 organ (of brain and trunk alike), 1 lesion, 2 left kidney, 3 whole, 4 core; MR and CT."""
    return Universe(
        UNIVERSAL,
        ("41:organ", "41:lesion", "42:left kidney", "43:whole", "43:core"),
        ("MR", "CT"),
        (
            Source(BRAIN, (0, 1), ((1,), (2,)), 0, num_cases=SIZES[BRAIN]),
            Source(TRUNK, (2, 0), ((1,), (2,)), 1, mirror_axes=(0, 1), num_cases=SIZES[TRUNK]),
            Source(TUMOUR, (3, 4), ((1, 2), (2,)), 0, True, 3, (), num_cases=SIZES[TUMOUR]),
        ),
    )


def universal_plans(block: dict[str, Any] | None = None, **planned: Any) -> dict[str, Any]:
    """Plans of the universal dataset, with `quick`; `block` adds to its `misfm` block."""
    block = {"hermes": {"evaluate_every_epochs": 0}, **(block or {})}
    return {**toy_plans(block, **planned), "dataset_name": UNIVERSAL, PLANS_KEY: toy_universe().as_dict()}


def universal_json() -> dict[str, Any]:
    """dataset.json of the universal dataset."""
    labels = {"background": 0, **{name: i for i, name in enumerate(toy_universe().tasks, start=1)}}
    return toy_dataset_json(labels=labels)


def source_json(dataset: str) -> dict[str, Any]:
    """dataset.json of a source."""
    more = {"regions_class_order": [1, 2]} if dataset == TUMOUR else {}
    return toy_dataset_json(labels=LABELS[dataset], **more)


def source_plans(dataset: str) -> dict[str, Any]:
    """Plans of a source, as the command writes them."""
    plans = toy_plans()
    planned = {**plans["configurations"]["3d_fullres"], "data_identifier": "nnUNetPlansOf950_3d_fullres"}
    return {
        **plans,
        "dataset_name": dataset,
        "plans_name": "nnUNetPlansOf950",
        "configurations": {"3d_fullres": planned},
        PLANS_KEY: toy_universe().answering(dataset).as_dict(),
    }


def write_toy_universe(preprocessed: Path, plans: dict[str, Any] | None = None) -> Path:
    """Writes the sources and the universal dataset below `nnUNet_preprocessed`; returns the latter's folder."""
    plans = plans or universal_plans()
    base = preprocessed / UNIVERSAL
    joined = base / plans["configurations"]["3d_fullres"]["data_identifier"]
    joined.mkdir(parents=True)
    split: dict[str, list[str]] = {"train": [], "val": []}
    for number, source in enumerate(toy_universe().sources):
        folder = preprocessed / source.dataset
        cases = folder / "nnUNetPlansOf950_3d_fullres"
        cases.mkdir(parents=True)
        (folder / "nnUNetPlansOf950.json").write_text(json.dumps(source_plans(source.dataset)))
        (folder / "dataset.json").write_text(json.dumps(source_json(source.dataset)))
        (folder / "dataset_fingerprint.json").write_text("{}")
        names = [f"case_{i}" for i in range(source.num_cases)]
        for i, name in enumerate(names):
            write_case(cases, name, *toy_case(100 * number + i, (20, 22, 20), 1))
            for file in cases.glob(f"{name}*"):
                (joined / f"{source.prefix}{file.name}").symlink_to(file)
        split["train"] += [source.prefix + name for name in names[:-1]]
        split["val"].append(source.prefix + names[-1])
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    (base / "dataset.json").write_text(json.dumps(universal_json()))
    (base / "dataset_fingerprint.json").write_text("{}")
    (base / "splits_final.json").write_text(json.dumps([split]))
    return base


def remove_universal(preprocessed: Path) -> None:
    """Removes the universal dataset's folder, as on a machine that only predicts."""
    shutil.rmtree(preprocessed / UNIVERSAL)
