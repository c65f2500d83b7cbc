"""nnU-Net's loaders of crops, with cases drawn so that large datasets do not drown small ones."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.universe import Universe

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.hermes import nnUNetTrainerHermes


def case_probabilities(
    cases: Sequence[str], universe: Universe, balance: float, weights: Sequence[float] | None
) -> np.ndarray:
    """Returns how probable each case is in a draw, (cases,), their sum 1.

    Args:
        cases: Names in the universal dataset.
        universe: Whose cases they are.
        balance: A dataset of n cases is drawn in proportion to n ** balance: 1 draws every case alike, 0 every dataset.
        weights: Of each dataset of the universe, in place of n ** balance.
    """
    sizes = Counter(universe.source_of(case).dataset for case in cases)
    if weights is None:
        wanted = {dataset: size**balance for dataset, size in sizes.items()}
    else:
        wanted = {source.dataset: weight for source, weight in zip(universe.sources, weights, strict=True)}
    dataset_of = [universe.source_of(case).dataset for case in cases]
    shares = np.array([wanted[dataset] / sizes[dataset] for dataset in dataset_of])
    return shares / shares.sum()


class _TaskLoader(nnUNetDataLoader):
    """nnU-Net's loader of cases of which some have unlabelled voxels; of these every crop holds a labelled one.

    nnU-Net asks the dataset's labels for an ignore value. Here datasets differ, but preprocessing notes the labelled
    voxels of such a case under a key that begins with -1.
    """

    annotated_classes_key: tuple[int, ...]

    def get_bbox(self, data_shape: np.ndarray, force_fg: bool, class_locations: dict | None, *more: Any) -> tuple:
        """Returns lower and upper bounds of a crop; arguments are nnU-Net's."""
        labelled = next((key for key in class_locations or {} if isinstance(key, tuple) and -1 in key), None)
        self.has_ignore = labelled is not None
        self.annotated_classes_key = labelled or self.annotated_classes_key
        return super().get_bbox(data_shape, force_fg, class_locations, *more)


def balanced_loaders(trainer: "nnUNetTrainerHermes") -> tuple[Any, Any]:
    """Returns nnU-Net's loaders of training and validation crops, started, with cases drawn in balance.

    Args:
        trainer: Its batch size, patch, transforms and oversampling of foreground are used (the class of a crop's centre
            is drawn among those of the case, so every task of it alike).

    Raises:
        MisfmError: The fold holds no case for training, or none for validation.
    """
    settings = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    rotation, dummy_2d, initial_patch_size, mirror_axes = settings
    planned = trainer.configuration_manager
    transforms = trainer.get_training_transforms(
        planned.patch_size, rotation, None, mirror_axes, dummy_2d, use_mask_for_norm=planned.use_mask_for_norm
    )
    datasets = dict(zip(("training", "validation"), trainer.get_tr_and_val_datasets(), strict=True))
    for part, dataset in datasets.items():
        if not dataset.identifiers:
            raise MisfmError(
                f"fold {trainer.fold} of {trainer.universe.dataset} has no {part} case: train the fold 'all', or write "
                "splits_final.json."
            )
    recipe = trainer.method_recipe
    loaders = []
    for dataset, crop_size, transform, num_processes, fewest_cached in zip(
        datasets.values(),
        (initial_patch_size, planned.patch_size),
        (transforms, trainer.get_validation_transforms(None)),
        num_worker_processes(),
        (6, 3),  # nnU-Net's
        strict=True,
    ):
        odds = case_probabilities(dataset.identifiers, trainer.universe, recipe.balance, recipe.dataset_weights)
        loader = make_loader(trainer, dataset, crop_size, transform, odds, num_processes, fewest_cached)
        next(loader)  # starts its processes
        loaders.append(loader)
    return loaders[0], loaders[1]


def make_loader(
    trainer: "nnUNetTrainerHermes",
    dataset: nnUNetBaseDataset,
    crop_size: Sequence[int],
    transforms: BasicTransform | None,
    probabilities: np.ndarray,
    num_processes: int,
    fewest_cached: int = 3,
) -> SingleThreadedAugmenter | NonDetMultiThreadedAugmenter:
    """Returns nnU-Net's loader of a dataset's crops, as nnU-Net sets it up but for the probabilities of the cases.

    Args:
        trainer: See `balanced_loaders`.
        dataset: The cases.
        crop_size: Edges (D, H, W) of a crop before the transforms.
        transforms: What happens to a crop.
        probabilities: Of each case of the dataset.
        num_processes: That make batches; 0 makes them in this one.
        fewest_cached: Batches in store, at least.
    """
    loader = _TaskLoader(
        dataset,
        trainer.batch_size,
        crop_size,
        trainer.configuration_manager.patch_size,
        trainer.label_manager,
        oversample_foreground_percent=trainer.oversample_foreground_percent,
        sampling_probabilities=probabilities,
        transforms=transforms,
        probabilistic_oversampling=trainer.probabilistic_oversampling,
    )
    if num_processes == 0:
        return SingleThreadedAugmenter(loader, None)
    num_cached = max(fewest_cached, num_processes // 2)
    return NonDetMultiThreadedAugmenter(
        loader, None, num_processes, num_cached, pin_memory=trainer.device.type == "cuda", wait_time=0.002
    )


def num_worker_processes() -> tuple[int, int]:
    """Returns nnU-Net's numbers of processes that make batches for training and for validation."""
    allowed = get_allowed_n_proc_DA()
    return allowed, max(1, allowed // 2) if allowed else 0
