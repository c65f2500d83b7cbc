"""A picture of what a pretraining method shows the network: volumes, input, target, and a trained network's answer."""

import io
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import nn

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import find_plans
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.trainers.pretext_figure import Sample
from nnunetv2_misfm.trainers.pretext_picture import samples_of, write_picture
from nnunetv2_misfm.trainers.recipe import MethodRecipe
from nnunetv2_misfm.trainers.unlabelled_batches import UnlabelledBatches
from nnunetv2_misfm.weights.checkpoint import network_weights, read_checkpoint


class _Setting(NamedTuple):
    """Where the samples of a picture come from.

    Attributes:
        trainer: The pretraining trainer.
        recipe: Its method's numbers under the configuration.
        manager: The plans.
        resolved: The configuration.
        folder: The dataset's in nnUNet_preprocessed.
    """

    trainer: type[PretextTrainer]
    recipe: MethodRecipe
    manager: PlansManager
    resolved: ConfigurationManager
    folder: Path


def preview(
    dataset: str,
    configuration: str,
    output: str | Path,
    plans: str = "nnUNetPlans",
    num_samples: int = 2,
    seed: int = 0,
    trainer: str = "nnUNetTrainerVFPretrain",
    checkpoint: str | Path | None = None,
) -> Path:
    """Writes a PNG of samples of a pretraining task on a preprocessed dataset and returns its path.

    Each sample takes three rows (the planes through the patch's centre, all at one scale). Its columns are the volumes
    that the input is made of, the input, the target where that is none of these volumes, and the answer of a trained
    network where a checkpoint is given; of several channels the first. The crops and tasks are drawn as in training,
    with the configuration's recipe.

    Args:
        dataset: Number or name of a dataset that nnU-Net has preprocessed.
        configuration: Configuration of its plans.
        output: The PNG file to write; its folder is made.
        plans: Name of the plans file without its ending.
        num_samples: Samples to show, at least 1.
        seed: Of cases, crops and tasks; the same seed gives the same picture.
        trainer: Name of a pretraining trainer, of this package or of a folder in nnUNet_extTrainer.
        checkpoint: One of this trainer's on these plans and this configuration.

    Raises:
        MisfmError: No such plans or pretraining trainer, or nothing preprocessed, or fewer than two cases, or a number
            of samples below 1, or a checkpoint of another network, or a file that cannot be read or written.
        NotImplementedError: A 2D configuration.
    """
    if num_samples < 1:
        raise MisfmError(f"expected at least 1 sample to show, got {num_samples}.")
    method = find_pretraining_trainer(trainer)
    plans_file = find_plans(dataset, plans)
    manager = PlansManager(str(plans_file))
    if configuration not in manager.available_configurations:
        known = ", ".join(manager.available_configurations)
        raise MisfmError(f"expected one of the configurations {known} of {plans_file}, got {configuration!r}.")
    resolved = manager.get_configuration(configuration)
    method.check_configuration(resolved)
    _, recipe = method.read_recipes(resolved)
    assert recipe is not None
    setting = _Setting(method, recipe, manager, resolved, plans_file.parent)
    network = None if checkpoint is None else _load_network(setting, configuration, Path(checkpoint))
    samples = _draw_samples(setting, max(2, num_samples), seed, network)[:num_samples]
    output = Path(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_picture(samples, method, recipe, output)
    except OSError as error:
        raise MisfmError(f"{output} could not be written ({error}): choose another file.") from error
    return output


def find_pretraining_trainer(name: str) -> type[PretextTrainer]:
    """Returns one of our pretraining trainers, or one that nnU-Net's own search finds.

    Raises:
        MisfmError: There is no trainer of this name, or it does not pretrain.
    """
    exported = {key: getattr(nnunetv2_misfm_trainers, key) for key in nnunetv2_misfm_trainers.__all__}
    trainer: Any = exported.get(name)
    if trainer is None:
        try:
            with redirect_stdout(io.StringIO()):  # nnU-Net tells how it searches
                trainer = recursive_find_trainer_class_by_name(name)
        except RuntimeError:
            trainer = None
    if trainer is None or not issubclass(trainer, PretextTrainer) or trainer.method is None:
        known = ", ".join(key for key, kind in exported.items() if issubclass(kind, PretextTrainer))
        raise MisfmError(
            f"expected the name of a pretraining trainer, got {name!r}: name one of {known}, or one of your own in a "
            "folder of nnUNet_extTrainer."
        )
    return trainer


def _load_network(setting: _Setting, configuration: str, file: Path) -> nn.Module:
    """Returns the trainer's network with a checkpoint's weights, evaluating, with its finest output alone."""
    name = setting.trainer.__name__
    checkpoint = read_checkpoint(file)
    weights = network_weights(checkpoint, file)
    writer = checkpoint.get("trainer_name", name)
    if writer != name:
        raise MisfmError(f"{file}: expected a checkpoint of {name}, got one of {writer}: name its trainer with -tr.")
    dataset_json = load_json(str(setting.folder / "dataset.json"))
    channels = determine_num_input_channels(setting.manager, setting.resolved, dataset_json)
    network = setting.trainer.build_network_architecture(
        setting.manager,
        setting.resolved,
        channels,
        setting.trainer.num_outputs(setting.recipe, channels),
        enable_deep_supervision=False,
    )
    expected = {key: tensor.shape for key, tensor in network.state_dict().items()}
    got = {key: tensor.shape for key, tensor in weights.items()}
    if differing := sorted(key for key in {*expected, *got} if expected.get(key) != got.get(key)):
        key = differing[0]
        shapes = [list(shape) if (shape := which.get(key)) is not None else "none" for which in (expected, got)]
        raise MisfmError(
            f"{file}: expected the weights of {name} with configuration {configuration}, got those of another network "
            f"({len(differing)} tensors differ, first {key}: {shapes[0]} expected, {shapes[1]} in the file); choose "
            "the plans and configuration that it was trained with (-p, -c)."
        )
    network.load_state_dict(weights)
    return network.eval()


def _draw_samples(setting: _Setting, num_samples: int, seed: int, network: nn.Module | None) -> list[Sample]:
    """Returns a batch with its task, as training would draw them, and the network's answers."""
    trainer, recipe, manager, resolved, folder = setting
    preprocessed = folder / resolved.data_identifier
    if not any(preprocessed.glob("*.pkl")):
        raise MisfmError(
            f"expected preprocessed cases in {preprocessed}, found none: run nnUNetv2_preprocess "
            f"-d {manager.dataset_name} -plans_name {manager.plans_name} first."
        )
    data = infer_dataset_class(str(preprocessed))(str(preprocessed))
    if len(data.identifiers) < 2:
        raise MisfmError(f"expected at least two cases in {preprocessed}, got {len(data.identifiers)}; add scans.")
    in_body = trainer.labels_are_body_masks(load_json(str(folder / "dataset.json")))
    batch = UnlabelledBatches(data, num_samples, resolved.patch_size, resolved.patch_size, in_body, [seed])[0]
    generator = torch.Generator().manual_seed(seed)
    return samples_of(trainer, recipe, batch, generator, data, manager.transpose_forward, resolved.spacing, network)
