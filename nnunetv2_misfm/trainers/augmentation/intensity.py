"""Noise, blur, brightness, contrast, low resolution and gamma, as nnU-Net's transforms do them.

The `draw_...` functions say which samples or channels change and by how much; the others change one of them in place
(hence the underscore), from numbers alone, so nothing waits for the device.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from nnunetv2_misfm.trainers.augmentation.distribution import Augmentation
from nnunetv2_misfm.trainers.augmentation.draws import draw_chosen, draw_two_sided, draw_uniform

# (sample, channel) of a batch
Place = tuple[int, int]
# blur_dimension of batchgeneratorsv2 cuts its Gaussian to about this many standard deviations in all
KERNEL_WIDTH = 6
# GammaTransform of batchgeneratorsv2: smallest range and standard deviation to divide by
SMALLEST_DIVISOR = 1e-7


def draw_noise(batch: int, augmentation: Augmentation, generator: torch.Generator) -> dict[int, float]:
    """Returns the noise's standard deviation for each sample that gets noise."""
    chosen = draw_chosen(augmentation.p_noise, (batch,), generator)
    sigmas = draw_uniform(augmentation.noise, (batch,), generator)
    return {i: float(sigmas[i]) for i in range(batch) if chosen[i]}


def draw_blur(
    size: tuple[int, int], augmentation: Augmentation, generator: torch.Generator
) -> dict[Place, tuple[float, ...]]:
    """Returns the standard deviation in voxels per axis for each channel to blur; `size` is (B, C)."""
    places = draw_places(size, augmentation.p_blur, augmentation.p_blur_per_channel, generator)
    sigmas = draw_uniform(augmentation.blur, (*size, 3), generator)
    return {place: tuple(sigmas[place].tolist()) for place in places}


def draw_low_resolution(
    size: tuple[int, int], augmentation: Augmentation, generator: torch.Generator
) -> dict[Place, float]:
    """Returns the coarse grid's size, as a share of the patch's, for each channel to coarsen; `size` is (B, C)."""
    places = draw_places(size, augmentation.p_low_resolution, augmentation.p_low_resolution_per_channel, generator)
    shares = draw_uniform(augmentation.low_resolution, size, generator)
    return {place: float(shares[place]) for place in places}


def draw_factors(
    size: tuple[int, int], probability: float, bounds: tuple[float, float], generator: torch.Generator
) -> dict[Place, float]:
    """Returns a two-sided number for every channel of the chosen samples (brightness, contrast, gamma)."""
    places = draw_places(size, probability, 1.0, generator)
    factors = draw_two_sided(bounds, size, generator)
    return {place: float(factors[place]) for place in places}


def draw_places(size: tuple[int, int], p_sample: float, p_channel: float, generator: torch.Generator) -> list[Place]:
    """Returns the channels chosen in a batch of `size` (B, C): first samples, then channels of these."""
    samples = draw_chosen(p_sample, size[:1], generator)
    channels = draw_chosen(p_channel, size, generator)
    return [(i, c) for i in range(size[0]) for c in range(size[1]) if samples[i] and channels[i, c]]


def add_noise_(sample: Tensor, sigma: float, generator: torch.Generator) -> None:
    """Adds independent Gaussian noise of a standard deviation; the generator is of the sample's device."""
    sample.add_(torch.empty_like(sample).normal_(0.0, sigma, generator=generator))


def blur_(channel: Tensor, sigmas: tuple[float, ...]) -> None:
    """Blurs [D, H, W] with a Gaussian, its standard deviation in voxels per axis; borders are reflected."""
    blurred = channel
    for axis, sigma in enumerate(sigmas):
        kernel = gaussian_kernel(sigma)
        reach = len(kernel) // 2
        widths = [0, 0] * (2 - axis) + [reach, reach] + [0, 0] * axis  # last axis first
        padded = pad(blurred[None], widths, mode="reflect")[0]
        blurred = padded.narrow(axis, 0, channel.shape[axis]) * kernel[0]
        for start, weight in enumerate(kernel[1:], start=1):
            blurred.add_(padded.narrow(axis, start, channel.shape[axis]), alpha=weight)
    channel.copy_(blurred)


def gaussian_kernel(sigma: float) -> list[float]:
    """Returns a Gaussian's weights, summing to 1; their number is the odd one nearest to 6 sigma + 0.5."""
    size = 2 * math.floor((KERNEL_WIDTH * sigma + 0.5) / 2) + 1
    weights = [math.exp(-0.5 * ((i - size // 2) / sigma) ** 2) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def change_brightness_(channel: Tensor, factor: float) -> None:
    """Multiplies the intensities of [D, H, W]."""
    channel.mul_(factor)


def change_contrast_(channel: Tensor, factor: float) -> None:
    """Multiplies the distance of [D, H, W] from its mean, and clips to the range it had."""
    mean = channel.mean()
    lowest, highest = torch.aminmax(channel)
    channel.sub_(mean).mul_(factor).add_(mean).clamp_(lowest, highest)


def lower_resolution_(channel: Tensor, share: float, in_plane: bool) -> None:
    """Takes [D, H, W] to a coarser grid (nearest voxel) and back (linear); in plane, D keeps its resolution."""
    size = list(channel.shape)
    coarse = [n if in_plane and axis == 0 else max(1, round(n * share)) for axis, n in enumerate(size)]
    small = interpolate(channel[None, None], coarse, mode="nearest-exact")
    channel.copy_(interpolate(small, size, mode="trilinear")[0, 0])


def change_gamma_(channel: Tensor, gamma: float, inverted: bool) -> None:
    """Raises [D, H, W], scaled to 0..1, to a power, and gives the result the mean and spread from before.

    Inverted, the negative is treated so. Mean, range and sign come in one last product and sum, and a power is taken by
    exp2 and log2, which a CPU does twice as fast.
    """
    lowest, highest = torch.aminmax(channel)
    width = highest - lowest
    mean = channel.mean()
    spread = _spread(channel - mean)
    channel.sub_(highest if inverted else lowest)
    divisor = width.clamp(min=SMALLEST_DIVISOR)
    channel.div_(-divisor if inverted else divisor)
    channel.log2_().mul_(gamma).exp2_()
    channel.sub_(channel.mean())
    factor = width * spread / (width * _spread(channel)).clamp(min=SMALLEST_DIVISOR)
    channel.mul_(-factor if inverted else factor).add_(mean)


def _spread(deviations: Tensor) -> Tensor:
    """Returns the standard deviation (n - 1) of what has a mean of 0."""
    return torch.linalg.vector_norm(deviations) / math.sqrt(deviations.numel() - 1)
