"""The fusion block of Hermes: priors attend to features, then features attend to the priors.

Paper: Gao et al., Training Like a Medical Resident: Context-Prior Learning Toward Universal Medical Image
Segmentation, CVPR 2024, arXiv:2306.02416, section on context-prior learning. Pre-norm residual steps, MLPs of four
times the width, 32 channels per head.

Deliberately unlike the published code: a token of a task that a sample does not have is hidden from the features, so
that nothing else in the batch, and no other task that is asked, changes an answer.

Shape letters: B batch, C channels, P prior tokens, N voxels of a feature map, read in array order.
"""

from torch import Tensor, nn
from torch.nn import functional

# Channels of an attention head (the authors' configuration)
HEAD_CHANNELS = 32
# Hidden units of an MLP per channel (the same)
MLP_RATIO = 4


def num_heads(channels: int) -> int:
    """Returns how many heads of at least 32 channels divide a width evenly; one where it is narrower."""
    return max(heads for heads in range(1, max(1, channels // HEAD_CHANNELS) + 1) if channels % heads == 0)


class CrossAttention(nn.Module):
    """Multi-head attention of one set of tokens to another, with a projection at either end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.num_heads = num_heads(channels)
        self.query = nn.Linear(channels, channels, bias=False)
        self.key_value = nn.Linear(channels, 2 * channels, bias=False)
        self.project = nn.Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor, visible: Tensor | None = None) -> Tensor:
        """Attends.

        Args:
            x: Tokens that ask (B, X, C).
            context: Tokens that are asked (B, Y, C).
            visible: bool (B, Y), which of these count, one of a sample at least; all without it.

        Returns:
            Answers (B, X, C).
        """
        batch, length, channels = x.shape
        query = self.query(x).view(batch, length, self.num_heads, -1).transpose(1, 2)
        key, value = self.key_value(context).view(batch, -1, 2, self.num_heads, channels // self.num_heads).unbind(2)
        mask = None if visible is None else visible[:, None, None, :]
        answer = functional.scaled_dot_product_attention(query, key.transpose(1, 2), value.transpose(1, 2), mask)
        return self.project(answer.transpose(1, 2).reshape(batch, length, channels))


class MLP(nn.Sequential):
    """Two linear layers with GELU between them."""

    def __init__(self, channels: int, hidden: int, out_channels: int) -> None:
        super().__init__(nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, out_channels))


class PriorAttentionBlock(nn.Module):
    """Priors <- features, priors <- MLP, features <- priors, features <- MLP, each a residual step."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.prior_norm, self.feature_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.prior_attention = CrossAttention(channels)
        self.prior_mlp_norm = nn.LayerNorm(channels)
        self.prior_mlp = MLP(channels, MLP_RATIO * channels, channels)
        self.feature_query_norm, self.posterior_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.feature_attention = CrossAttention(channels)
        self.feature_mlp_norm = nn.LayerNorm(channels)
        self.feature_mlp = MLP(channels, MLP_RATIO * channels, channels)

    def forward(self, features: Tensor, priors: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Lets features and priors inform each other.

        Args:
            features: (B, N, C).
            priors: (B, P, C). Each attends to the features by itself, so none depends on the others.
            visible: bool (B, P), the priors that the features attend to, one of a sample at least.

        Returns:
            Features (B, N, C) and posterior tokens (B, P, C).
        """
        priors = priors + self.prior_attention(self.prior_norm(priors), self.feature_norm(features))
        priors = priors + self.prior_mlp(self.prior_mlp_norm(priors))
        features = features + self.feature_attention(
            self.feature_query_norm(features), self.posterior_norm(priors), visible
        )
        return features + self.feature_mlp(self.feature_mlp_norm(features)), priors
