"""A tiny preprocessed dataset and its plans, written without nnU-Net's commands (those run in the end-to-end tests)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

DATASET = "Dataset555_Toy"
LABELS = {"background": 0, "organ": 1, "lesion": 2}


def toy_architecture(num_stages: int = 3, residual: bool = False, strides: Sequence | None = None) -> dict[str, Any]:
    """An `architecture` entry as nnU-Net's planners write it, very narrow."""
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    blocks = {"n_blocks_per_stage": [1] * num_stages} if residual else {"n_conv_per_stage": [1] * num_stages}
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": num_stages,
            "features_per_stage": [4 * min(2**i, 4) for i in range(num_stages)],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * num_stages,
            "strides": [list(s) for s in strides] if strides else [[1, 1, 1]] + [[2, 2, 2]] * (num_stages - 1),
            **blocks,
            "n_conv_per_stage_decoder": [1] * (num_stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def toy_plans(block: dict[str, Any] | None = None, **configuration: Any) -> dict[str, Any]:
    """Fresh plans; the planned `3d_fullres`, and `quick`, which inherits from it and holds a `misfm` block."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    planned = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "median_image_size_in_voxels": [20.0, 22.0, 20.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": toy_architecture(),
        "batch_dice": False,
        **configuration,
    }
    quick = {"num_epochs": 1, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 7}
    block = {**quick, "features_per_stage": [4, 4, 8, 16, 32], "num_heads": [1, 1, 1], **(block or {})}
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 22, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {
            "3d_fullres": planned,
            "quick": {"inherits_from": "3d_fullres", "batch_size": planned["batch_size"], "misfm": block},
        },
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {},
    }


def toy_dataset_json(num_channels: int = 1, **entries: Any) -> dict[str, Any]:
    """Fresh dataset.json content."""
    channels = {str(i): "MRI" for i in range(num_channels)}
    return {"channel_names": channels, "labels": dict(LABELS), "numTraining": 6, "file_ending": ".nii.gz", **entries}


def toy_case(seed: int, shape: Sequence[int], num_channels: int, labels: Sequence[int] = (1, 2)) -> tuple:
    """Image float32 [C, D, H, W] (z-scored noise with a bright box per label) and labels int8 [1, D, H, W]."""
    generator = np.random.default_rng(seed)
    image = generator.standard_normal((num_channels, *shape)).astype(np.float32)
    segmentation = np.zeros((1, *shape), np.int8)
    for label in labels:
        start = [int(generator.integers(0, n - 8)) for n in shape]
        box = tuple(slice(s, s + 8) for s in start)
        segmentation[(0, *box)] = label
        image[(slice(None), *box)] += 2 * label
    return image, segmentation


def write_case(folder: Path, name: str, image: np.ndarray, segmentation: np.ndarray) -> None:
    """Saves a case as nnU-Net's preprocessing does, overwriting."""
    for file in folder.glob(f"{name}*"):
        file.unlink()
    present = [int(v) for v in np.unique(segmentation) if v > 0]
    properties = {
        "spacing": [1.0, 1.0, 1.0],
        "shape_before_cropping": list(image.shape[1:]),
        "bbox_used_for_cropping": [[0, n] for n in image.shape[1:]],
        "shape_after_cropping_and_before_resampling": list(image.shape[1:]),
        "class_locations": {v: np.argwhere(segmentation == v) for v in present},
    }
    whole, whole_labels = image.shape, segmentation.shape  # one chunk and one block
    target = str(folder / name)
    nnUNetDatasetBlosc2.save_case(image, segmentation, properties, target, whole, whole, whole_labels, whole_labels)


def write_toy_dataset(
    preprocessed: Path,
    plans: dict[str, Any],
    dataset_json: dict[str, Any] | None = None,
    num_cases: int = 6,
    shape: Sequence[int] = (20, 22, 20),
    labels: Sequence[int] = (1, 2),
) -> Path:
    """Writes plans and cases below `nnUNet_preprocessed` and returns the dataset's folder."""
    dataset_json = dataset_json or toy_dataset_json()
    base = preprocessed / plans["dataset_name"]
    folder = base / plans["configurations"]["3d_fullres"]["data_identifier"]
    folder.mkdir(parents=True, exist_ok=True)
    write_plans(preprocessed, plans)
    (base / "dataset.json").write_text(json.dumps(dataset_json))
    (base / "dataset_fingerprint.json").write_text("{}")
    names = [f"case_{i}" for i in range(num_cases)]
    (base / "splits_final.json").write_text(json.dumps([{"train": names[:-2], "val": names[-2:]}]))
    for i, name in enumerate(names):
        write_case(folder, name, *toy_case(i, shape, len(dataset_json["channel_names"]), labels))
    return base


def write_plans(preprocessed: Path, plans: dict[str, Any]) -> None:
    """Writes (or replaces) the plans file alone."""
    (preprocessed / plans["dataset_name"] / "nnUNetPlans.json").write_text(json.dumps(plans))
