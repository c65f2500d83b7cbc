"""Volume Fusion: fuse two volumes by a map of discrete coefficients, and learn to segment the map.

Paper: Wang et al., MIS-FM, arXiv:2306.16925 (2023). With K levels the coefficient of a voxel is alpha = k / K,
k = 0..K; the input is X = alpha * foreground + (1 - alpha) * background, the target its level Y = k: a segmentation
task of K + 1 classes, learned with Dice and cross-entropy over all of them. The map of overlapping boxes is the
paper's (default); the grid of blocks is that of the follow-up (Wang et al., IEEE TIP 34, 6041-6052, 2025).

What differs: the foreground is the previous sample of the batch, as in the authors' code; a batch of one takes it from
the step before, instead of fusing a volume with itself.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from nnunetv2_misfm.trainers.finetune import FinetuneTrainer
from nnunetv2_misfm.trainers.fmunet import nnUNetTrainerFMUNet
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.recipe import MethodRecipe, require


@dataclass(frozen=True)
class VolumeFusionRecipe(MethodRecipe):
    """Numbers of Volume Fusion. Sizes are in voxels of the patch, per axis in array order (D, H, W).

    Attributes:
        num_levels: K; the task has K + 1 classes. Paper: 4.
        map: `boxes` is the paper's, `grid` the follow-up's.
        num_boxes: Fewest and most boxes of a sample (inclusive). The authors' configuration: 10, 40.
        box_min_size: Smallest edge of a box, or the axis' largest edge where that is less. Theirs: 8.
        box_max_share: Largest edge of a box as a share of the patch, at least one voxel. Theirs: [40, 80, 80] voxels
            of a patch of 64 x 128 x 128, that is 0.625.
        grid_min_size: Smallest edge of a grid's block, limited likewise. The follow-up's example: [5, 8, 8].
        grid_max_share: Largest edge of a grid's block as a share of the patch. Theirs: 32 of 128 voxels in-plane.
        grid_foreground_share: Share of a grid's blocks that are foreground (class above 0). Theirs: 0.7.
    """

    method: ClassVar[str] = "volume_fusion"
    num_levels: int = 4
    map: Literal["boxes", "grid"] = "boxes"
    num_boxes: tuple[int, int] = (10, 40)
    box_min_size: int = 8
    box_max_share: float = 0.625
    grid_min_size: int = 8
    grid_max_share: float = 0.25
    grid_foreground_share: float = 0.7

    def __post_init__(self) -> None:
        fewest, most = self.num_boxes
        require(1 <= self.num_levels <= 254, "volume_fusion.num_levels", "from 1 to 254", self.num_levels)
        require(
            0 <= fewest <= most,
            "volume_fusion.num_boxes",
            "two ordered numbers of at least 0",
            self.num_boxes,
        )
        for key in ("box_min_size", "grid_min_size"):
            require(getattr(self, key) >= 1, f"volume_fusion.{key}", "at least 1", getattr(self, key))
        for key in ("box_max_share", "grid_max_share", "grid_foreground_share"):
            require(
                0 < getattr(self, key) <= 1,
                f"volume_fusion.{key}",
                "above 0 and at most 1",
                getattr(self, key),
            )


def edge_range(size: int, smallest: int, max_share: float) -> tuple[int, int]:
    """Returns the smallest and largest edge (inclusive, voxels) along an axis of `size` voxels."""
    largest = max(1, int(max_share * size))
    return min(smallest, largest), largest


def _integer(low: int, high: int, generator: torch.Generator | None) -> int:
    """Returns a whole number uniform in low..high (inclusive)."""
    return int(torch.randint(low, high + 1, (), generator=generator))


def draw_boxes(
    shape: tuple[int, ...], recipe: VolumeFusionRecipe, generator: torch.Generator | None = None
) -> list[tuple[tuple[slice, ...], int]]:
    """Returns the boxes of one sample, in the order of painting: (half-open slices, class in 1..K).

    Number, edges and centre are uniform; what reaches over the border is clipped.

    Args:
        shape: Size of the patch (D, H, W).
        recipe: The method's numbers.
        generator: On the CPU; None uses PyTorch's global one.
    """
    number = _integer(*recipe.num_boxes, generator)
    uniform = torch.rand((number, 7), generator=generator, dtype=torch.float64)  # float32 could round up to 1 times n
    ranges = [edge_range(size, recipe.box_min_size, recipe.box_max_share) for size in shape]
    sizes, shortest, longest = torch.tensor([(n, low, high) for n, (low, high) in zip(shape, ranges, strict=True)]).T
    edges = shortest + (uniform[:, :3] * (longest - shortest + 1)).long()
    starts = (uniform[:, 3:6] * sizes).long() - edges // 2
    stops = (starts + edges).minimum(sizes).tolist()
    levels = (1 + (uniform[:, 6] * recipe.num_levels).long()).tolist()
    return [
        (tuple(map(slice, start, stop)), level)
        for start, stop, level in zip(starts.clamp(min=0).tolist(), stops, levels, strict=True)
    ]


def draw_box_map(
    shape: tuple[int, ...],
    recipe: VolumeFusionRecipe,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Returns one sample's map of levels, uint8 [D, H, W] in 0..K: boxes on level 0, the later one on top."""
    levels = torch.zeros(shape, dtype=torch.uint8, device=device)
    for box, level in draw_boxes(shape, recipe, generator):
        levels[box].fill_(level)
    return levels


def draw_grid_map(
    shape: tuple[int, ...],
    recipe: VolumeFusionRecipe,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Returns one sample's map of levels, uint8 [D, H, W] in 0..K: equal blocks side by side.

    Edges of a block and offset of the grid are uniform per axis; `grid_foreground_share` of the blocks get a class
    uniform in 1..K, the others and the margins that no block covers are level 0.
    """
    edges = [_integer(*edge_range(n, recipe.grid_min_size, recipe.grid_max_share), generator) for n in shape]
    counts = [n // edge for n, edge in zip(shape, edges, strict=True)]
    num_blocks = counts[0] * counts[1] * counts[2]
    blocks = torch.randint(1, recipe.num_levels + 1, (num_blocks,), generator=generator, dtype=torch.uint8)
    order = torch.randperm(num_blocks, generator=generator)
    blocks[order[int(num_blocks * recipe.grid_foreground_share) :]] = 0
    grid = blocks.reshape(counts).to(device)
    for axis, edge in enumerate(edges):
        grid = grid.repeat_interleave(edge, axis)
    levels = torch.zeros(shape, dtype=torch.uint8, device=device)
    starts = [_integer(0, n % edge, generator) for n, edge in zip(shape, edges, strict=True)]
    levels[tuple(slice(s, s + n) for s, n in zip(starts, grid.shape, strict=True))] = grid
    return levels


def fuse(
    background: torch.Tensor,
    foreground: torch.Tensor,
    levels: torch.Tensor,
    num_levels: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns alpha * foreground + (1 - alpha) * background with alpha = levels / num_levels.

    Args:
        background: float [..., C, D, H, W].
        foreground: float [..., C, D, H, W].
        levels: uint8 in 0..num_levels, of a shape that broadcasts: all channels share it.
        num_levels: K.
        out: Memory for the result; None takes new memory.
    """
    return torch.lerp(background, foreground, levels.to(background.dtype).div_(num_levels), out=out)


def make_task(
    volumes: torch.Tensor,
    recipe: VolumeFusionRecipe,
    generator: torch.Generator | None = None,
    foreground: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the fused volumes and their maps of levels.

    Args:
        volumes: Backgrounds, float [B, C, D, H, W], on any device.
        recipe: The method's numbers.
        generator: Draws the maps, on the CPU (the same maps on any device); None uses PyTorch's global one.
        foreground: float [B, C, D, H, W]; None takes the previous sample of the batch (the last for the first).

    Returns:
        Input, float [B, C, D, H, W], and target, int16 [B, 1, D, H, W] in 0..K.

    Raises:
        ValueError: A batch of one without a foreground: a volume would be fused with itself.
    """
    if foreground is None and len(volumes) < 2:
        raise ValueError("Volume Fusion expected two samples or a foreground, got one sample; pass a foreground")
    draw = draw_box_map if recipe.map == "boxes" else draw_grid_map
    shape = tuple(volumes.shape[2:])
    fused, target = torch.empty_like(volumes), volumes.new_empty((len(volumes), 1, *shape), dtype=torch.int16)
    for i, background in enumerate(volumes):  # sample by sample, so that what is in between stays in the cache
        levels = draw(shape, recipe, generator, volumes.device)
        target[i, 0] = levels
        fuse(background, volumes[i - 1] if foreground is None else foreground[i], levels, recipe.num_levels, fused[i])
    return fused, target


class nnUNetTrainerVFPretrain(PretextTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """Volume Fusion pretraining of the network that the plans name."""

    method = VolumeFusionRecipe
    method_recipe: VolumeFusionRecipe
    make_task = staticmethod(make_task)
    citations = nnUNetTrainerPCTNet.citations

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this very signature
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self._previous: dict[str, dict[str, Any]] = {}  # batches of one that the next is fused with, by phase

    @classmethod
    def num_task_classes(cls, recipe: VolumeFusionRecipe) -> int:  # type: ignore[override]
        """Returns K + 1."""
        return recipe.num_levels + 1

    @classmethod
    def preview_sources(cls, volumes: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the backgrounds, and the foregrounds that `make_task` takes from the batch."""
        return {"background": volumes, "foreground": volumes.roll(1, 0)}

    @classmethod
    def preview_caption(cls, recipe: VolumeFusionRecipe) -> str:  # type: ignore[override]
        """Returns what a level means."""
        k = recipe.num_levels
        return f"level k of a voxel, which the network is to tell: k/{k} foreground, the rest background"

    def other_inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns the foreground of a batch of one."""
        return {"foreground": batch["foreground"].to(self.device)} if "foreground" in batch else {}

    def _build_loss(self) -> nn.Module:
        """Returns nnU-Net's Dice + cross-entropy, the Dice over the whole batch and with class 0 (as PyMIC)."""
        loss = super()._build_loss()
        dice = (loss.loss if self.enable_deep_supervision else loss).dc
        dice = getattr(dice, "_orig_mod", dice)
        dice.do_bg = dice.batch_dice = True
        return loss

    def on_train_start(self) -> None:
        """Starts with no volume remembered but the one that a checkpoint names."""
        self._previous.clear()
        super().on_train_start()

    def on_validation_epoch_start(self) -> None:
        """Starts the validation with no volume remembered, so that every epoch's is the same."""
        super().on_validation_epoch_start()
        self._previous.pop("validation", None)

    def prepare_batch(self, batch: dict[str, Any], training: bool) -> dict[str, Any]:
        """Returns fused volumes and their levels."""
        loader, phase = (self.dataloader_train, "training") if training else (self.dataloader_val, "validation")
        return super().prepare_batch(self._with_foreground(batch, loader, phase), training)

    def run_state(self) -> dict[str, Any]:
        """Returns what this rank needs to go on: also the number of the batch that a batch of one is fused with."""
        return {**super().run_state(), "previous": self._previous.get("training", {}).get("number")}

    def set_run_state(self, state: dict[str, Any]) -> None:
        """Puts this rank where `run_state` was taken."""
        super().set_run_state(state)
        if state["previous"] is not None:
            self._previous["training"] = self.dataloader_train.batches[state["previous"]]

    def _with_foreground(self, batch: dict[str, Any], loader: Any, phase: str) -> dict[str, Any]:
        """Gives a batch of one the volume of the step before, of another case, as its `foreground`."""
        if len(batch["keys"]) > 1:
            return batch
        previous = self._previous.get(phase, batch)
        while list(batch["keys"]) == list(previous["keys"]):
            batch = next(loader)
        self._previous[phase] = batch
        both = [*batch["keys"], *previous["keys"]]  # named if the loss is not finite
        return {**batch, "foreground": previous["data"], "keys": both}


class nnUNetTrainerPCTNetVFPretrain(nnUNetTrainerVFPretrain, nnUNetTrainerPCTNet):  # noqa: N801
    """Volume Fusion pretraining of PCT-Net."""


class nnUNetTrainerFMUNetVFPretrain(nnUNetTrainerVFPretrain, nnUNetTrainerFMUNet):  # noqa: N801
    """Volume Fusion pretraining of FMUNet, with the first paper's boxes unless `volume_fusion.map` is `grid`."""

    citations = nnUNetTrainerFMUNet.citations


class nnUNetTrainerVF(FinetuneTrainer):  # noqa: N801 - nnU-Net's convention for trainers
    """Fine-tunes the network that the plans name from Volume Fusion, with nnU-Net's own settings."""

    pretrain_trainer = "nnUNetTrainerVFPretrain"
    citations = nnUNetTrainerVFPretrain.citations


class nnUNetTrainerPCTNetVF(FinetuneTrainer, nnUNetTrainerPCTNet):  # noqa: N801
    """Fine-tunes PCT-Net from Volume Fusion, with the settings of PCT-Net from scratch."""

    pretrain_trainer = "nnUNetTrainerPCTNetVFPretrain"


class nnUNetTrainerFMUNetVF(FinetuneTrainer, nnUNetTrainerFMUNet):  # noqa: N801
    """Fine-tunes FMUNet from Volume Fusion, with the settings of FMUNet from scratch."""

    pretrain_trainer = "nnUNetTrainerFMUNetVFPretrain"
