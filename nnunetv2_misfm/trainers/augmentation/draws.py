"""Random numbers of the augmentations: always from one generator on the CPU, so that every device gets the same.

Numbers are drawn for all samples and channels, used or not, so a call takes the same amount from its generator
whatever is chosen.
"""

import torch
from torch import Tensor


def draw_chosen(probability: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns bool of a shape on the CPU, each true with a probability."""
    return torch.rand(shape, generator=generator, dtype=torch.float64) < probability


def draw_uniform(bounds: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns float64 of a shape on the CPU, each uniform in [low, high)."""
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def draw_two_sided(bounds: tuple[float, float], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Returns float64 of a shape on the CPU: each uniform in [low, 1) or, as likely, in [1, high).

    Bounds that lie above 1 leave one side: uniform in [low, high), as in nnU-Net's `BGContrast`.
    """
    low, high = bounds
    lower = draw_chosen(0.5 if low < 1 else 0.0, shape, generator)
    share = torch.rand(shape, generator=generator, dtype=torch.float64)
    start = max(low, 1.0)
    return torch.where(lower, low + (1 - low) * share, start + (high - start) * share)
