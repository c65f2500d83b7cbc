"""Crops for pretraining: one per sample, from cases drawn without replacement, without reading any label."""

from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

# A voxel is air below this share of the way from the dataset's 1st to its 99th intensity percentile (ours: for CT of
# -1024..300 HU that is -890 HU, under lung at about -850)
AIR_LEVEL = 0.1
# A crop with more air than this is drawn again, at most so many times (ours)
MAX_AIR_SHARE = 0.9
MAX_DRAWS = 10
# Crops that estimate the dataset's percentiles (ours)
NUM_PROBES = 16
PROBE_STEP = 4


class UnlabelledLoader(nnUNetDataLoader):
    """nnU-Net's loader without labels.

    A batch holds `data` float32 [B, C, D, H, W] and `keys` (the cases' names). Cases are drawn without replacement
    within a batch; a batch larger than the dataset repeats its order. Crops are uniform and those of
    mostly air are drawn again; where the dataset's labels are declared a body mask, crops are centred on the body.

    Args:
        in_body: Whether `class_locations` of the cases are those of a body mask (label 1) and may be used.
        **loader: As nnU-Net's loader takes them.
    """

    def __init__(self, *, in_body: bool, **loader: Any) -> None:
        super().__init__(**loader)
        self.in_body = in_body
        self.restart(0)  # the same probes in every run, so that validation compares between runs
        self.air_threshold = None if in_body else self._estimate_air_threshold()
        self.restart(np.random.randint(2**31))

    def set_thread_id(self, thread_id: int) -> None:
        """Gives a data worker its own random stream; the worker's NumPy was seeded just before."""
        super().set_thread_id(thread_id)
        self.restart(np.random.randint(2**31))

    def restart(self, seed: int) -> None:
        """Starts the sequence of cases and crops that belongs to a seed."""
        self.generator = np.random.default_rng(seed)

    def generate_train_batch(self) -> dict[str, Any]:
        """Returns the next batch."""
        keys = self._draw_keys()
        crops = []
        for key in keys:
            crop = torch.from_numpy(self._draw_crop(key)).float()
            crops.append(crop if self.transforms is None else self.transforms(image=crop)["image"])
        return {"data": torch.stack(crops), "keys": keys}

    def _draw_keys(self) -> list[str]:
        order = self.generator.permutation(self.indices).tolist()
        return [order[i % len(order)] for i in range(self.batch_size)]

    def _draw_crop(self, key: str) -> np.ndarray:
        """Returns a crop [C, D, H, W] of the loader's (initial) patch size, zero-padded where the volume ends."""
        volume, _, _, properties = self._data.load_case(key)  # opens the files; no label voxel is read
        centres = properties["class_locations"].get(1, ()) if self.in_body else ()
        for _ in range(MAX_DRAWS):
            lower = self._draw_corner(volume.shape[1:], centres)
            box = [[int(low), int(low) + int(size)] for low, size in zip(lower, self.patch_size, strict=True)]
            crop = crop_and_pad_nd(volume, box, 0)
            if self.in_body or self.air_threshold is None or not self._is_mostly_air(crop):
                break
        return crop

    def _draw_corner(self, shape: tuple[int, ...], centres: Any) -> np.ndarray:
        """Returns the lower corner of a box, uniform over nnU-Net's range of corners or around a body voxel."""
        patch = np.array(self.patch_size)
        margin = np.maximum(self.need_to_pad, patch - np.array(shape))
        lowest, highest = -(margin // 2), np.array(shape) - patch + (margin + 1) // 2
        if len(centres) == 0:
            return self.generator.integers(lowest, highest, endpoint=True)
        centre = np.asarray(centres[self.generator.integers(len(centres))])[1:]
        return np.clip(centre - patch // 2, lowest, highest)

    def _is_mostly_air(self, crop: np.ndarray) -> bool:
        assert self.air_threshold is not None
        threshold = self.air_threshold.reshape(-1, *[1] * (crop.ndim - 1))
        # exactly 0: outside the mask of nnU-Net's masked normalisation, or padding
        return float(((crop < threshold) | (crop == 0)).all(axis=0).mean()) > MAX_AIR_SHARE

    def _estimate_air_threshold(self) -> np.ndarray:
        """Returns the intensity of each channel [C] under which a voxel counts as air."""
        self.air_threshold = None
        keys = self.generator.choice(self.indices, NUM_PROBES)
        crops = [self._draw_crop(key)[:, ::PROBE_STEP, ::PROBE_STEP, ::PROBE_STEP] for key in keys]
        pooled = np.concatenate([crop.reshape(crop.shape[0], -1) for crop in crops], axis=1)
        low, high = np.percentile(pooled, (1, 99), axis=1)
        return low + AIR_LEVEL * (high - low)
