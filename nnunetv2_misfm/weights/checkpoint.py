"""Checkpoint files: written whole or not at all, and read without running anything that they contain."""

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnunetv2_misfm.errors import MisfmError

# What a stock nnU-Net 2.8 checkpoint holds beside tensors and plain data: numbers of NumPy type (`_best_ema`, the
# logged curves). Reading them runs no code of the file's choosing. NumPy 1 and 2 write the rebuilding function under
# different names.
_REBUILD_SCALAR = np.float32(0).__reduce__()[0]
_NUMPY_SCALARS: list[Any] = [
    (_REBUILD_SCALAR, "numpy.core.multiarray.scalar"),
    (_REBUILD_SCALAR, "numpy._core.multiarray.scalar"),
    np.dtype,
    *{type(np.dtype(code)) for code in "?efd" + np.typecodes["AllInteger"]},
]
# How PyTorch (2.15) names what its safe loader refuses, at the end of a page of advice; else the general sentence
_REFUSED = re.compile(r"GLOBAL ([\w.]*\w)")
# What DDP and torch.compile put before a parameter's name, in either order
_WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


def plain(value: Any) -> Any:
    """Returns the same data in fresh dicts, lists and tuples, NumPy scalars and arrays as Python numbers and lists.

    Tensors, strings and other leaves are handed on as they are.
    """
    if isinstance(value, Mapping):
        return {plain(k): plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    if isinstance(value, tuple):
        return tuple(plain(v) for v in value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value


def write_checkpoint(checkpoint: Mapping[str, Any], path: str | Path, former: Sequence[Path] = ()) -> None:
    """Writes a checkpoint that `torch.load(..., weights_only=True)` can read, atomically.

    The data go to a temporary file in the same folder, reach the disk (fsync), are read back, and only then take the
    name `path`; whatever interrupts this leaves the former file as it was.

    Args:
        checkpoint: Tensors and plain data.
        path: The file.
        former: Where to keep the files that stood at `path` before, the newest first, in the same folder.

    Raises:
        MisfmError: The file could not be written (a full disk, say) or holds what `read_checkpoint` refuses; the
            former file is intact.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(plain(checkpoint), file)
            file.flush()
            os.fsync(file.fileno())
        read_checkpoint(temporary)
        _keep(path, former)
        os.replace(temporary, path)
    except (OSError, RuntimeError, MisfmError) as error:  # PyTorch's archive reports a failed write as RuntimeError
        raise_death_of_worker(error)
        raise MisfmError(f"{path} could not be written ({error}); the former checkpoint, if any, is intact.") from error
    finally:
        temporary.unlink(missing_ok=True)


def _keep(path: Path, former: Sequence[Path]) -> None:
    """Moves each of the former files one place back, and gives the file at `path` the first place as a second name."""
    if not former or not path.is_file():
        return
    second_name = former[0].with_name(former[0].name + ".tmp")
    second_name.unlink(missing_ok=True)
    try:
        try:
            os.link(path, second_name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, second_name)
        for newer, older in reversed(list(pairwise(former))):
            if newer.is_file():
                os.replace(newer, older)
        os.replace(second_name, former[0])
    finally:
        second_name.unlink(missing_ok=True)  # there still where both are names of one file: renaming does nothing then


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Returns the dictionary in a checkpoint file, its tensors on the CPU and mapped from the file.

    Only tensors, plain data and NumPy numbers are accepted: nothing in the file is executed.

    Raises:
        MisfmError: No such file, a truncated or foreign one, or one that holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise MisfmError(f"expected a checkpoint file at {path}, found none; check the path.")
    try:
        can_be_mapped = _is_zip(path)
    except OSError as error:
        raise MisfmError(f"{path} could not be read ({error.strerror}); check disk and permissions.") from error
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except Exception as error:  # PyTorch's readers raise a dozen types of error on bytes that are no checkpoint
        raise_death_of_worker(error)
        if refused := _REFUSED.search(str(error)):
            raise MisfmError(
                f"{path}: expected tensors and plain data alone, got {refused[1]}, so the file is not read and nothing "
                "in it was run; use a checkpoint that nnU-Net or this package wrote, or save the state dict alone."
            ) from error
        raise MisfmError(
            f"{path} is truncated or no PyTorch checkpoint: its {path.stat().st_size} bytes cannot be read as one "
            f"({type(error).__name__}); use another copy or write it again."
        ) from error
    if not isinstance(checkpoint, dict):
        raise MisfmError(f"{path}: expected a checkpoint dictionary, got {type(checkpoint).__name__}.")
    return checkpoint


def raise_death_of_worker(error: Exception) -> None:
    """Raises what PyTorch says of a dead data worker, wherever the main thread is: it is no fault of a file."""
    if str(error).startswith("DataLoader worker"):
        raise error


def _is_zip(path: Path) -> bool:
    """Whether the file is in PyTorch's present container, the only one that can be mapped into memory."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\x03\x04"


def network_weights(checkpoint: Mapping[str, Any], path: str | Path) -> dict[str, torch.Tensor]:
    """Returns the state dict in an nnU-Net checkpoint, without the prefixes of DDP and torch.compile.

    Raises:
        MisfmError: The checkpoint has no `network_weights`, or they are empty or not all tensors.
    """
    weights = checkpoint.get("network_weights")
    if not isinstance(weights, Mapping) or not weights or not all(torch.is_tensor(v) for v in weights.values()):
        keys = ", ".join(map(str, list(checkpoint)[:8])) or "none"
        raise MisfmError(
            f"{path}: expected an nnU-Net checkpoint with tensors under 'network_weights', got the keys {keys}; "
            "pass the checkpoint_final.pth of a training."
        )
    return without_wrappers(weights)


def without_wrappers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns a state dict without the prefixes that DDP, DataParallel and torch.compile put before names."""
    return {_WRAPPERS.sub("", str(name)): tensor for name, tensor in weights.items()}


def file_sha256(path: str | Path) -> str:
    """Returns the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """Returns the SHA-256 over names, shapes and bytes of tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
