"""The range of intensities that Models Genesis takes for [0, 1]."""

import math

import torch

# Percentiles, those between which nnU-Net clips CT: single bright voxels must not squeeze all others together
LOWER, UPPER = 0.005, 0.995
# At most about so many voxels of a channel are looked at (ours)
NUM_VOXELS = 2**14


def percentiles(volume: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the 0.5 % and 99.5 % percentiles of each channel of a volume [C, D, H, W], float [C, 1, 1, 1] each.

    They are estimated from every n-th voxel of the flattened channel. A channel in which both are the same, nearly all
    air, has its least and largest value instead.
    """
    flat = volume.flatten(1)
    step = max(1, flat.shape[1] // NUM_VOXELS)
    while math.gcd(step, flat.shape[1]) > 1:  # so as not to fall into step with the rows
        step += 1
    ends = torch.quantile(flat[:, ::step].float(), flat.new_tensor([LOWER, UPPER], dtype=torch.float32), dim=1)
    low, high = ends.to(volume.dtype)
    sparse = high <= low
    low, high = torch.where(sparse, flat.amin(1), low), torch.where(sparse, flat.amax(1), high)
    return low[:, None, None, None], high[:, None, None, None]
