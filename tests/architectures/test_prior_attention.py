import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures.prior_attention import CrossAttention, PriorAttentionBlock, num_heads

BATCH, VOXELS, PRIORS = 2, 5, 4
VISIBLE = torch.tensor([[True, False, True, True], [False, True, False, False]])


def affine(layer: nn.Linear, x: np.ndarray) -> np.ndarray:
    bias = 0 if layer.bias is None else layer.bias.detach().numpy()
    return layer.weight.detach().numpy() @ x + bias


def slow_norm(layer: nn.LayerNorm, x: np.ndarray) -> np.ndarray:
    mean = sum(x) / len(x)
    variance = sum((value - mean) ** 2 for value in x) / len(x)
    scale, shift = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return np.array([(v - mean) / math.sqrt(variance + 1e-5) * s + b for v, s, b in zip(x, scale, shift, strict=True)])


def slow_mlp(layer: nn.Sequential, x: np.ndarray) -> np.ndarray:
    hidden = [value * (1 + math.erf(value / math.sqrt(2))) / 2 for value in affine(layer[0], x)]
    return affine(layer[2], np.array(hidden))


def slow_attention(
    layer: CrossAttention, heads: int, x: np.ndarray, context: np.ndarray, visible: np.ndarray | None = None
) -> np.ndarray:
    """One sample (X, C), (Y, C), (Y,), token by token and head by head, leaving hidden tokens out altogether."""
    channels = x.shape[1]
    size = channels // heads
    seen = [token for i, token in enumerate(context) if visible is None or visible[i]]
    answers = []
    for token in x:
        query, answer = affine(layer.query, token), np.zeros(channels)
        keys_and_values = [affine(layer.key_value, other) for other in seen]
        for head in range(heads):
            own = slice(head * size, (head + 1) * size)
            scores = [sum(query[own] * both[:channels][own]) / math.sqrt(size) for both in keys_and_values]
            weights = [math.exp(score) / sum(math.exp(other) for other in scores) for score in scores]
            for weight, both in zip(weights, keys_and_values, strict=True):
                answer[own] += weight * both[channels:][own]
        answers.append(affine(layer.project, answer))
    return np.array(answers)


def slow_block(
    block: PriorAttentionBlock, heads: int, features: np.ndarray, priors: np.ndarray, visible: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One sample: features (N, C), priors (P, C), visible (P,)."""

    def normed(layer: nn.LayerNorm, tokens: np.ndarray) -> np.ndarray:
        return np.array([slow_norm(layer, token) for token in tokens])

    asking, asked = normed(block.prior_norm, priors), normed(block.feature_norm, features)
    priors = priors + slow_attention(block.prior_attention, heads, asking, asked)
    priors = np.array([token + slow_mlp(block.prior_mlp, slow_norm(block.prior_mlp_norm, token)) for token in priors])
    asking, asked = normed(block.feature_query_norm, features), normed(block.posterior_norm, priors)
    features = features + slow_attention(block.feature_attention, heads, asking, asked, visible)
    mlp, norm = block.feature_mlp, block.feature_mlp_norm
    return np.array([token + slow_mlp(mlp, slow_norm(norm, token)) for token in features]), priors


def random_weights(module: nn.Module) -> nn.Module:
    """In double precision; norms differ from one another and from the identity, scores from zero."""
    torch.manual_seed(0)
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.1, 2 / math.sqrt(parameter.shape[-1]))
    return module


def tokens(channels: int, *, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (BATCH, VOXELS, channels), (BATCH, PRIORS, channels)
    features, priors = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return features.requires_grad_(requires_grad), priors.requires_grad_(requires_grad)


@pytest.mark.parametrize(
    ("channels", "heads"),
    [(128, 4), (256, 8), (320, 10), (32, 1), (64, 2), (96, 3), (63, 1), (80, 2), (100, 2), (37, 1), (8, 1), (1, 1)],
)
def test_heads_are_the_most_of_32_channels_or_more_that_divide_the_width(channels: int, heads: int) -> None:
    assert num_heads(channels) == heads


@pytest.mark.parametrize(("channels", "heads"), [(96, 3), (80, 2), (6, 1)])
@pytest.mark.parametrize("visible", [None, VISIBLE], ids=["all", "masked"])
def test_attention_equals_a_slow_loop(channels: int, heads: int, visible: Tensor | None) -> None:
    attention = random_weights(CrossAttention(channels))
    features, priors = tokens(channels)
    answers = attention(features, priors, visible).detach().numpy()
    for i in range(BATCH):
        mask = None if visible is None else visible[i].numpy()
        expected = slow_attention(attention, heads, features[i].numpy(), priors[i].numpy(), mask)
        np.testing.assert_allclose(answers[i], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("channels", "heads"), [(64, 2), (6, 1)])
def test_block_equals_a_slow_loop(channels: int, heads: int) -> None:
    block = random_weights(PriorAttentionBlock(channels))
    features, priors = tokens(channels)
    found = [tensor.detach().numpy() for tensor in block(features, priors, VISIBLE)]
    for i in range(BATCH):
        expected = slow_block(block, heads, features[i].numpy(), priors[i].numpy(), VISIBLE[i].numpy())
        np.testing.assert_allclose(found[0][i], expected[0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(found[1][i], expected[1], rtol=1e-9, atol=1e-9)


def test_a_prior_moves_no_other_posterior() -> None:
    block = random_weights(PriorAttentionBlock(8))
    features, priors = tokens(8, requires_grad=True)
    seen = torch.ones(BATCH, PRIORS, dtype=torch.bool)
    _, posteriors = block(features, priors, seen)
    gradient = torch.autograd.grad(posteriors[1, 2].square().sum(), priors)[0]
    others = torch.ones(BATCH, PRIORS, dtype=torch.bool)
    others[1, 2] = False
    assert gradient[1, 2].abs().min() > 0 and not gradient[others].any()
    changed = priors.detach().clone()
    changed[1, 2] = torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(block(features, changed, seen)[1][others], posteriors[others], rtol=0, atol=1e-12)


def test_posteriors_do_not_depend_on_what_is_visible() -> None:
    block = random_weights(PriorAttentionBlock(8))
    features, priors = tokens(8)
    everything = torch.ones_like(VISIBLE)
    masked, whole = block(features, priors, VISIBLE), block(features, priors, everything)
    torch.testing.assert_close(masked[1], whole[1], rtol=0, atol=1e-12)
    assert (masked[0] - whole[0]).abs().max() > 0.01


def test_hidden_priors_do_not_reach_the_features() -> None:
    block = random_weights(PriorAttentionBlock(8))
    features, priors = tokens(8, requires_grad=True)
    expected = block(features, priors, VISIBLE)[0]
    gradient = torch.autograd.grad(expected.square().sum(), priors)[0]
    assert not gradient[~VISIBLE].any() and gradient[VISIBLE].abs().amax(1).min() > 0
    changed = priors.detach().clone()
    changed[~VISIBLE] = torch.randn(int((~VISIBLE).sum()), 8, dtype=torch.float64)
    torch.testing.assert_close(block(features, changed, VISIBLE)[0], expected, rtol=0, atol=1e-12)
    changed[VISIBLE] = torch.randn(int(VISIBLE.sum()), 8, dtype=torch.float64)
    assert (block(features, changed, VISIBLE)[0] - expected).abs().amax((1, 2)).min() > 0.01


def test_an_order_of_priors_orders_the_posteriors_and_leaves_the_features() -> None:
    block = random_weights(PriorAttentionBlock(8))
    features, priors = tokens(8)
    order = torch.tensor([2, 0, 3, 1])
    found, expected = block(features, priors[:, order], VISIBLE[:, order]), block(features, priors, VISIBLE)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], expected[1][:, order], rtol=0, atol=1e-12)
