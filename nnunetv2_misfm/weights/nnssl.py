"""To and from nnssl: the key by which nnU-Net's own fine-tuning finds its way, and encoders pretrained there.

nnssl (MIC-DKFZ/nnssl) writes beside the weights an *adaptation plan*: which network, on what data, and where in the
state dict stem and encoder lie. nnU-Net after 2.8.1 (documentation: finetuning_from_nnssl_checkpoints) builds the
network from it and loads stem and encoder. Our pretraining checkpoints of nnU-Net's own networks carry the same key.
In the other direction stem and encoder of an nnssl checkpoint of a ResidualEncoderUNet are taken, as nnU-Net does.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights.transfer import HEAD_MARK, TransferReport, transfer_weights

ADAPTATION_PLAN = "nnssl_adaptation_plan"
# How a network of dynamic_network_architectures says where its parts lie (its AbstractDynamicNetworkArchitectures)
_LAYOUT = ("key_to_encoder", "key_to_stem", "keys_to_in_proj")
# Entries of nnssl's Plan and ConfigurationPlan that nnU-Net's plans have under the same name
_PLAN_ENTRIES = (
    *("dataset_name", "plans_name", "original_median_spacing_after_transp", "image_reader_writer"),
    *("transpose_forward", "transpose_backward", "experiment_planner_used"),
)
_CONFIGURATION_ENTRIES = (
    *("data_identifier", "preprocessor_name", "normalization_schemes", "use_mask_for_norm"),
    *("resampling_fn_data", "resampling_fn_data_kwargs", "spacing", "patch_size"),
)
# Where a ResidualEncoderUNet keeps stem and stages, and what its stages, unlike a PlainConvUNet's, are made of
_STEM, _STAGES = "encoder.stem", "encoder.stages"
_RESIDUAL_BLOCK = re.compile(rf"{re.escape(_STAGES)}\.\d+\.blocks\.")
_DECODER_LEFT = "the decoder of an nnssl checkpoint is not taken"


def states_its_layout(network: nn.Module) -> bool:
    """Whether a network says where its stem and its encoder lie, as nnU-Net's own do."""
    return all(hasattr(network, name) for name in _LAYOUT)


def adaptation_plan(
    network: nn.Module,
    description: Mapping[str, Any],
    plans: Mapping[str, Any],
    configuration_name: str,
    configuration: Mapping[str, Any],
    num_input_channels: int,
) -> dict[str, Any]:
    """Returns the adaptation plan of a pretrained network: plain data that JSON can hold.

    Args:
        network: The bare network; it states its layout.
        description: `class` (dotted path), `kwargs` and `kwargs_to_import` of the network, as in `misfm_meta`.
        plans: nnU-Net's plans.
        configuration_name: Name of the configuration that was pretrained.
        configuration: That configuration with all that it inherits; spacing (mm) and patch size (voxels) in the
            plans' axis order.
        num_input_channels: Channels of the network's input.
    """
    patch_size = [int(size) for size in configuration["patch_size"]]
    planned = {
        **{entry: configuration.get(entry) for entry in _CONFIGURATION_ENTRIES},
        "resampling_fn_mask": configuration.get("resampling_fn_seg"),
        "resampling_fn_mask_kwargs": configuration.get("resampling_fn_seg_kwargs"),
        "spacing": [float(edge) for edge in configuration["spacing"]],
        "spacing_style": "median",  # of onemmiso, median and noresample the one by which nnU-Net plans
        "patch_size": patch_size,
    }
    return {
        "architecture_plans": {
            "arch_class_name": description["class"],
            "arch_kwargs": description["kwargs"],
            "arch_kwargs_requiring_import": list(description["kwargs_to_import"]),
        },
        "architecture_kwargs": description["kwargs"],  # not nnssl's, but nnU-Net's DynamicPretrainedTrainer reads it
        "pretrain_plan": {
            **{entry: plans.get(entry) for entry in _PLAN_ENTRIES},
            "configurations": {configuration_name: planned},  # one alone: nnU-Net takes the first
        },
        "pretrain_num_input_channels": num_input_channels,
        "recommended_downstream_patchsize": patch_size,
        "key_to_encoder": network.key_to_encoder,
        "key_to_stem": network.key_to_stem,
        "keys_to_in_proj": list(network.keys_to_in_proj),  # type: ignore[arg-type]
        "key_to_lpe": getattr(network, "key_to_lpe", None),
    }


def is_nnssl(checkpoint: Mapping[str, Any]) -> bool:
    """Whether nnssl wrote a checkpoint; ours carry an adaptation plan too, but say more under `misfm_meta`."""
    return isinstance(checkpoint.get(ADAPTATION_PLAN), Mapping) and "misfm_meta" not in checkpoint


def transfer_from_nnssl(
    checkpoint: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    network: nn.Module,
    num_label_channels: int = 0,
) -> TransferReport:
    """Copies stem and encoder of an nnssl checkpoint into a ResidualEncoderUNet in place and returns the account.

    Args:
        checkpoint: The checkpoint; `is_nnssl` holds.
        weights: Its state dict, without the prefixes of DDP and torch.compile.
        network: Bare network (no DDP or compile wrapper).
        num_label_channels: As in `transfer_weights`.

    Raises:
        MisfmError: The checkpoint or the network is of another architecture, or too little fits; the network is left
            as it was.
    """
    plan = checkpoint[ADAPTATION_PLAN]
    source = _in_our_names(weights, plan)
    architecture = plan.get("architecture_plans")
    name = architecture.get("arch_class_name") if isinstance(architecture, Mapping) else None
    if not _is_residual_encoder(source):
        raise MisfmError(
            f"expected an nnssl checkpoint of a ResidualEncoderUNet (ResEncL), got one of {name or 'no stated class'} "
            f"with its encoder under {plan.get('key_to_encoder')!r} and its stem under {plan.get('key_to_stem')!r}; "
            "take a ResEnc checkpoint, or fine-tune this one with nnU-Net's nnUNetv2_train_pretrained."
        )
    if not _is_residual_encoder(network.state_dict()):
        raise MisfmError(
            f"expected a ResidualEncoderUNet for the encoder of an nnssl checkpoint, got {type(network).__name__}; "
            "plan with nnUNetPlannerResEncM, L or XL and take a trainer of the plans' network."
        )
    _settle_aliases(source, network)
    try:
        report = transfer_weights(source, network, "encoder", num_label_channels=num_label_channels)
    except MisfmError as error:
        raise MisfmError(
            f"nnssl checkpoint of {name}: {error} Plans of nnUNetPlannerResEncM, L or XL have the encoder of an nnssl "
            "ResEncL."
        ) from error
    for tensor in report.fresh:
        if not tensor.startswith("encoder.") and HEAD_MARK not in tensor:
            report.fresh[tensor] = _DECODER_LEFT
    return report


def _in_our_names(weights: Mapping[str, torch.Tensor], plan: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns stem and encoder under a ResidualEncoderUNet's names, wherever the plan says they lie."""
    parts = [(plan.get("key_to_stem"), _STEM), (plan.get("key_to_encoder"), _STAGES)]
    return {
        ours + name.removeprefix(theirs): tensor
        for name, tensor in weights.items()
        for theirs, ours in parts
        if isinstance(theirs, str) and name.startswith(f"{theirs}.")
    }


def _is_residual_encoder(names: Iterable[str]) -> bool:
    """Whether tensors of these names include the stem and a stage of a ResidualEncoderUNet."""
    names = list(names)
    return any(name.startswith(f"{_STEM}.convs.") for name in names) and any(map(_RESIDUAL_BLOCK.match, names))


def _settle_aliases(source: dict[str, torch.Tensor], network: nn.Module) -> None:
    """Gives all names of one tensor the value that `load_state_dict` would leave in it: that of the last name.

    The network registers every convolution and norm twice. In a checkpoint of nnssl's sparse (SparK) pretraining the
    two differ, and only the later ones were trained.
    """
    aliases: dict[int, list[str]] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if name in source:
            aliases.setdefault(id(tensor), []).append(name)
    for names in aliases.values():
        source.update(dict.fromkeys(names, source[names[-1]]))
