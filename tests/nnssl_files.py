"""Checkpoints as nnssl writes them, of tiny networks."""

from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from toy import toy_architecture


def toy_network(residual: bool = True, num_stages: int = 3, channels: int = 1, features: int = 1) -> nn.Module:
    """A network of nnU-Net's with three outputs and random weights everywhere (norms too); `features` widens it."""
    architecture = toy_architecture(num_stages, residual)
    kwargs = architecture["arch_kwargs"]
    kwargs["features_per_stage"] = [features * number for number in kwargs["features_per_stage"]]
    imported = architecture["_kw_requires_import"]
    network = get_network_from_plans(
        architecture["network_class_name"], kwargs, imported, channels, 3, allow_init=True, deep_supervision=True
    )
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.add_(torch.randn_like(tensor))
    return network


def nnssl_checkpoint(weights: dict[str, Tensor], **plan: Any) -> dict[str, Any]:
    """A checkpoint of nnssl's masked autoencoder (ResEncL) around these weights; `plan` replaces entries."""
    configuration = {"spacing": [1.0, 1.0, 1.0], "patch_size": [160, 160, 160], "spacing_style": "onemmiso"}
    return {
        "network_weights": dict(weights),
        "trainer_name": "BaseMAETrainer_BS8",
        "citations": [{"type": "Pretraining Method", "name": "MAE", "apa_citations": ["Wald et al. (2025)"]}],
        "nnssl_adaptation_plan": {
            "architecture_plans": {
                "arch_class_name": "ResEncL",
                "arch_kwargs": None,
                "arch_kwargs_requiring_import": None,
            },
            "pretrain_plan": {"configurations": {"onemmiso": configuration}},
            "pretrain_num_input_channels": 1,
            "recommended_downstream_patchsize": [160, 160, 160],
            "key_to_encoder": "encoder.stages",
            "key_to_stem": "encoder.stem",
            "keys_to_in_proj": ["encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"],
            "key_to_lpe": None,
            **plan,
        },
    }


def primus_checkpoint() -> dict[str, Any]:
    """A checkpoint of nnssl's transformer."""
    weights = {"down_projection.proj.weight": torch.randn(8, 1, 8, 8, 8), "eva.blocks.0.norm1.weight": torch.randn(8)}
    architecture = {"arch_class_name": "PrimusM", "arch_kwargs": None, "arch_kwargs_requiring_import": None}
    keys = {"key_to_encoder": "eva", "key_to_stem": "down_projection", "key_to_lpe": "eva.pos_embed"}
    projection = ["down_projection.proj"]
    return nnssl_checkpoint(weights, architecture_plans=architecture, keys_to_in_proj=projection, **keys)
