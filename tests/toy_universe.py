"""A tiny universal dataset of three sources, written without any command (those run in the end-to-end tests)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from toy import toy_case, toy_dataset_json, toy_plans, write_case

from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes
from nnunetv2_misfm.universe import PLANS_KEY, Source, Universe

UNIVERSAL = "Dataset950_Toy"
BRAIN, TRUNK, TUMOUR = "Dataset041_Brain", "Dataset042_Trunk", "Dataset043_Tumour"
LABELS: dict[str, dict[str, Any]] = {
    BRAIN: {"background": 0, "organ": 1, "lesion": 2},
    TRUNK: {"background": 0, "left kidney": 1, "organ": 2},
    TUMOUR: {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
}
INTENSITIES = {"mean": 10.0, "std": 20.0, "percentile_00_5": -30.0, "percentile_99_5": 60.0}
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
    more: dict[str, Any] = {"regions_class_order": [1, 2]} if dataset == TUMOUR else {}
    return toy_dataset_json(labels=LABELS[dataset], **more)


def source_plans(dataset: str, **planned_otherwise: Any) -> dict[str, Any]:
    """Plans of a source, as the command writes them: the trunk's images are normalised as CT."""
    plans = toy_plans(**planned_otherwise)
    planned = {**plans["configurations"]["3d_fullres"], "data_identifier": "nnUNetPlansOf950_3d_fullres"}
    if dataset == TRUNK:
        planned["normalization_schemes"] = ["CTNormalization"]
    return {
        **plans,
        "foreground_intensity_properties_per_channel": {"0": INTENSITIES},
        "dataset_name": dataset,
        "plans_name": "nnUNetPlansOf950",
        "configurations": {"3d_fullres": planned},
        PLANS_KEY: toy_universe().answering(dataset).as_dict(),
    }


def write_toy_universe(preprocessed: Path, plans: dict[str, Any] | None = None, **planned: Any) -> Path:
    """Writes the sources and the universal dataset below `nnUNet_preprocessed`; returns the latter's folder."""
    plans = plans or universal_plans(**planned)
    base = preprocessed / UNIVERSAL
    joined = base / plans["configurations"]["3d_fullres"]["data_identifier"]
    joined.mkdir(parents=True)
    split: dict[str, list[str]] = {"train": [], "val": []}
    for number, source in enumerate(toy_universe().sources):
        folder = preprocessed / source.dataset
        cases = folder / "nnUNetPlansOf950_3d_fullres"
        cases.mkdir(parents=True)
        (folder / "nnUNetPlansOf950.json").write_text(json.dumps(source_plans(source.dataset, **planned)))
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


def universal_trainer(
    workspace: Any, block: dict[str, Any] | None = None, *, kind: type | None = None, **planned: Any
) -> Any:
    """Makes a trainer of the universal dataset as nnU-Net's command does; `planned` adds to the plans."""
    arguments = {name: planned.pop(name) for name in ("continue_training", "configuration", "plans") if name in planned}
    arguments.setdefault("plans", universal_plans(block, **planned))
    return workspace.trainer(kind or nnUNetTrainerHermes, dataset_json=universal_json(), **arguments)


def with_audible_priors(network: Any) -> Any:
    """Returns the network with tokens and kernels large enough to be felt, since a new network's are small."""
    torch.manual_seed(1)
    with torch.no_grad():
        for fusion in network.fusions.values():
            fusion.task_tokens.normal_()
            fusion.modality_tokens.normal_()
        network.kernel_head[-1][-1].weight.normal_()
    return network


def make_sources_validatable(preprocessed: Path) -> None:
    """Gives every case of the sources what the final validation needs: geometry, and a reference file."""
    geometry = {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}
    for source in toy_universe().sources:
        folder = preprocessed / source.dataset
        (folder / "gt_segmentations").mkdir()
        for file in (folder / "nnUNetPlansOf950_3d_fullres").glob("*.pkl"):
            write_pickle({**load_pickle(str(file)), "sitk_stuff": geometry}, str(file))
            labels = np.array(nnUNetDatasetBlosc2(str(file.parent), [file.stem]).load_case(file.stem)[1][0])
            image = sitk.GetImageFromArray(labels.astype(np.uint8))
            sitk.WriteImage(image, str(folder / "gt_segmentations" / f"{file.stem}.nii.gz"))


def uneven_universe() -> Universe:
    """The same universe, but that of the brain only the organ is a task: datasets of one, two and two tasks."""
    universe = toy_universe()
    brain = replace(universe.sources[0], tasks=(0,), values=((1,),))
    return replace(universe, sources=(brain, *universe.sources[1:]))


def given_batch(*cases: str, size: int = 16) -> dict[str, Any]:
    """A batch as the loader makes it, of cases of these names, each other random structures of the values 1 and 2."""
    generator = torch.Generator().manual_seed(sum(map(ord, "".join(cases))))
    target = torch.randint(0, 3, (len(cases), 1, *[size // 4] * 3), generator=generator)
    for axis in (2, 3, 4):
        target = target.repeat_interleave(4, axis)
    data = target + 0.3 * torch.randn(target.shape, generator=generator)
    return {"data": data, "target": target.to(torch.int16), "keys": list(cases)}
