"""The numbers of a run, and how the `misfm` block of a plans configuration overrides them.

A recipe is a frozen dataclass whose fields are the documentation of the knobs. `Recipe` holds what all trainers of
this package share; a method adds a `MethodRecipe` of its own, read from the sub-block that bears its name:

    "3d_fullres_vf": {"inherits_from": "3d_fullres",
                      "misfm": {"num_epochs": 400, "volume_fusion": {"num_levels": 8, "initial_lr": 3e-4}}}
"""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from nnunetv2_misfm.errors import MisfmError


@dataclass(frozen=True)
class Recipe:
    """What every trainer of this package reads from the block. The defaults are nnU-Net's own.

    Attributes:
        num_epochs: Length of the run in epochs.
        num_iterations_per_epoch: Training steps of an epoch.
        num_val_iterations_per_epoch: Validation steps of an epoch.
        optimizer: `sgd` is nnU-Net's (Nesterov momentum 0.99), `adam` is PyTorch's with L2 weight decay, `adamw`
            decouples the decay.
        initial_lr: Learning rate of the first epoch.
        weight_decay: L2 coefficient.
        lr_schedule: `poly` is nnU-Net's; `halving` halves the rate after every fifth of the run.
        lr_scaling: How the rate follows the whole batch (all GPUs and accumulated batches) where that is not the
            configuration's `batch_size`: `linear` for SGD, `sqrt` for Adam, `none` (learning_rate.py has the sources).
        warmup_epochs: Epochs in which the rate rises to what the schedule says.
        batch_per_gpu: Every GPU takes the whole `batch_size`, instead of a share of it (nnU-Net's way).
        accumulate_steps: Batches whose gradients make one step; an epoch has as many steps as ever.
        ema_decay: Decay per step of the moving average of the weights, which validation, checkpoints' weights and all
            that follows then use; None trains without one.
        mixed_precision: On a GPU. `float16` is nnU-Net's, with a scaled loss; `bfloat16` needs no scaling; `auto` is
            bfloat16 where the GPU has it.
        augmentation: `nnunet` is nnU-Net's full set; `flips` only crops and mirrors.
        augmentation_on: Where pretraining augments: on the `device`, or in the `workers` by nnU-Net's own transforms;
            the distribution is the same. Fine-tuning always has nnU-Net's own.
        checkpoint_every_epochs: Epochs between two checkpoints of the newest state.
        checkpoint_every_minutes: Minutes after which one is written in the middle of an epoch; 0 never.
        keep_checkpoints: How many of them are kept, the newest included.
        picture_every_epochs: Epochs between two pictures of what a pretraining network answers; 0 draws none.
        seed: Seeds Python, NumPy and PyTorch; None leaves them as they are (nnU-Net's way). Trainings with labels
            repeat only with `nnUNet_n_proc_DA=0`, since the order in which their workers deliver is not fixed, and up
            to the rounding of nnU-Net's blur.
        features_per_stage: Channels per level of the networks of this package; None is their default. The plans'
            networks take theirs from nnU-Net's own `architecture`.
        num_heads: Attention heads of PCT-Net's levels 2, 3 and 4; None is the released 4, 8, 16 where they divide the
            channels.
        attention_dropout: Dropout of PCT-Net's attention probabilities; None is the network's default.
        pretrained_weights: Checkpoint file that a fine-tuning trainer starts from.
        transfer: What moves over at fine-tuning: `all` (but the heads) or only the `encoder`.
    """

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    initial_lr: float = 1e-2
    weight_decay: float = 3e-5
    lr_schedule: Literal["poly", "halving"] = "poly"
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"
    warmup_epochs: int = 0
    batch_per_gpu: bool = False
    accumulate_steps: int = 1
    ema_decay: float | None = None
    mixed_precision: Literal["float16", "bfloat16", "auto"] = "float16"
    augmentation: Literal["nnunet", "flips"] = "nnunet"
    augmentation_on: Literal["device", "workers"] = "device"
    checkpoint_every_epochs: int = 50
    checkpoint_every_minutes: float = 30
    keep_checkpoints: int = 2
    picture_every_epochs: int = 50
    seed: int | None = None
    features_per_stage: tuple[int, ...] | None = None
    num_heads: tuple[int, int, int] | None = None
    attention_dropout: float | None = None
    pretrained_weights: str | None = None
    transfer: Literal["all", "encoder"] = "all"

    def __post_init__(self) -> None:
        for key in (
            "num_epochs",
            "num_iterations_per_epoch",
            "num_val_iterations_per_epoch",
            "initial_lr",
            "accumulate_steps",
            "checkpoint_every_epochs",
            "keep_checkpoints",
        ):
            require(0 < getattr(self, key) < math.inf, key, "a number above 0", getattr(self, key))
        for key in ("weight_decay", "warmup_epochs", "checkpoint_every_minutes", "picture_every_epochs"):
            require(0 <= getattr(self, key) < math.inf, key, "a number of at least 0", getattr(self, key))
        decay = self.ema_decay
        require(decay is None or 0 < decay < 1, "ema_decay", "above 0 and below 1", decay)
        require(self.seed is None or 0 <= self.seed < 2**31, "seed", "from 0 to 2147483647", self.seed)
        heads = self.num_heads
        require(heads is None or min(heads) > 0, "num_heads", "positive numbers", heads)
        rate = self.attention_dropout
        require(rate is None or 0 <= rate < 1, "attention_dropout", "in [0, 1)", rate)
        widths = self.features_per_stage
        require(
            widths is None or (len(widths) > 0 and min(widths) > 0),
            "features_per_stage",
            "positive numbers",
            widths,
        )


@dataclass(frozen=True)
class MethodRecipe:
    """Base of the recipes of pretraining methods; a subclass that is a method names its block in `method`."""

    method: ClassVar[str]


def known_methods() -> dict[str, type[MethodRecipe]]:
    """Returns the recipe class of every method that the package exports, by the name of its block."""
    importlib.import_module("nnunetv2_misfm.trainers.discovery.nnunetv2_misfm_trainers")  # defines all methods
    found, waiting = {}, [MethodRecipe]
    for kind in waiting:  # grows while it is read
        waiting += kind.__subclasses__()
        if "method" in vars(kind):
            found[kind.method] = kind
    return found


def require(holds: bool, key: str, expected: str, got: object) -> None:
    """Raises the error of a value that has the right type but a wrong range.

    Raises:
        MisfmError: `holds` is false.
    """
    if not holds:
        raise MisfmError(f"misfm block: {key} must be {expected}, got {got!r}; correct it in the plans file.")


def read_recipes(
    block: object, defaults: Recipe, method: type[MethodRecipe] | None = None
) -> tuple[Recipe, MethodRecipe | None]:
    """Returns the common recipe and the method's, with the block's values in place of the defaults.

    Args:
        block: The value of `misfm` in a resolved configuration (None where there is none).
        defaults: The trainer's common recipe.
        method: Recipe class of a pretraining trainer's method; its sub-block may also hold common keys, which win
            over the block's. None for all other trainers, for which sub-blocks are only checked.

    Raises:
        MisfmError: The block is no dictionary, or a key is unknown, or a value has a wrong type or range.
    """
    if block is None:
        block = {}
    if not isinstance(block, Mapping):
        raise MisfmError(f"misfm block: expected a dictionary of keys, got {block!r}; correct it in the plans file.")
    methods = known_methods() | ({} if method is None else {method.method: method})
    sub_blocks = {k: v for k, v in block.items() if isinstance(v, Mapping) or k in methods}
    unknown = [k for k in sub_blocks if k not in methods]
    if unknown:
        raise _unknown_key(unknown[0], [f.name for f in fields(Recipe)] + list(methods), "")
    recipe = _override(defaults, {k: v for k, v in block.items() if k not in sub_blocks}, list(methods), "")
    chosen = None
    for name, sub_block in sub_blocks.items():
        if not isinstance(sub_block, Mapping):
            raise MisfmError(f"misfm block: {name} must be a dictionary of the method's keys, got {sub_block!r}.")
        common = {f.name for f in fields(Recipe)}
        own = {k: v for k, v in sub_block.items() if k not in common}
        method_recipe = _override(methods[name](), own, sorted(common), f"{name}.")
        with_common = _override(recipe, {k: v for k, v in sub_block.items() if k in common}, [], f"{name}.")
        if methods[name] is method:
            chosen, recipe = method_recipe, with_common
    return recipe, chosen if chosen is not None or method is None else method()


AnyRecipe = TypeVar("AnyRecipe", Recipe, MethodRecipe)


def _override(recipe: AnyRecipe, values: Mapping[str, Any], also_known: list[str], prefix: str) -> AnyRecipe:
    hints = get_type_hints(type(recipe))
    known = [f.name for f in fields(recipe)]
    checked = {}
    for key, value in values.items():
        if key not in known:
            raise _unknown_key(prefix + key, known + also_known, prefix)
        checked[key] = _checked(prefix + key, value, hints[key])
    return replace(recipe, **checked)


def _unknown_key(key: str, known: list[str], prefix: str) -> MisfmError:
    where = f" in {prefix[:-1]}" if prefix else ""
    return MisfmError(f"misfm block: unknown key {key!r}; known keys{where} are {', '.join(known)}.")


def _checked(key: str, value: Any, hint: Any) -> Any:
    """Returns a JSON value as the annotated type (lists become tuples, whole numbers floats where asked)."""
    if get_origin(hint) in (Union, UnionType):
        if value is None and NoneType in get_args(hint):
            return None
        (hint,) = (h for h in get_args(hint) if h is not NoneType)
    if get_origin(hint) is Literal:
        require(value in get_args(hint), key, "one of " + ", ".join(map(repr, get_args(hint))), value)
        return value
    if get_origin(hint) is tuple:
        item, *rest = get_args(hint)
        size = None if rest and rest[0] is Ellipsis else 1 + len(rest)
        expected = f"a list of {'' if size is None else f'{size} '}{item.__name__} values"
        require(isinstance(value, list | tuple) and size in (None, len(value)), key, expected, value)
        return tuple(_checked(key, v, item) for v in value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = number if hint is float else (isinstance(value, hint) and (hint is bool or not isinstance(value, bool)))
    require(right, key, f"of type {hint.__name__}", value)
    return float(value) if hint is float else value
