"""Local shuffling: the voxels of small blocks change places within their block (Models Genesis, section 3.2).

The published procedure permutes 10,000 boxes one after the other, each read from the original volume. Here the blocks
tile the volume, with edges of the same distribution, and a share of them is permuted: every block keeps its histogram
exactly, and all blocks are moved at once. Axes below 20 voxels are not shuffled along, as published.
"""

import math

import torch

# Largest edge of a block: a tenth of the axis, at least one voxel (Models Genesis' published configuration)
EDGES_PER_AXIS = 10
# Permutations drawn per number of voxels in a block, of which blocks of that number pick one: many for small blocks,
# which are the most and of which the identity takes its share (ours)
NUM_PERMUTATIONS, NUM_OF_SMALL, SMALL = 2, 16, 64
# Up to here float32 tells all multiples of 0.5 apart
LARGEST_FLOAT32 = 2**23


def draw_edges(size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Returns the edges of the blocks along an axis, int64 [blocks], that add up to `size` voxels.

    Edges are uniform in 1..a tenth of the axis; the last one is cut where the axis ends.
    """
    largest = max(1, size // EDGES_PER_AXIS)
    ends = torch.randint(1, largest + 1, (size,), generator=generator).cumsum(0).clamp(max=size)
    edges = torch.diff(ends, prepend=ends.new_zeros(1))
    return edges[edges > 0]


def shuffle_locally(volume: torch.Tensor, share: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Returns the volume with the voxels of some blocks permuted within their block; channels move together.

    Args:
        volume: [C, D, H, W], on any device.
        share: Share (0..1) of the blocks that are permuted, each drawn by itself.
        generator: On the CPU (the same blocks and permutations on any device); None uses PyTorch's global one.
    """
    source = draw_source(tuple(volume.shape[1:]), share, generator, volume.device)
    return volume.flatten(1).index_select(1, source).reshape(volume.shape)


def draw_source(
    shape: tuple[int, ...],
    share: float,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Returns for each voxel the flat index of the one that takes its place, int32 [D * H * W].

    Within a block of n voxels a voxel's number is looked up in a permutation of 0..n-1, and the number found is turned
    into a place in the block again. That is done in floating point, which is several times faster than dividing whole
    numbers; the numbers carry + 0.5, so that rounding down is exact.
    """
    edges = [draw_edges(size, generator) for size in shape]
    numbers = edges[0][:, None, None] * edges[1][:, None] * edges[2]  # voxels of each block
    permutations, starts = _draw_permutations(numbers, generator)
    drawn, picked = torch.rand((2, *numbers.shape), generator=generator, dtype=torch.float64)
    variants = (picked * torch.where(numbers <= SMALL, NUM_OF_SMALL, NUM_PERMUTATIONS)).long()
    starts = torch.where(drawn < share, starts[numbers] + variants * numbers, 0)  # 0: the identity
    dtype = torch.float32 if math.prod(shape) <= LARGEST_FLOAT32 else torch.float64
    (first_z, _, block_z), (first_y, edge_y, block_y), (first_x, edge_x, block_x) = (
        tuple(values.to(device) for values in _per_voxel(e, dtype)) for e in edges
    )
    z, y, x = (torch.arange(size, dtype=dtype, device=device) for size in shape)
    plane = edge_y[:, None] * edge_x
    number = plane * (z - first_z)[:, None, None] + ((y - first_y)[:, None] * edge_x + (x - first_x))
    number += starts.to(device, dtype).index_select(0, block_z).index_select(1, block_y).index_select(2, block_x)
    found = permutations.to(device, dtype).add_(0.5).index_select(0, number.int().flatten()).reshape(shape)
    down = (found * (1 / plane)).floor_()
    found.addcmul_(down, plane, value=-1)
    back = (found * (1 / edge_x)).floor_()
    found.addcmul_(back, edge_x, value=-1)  # now across + 0.5
    _, height, width = shape
    found.add_(down.add_(first_z[:, None, None]), alpha=height * width)
    found.add_(back.add_(first_y[:, None]), alpha=width)
    return found.add_(first_x).int().flatten()


def _per_voxel(edges: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns first voxel, edge and number (int64) of the block to which each voxel of an axis belongs, [size] each."""
    ends = edges.cumsum(0)
    block = torch.bucketize(torch.arange(int(ends[-1])), ends, right=True)
    return (ends - edges)[block].to(dtype), edges[block].to(dtype), block


def _draw_permutations(numbers: torch.Tensor, generator: torch.Generator | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns permutations one behind the other, int64, and where those of n voxels start, int64 [largest n + 1].

    The first stretch, from 0 on, is the identity.
    """
    largest = int(numbers.max())
    parts, starts, end = [torch.arange(largest)], torch.zeros(largest + 1, dtype=torch.int64), largest
    for number in numbers.unique().tolist():
        starts[number] = end
        variants = NUM_OF_SMALL if number <= SMALL else NUM_PERMUTATIONS
        parts += [torch.randperm(number, generator=generator) for _ in range(variants)]
        end += variants * number
    return torch.cat(parts), starts
