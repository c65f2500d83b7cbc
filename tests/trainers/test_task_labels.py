from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from toy_universe import BRAIN, TRUNK, TUMOUR, toy_universe

from nnunetv2_misfm.trainers.task_labels import TaskLabels, contexts, mirrored, task_labels
from nnunetv2_misfm.universe import Source

CPU = torch.device("cpu")
SOURCES = {source.dataset: source for source in toy_universe().sources}
# One class alone, of a modality of its own; half of its values are unused
LONELY = Source("Dataset044_Lonely", (5,), ((7, 9),), 2)


def segmentation(*voxels: Sequence[int]) -> Tensor:
    """Label maps of a single row of voxels each."""
    return torch.tensor(voxels, dtype=torch.int16)[:, None, None, None]


def masks_of(labels: TaskLabels, sample: int) -> list[list[int]]:
    return labels.masks[sample, :, 0, 0].int().tolist()


def labels_of(maps: Tensor, sources: Sequence[Source], num_slots: int) -> TaskLabels:
    return task_labels(maps, sources, contexts(sources, num_slots, maps.device))


def slow_labels(maps: Tensor, sources: Sequence[Source], num_slots: int) -> tuple[Tensor, Tensor]:
    """Masks and labelled voxels, one voxel at a time."""
    masks = torch.zeros(len(sources), num_slots, *maps.shape[2:], dtype=torch.bool)
    labelled = torch.ones(len(sources), *maps.shape[2:], dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in maps[:, 0].shape)).tolist():
        sample, voxel = index[0], tuple(index[1:])
        value = max(int(maps[sample, 0][voxel]), 0)
        labelled[sample][voxel] = value != sources[sample].ignore_label
        for slot, group in enumerate(sources[sample].values):
            masks[sample, slot][voxel] = value in group
    return masks, labelled


def test_each_value_becomes_the_mask_of_its_task_in_the_sources_own_order() -> None:
    labels = labels_of(segmentation([0, 1, 2, 1]), [SOURCES[TRUNK]], 2)
    assert masks_of(labels, 0) == [[0, 1, 0, 1], [0, 0, 1, 0]]
    assert labels.masks.dtype == labels.present.dtype == labels.labelled.dtype == torch.bool
    assert labels.labelled.all() and labels.modality.tolist() == [1]


def test_regions_overlap_and_ignored_voxels_belong_to_none() -> None:
    labels = labels_of(segmentation([0, 1, 2, 3]), [SOURCES[TUMOUR]], 2)
    assert masks_of(labels, 0) == [[0, 1, 1, 0], [0, 0, 1, 0]]
    assert labels.labelled[0, 0, 0].tolist() == [True, True, True, False]


@pytest.mark.parametrize("value", [-1, -7, 4, 200, 32767])
@pytest.mark.parametrize("dataset", [BRAIN, TRUNK, TUMOUR])
def test_what_is_outside_the_image_or_unknown_is_background(dataset: str, value: int) -> None:
    labels = labels_of(segmentation([value, 2]), [SOURCES[dataset]], 2)
    assert [row[0] for row in masks_of(labels, 0)] == [0, 0]
    assert masks_of(labels, 0)[1][1] == 1 and labels.labelled.all()


def test_one_value_means_what_the_samples_own_dataset_says() -> None:
    sources = [SOURCES[BRAIN], SOURCES[TUMOUR], LONELY]
    labels = labels_of(segmentation([3, 7, 1], [3, 7, 1], [3, 7, 1]), sources, 3)
    assert masks_of(labels, 0) == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert masks_of(labels, 1) == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert masks_of(labels, 2) == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert labels.labelled[:, 0, 0].tolist() == [[True] * 3, [False, True, True], [True] * 3]


def test_a_slow_loop_agrees_on_a_mixed_batch() -> None:
    sources = [LONELY, SOURCES[TUMOUR], SOURCES[BRAIN], SOURCES[TRUNK], LONELY]
    maps = torch.randint(-2, 11, (5, 1, 4, 3, 5), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    before = maps.clone()
    labels = labels_of(maps, sources, 4)
    masks, labelled = slow_labels(maps, sources, 4)
    assert torch.equal(labels.masks, masks) and torch.equal(labels.labelled, labelled)
    assert masks.any((2, 3, 4)).sum() == 8 and not labelled.all() and torch.equal(maps, before)


def test_a_loaders_float_maps_are_read_alike() -> None:
    maps = segmentation([-1, 0, 1, 2, 3])
    for found, expected in zip(
        labels_of(maps.float(), [SOURCES[TUMOUR]], 2), labels_of(maps, [SOURCES[TUMOUR]], 2), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("num_slots", [2, 3, 6])
def test_missing_tasks_are_padded_as_absent(num_slots: int) -> None:
    sources = [SOURCES[TRUNK], LONELY]
    context = contexts(sources, num_slots, CPU)
    labels = labels_of(segmentation([1, 7], [1, 7]), sources, num_slots)
    padding = num_slots - 2
    assert context.labelled[0, :2].tolist() == [2, 0] and context.labelled[1, 0] == 5
    assert context.labelled.shape == (2, num_slots) and 0 <= context.labelled.min() and context.labelled.max() <= 5
    assert context.present.tolist() == [[True, True] + padding * [False], [True] + [False] * (1 + padding)]
    assert context.modality.tolist() == [1, 2]
    assert torch.equal(labels.present, context.present) and torch.equal(labels.modality, context.modality)
    assert not labels.masks[~labels.present].any()
    assert (context.labelled.dtype, context.present.dtype, context.modality.dtype) == (
        torch.int64, torch.bool, torch.int64,
    )  # fmt: skip


def test_to_moves_every_part() -> None:
    moved = labels_of(segmentation([1]), [SOURCES[BRAIN]], 2).to(torch.device("meta"))
    assert isinstance(moved, TaskLabels) and {tensor.device.type for tensor in moved} == {"meta"}


# ---------------------------------------------------------------------- mirroring


def batch_of(source: Source, copies: int) -> tuple[Tensor, Tensor]:
    """The same two-channel image, all voxels different, and its label map, several times."""
    image = torch.arange(2 * 3 * 4 * 5.0).reshape(1, 2, 3, 4, 5).repeat(copies, 1, 1, 1, 1)
    return image, (image[:, :1] % 7).to(torch.int16)


def flips_of(volume: Tensor, original: Tensor) -> tuple[bool, ...]:
    """Along which axes a volume was flipped, by trying all eight ways with NumPy's slices."""
    found = []
    for way in torch.cartesian_prod(*[torch.tensor([0, 1])] * 3).tolist():
        slices = (slice(None), *(slice(None, None, -1 if flip else 1) for flip in way))
        if (original.numpy()[slices] == volume.numpy()).all():
            found.append(tuple(map(bool, way)))
    (only,) = found
    return only


@pytest.mark.parametrize("axes", [(), (0,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_each_allowed_axis_is_flipped_half_of_the_time_and_no_other_ever(axes: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    copies = 400
    source = Source("Dataset001_A", (0,), ((1,),), 0, mirror_axes=axes)
    image, labels = batch_of(source, copies)
    mirrored_image, mirrored_labels = mirrored(image, labels, [source] * copies)
    ways = [flips_of(new, old) for new, old in zip(mirrored_image, image, strict=True)]
    for axis in range(3):
        share = sum(way[axis] for way in ways) / copies
        assert abs(share - 0.5) < 0.1 if axis in axes else share == 0  # four standard deviations
    assert len(set(ways)) == 2 ** len(axes)  # each axis by a draw of its own
    for way, new, old in zip(ways, mirrored_labels, labels, strict=True):
        assert torch.equal(new, old.flip([1 + axis for axis in range(3) if way[axis]]))


def test_each_sample_of_a_mixed_batch_keeps_to_its_own_sources_axes() -> None:
    torch.manual_seed(0)
    sources = [SOURCES[BRAIN], SOURCES[TRUNK], SOURCES[TUMOUR]] * 60
    image, labels = batch_of(sources[0], len(sources))
    ways = [flips_of(new, old) for new, old in zip(mirrored(image, labels, sources)[0], image, strict=True)]
    assert any(way[2] for way in ways[0::3])
    assert not any(way[2] for way in ways[1::3]) and any(way[0] for way in ways[1::3])  # left and right kidney
    assert not any(any(way) for way in ways[2::3])


def test_mirroring_leaves_its_input_alone_and_follows_pytorchs_seed() -> None:
    sources = [SOURCES[BRAIN]] * 8
    image, labels = batch_of(sources[0], 8)
    before = image.clone(), labels.clone()
    again = []
    for _ in range(2):
        torch.manual_seed(3)
        again.append(mirrored(image, labels, sources))
    assert torch.equal(image, before[0]) and torch.equal(labels, before[1])
    assert torch.equal(again[0][0], again[1][0]) and not torch.equal(again[0][0], image)
