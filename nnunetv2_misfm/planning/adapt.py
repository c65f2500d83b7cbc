"""Pretrained weights fitted beforehand to a dataset's network, for nnU-Net's own `-pretrained_weights`.

That option takes equal shapes only; here another number of input channels, other kernels and other depths are adapted
as the fine-tuning trainers do it (weights/transfer.py), and the result is written.
"""

import shlex
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from batchgenerators.utilities.file_and_folder_operations import load_json
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import find_plans
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.finetune import FinetuneTrainer
from nnunetv2_misfm.trainers.five_levels import FiveLevelTrainer, network_strides
from nnunetv2_misfm.weights.checkpoint import file_sha256, write_checkpoint
from nnunetv2_misfm.weights.convert import (
    NNUNET,
    RECORDED_PACKAGES,
    Source,
    found_lines,
    metadata,
    output_path,
    read_source,
    recognise,
)
from nnunetv2_misfm.weights.nnssl import is_nnssl, transfer_from_nnssl
from nnunetv2_misfm.weights.released import Conversion
from nnunetv2_misfm.weights.transfer import HEAD_MARK, TransferReport, transfer_weights

_TRAINERS = {name: getattr(nnunetv2_misfm_trainers, name) for name in nnunetv2_misfm_trainers.__all__}
# Of the values that the file does not give, so that the same command writes the same weights (ours)
_SEED = 0
_Stated = TypeVar("_Stated")


@dataclass(frozen=True)
class Adaptation:
    """What was adapted to what, and what moved; `str` gives it in sentences.

    Attributes:
        source: The file that was read.
        conversion: How its network was converted; None for a checkpoint of nnU-Net, nnssl or this package.
        report: What moved into the target's network.
        output: The file that was written.
        dataset: Name of the target.
        plans: Name of its plans.
        configuration: Configuration of these plans.
        trainer: Trainer that takes the file.
    """

    source: Source
    conversion: Conversion | None
    report: TransferReport
    output: Path
    dataset: str
    plans: str
    configuration: str
    trainer: str

    def __str__(self) -> str:
        container = "nnssl checkpoint" if is_nnssl(self.source.rest) else self.source.container
        found = [f"read {self.source.file} ({container})"]
        fresh = {name: why for name, why in self.report.fresh.items() if HEAD_MARK not in name}
        return "\n".join(
            [
                *(found_lines(self.source, self.conversion) if self.conversion else found),
                f"adapted to {self.dataset}, {self.plans}, {self.configuration}: {self.report.summary()}",
                *(f"  adapted {name}: {how}" for name, how in self.report.adapted.items()),
                *(f"  left fresh {name}: {why}" for name, why in fresh.items()),
                f"wrote {self.output}",
                "fine-tune:",
                f"  nnUNetv2_train {self.dataset} {self.configuration} FOLD -tr {self.trainer} -p {self.plans} "
                f"-pretrained_weights {shlex.quote(str(self.output))}",
            ]
        )


def adapt(
    file: str | Path,
    dataset: str,
    configuration: str,
    plans: str = "nnUNetPlans",
    output: str | Path | None = None,
    resolution_mode: int | None = None,
) -> Adaptation:
    """Writes pretrained weights in the shapes of a dataset's network, heads left out.

    Args:
        file: A checkpoint that the MIS-FM authors released, or one of this package, nnU-Net or nnssl (of a
            ResidualEncoderUNet; its decoder is not taken).
        dataset: Number or name of the dataset to fine-tune on; its plans are needed, its cases are not.
        configuration: Configuration of the plans.
        plans: Name of the plans file without its ending.
        output: The file to write; None makes a name beside `file`.
        resolution_mode: Which branch of a released PCT-Net to take; None takes a trained one, if possible the one that
            pools as the configuration does.

    Raises:
        MisfmError: The file or the plans are missing or damaged, or less than half of the network would be filled;
            nothing is written then.
        NotImplementedError: A 2D configuration with a network that is 3D.
    """
    file = Path(file)
    plans_file = find_plans(dataset, plans)
    manager = PlansManager(str(plans_file))
    if configuration not in manager.available_configurations:
        known = ", ".join(manager.available_configurations)
        raise MisfmError(f"expected one of the configurations {known} of {plans_file}, got {configuration!r}.")
    output = output_path(file, output, f"{file.stem}__{manager.dataset_name}__{plans}__{configuration}.pth")
    source = read_source(file)
    conversion, weights, meta = _converted(source, manager, configuration, resolution_mode)
    given: dict[str, Any] = _stated(file, meta, "network", {})
    num_source_label_channels = _stated(file, given, "label_channels", 0)
    scratch = _scratch_trainer(given.get("class"))
    trained_by = conversion.trainer if conversion else _stated(file, source.rest, "trainer_name", scratch.__name__)
    network, description = _target(scratch, manager, configuration, plans_file)
    try:
        if is_nnssl(source.rest):
            report = transfer_from_nnssl(source.rest, weights, network, description["label_channels"])
        else:
            report = transfer_weights(weights, network, "all", description["label_channels"], num_source_label_channels)
    except MisfmError as error:
        raise MisfmError(f"{file} for {manager.dataset_name}, {plans}, {configuration}: {error}") from error
    target = {"dataset": manager.dataset_name, "plans": plans, "configuration": configuration}
    meta |= {
        "network": description,
        "adapted_from": {"file": file.name, "sha256": file_sha256(file), "network": given},
        "adapted_to": {**target, "transfer": report.as_dict()},
        "versions": {package: version(package) for package in RECORDED_PACKAGES},
        "citations": meta.get("citations") or source.rest.get("citations", []),  # nnssl's stand beside its weights
    }
    body = {key: tensor for key, tensor in network.state_dict().items() if HEAD_MARK not in key}
    write_checkpoint({"network_weights": body, "trainer_name": trained_by, "misfm_meta": meta}, output)
    name = trained_by.removesuffix("Pretrain")
    trainer = name if name in _TRAINERS else scratch.__name__
    return Adaptation(source, conversion, report, output, **target, trainer=trainer)


def _converted(
    source: Source, manager: PlansManager, configuration: str, resolution_mode: int | None
) -> tuple[Conversion | None, dict[str, torch.Tensor], dict[str, Any]]:
    """Returns how a file was converted (None where it needs it not), its weights in our terms, and its `misfm_meta`."""
    if source.container != NNUNET:
        strides = network_strides(manager.get_configuration(configuration))
        conversion = recognise(source, resolution_mode, strides)
        return conversion, conversion.weights, metadata(source, conversion)
    if resolution_mode is not None:
        raise MisfmError(
            f"expected no --resolution-mode with {source.file}, got {resolution_mode}: it chooses a branch of a "
            "PCT-Net that the authors released, and this is an nnU-Net checkpoint; leave the option out."
        )
    return None, source.state, dict(_stated(source.file, source.rest, "misfm_meta", {}))


def _stated(file: Path, holder: dict[str, Any], key: str, default: _Stated) -> _Stated:
    """Returns what a checkpoint says under a key, `default` where it says nothing.

    Raises:
        MisfmError: It says something of another type than `default`.
    """
    value = holder.get(key)
    if value is None:
        return default
    if type(value) is not type(default):
        raise MisfmError(
            f"{file}: expected {key} to be of type {type(default).__name__}, got {type(value).__name__}: correct it or "
            "leave it out, and save the checkpoint again."
        )
    return value


def _scratch_trainer(network_class: str | None) -> type[MisfmTrainer]:
    """Returns the trainer that trains a network from scratch; nnU-Net's own networks are whatever the plans name."""
    for trainer in _TRAINERS.values():
        from_scratch = trainer.method is None and not issubclass(trainer, FinetuneTrainer)
        if issubclass(trainer, FiveLevelTrainer) and from_scratch and trainer.network_class == network_class:
            return trainer
    return nnUNetTrainerBaseline


def _target(
    trainer: type[MisfmTrainer], manager: PlansManager, configuration: str, plans_file: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the network that a trainer builds for a dataset, and its description as in `misfm_meta`."""
    resolved = manager.get_configuration(configuration)
    trainer.check_configuration(resolved)
    dataset_json = plans_file.with_name("dataset.json")
    if not dataset_json.is_file():
        raise MisfmError(
            f"expected {dataset_json} beside the plans, found none: plan and preprocess the dataset again."
        )
    content = load_json(str(dataset_json))
    labels = manager.get_label_manager(content)
    num_channels = determine_num_input_channels(manager, resolved, content)
    is_cascaded = resolved.previous_stage_name is not None
    num_classes = labels.num_segmentation_heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        network = trainer.build_network_architecture(manager, resolved, num_channels, num_classes)
    return network, {
        **trainer.network_description(manager, resolved),
        "input_channels": num_channels,
        "label_channels": len(labels.foreground_labels) if is_cascaded else 0,
        "num_classes": num_classes,
    }
