"""Models Genesis' corruption of one volume as it was published, on the CPU in NumPy: the procedure to be faster than.

Written anew from the paper (Zhou et al., arXiv:2004.07882) and the published numbers: 10,000 boxes shuffled one after
the other, a curve of 100,000 points, boxes of noise.
"""

import random

import numpy as np
from numpy.typing import NDArray

Volume = NDArray[np.float32]


def shuffle_locally(volume: Volume, num_boxes: int = 10_000) -> Volume:
    """Returns a volume [D, H, W] in which boxes of the original, up to a tenth of each axis, were permuted."""
    shuffled = volume.copy()
    for _ in range(num_boxes):
        edges = [random.randint(1, size // 10) for size in volume.shape]
        starts = [random.randint(0, size - edge) for size, edge in zip(volume.shape, edges, strict=True)]
        box = tuple(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))
        voxels = volume[box].flatten()
        np.random.shuffle(voxels)
        shuffled[box] = voxels.reshape(edges)
    return shuffled


def map_intensity(volume: Volume, num_points: int = 100_000) -> Volume:
    """Returns a volume in [0, 1] with its intensities mapped by a random cubic Bézier curve."""
    points = np.array([(0, 0), np.random.rand(2), np.random.rand(2), (1, 1)])
    t = np.linspace(0, 1, num_points)
    weights = np.stack([(1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3])
    x, y = points.T @ weights
    y = y[::-1] if random.random() < 0.5 else np.sort(y)
    return np.interp(volume, np.sort(x), y).astype(volume.dtype)


def paint(volume: Volume) -> Volume:
    """Returns a volume in [0, 1] with noise in up to five boxes (0.2) or everywhere but in up to five (0.8)."""
    inwards = random.random() < 0.2
    painted = volume.copy() if inwards else np.random.rand(*volume.shape).astype(volume.dtype)
    for number in range(5):
        if (inwards or number > 0) and random.random() >= 0.95:
            break
        if inwards:
            edges = [random.randint(size // 6, size // 3) for size in volume.shape]
        else:
            edges = [size - random.randint(3 * size // 7, 4 * size // 7) for size in volume.shape]
        starts = [random.randint(3, size - edge - 3) for size, edge in zip(volume.shape, edges, strict=True)]
        box = tuple(slice(start, start + edge) for start, edge in zip(starts, edges, strict=True))
        painted[box] = np.random.rand(*edges) if inwards else volume[box]
    return painted


def corrupt(volume: Volume) -> Volume:
    """Returns a volume [D, H, W] in [0, 1] corrupted with the published probabilities."""
    if random.random() < 0.5:
        volume = shuffle_locally(volume)
    if random.random() < 0.9:
        volume = map_intensity(volume)
    if random.random() < 0.9:
        volume = paint(volume)
    return volume
