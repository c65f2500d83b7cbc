"""Batches for pretraining, by their number: one crop per sample, cases without replacement, no label read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from torch.utils.data import Dataset

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.augmentation.crops import Crops
from nnunetv2_misfm.trainers.augmentation.distribution import Augmentation
from nnunetv2_misfm.trainers.augmentation.geometry import draw_poses

# A voxel is air below this share of the way from the dataset's 1st to its 99th intensity percentile (ours: for CT of
# -1024..300 HU that is -890 HU, under lung at about -850)
AIR_LEVEL = 0.1
# A crop with more air than this is drawn again, at most so many times (ours)
MAX_AIR_SHARE = 0.9
MAX_DRAWS = 10
# Crops that estimate the dataset's percentiles (ours), the same in every run, so that validation compares between runs
NUM_PROBES = 16
PROBE_STEP = 4
PROBE_SEED = 0


class UnlabelledBatches(Dataset):
    """Batch number n of a seed: the same in every process and every run, so that a run may go on anywhere.

    A batch holds its `number`, `keys` (the cases' names) and `data`: float32 [B, C, D, H, W], or the `Crops` of which
    the device makes that. Cases are drawn without replacement within a batch; a batch larger than the dataset repeats
    its order. Crops are uniform and those of mostly air are drawn again; where the dataset's labels are declared a body
    mask, crops are centred on the body.

    Args:
        data: nnU-Net's dataset of preprocessed cases.
        batch_size: B.
        crop_size: (D, H, W) of the crops, voxels.
        patch_size: What will be left of a crop, voxels; the margin may lie outside of the volume, where zeros are.
        in_body: Whether `class_locations` of the cases are those of a body mask (label 1) and may be used.
        seed: Numbers that name the sequence of batches.
        transforms: nnU-Net's, for every crop, whose result is a patch; None leaves the crops as they are.
        augmentation: What the device will do, in place of transforms: crops that it only crops get no margin.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        crop_size: Sequence[int],
        patch_size: Sequence[int],
        in_body: bool,
        seed: Sequence[int],
        transforms: Callable[..., dict[str, Any]] | None = None,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.data = data
        self.cases = list(data.identifiers)
        self.batch_size = batch_size
        self.crop_size = np.array(crop_size)
        self.patch_size = np.array(patch_size)
        self.in_body = in_body
        self.seed = tuple(seed)
        self.transforms = transforms
        self.augmentation = augmentation
        self.air_threshold = None if in_body else self._estimate_air_threshold()

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Returns a batch.

        Raises:
            MisfmError: A case cannot be read.
        """
        generator = np.random.default_rng([*self.seed, number])
        order = generator.choice(len(self.cases), min(len(self.cases), self.batch_size), replace=False)
        keys = [self.cases[order[i % len(order)]] for i in range(self.batch_size)]
        seed = int(generator.integers(2**31))
        if self.augmentation is None:
            crops = self._draw_crops(keys, [self.crop_size] * self.batch_size, generator)
            if self.transforms is not None:
                with _global_seed(seed):
                    crops = [self._transformed(crop) for crop in crops]
            return {"number": number, "keys": keys, "data": torch.stack(crops)}
        poses = draw_poses(self.batch_size, self.augmentation, torch.Generator().manual_seed(seed))
        sizes = [self.crop_size if pose.is_resampled else self.patch_size for pose in poses]
        return {"number": number, "keys": keys, "data": Crops(self._draw_crops(keys, sizes, generator), poses)}

    def _transformed(self, crop: torch.Tensor) -> torch.Tensor:
        assert self.transforms is not None
        outside = (crop == 0).all(dim=0, keepdim=True)  # of the mask of a masked normalisation; -1 is nnU-Net's sign
        return self.transforms(image=crop, segmentation=-outside.to(torch.int16))["image"]

    def _draw_crops(
        self, keys: list[str], sizes: Sequence[np.ndarray], generator: np.random.Generator
    ) -> list[torch.Tensor]:
        crops = [self._draw_crop(key, size, generator) for key, size in zip(keys, sizes, strict=True)]
        return [torch.from_numpy(crop).float() for crop in crops]

    def _draw_crop(self, key: str, size: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Returns a crop [C, *size], zero-padded where the volume ends; of a smaller size, the centre of the crop."""
        try:
            volume, _, _, properties = self.data.load_case(key)  # opens the files; no label voxel is read
            centres = properties["class_locations"].get(1, ()) if self.in_body else ()
            for _ in range(MAX_DRAWS):
                lower = self._draw_corner(volume.shape[1:], centres, generator) + self.crop_size // 2 - size // 2
                box = np.stack([lower, lower + size], 1).tolist()
                crop = crop_and_pad_nd(volume, box, 0)
                if self.in_body or self.air_threshold is None or not self._is_mostly_air(crop):
                    break
        except (OSError, RuntimeError, ValueError, EOFError, KeyError, UnpicklingError) as error:  # names of damage
            raise MisfmError(
                f"expected a preprocessed case {key} in {self.data.source_folder}, got {type(error).__name__} "
                f"({error}); preprocess it again or take it out of the dataset."
            ) from error
        return crop

    def _draw_corner(self, shape: tuple[int, ...], centres: Any, generator: np.random.Generator) -> np.ndarray:
        """Returns the lower corner of a box, uniform over nnU-Net's range of corners or around a body voxel."""
        margin = np.maximum(self.crop_size - self.patch_size, self.crop_size - np.array(shape))
        lowest, highest = -(margin // 2), np.array(shape) - self.crop_size + (margin + 1) // 2
        if len(centres) == 0:
            return generator.integers(lowest, highest, endpoint=True)
        centre = np.asarray(centres[generator.integers(len(centres))])[1:]
        return np.clip(centre - self.crop_size // 2, lowest, highest)

    def _is_mostly_air(self, crop: np.ndarray) -> bool:
        assert self.air_threshold is not None
        threshold = self.air_threshold.reshape(-1, *[1] * (crop.ndim - 1))
        # exactly 0: outside the mask of nnU-Net's masked normalisation, or padding
        return float(((crop < threshold) | (crop == 0)).all(axis=0).mean()) > MAX_AIR_SHARE

    def _estimate_air_threshold(self) -> np.ndarray:
        """Returns the intensity of each channel [C] under which a voxel counts as air."""
        self.air_threshold = None
        generator = np.random.default_rng(PROBE_SEED)
        keys = generator.choice(self.cases, NUM_PROBES)
        size = self.patch_size
        crops = [self._draw_crop(key, size, generator)[:, ::PROBE_STEP, ::PROBE_STEP, ::PROBE_STEP] for key in keys]
        pooled = np.concatenate([crop.reshape(crop.shape[0], -1) for crop in crops], axis=1)
        low, high = np.percentile(pooled, (1, 99), axis=1)
        return low + AIR_LEVEL * (high - low)


@contextmanager
def _global_seed(seed: int) -> Iterator[None]:
    """Seeds NumPy's and PyTorch's global generators, from which nnU-Net's transforms draw, and restores them."""
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
