"""Non-linear intensity: grey values mapped by a random Bézier curve (Models Genesis, section 3.1).

The curve is cubic, from (0, 0) to (1, 1) with two inner control points uniform in the unit square. Such a curve rises
everywhere, so it is a function of intensity; half of the time it is taken backwards in y, and inverts the image.
"""

import torch

# Points at which the curve is evaluated, and entries of the table that it becomes: finer than 12-bit grey values (ours)
NUM_POINTS = 1000
NUM_ENTRIES = 4096
# How often the curve inverts (published)
INVERTED = 0.5


def draw_curve(generator: torch.Generator | None = None) -> torch.Tensor:
    """Returns a random curve as a table, float32 [NUM_ENTRIES]: entry i is the value that i / (NUM_ENTRIES - 1) takes.

    Args:
        generator: On the CPU; None uses PyTorch's global one.
    """
    inner = torch.rand((2, 2), generator=generator)
    inverted = torch.rand((), generator=generator) < INVERTED
    t = torch.linspace(0, 1, NUM_POINTS)
    x, y = (3 * (1 - t) ** 2 * t * first + 3 * (1 - t) * t**2 * second + t**3 for first, second in inner)
    return interpolate_at(torch.linspace(0, 1, NUM_ENTRIES), x, y.flip(0) if inverted else y)


def interpolate_at(positions: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Returns y at `positions` in 0..1, linear between the points (x, y); x [N] rises from 0 to 1."""
    after = torch.searchsorted(x, positions).clamp(1, len(x) - 1)
    width = (x[after] - x[after - 1]).clamp(min=torch.finfo(x.dtype).tiny)
    return torch.lerp(y[after - 1], y[after], ((positions - x[after - 1]) / width).clamp(0, 1))


def apply_curve(volume: torch.Tensor, curve: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Returns the volume with `low`..`high` mapped on itself by a curve; values beyond are taken for the ends.

    Args:
        volume: float [C, D, H, W].
        curve: float [N], on any device: the nearest of its entries is taken.
        low: float [C, 1, 1, 1], what counts as 0.
        high: float [C, 1, 1, 1], what counts as 1.
    """
    last = len(curve) - 1
    exact = torch.promote_types(volume.dtype, torch.float32)  # half precision cannot count to `last`
    width = (high - low).to(exact).clamp(min=torch.finfo(exact).tiny * len(curve))  # so that last / width is finite
    entries = ((volume - low).to(exact) * (last / width)).round_()
    curve = curve.to(volume.device, volume.dtype)
    mapped = curve.index_select(0, entries.nan_to_num_(nan=0.0).clamp_(0, last).int().flatten()).reshape(volume.shape)
    return mapped.mul_(high - low).add_(low)
