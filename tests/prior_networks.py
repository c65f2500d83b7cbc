"""Networks with context priors that the tests share, all tiny."""

from typing import Any

import torch
from torch import Tensor
from toy import toy_architecture

from nnunetv2_misfm.architectures.context_prior import Context, ContextPriorNetwork, Sample

NUM_TASKS, NUM_MODALITIES = 7, 3


def unet_entry(num_stages: int = 5, residual: bool = True) -> dict[str, Any]:
    """A network as a checkpoint of ours describes it."""
    entry = toy_architecture(num_stages, residual)
    return {
        "class": entry["network_class_name"],
        "kwargs": entry["arch_kwargs"],
        "kwargs_to_import": entry["_kw_requires_import"],
    }


def pct_entry() -> dict[str, Any]:
    """The same for PCT-Net, without dropout."""
    return {
        "class": "nnunetv2_misfm.architectures.pct_net.PCTNet",
        "kwargs": {
            "features_per_stage": [4, 8, 8, 16, 32], "num_heads": [2, 2, 4], "dropout_per_stage": [0.0] * 5,
            "attention_dropout": 0.0, "drop_path": 0.0,
        },
        "kwargs_to_import": [],
    }  # fmt: skip


NETWORKS = {"PlainConvUNet": unet_entry(residual=False), "ResidualEncoderUNet": unet_entry(), "PCTNet": pct_entry()}


def prior_network(
    network: dict[str, Any] | None = None, num_tasks: int = NUM_TASKS, num_modalities: int = NUM_MODALITIES
) -> ContextPriorNetwork:
    """Seeded; with tokens large enough to be felt, since a new network's are small."""
    torch.manual_seed(0)
    net = ContextPriorNetwork(1, num_tasks, num_modalities=num_modalities, network=network or unet_entry())
    with torch.no_grad():
        for fusion in net.fusions.values():
            fusion.task_tokens.normal_()
            fusion.modality_tokens.normal_()
    return net


def sample(
    tasks: list[list[int]], present: list[list[bool]], modality: list[int], *, size: tuple[int, int, int] = (32, 32, 32)
) -> Sample:
    """The same images for the same number of samples."""
    generator = torch.Generator().manual_seed(1)
    images = torch.stack([torch.randn(1, *size, generator=generator) for _ in tasks])
    return Sample(images, Context(torch.tensor(tasks), torch.tensor(present), torch.tensor(modality)))


def doubled(batch: Sample) -> Sample:
    """In double precision."""
    return batch._replace(image=batch.image.double())


def relative(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()
