import pickle
from typing import Any

import numpy as np
import pytest

from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.unlabelled_loader import AIR_LEVEL, UnlabelledLoader
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerVFPretrain


class Unreadable:
    """A label array that nobody may touch."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a label was read: {name}")

    __getitem__ = __array__ = __getattr__


class Cases:
    """Volumes by name, in the shape of nnU-Net's dataset classes."""

    def __init__(self, volumes: dict[str, np.ndarray], centres: Any = ()) -> None:
        self.volumes, self.centres, self.identifiers = volumes, centres, sorted(volumes)

    def load_case(self, name: str) -> tuple:
        return self.volumes[name], Unreadable(), None, {"class_locations": {1: self.centres}}


class NoLabels:
    all_labels: list[int] = [0]
    has_ignore_label = False


def loader(cases: Cases, batch_size: int = 2, patch: tuple[int, ...] = (4, 4, 4), in_body: bool = False) -> Any:
    np.random.seed(0)
    return UnlabelledLoader(
        in_body=in_body,
        data=cases,
        batch_size=batch_size,
        patch_size=patch,
        final_patch_size=patch,
        label_manager=NoLabels(),
    )


def numbered(count: int, shape: tuple[int, ...] = (6, 6, 6)) -> Cases:
    generator = np.random.default_rng(0)
    return Cases({f"c{i}": i + generator.uniform(0, 0.5, (1, *shape)).astype(np.float32) for i in range(count)})


def test_a_batch_holds_different_cases_and_says_which() -> None:
    made = loader(numbered(5), batch_size=5)
    for _ in range(20):
        batch = made.generate_train_batch()
        assert sorted(batch["keys"]) == [f"c{i}" for i in range(5)]
        assert [int(v.min()) for v in batch["data"]] == [int(k[1:]) for k in batch["keys"]]
        assert batch["data"].shape == (5, 1, 4, 4, 4)


def test_a_batch_larger_than_the_dataset_uses_every_case_before_any_twice() -> None:
    batch = loader(numbered(3), batch_size=7).generate_train_batch()
    counts = [batch["keys"].count(f"c{i}") for i in range(3)]
    assert sorted(counts) == [2, 2, 3]


def test_corners_cover_every_place_and_small_volumes_are_padded_with_zeros() -> None:
    volume = np.arange(1, 1 + 5 * 4 * 2, dtype=np.float32).reshape(1, 5, 4, 2)
    made = loader(Cases({"a": volume}), batch_size=1, patch=(4, 4, 4))
    seen = set()
    for _ in range(200):
        crop = made._draw_crop("a")[0]
        assert crop.shape == (4, 4, 4)
        assert (crop[:, :, [0, 3]] == 0).all()  # two voxels centred in four
        seen.add(float(crop[0, 0, 1]))
    assert seen == {1.0, 9.0}  # the first axis has two places, the second one


def test_crops_are_centred_on_the_body_where_the_labels_are_a_body_mask() -> None:
    centres = np.array([[0, 10, 2, 17]])  # channel, then voxel, as nnU-Net stores it
    volume = np.zeros((1, 20, 20, 20), np.float32)
    volume[0, 10, 2, 17] = 1
    made = loader(Cases({"a": volume}, centres), batch_size=1, in_body=True)
    for _ in range(5):
        assert made._draw_crop("a").sum() == 1
    assert made._draw_corner((20, 20, 20), centres).tolist() == [8, 0, 15]


def test_crops_of_mostly_air_are_drawn_again() -> None:
    generator = np.random.default_rng(1)
    volume = generator.normal(-1000, 5, (1, 60, 10, 10)).astype(np.float32)
    volume[:, :20] = generator.normal(40, 20, (1, 20, 10, 10))  # a third is body
    made = loader(Cases({"a": volume}), batch_size=1, patch=(6, 6, 6))
    shares = [(made._draw_crop("a") < -500).mean() for _ in range(200)]
    assert np.mean([share == 1 for share in shares]) < 0.05  # 65 % of the places are all air
    assert -1020 < made.air_threshold[0] < 40
    low, high = -1000, 80
    assert made.air_threshold[0] == pytest.approx(low + AIR_LEVEL * (high - low), abs=40)


def test_same_seed_same_batches() -> None:
    made = loader(numbered(4))
    made.restart(3)
    first = [made.generate_train_batch() for _ in range(3)]
    made.restart(3)
    for batch in first:
        again = made.generate_train_batch()
        assert again["keys"] == batch["keys"] and (again["data"] == batch["data"]).all()


def test_outside_of_a_mask_counts_as_air() -> None:
    generator = np.random.default_rng(1)
    volume = np.zeros((1, 60, 10, 10), np.float32)  # masked z-score: 0 outside, mean 0 inside
    volume[:, :20] = generator.normal(0, 1, (1, 20, 10, 10))
    made = loader(Cases({"a": volume}), batch_size=1, patch=(6, 6, 6))
    assert np.mean([(made._draw_crop("a") == 0).all() for _ in range(200)]) < 0.05


def test_two_cases_alternate_in_a_larger_batch() -> None:
    made = loader(numbered(2), batch_size=4)
    for _ in range(10):
        keys = made.generate_train_batch()["keys"]
        assert all(keys[i] != keys[i - 1] for i in range(4))  # the foreground is always the other case


def test_data_workers_draw_different_batches() -> None:
    copies = [pickle.loads(pickle.dumps(loader(numbered(8)))) for _ in range(2)]
    for worker, copied in enumerate(copies):
        np.random.seed(worker)  # as batchgenerators does in each worker
        copied.set_thread_id(worker)
    first, second = ([c.generate_train_batch()["keys"] for _ in range(5)] for c in copies)
    assert first != second


def test_pretext_trainers_share_the_rule_for_body_masks() -> None:
    assert nnUNetTrainerVFPretrain.labels_are_body_masks({"misfm": {"labels": "body_mask"}})
    assert not PretextTrainer.labels_are_body_masks({"labels": {"background": 0, "body": 1}})
