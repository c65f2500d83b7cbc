"""PCT-Net made to work as the released code does, for comparison of time and memory; the values stay the same.

Undone are: the cached masks (made anew in every forward pass of every layer, shifted or not), the attention without its
matrix (stored, with dropout as a module of its own), the cheap dropout, the branches that are not computed where they
are dropped, the function of norm and activation that stores one tensor, and the memory layout of the convolutions.
"""

from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.nn import functional

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.anisotropy import Size3
from nnunetv2_misfm.architectures.convolution import Convolution
from nnunetv2_misfm.architectures.drop_path import DropPath
from nnunetv2_misfm.architectures.dropout import Dropout
from nnunetv2_misfm.architectures.norm_act import NormAct
from nnunetv2_misfm.architectures.window_attention import WindowAttention, attention_mask, padded_grid


class ReferenceDropout(Dropout):
    """PyTorch's dropout on every device."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps a tensor to one of the same shape."""
        return functional.dropout(x, self.probability, self.training)


class ReferenceDropPath(DropPath):
    """Every branch computed for every sample."""

    def forward(self, x: Tensor, branch: Callable[[Tensor], Tensor], parts: Iterable[nn.Module] = ()) -> Tensor:
        """Maps (B, ...) to x + branch(x) of the same shape."""
        if not self.training:
            return x + branch(x)
        kept = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.probability)
        return x + branch(x) * (kept / (1 - self.probability))


class ReferenceNormAct(NormAct):
    """The two modules one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, D, H, W) to the same shape."""
        return self.act(self.norm(x))

    def convolve(self, x: Tensor, conv: nn.Conv3d | nn.ConvTranspose3d) -> Tensor:
        """Maps (B, C, D, H, W) to conv(self(x))."""
        return conv(self(x))


class ReferenceAttention(WindowAttention):
    """Attention whose matrix is stored for every step."""

    def forward(self, tokens: Tensor, window: Size3, shift: Size3) -> Tensor:
        """Attends as `WindowAttention` does, after making the mask that the released layer makes in every pass."""
        padded = padded_grid((tokens.shape[1], tokens.shape[2], tokens.shape[3]), window)
        half = self.window_size // 2
        attention_mask(padded, window, shift if any(shift) else (half, half, half), tokens.device)
        return super().forward(tokens, window, shift)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """Attention within windows: scores, bias, mask, softmax, dropout and product, one tensor each."""
        num_heads, tokens = bias.shape[0], query.shape[2]
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
        scores = scores.view(query.shape[0], -1, num_heads, tokens, tokens) + bias
        if mask is not None:
            scores = scores + mask[:, None]
        weights = functional.dropout(scores.softmax(-1), dropout)
        return weights.view(*query.shape[:3], tokens).to(value.dtype) @ value


REFERENCES: dict[type[nn.Module], type[nn.Module]] = {
    Dropout: ReferenceDropout,
    DropPath: ReferenceDropPath,
    NormAct: ReferenceNormAct,
    WindowAttention: ReferenceAttention,
    Convolution: nn.Conv3d,
}


def reference_pct_net(network: PCTNet, only: str | None = None) -> PCTNet:
    """Returns the same network, its modules replaced in place by their references; the state dict is unchanged.

    Args:
        network: The network.
        only: Name of the one class of module to be replaced; None replaces all that have a reference.
    """
    for module in network.modules():
        if type(module) in REFERENCES and only in (None, type(module).__name__):
            module.__class__ = REFERENCES[type(module)]
    return network
