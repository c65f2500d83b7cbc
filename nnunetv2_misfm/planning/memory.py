"""How much memory a training step takes, found by running the step without data.

The network, nnU-Net's loss and the backward pass run on tensors that have shapes and types but no content
(PyTorch's FakeTensorMode), while every storage that comes alive is counted until it dies. So nothing here is fitted to
a network: saved activations, gradients, temporaries of the backward pass and whatever a network recomputes instead of
storing are seen as they are.

What it stands for, and what it does not see:

- The fake tensors are those of a CPU, so a network with separate kernels for CPU and GPU is taken by its CPU ones, and
  half precision is PyTorch's autocast on the CPU, which casts convolutions and matrix products as the one on CUDA
  does and differs in a few cheap layers (LayerNorm stays in half precision).
- Memory inside a kernel: the workspace of cuDNN, the reordered copies of oneDNN. Nor the CUDA context, the
  fragmentation of an allocator, or what `torch.compile` saves. A planner leaves room for them.

`benchmarks/memory.py` compares the estimate with what is measured.

Shape letters: B batch, C channels, D H W voxels in array order.
"""

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunetv2_misfm import architectures

Precision = Literal["float32", "float16", "bfloat16"]
Optimizer = Literal["sgd", "adam", "adamw"]

# Tensors of the size of the parameters that PyTorch's optimisers keep: momentum; first and second moment
OPTIMIZER_STATES: dict[Optimizer, int] = {"sgd": 1, "adam": 2, "adamw": 2}


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages that operations put out while it is active, until they are freed.

    Attributes:
        live: Bytes alive now.
        peak: The most bytes alive at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts the storages it brings."""
        result = operation(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        # A storage has one Python object as long as it lives, so its identity tells it from others
        if id(storage) in self._sizes:
            return
        self._sizes[id(storage)] = storage.nbytes()
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._discount, id(storage)).atexit = False

    def _discount(self, identity: int) -> None:
        self.live -= self._sizes.pop(identity)


def training_memory(
    build_network: Callable[[], nn.Module],
    input_channels: int,
    patch_size: Sequence[int],
    batch_size: int,
    *,
    precision: Precision = "float16",
    optimizer: Optimizer = "adam",
) -> int:
    """Returns the peak memory of a training step, in bytes.

    Args:
        build_network: Makes the network; called with PyTorch's "meta" device as the default one.
        input_channels: Channels of the image.
        patch_size: Voxels per axis (D, H, W).
        batch_size: B.
        precision: "float32", or the type of autocast; weights, gradients and optimiser stay in float32.
        optimizer: Whose state is held beside the weights.
    """
    with torch.device("meta"):
        network = build_network()
    network.train()
    with _without_cached_tensors(), FakeTensorMode(), LiveStorages() as storages:
        state = {name: torch.empty(p.shape, requires_grad=True) for name, p in network.named_parameters()}
        state |= {name: torch.empty(b.shape, dtype=b.dtype) for name, b in network.named_buffers()}
        images = torch.empty(batch_size, input_channels, *patch_size)
        training_step(lambda x: functional_call(network, state, x), images, precision)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    return storages.peak + OPTIMIZER_STATES[optimizer] * weights


def training_step(network: Callable[[Tensor], Tensor | list[Tensor]], images: Tensor, precision: Precision) -> None:
    """Runs forward pass, nnU-Net's loss and backward pass as nnU-Net's trainer does; the gradients stay.

    Args:
        network: Returns logits (B, classes, D, H, W), or a list of them under deep supervision.
        images: (B, C, D, H, W), float32.
        precision: "float32", or the type of autocast.
    """
    half = precision != "float32"
    dtype = getattr(torch, precision) if half else None
    with torch.autocast(images.device.type, dtype=dtype, enabled=half):
        outputs = network(images)
        outputs = outputs if isinstance(outputs, list | tuple) else [outputs]
        # nnU-Net's labels are int16
        targets = [torch.zeros_like(logits[:, :1], dtype=torch.int16) for logits in outputs]
        loss = _nnunet_loss(len(outputs))(outputs, targets)
    loss.backward()


def _nnunet_loss(num_outputs: int) -> nn.Module:
    """nnU-Net's loss for labels (nnUNetTrainer._build_loss); every output takes part, as in our trainers."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    return DeepSupervisionWrapper(loss, [1 / num_outputs] * num_outputs)


@contextlib.contextmanager
def _without_cached_tensors() -> Iterator[None]:
    """Empties the function caches of our networks' modules, so that no fake tensor meets a real run or the reverse."""

    def clear() -> None:
        for name in [name for name in sys.modules if name.startswith(architectures.__name__)]:
            for value in list(vars(sys.modules[name]).values()):
                if hasattr(value, "cache_clear"):
                    value.cache_clear()

    clear()
    try:
        yield
    finally:
        clear()
