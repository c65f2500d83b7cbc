"""In- and out-painting: boxes replaced by noise, or all but boxes (Models Genesis, sections 3.3 and 3.4).

Sizes are the published ones; where a patch is too thin for them (an axis below 14 voxels), an edge is at least one
voxel and the margin to the border what is left.
"""

import torch

Box = tuple[slice, ...]

# At most so many boxes, each further one with this probability (published)
MOST_BOXES = 5
FURTHER_BOX = 0.95
# Voxels between a box and the border (published)
MARGIN = 3


def draw_inpainting_boxes(shape: tuple[int, ...], generator: torch.Generator | None = None) -> list[Box]:
    """Returns 0 to 5 boxes (half-open slices) with edges of a sixth to a third of each axis of `shape` (D, H, W)."""
    return [
        tuple(_draw_interval(size, max(1, size // 6), max(1, size // 3), generator) for size in shape)
        for _ in range(_draw_number(0, generator))
    ]


def draw_outpainting_boxes(shape: tuple[int, ...], generator: torch.Generator | None = None) -> list[Box]:
    """Returns 1 to 5 boxes (half-open slices) with edges of three to four sevenths of each axis of `shape`."""
    return [
        tuple(_draw_interval(size, size - 4 * size // 7, size - 3 * size // 7, generator) for size in shape)
        for _ in range(_draw_number(1, generator))
    ]


def _draw_number(least: int, generator: torch.Generator | None) -> int:
    """Returns how many boxes there are: `least`, and others until a draw fails."""
    draws = (torch.rand(MOST_BOXES - least, generator=generator) < FURTHER_BOX).int()
    return least + int(draws.cumprod(0).sum())


def _draw_interval(size: int, shortest: int, longest: int, generator: torch.Generator | None) -> slice:
    edge = int(torch.randint(shortest, longest + 1, (), generator=generator))
    margin = min(MARGIN, (size - edge) // 2)
    start = int(torch.randint(margin, size - edge - margin + 1, (), generator=generator))
    return slice(start, start + edge)


def paint_in(
    volume: torch.Tensor, low: torch.Tensor, high: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Returns the volume with noise in some boxes.

    Args:
        volume: float [C, D, H, W], on any device.
        low: float [C, 1, 1, 1], least value of the noise.
        high: float [C, 1, 1, 1], largest value of the noise.
        generator: On the CPU; None uses PyTorch's global one.
    """
    painted = volume.clone()
    noise = _draw_noise(volume, low, high, generator)
    for box in draw_inpainting_boxes(tuple(volume.shape[1:]), generator):
        in_all_channels = (slice(None), *box)
        painted[in_all_channels] = noise[in_all_channels]
    return painted


def paint_out(
    volume: torch.Tensor, low: torch.Tensor, high: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Returns noise with the volume in some boxes; the arguments are those of `paint_in`."""
    painted = _draw_noise(volume, low, high, generator)
    for box in draw_outpainting_boxes(tuple(volume.shape[1:]), generator):
        in_all_channels = (slice(None), *box)
        painted[in_all_channels] = volume[in_all_channels]
    return painted


def _draw_noise(
    volume: torch.Tensor, low: torch.Tensor, high: torch.Tensor, generator: torch.Generator | None
) -> torch.Tensor:
    """Returns noise uniform between `low` and `high`, the same in every channel but for its range."""
    seed = int(torch.randint(2**62, (), generator=generator))
    on_device = torch.Generator(volume.device).manual_seed(seed)
    noise = torch.rand(volume.shape[1:], generator=on_device, device=volume.device, dtype=volume.dtype)
    return torch.lerp(low, high, noise)
