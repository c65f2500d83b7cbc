"""Which half precision a run computes in.

nnU-Net opens `autocast(device_type)` without a dtype, on CUDA only, and so takes PyTorch's default, float16. bfloat16
has float32's range (no overflow, no need of a scaled loss) with fewer digits; NVIDIA's GPUs compute in it from compute
capability 8.0 on, older ones at most emulate it.
"""

from typing import Literal

import torch

from nnunetv2_misfm.errors import MisfmError

Precision = Literal["auto", "float16", "bfloat16"]


def autocast_dtype(choice: Precision, device: torch.device) -> torch.dtype | None:
    """Returns the dtype that autocast shall use on a device; None where nnU-Net does not autocast (all but CUDA).

    Args:
        choice: `auto` is bfloat16 where the device computes in it and float16 elsewhere.
        device: Where the network is; without an index, the current CUDA device.

    Raises:
        MisfmError: bfloat16 is asked of a CUDA device that does not compute in it.
    """
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):  # the question below is about the current device
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if choice == "bfloat16" and not has_bfloat16:
        raise MisfmError(
            f"expected a GPU that computes in bfloat16 (NVIDIA: compute capability 8.0 or higher), got {device} "
            "without it; choose the precision auto or float16."
        )
    return torch.bfloat16 if has_bfloat16 and choice != "float16" else torch.float16


def use_autocast_dtype(dtype: torch.dtype) -> None:
    """Makes a dtype the default of CUDA's autocast, which nnU-Net's own steps and prediction then use.

    PyTorch keeps this default per thread: call it in the thread that trains.

    Args:
        dtype: `torch.float16` (PyTorch's own default) or `torch.bfloat16`.
    """
    torch.set_autocast_dtype("cuda", dtype)
