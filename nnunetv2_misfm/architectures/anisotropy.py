"""How the levels of a network follow nnU-Net's strides: sizes of their grids and of their kernels.

Shape letters: D H W voxels in array order. Level l is the l-th resolution, 0 the finest.
"""

import math
from collections.abc import Sequence

Size3 = tuple[int, int, int]
# Levels of PCT-Net and of FMUNet (released code)
NUM_LEVELS = 5


def as_size3(values: Sequence[int]) -> Size3:
    """Three integers as a tuple.

    Raises:
        ValueError: there are not three.
    """
    if len(values) != 3:
        raise ValueError(f"the network is 3D: expected three values (D, H, W), got {tuple(values)}.")
    return values[0], values[1], values[2]


def grid_sizes(input_size: Sequence[int], strides: Sequence[Sequence[int]]) -> list[Size3]:
    """The grid of each level for an input of any size.

    Args:
        input_size: voxels per axis (D, H, W).
        strides: nnU-Net's strides, a triple per level, the first (1, 1, 1).

    Returns:
        A triple per level: the level before divided by the stride and rounded up. All but the last are the
        sizes of the outputs under deep supervision.
    """
    grid = as_size3(input_size)
    grids = []
    for stride in strides:
        grid = as_size3([(size + step - 1) // step for size, step in zip(grid, stride, strict=True)])
        grids.append(grid)
    return grids


def kernel_sizes(strides: Sequence[Sequence[int]]) -> list[Size3]:
    """The convolution kernel of each level: 3, but 1 along an axis that is not pooled up to the next level.

    The deepest level has no next one and goes by the pools that lead to it. The three resolution modes of the code
    released with MIS-FM, for PCT-Net (net/pct_net.py) and FMUNet alike.
    """
    passed = [strides[1 : level + 2] for level in range(len(strides))]
    return [as_size3([3 if math.prod(axis) > 1 else 1 for axis in zip(*pools, strict=True)]) for pools in passed]
