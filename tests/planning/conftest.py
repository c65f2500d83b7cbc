"""Fixtures of the tests of PCT-Net's plans."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from pct_net_plans import BYTES_PER_VOXEL, NAME

from nnunetv2_misfm.planning import pct_net_planner


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("raw", "preprocessed"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.delenv("nnUNet_results", raising=False)
    return tmp_path


@pytest.fixture
def dataset(folders: Path) -> Callable[..., Path]:
    """Makes a dataset of three cases that has a fingerprint; returns its preprocessed folder."""

    def make(
        shape: tuple[int, ...] = (200, 200, 200),
        spacing: tuple[float, ...] = (1.0, 1.0, 1.0),
        num_training: int = 100000,
        channels: int = 1,
        **entries: Any,
    ) -> Path:
        raw, base = folders / "raw" / NAME, folders / "preprocessed" / NAME
        for folder in (raw / "imagesTr", raw / "labelsTr", base):
            folder.mkdir(parents=True, exist_ok=True)
        image = sitk.GetImageFromArray(np.zeros((4, 4, 4), np.uint8))
        for file in [*(f"imagesTr/a_{channel:04d}" for channel in range(channels)), "labelsTr/a"]:
            sitk.WriteImage(image, str(raw / f"{file}.nii.gz"))
        description = {
            "channel_names": {str(channel): "MRI" for channel in range(channels)},
            "labels": {"background": 0, "organ": 1, "lesion": 2},
            "numTraining": num_training,
            "file_ending": ".nii.gz",
            **entries,
        }
        fingerprint = {
            "spacings": [list(spacing)] * 3,
            "shapes_after_crop": [list(shape)] * 3,
            "median_relative_size_after_cropping": 1.0,
            "foreground_intensity_properties_per_channel": {"0": {"mean": 1.5, "std": 0.5}},
        }
        (raw / "dataset.json").write_text(json.dumps(description))
        (base / "dataset_fingerprint.json").write_text(json.dumps(fingerprint))
        return base

    return make


@pytest.fixture
def linear_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training step takes 1,000 bytes a voxel."""

    def memory(build: Callable, channels: int, patch: tuple[int, ...], batch: int) -> int:
        return BYTES_PER_VOXEL * math.prod(patch) * batch

    monkeypatch.setattr(pct_net_planner, "training_memory", memory)
