"""How much memory a training step takes, found by running the step without data.

The network, nnU-Net's loss and the backward pass run on tensors that have shapes and types but no content, while every
storage is counted from the operation that makes it until it dies. So nothing here is fitted to a network: saved
activations, gradients, temporaries of the backward pass, and whatever a network makes anew instead of storing it are
seen as they are.

For the CPU the tensors are PyTorch's fake tensors, which take a network's CPU kernels and its real autocast. For a GPU,
which need not be there, they lie on the "meta" device: a network takes what it does off the CPU, its attention counts
as a fused kernel (queries, keys, values, bias, output and one number per query are kept), and half precision is a half
precision network beside float32 weights, with a float32 loss. CUDA's autocast differs from that in LayerNorm, which it
computes in float32.

What is not seen: memory inside a kernel (the workspace of cuDNN, reordered copies of oneDNN), the CUDA context, the
fragmentation of an allocator, and what `torch.compile` saves. A planner leaves room for them. `benchmarks/memory.py`
compares the estimate with what is measured.

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
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nnunetv2_misfm import architectures

Device = Literal["cuda", "cpu"]
Precision = Literal["float32", "float16", "bfloat16"]
Optimizer = Literal["sgd", "adam", "adamw"]
Network = Callable[[Tensor], Tensor | Sequence[Tensor]]

# Tensors of the size of the parameters that PyTorch's optimisers keep: momentum; first and second moment
OPTIMIZER_STATES: dict[Optimizer, int] = {"sgd": 1, "adam": 2, "adamw": 2}


def training_memory(
    build_network: Callable[[], nn.Module],
    input_channels: int,
    patch_size: Sequence[int],
    batch_size: int,
    *,
    device: Device = "cuda",
    precision: Precision = "float16",
    optimizer: Optimizer = "adam",
) -> int:
    """Returns the peak memory of a training step, in bytes.

    Args:
        build_network: Makes the network; called with PyTorch's "meta" device as the default one.
        input_channels: Channels of the image.
        patch_size: Voxels per axis (D, H, W).
        batch_size: B.
        device: Where the step runs; a GPU is estimated on any machine.
        precision: "float32", or the type of autocast; weights, gradients and optimiser stay in float32.
        optimizer: Whose state is held beside the weights.
    """
    with torch.device("meta"):
        network = build_network().train()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    trace = _trace_cpu if device == "cpu" else _trace_gpu
    with _without_cached_tensors():
        peak = trace(network, (batch_size, input_channels, *patch_size), precision)
    return peak + (1 + OPTIMIZER_STATES[optimizer]) * weights


def training_step(network: Network, images: Tensor, precision: Precision) -> None:
    """Runs forward pass, nnU-Net's loss and backward pass as nnU-Net's trainer does; the gradients stay.

    Args:
        network: Returns logits (B, classes, D, H, W), or a list of them under deep supervision.
        images: (B, C, D, H, W), float32.
        precision: "float32", or the type of autocast.
    """
    half = precision != "float32"
    with torch.autocast(images.device.type, dtype=getattr(torch, precision) if half else None, enabled=half):
        outputs = _as_list(network(images))
        targets = empty_labels(outputs)
        loss = nnunet_loss(outputs, targets)
    loss.backward()


def empty_labels(outputs: list[Tensor]) -> list[Tensor]:
    """Returns background (B, 1, D, H, W), int16 as nnU-Net's labels are, for each head's logits."""
    return [torch.zeros_like(logits[:, :1], dtype=torch.int16) for logits in outputs]


def nnunet_loss(outputs: list[Tensor], targets: list[Tensor]) -> Tensor:
    """Returns nnU-Net's loss for labels (nnUNetTrainer._build_loss), of all heads alike."""
    dice = {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False}
    loss = DC_and_CE_loss(dice, {}, dice_class=MemoryEfficientSoftDiceLoss)
    return DeepSupervisionWrapper(loss, [1 / len(outputs)] * len(outputs))(outputs, targets)


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
        if operation is torch.ops.aten._local_scalar_dense.default:
            # A number is asked for where there is none: any will do
            return 1.0 if args[0].dtype.is_floating_point else 1
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


class _FusedAttention(torch.autograd.Function):
    """What PyTorch's memory-efficient attention on CUDA allocates and keeps; it computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, bias, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[3]:
            # The bias' gradient is first made for every sample, its rows filled up to a multiple of 16 (ATen's source)
            query = ctx.saved_tensors[0]
            query.new_empty(*query.shape[:-1], (query.shape[-2] + 15) // 16 * 16)
        inputs = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return tuple(torch.empty_like(tensor) if needed else None for tensor, needed in inputs)


class _WithFusedAttention(TorchFunctionMode):
    """Puts `_FusedAttention` where a network asks for PyTorch's attention, which has no fused kernel for "meta"."""

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3], kwargs.get("attn_mask"))
        return function(*args, **kwargs)


def _trace_cpu(network: nn.Module, shape: Sequence[int], precision: Precision) -> int:
    """Returns the peak of a step on the CPU, weights left out."""
    with FakeTensorMode():
        _replace_tensors(network)
        with LiveStorages() as storages:
            training_step(network, torch.empty(*shape), precision)
    return storages.peak


def _trace_gpu(network: nn.Module, shape: Sequence[int], precision: Precision) -> int:
    """Returns the peak of a step on a GPU, the float32 weights left out; the network's own become half ones."""
    dtype = getattr(torch, precision)
    with torch.device("meta"), _WithFusedAttention(), LiveStorages() as storages:
        network.to(dtype)
        images = torch.empty(*shape)
        outputs = _as_list(network(images.to(dtype)))
        targets = empty_labels(outputs)
        nnunet_loss([logits.float() for logits in outputs], targets).backward()
    # Autocast's gradients are float32, as the weights are
    missing = sum(parameter.numel() * (4 - parameter.element_size()) for parameter in network.parameters())
    return storages.peak + missing


def _as_list(outputs: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _replace_tensors(network: nn.Module) -> None:
    """Gives a network on the "meta" device tensors of the default one."""
    made: dict[Tensor, Tensor] = {}
    for module in network.modules():
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor not in made:
                new = torch.empty(tensor.shape, dtype=tensor.dtype)
                made[tensor] = nn.Parameter(new) if isinstance(tensor, nn.Parameter) else new
            setattr(module, name, made[tensor])


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
