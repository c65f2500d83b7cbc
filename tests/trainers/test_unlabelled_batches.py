import hashlib
import pickle
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from toy import toy_case, toy_dataset_json, write_case

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.unlabelled_batches import AIR_LEVEL, UnlabelledBatches
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerVFPretrain


class Unreadable:
    """A label array that nobody may touch."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a label was read: {name}")

    __getitem__ = __array__ = __getattr__


class Cases:
    """Volumes by name, in the shape of nnU-Net's dataset classes."""

    source_folder = "memory"

    def __init__(self, volumes: dict[str, np.ndarray], centres: Any = ()) -> None:
        self.volumes, self.centres, self.identifiers = volumes, centres, sorted(volumes)

    def load_case(self, name: str) -> tuple:
        return self.volumes[name], Unreadable(), None, {"class_locations": {1: self.centres}}


def batches_of(data: Any, batch_size: int = 1, patch: int = 4, seed: tuple[int, ...] = (0,), **other: Any) -> Any:
    settings = {"crop_size": (patch,) * 3, "patch_size": (patch,) * 3, "in_body": False, **other}
    return UnlabelledBatches(data, batch_size, seed=seed, **settings)


def numbered(count: int) -> Cases:
    generator = np.random.default_rng(0)
    return Cases({f"c{i}": i + generator.uniform(0, 0.5, (1, 6, 6, 6)).astype(np.float32) for i in range(count)})


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first["keys"] == second["keys"] and torch.equal(first["data"], second["data"])


def folder_of(workspace: Workspace) -> Path:
    return workspace.base / "nnUNetPlans_3d_fullres"


def on_disk(workspace: Workspace, **other: Any) -> UnlabelledBatches:
    return batches_of(nnUNetDatasetBlosc2(str(folder_of(workspace))), batch_size=3, patch=16, **other)


def with_nnunets_transforms(workspace: Workspace) -> UnlabelledBatches:
    block = {"augmentation": "nnunet", "augmentation_on": "workers"}
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, block)
    trainer.initialize()
    return trainer.get_dataloaders()[0].batches


class Noise:
    """Draws from the global generators, as nnU-Net's transforms do."""

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image": image + torch.rand(()) + 10 * np.random.rand()}


# Which cases


def test_a_batch_holds_different_cases_and_says_which() -> None:
    batches = batches_of(numbered(5), batch_size=5)
    for number in range(20):
        batch = batches[number]
        assert sorted(batch["keys"]) == [f"c{i}" for i in range(5)]
        assert [int(v.min()) for v in batch["data"]] == [int(k[1:]) for k in batch["keys"]]
        assert (batch["data"].shape, batch["data"].dtype) == ((5, 1, 4, 4, 4), torch.float32)
    assert len({tuple(batches[number]["keys"]) for number in range(20)}) > 10


def test_a_batch_larger_than_the_dataset_uses_every_case_before_any_twice() -> None:
    keys = batches_of(numbered(3), batch_size=7)[0]["keys"]
    assert sorted(keys.count(f"c{i}") for i in range(3)) == [2, 2, 3]
    assert len(set(keys[:3])) == 3


def test_two_cases_alternate_in_a_larger_batch() -> None:
    batches = batches_of(numbered(2), batch_size=4)
    for number in range(10):
        keys = batches[number]["keys"]
        assert all(keys[i] != keys[i - 1] for i in range(4))  # the foreground is always the other case


# Which crops


def test_corners_cover_every_place_and_small_volumes_are_padded_with_zeros() -> None:
    volume = np.arange(1, 1 + 5 * 4 * 2, dtype=np.float32).reshape(1, 5, 4, 2)
    batches = batches_of(Cases({"a": volume}))
    seen = set()
    for number in range(200):
        crop = batches[number]["data"][0, 0]
        assert crop.shape == (4, 4, 4)
        assert (crop[:, :, [0, 3]] == 0).all()  # two voxels centred in four
        seen.add(float(crop[0, 0, 1]))
    assert seen == {1.0, 9.0}  # the first axis has two places, the second one


def test_the_margin_of_a_crop_may_lie_outside_of_the_volume_but_no_voxel_of_the_patch() -> None:
    volume = np.arange(1, 1 + 10**3, dtype=np.float32).reshape(1, 10, 10, 10)
    batches = batches_of(Cases({"a": volume}), crop_size=(8, 8, 7), patch_size=(4, 4, 4))
    corners = set()
    for number in range(400):
        crop = batches[number]["data"][0, 0]
        assert crop.shape == (8, 8, 7)
        assert (crop[2:6, 2:6, 2:5] > 0).all()
        voxel = np.array(np.unravel_index(int(crop[4, 4, 3]) - 1, (10, 10, 10)))
        corners.add(tuple(int(c) for c in voxel - (4, 4, 3)))
    seen = [{corner[axis] for corner in corners} for axis in range(3)]
    assert seen == [set(range(-2, 5)), set(range(-2, 5)), set(range(-1, 6))]  # of 3 the larger half is behind


def test_crops_are_centred_on_the_body_where_the_labels_are_a_body_mask() -> None:
    centres = np.array([[0, 10, 2, 17], [0, 4, 9, 9]])  # channel, then voxel, as nnU-Net stores it
    volume = np.zeros((1, 20, 20, 20), np.float32)
    volume[0, 10, 2, 17], volume[0, 4, 9, 9] = 1, 2
    batches = batches_of(Cases({"a": volume}, centres), in_body=True)
    crops = [batches[number]["data"][0, 0] for number in range(30)]
    assert {float(crop[2, 2, 2]) for crop in crops} == {1.0, 2.0}


def test_a_case_without_body_gets_uniform_crops() -> None:
    volume = np.arange(1, 1 + 6**3, dtype=np.float32).reshape(1, 6, 6, 6)
    batches = batches_of(Cases({"a": volume}), in_body=True)
    assert len({float(batches[number]["data"][0, 0, 0, 0, 0]) for number in range(300)}) == 27


@pytest.mark.parametrize("num_channels", [1, 2])
def test_crops_of_mostly_air_are_drawn_again(num_channels: int) -> None:
    generator = np.random.default_rng(1)
    volume = generator.normal(-1000, 5, (num_channels, 60, 10, 10)).astype(np.float32)
    volume[:, :20] = generator.normal(40, 20, (num_channels, 20, 10, 10))  # a third is body
    volume[1:] /= 1000  # channels have levels of their own
    batches = batches_of(Cases({"a": volume}), patch=6)
    shares = [float((batches[number]["data"][0, 0] < -500).float().mean()) for number in range(200)]
    assert np.mean([share == 1 for share in shares]) < 0.05  # 65 % of the places are all air
    low, high = -1000, 80
    level = low + AIR_LEVEL * (high - low)
    assert batches.air_threshold == pytest.approx([level, level / 1000][:num_channels], rel=0.05)


def test_outside_of_a_mask_counts_as_air() -> None:
    volume = np.zeros((1, 60, 10, 10), np.float32)  # masked z-score: 0 outside, mean 0 inside
    volume[:, :20] = np.random.default_rng(1).normal(0, 1, (1, 20, 10, 10))
    batches = batches_of(Cases({"a": volume}), patch=6)
    assert np.mean([bool((batches[number]["data"] == 0).all()) for number in range(200)]) < 0.05


def test_the_level_of_air_is_the_same_in_every_run() -> None:
    levels = [batches_of(numbered(5), seed=(seed,)).air_threshold for seed in range(3)]
    assert levels[0] == levels[1] == levels[2]


# The same again


def test_a_number_and_a_seed_name_a_batch() -> None:
    batches = batches_of(numbered(8), batch_size=2, seed=(3, 0))
    forwards = [batches[number] for number in range(6)]
    again = batches_of(numbered(8), batch_size=2, seed=(3, 0))
    for number in (5, 0, 3, 1, 4, 2):  # in any order
        assert same(again[number], forwards[number])
    for seed in ((4, 0), (3, 1)):
        others = batches_of(numbered(8), batch_size=2, seed=seed)
        assert not any(same(others[number], forwards[number]) for number in range(6))
    assert not any(same(forwards[i], forwards[j]) for i in range(6) for j in range(i))


ANOTHER_PROCESS = """
import hashlib, sys
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2_misfm.trainers.unlabelled_batches import UnlabelledBatches
batches = UnlabelledBatches(nnUNetDatasetBlosc2(sys.argv[1]), 3, (16, 16, 16), (16, 16, 16), False, (5, 1))
batch = batches[12]
print(*batch["keys"], hashlib.sha256(batch["data"].numpy().tobytes()).hexdigest())
"""


def test_another_process_makes_the_same_batch(workspace: Workspace) -> None:
    batch = on_disk(workspace, seed=(5, 1))[12]
    expected = " ".join([*batch["keys"], hashlib.sha256(batch["data"].numpy().tobytes()).hexdigest()])
    command = [sys.executable, "-c", ANOTHER_PROCESS, str(folder_of(workspace))]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == expected


def test_transforms_draw_afresh_for_every_crop_and_repeat_with_the_number() -> None:
    data = Cases({name: np.ones((1, 4, 4, 4), np.float32) for name in "abc"})
    batches = batches_of(data, batch_size=3, in_body=True, transforms=Noise())
    made = [batches[number] for number in range(3)]
    values = torch.stack([batch["data"][:, 0, 0, 0, 0] for batch in made])
    assert len(set(values.flatten().tolist())) == 9
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(same(batches[number], made[number]) for number in (2, 0, 1))


def test_no_global_generator_is_touched(workspace: Workspace) -> None:
    def states() -> bytes:
        return pickle.dumps((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))

    batches = with_nnunets_transforms(workspace)
    before = states()
    assert all(same(batches[number], batches[number]) for number in range(8))
    assert states() == before
    broken = batches_of(numbered(2), transforms=lambda image, segmentation: np.random.rand() + torch.rand(()) + None)
    with pytest.raises(TypeError):
        broken[0]
    assert states() == before


@pytest.mark.parametrize("make", [on_disk, with_nnunets_transforms])
def test_a_pickled_copy_makes_the_same_batches(workspace: Workspace, make: Callable) -> None:
    batches = make(workspace)
    copied = pickle.loads(pickle.dumps(batches))
    assert all(same(copied[number], batches[number]) for number in range(4))


def test_several_channels_are_cropped_alike(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace(dataset_json=toy_dataset_json(num_channels=3))
    batch = on_disk(workspace)[0]
    assert batch["data"].shape == (3, 3, 16, 16, 16)
    volume = torch.from_numpy(toy_case(int(batch["keys"][0][-1]), (20, 22, 20), 3)[0])
    windows = volume.unfold(1, 16, 1).unfold(2, 16, 1).unfold(3, 16, 1)  # every place of the volume
    assert (windows == batch["data"][0][:, None, None, None]).all(dim=(-1, -2, -3)).all(dim=0).any()


# What is not there to be read


def test_other_labels_and_other_places_of_classes_change_no_batch(workspace: Workspace) -> None:
    before = [on_disk(workspace)[number] for number in range(5)]
    for i in range(6):
        image, _ = toy_case(i, (20, 22, 20), 1)
        _, other_labels = toy_case(100 + i, (20, 22, 20), 1, labels=[2] if i % 2 else [])
        write_case(folder_of(workspace), f"case_{i}", image, other_labels)
    assert all(same(on_disk(workspace)[number], before[number]) for number in range(5))


@pytest.mark.parametrize("file", ["case_3.b2nd", "case_3.pkl", "case_3_seg.b2nd"])
@pytest.mark.parametrize("left", [None, 0, 20, 200, -1])
def test_a_damaged_or_missing_file_is_told_with_its_case(workspace: Workspace, file: str, left: int | None) -> None:
    batches = on_disk(workspace)
    path = folder_of(workspace) / file
    if left is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:left])
    expected = rf"expected a preprocessed case case_3 in {re.escape(str(path.parent))}, got \w+ \(.*\); preprocess it"
    with pytest.raises(MisfmError, match=expected):
        for number in range(20):
            batches[number]


def test_pretext_trainers_share_the_rule_for_body_masks() -> None:
    assert nnUNetTrainerVFPretrain.labels_are_body_masks({"misfm": {"labels": "body_mask"}})
    assert not PretextTrainer.labels_are_body_masks({"labels": {"background": 0, "body": 1}})
