import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunetv2_misfm.architectures.swin import window_and_shift
from nnunetv2_misfm.architectures.window_attention import (
    Size3,
    WindowAttention,
    attention_mask,
    cached_attention_mask,
    padded_grid,
    relative_position_index,
    window_partition,
    window_reverse,
)

CPU = torch.device("cpu")


def positions(grid: Size3) -> list[Size3]:
    return list(itertools.product(*(range(size) for size in grid)))


def windows_of(padded: Size3, window: Size3, shift: Size3) -> dict[Size3, list[tuple[Size3, Size3]]]:
    """Window -> its tokens, each as (place after the shift, true place), both in row-major order."""
    groups: dict[Size3, list[tuple[Size3, Size3]]] = {}
    for place in positions(padded):
        origin = tuple((p + s) % size for p, s, size in zip(place, shift, padded, strict=True))
        key = tuple(p // w for p, w in zip(place, window, strict=True))
        groups.setdefault(key, []).append((place, origin))
    return groups


def are_neighbours(first: tuple[Size3, Size3], second: tuple[Size3, Size3]) -> bool:
    """Whether the shift kept the distance between two tokens."""
    (place, origin), (other_place, other_origin) = first, second
    return all(p - q == a - b for p, q, a, b in zip(place, other_place, origin, other_origin, strict=True))


def slow_attention(module: WindowAttention, tokens: Tensor, window: Size3, shift: Size3) -> Tensor:
    """Shifted-window attention of one sample (D, H, W, C), token pair by token pair.

    Tokens that pad the grid are zeros, whose keys and values are the bias of their projection; under `mask_padding`
    they are left out.
    """
    grid, heads, full = tokens.shape[:3], module.num_heads, module.window_size
    head_dim = tokens.shape[-1] // heads
    padded = tuple(math.ceil(size / w) * w for size, w in zip(grid, window, strict=True))
    weight, bias = module.qkv.weight.numpy(), module.qkv.bias.numpy()
    table = module.relative_position_bias_table.numpy()
    filled = np.zeros((*padded, tokens.shape[-1]))
    filled[: grid[0], : grid[1], : grid[2]] = tokens.numpy()
    attended = np.zeros_like(filled)
    for everyone in windows_of(padded, window, shift).values():
        inside = [token for token in everyone if all(p < size for p, size in zip(token[1], grid, strict=True))]
        group = inside if module.mask_padding else everyone
        projected = [(weight @ filled[origin] + bias).reshape(3, heads, head_dim) for _, origin in group]
        for (query_index, query), head in itertools.product(enumerate(group), range(heads)):
            logits = []
            for key_index, key in enumerate(group):
                dz, dy, dx = (p - q + full - 1 for p, q in zip(query[0], key[0], strict=True))
                row = (dz * (2 * full - 1) + dy) * (2 * full - 1) + dx
                product = projected[query_index][0, head] @ projected[key_index][1, head] / math.sqrt(head_dim)
                logits.append(product + table[row, head] + (0 if are_neighbours(query, key) else -100))
            weights = np.exp(logits) / np.exp(logits).sum()
            channels = slice(head * head_dim, (head + 1) * head_dim)
            attended[query[1]][channels] = sum(w * p[2, head] for w, p in zip(weights, projected, strict=True))
    kept = torch.from_numpy(attended[: grid[0], : grid[1], : grid[2]])
    return module.proj(kept)


def attention(window_size: int, *, mask_padding: bool = False) -> WindowAttention:
    torch.manual_seed(0)
    module = WindowAttention(
        4, 2, window_size=window_size, mask_padding=mask_padding, attention_dropout=0.2, dropout=0.2
    )
    torch.nn.init.normal_(module.relative_position_bias_table)
    return module.double().eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("grid", "window", "num_heads"),
    [((4, 6, 2), (2, 3, 1), 1), ((3, 3, 3), (3, 3, 3), 2), ((1, 4, 8), (1, 2, 4), 4)],
)
def test_reversing_a_partition_changes_nothing(grid: Size3, window: Size3, num_heads: int) -> None:
    tokens = torch.randn(2, *grid, 8)
    assert torch.equal(window_reverse(window_partition(tokens, window, num_heads), window, grid), tokens)


def test_a_partition_lists_windows_then_heads_then_tokens_in_row_major_order() -> None:
    grid, window, num_heads, head_dim = (4, 3, 4), (2, 3, 2), 2, 3
    tokens = torch.randn(2, *grid, num_heads * head_dim)
    windows = window_partition(tokens, window, num_heads)
    assert windows.shape == (2, 4 * num_heads, 12, head_dim)
    groups = windows_of(grid, window, (0, 0, 0))
    for index, key in enumerate(sorted(groups)):
        for head, (token, (place, _)) in itertools.product(range(num_heads), enumerate(groups[key])):
            channels = slice(head * head_dim, (head + 1) * head_dim)
            expected = tokens[(slice(None), *place, channels)]
            assert torch.equal(windows[:, index * num_heads + head, token], expected)


@pytest.mark.parametrize("window_size", [1, 2, 3, 4])
def test_each_offset_owns_a_row_of_the_bias_table(window_size: int) -> None:
    index = relative_position_index(window_size).tolist()
    places = positions((window_size,) * 3)
    row_of: dict[Size3, int] = {}
    for (i, a), (j, b) in itertools.product(enumerate(places), repeat=2):
        offset = (a[0] - b[0], a[1] - b[1], a[2] - b[2])
        assert row_of.setdefault(offset, index[i][j]) == index[i][j]
    ordered = itertools.product(range(1 - window_size, window_size), repeat=3)  # offsets in row-major order
    assert [row_of[offset] for offset in ordered] == list(range((2 * window_size - 1) ** 3))


@pytest.mark.parametrize(
    ("grid", "shrink", "window", "shift"),
    [
        ((32, 16, 8), "per_axis", (6, 6, 6), (3, 3, 3)),
        ((32, 6, 4), "per_axis", (6, 6, 4), (3, 0, 0)),
        ((6, 4, 32), "per_axis", (6, 4, 6), (0, 0, 3)),
        ((1, 7, 5), "per_axis", (1, 6, 5), (0, 3, 0)),
        ((32, 16, 8), "cube", (6, 6, 6), (3, 3, 3)),
        ((32, 16, 6), "cube", (6, 6, 6), (0, 0, 0)),
        ((4, 8, 8), "cube", (4, 4, 4), (0, 0, 0)),
    ],
)
def test_windows_are_cut_to_the_grid(grid: Size3, shrink: str, window: Size3, shift: Size3) -> None:
    assert window_and_shift(grid, 6, shifted=True, shrink=shrink) == (window, shift)
    assert window_and_shift(grid, 6, shifted=False, shrink=shrink) == (window, (0, 0, 0))


@pytest.mark.parametrize("mask_padding", [False, True], ids=["padding seen", "padding masked"])
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((3, 3, 3), (3, 3, 3), (0, 0, 0)),  # one full window
        ((2, 3, 1), (2, 3, 1), (0, 0, 0)),  # cut along two axes
        ((2, 4, 5), (2, 3, 3), (0, 0, 0)),  # cut along one axis, padded along the others
        ((4, 5, 2), (3, 3, 2), (1, 1, 0)),  # the same, shifted where it is not cut
        ((6, 4, 3), (2, 2, 2), (1, 1, 1)),  # an even window, padded along the last axis
        ((7, 4, 3), (3, 3, 3), (1, 1, 0)),  # a window of padding and what the shift carried there
        ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ],
)
def test_attention_is_that_of_a_slow_loop_over_token_pairs(
    grid: Size3, window: Size3, shift: Size3, mask_padding: bool
) -> None:
    module = attention(window_size=3, mask_padding=mask_padding)
    tokens = torch.randn(2, *grid, 4, dtype=torch.float64)
    expected = torch.stack([slow_attention(module, sample, window, shift) for sample in tokens])
    torch.testing.assert_close(module(tokens, window, shift), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("hidden", [False, True], ids=["padding seen", "padding hidden"])
@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((6, 4, 4), (3, 2, 2), (1, 1, 1)),
        ((2, 6, 4), (2, 3, 2), (0, 1, 1)),
        ((4, 4, 4), (4, 4, 4), (0, 0, 0)),
        ((4, 5, 2), (3, 3, 2), (1, 1, 0)),
        ((7, 1, 2), (3, 1, 2), (0, 0, 0)),
    ],
)
def test_the_mask_parts_tokens_whose_distance_the_shift_changed_and_may_hide_padding(
    grid: Size3, window: Size3, shift: Size3, hidden: bool
) -> None:
    padded = padded_grid(grid, window)
    mask = attention_mask(padded, window, shift, CPU, hide_beyond=grid if hidden else None)
    groups = windows_of(padded, window, shift)
    assert mask.shape == (len(groups), math.prod(window), math.prod(window))
    for index, key in enumerate(sorted(groups)):
        for (i, query), (j, other) in itertools.product(enumerate(groups[key]), repeat=2):
            hide = hidden and any(p >= size for p, size in zip(other[1], grid, strict=True))
            assert mask[index, i, j] == (0 if are_neighbours(query, other) and not hide else -100)


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 1)])
def test_where_the_grid_divides_masking_the_padding_changes_nothing(shift: Size3) -> None:
    tokens = torch.randn(1, 4, 6, 2, 4, dtype=torch.float64)
    seen, masked = (attention(2, mask_padding=mask_padding)(tokens, (2, 2, 2), shift) for mask_padding in (False, True))
    assert torch.equal(seen, masked)


def test_padding_takes_a_share_of_the_softmax_unless_masked() -> None:
    tokens = torch.randn(1, 3, 1, 1, 4, dtype=torch.float64)
    shares = []
    for mask_padding in (False, True):
        module = attention(2, mask_padding=mask_padding)
        for layer, first in ((module.qkv, 8), (module.proj, 0)):  # the values are the tokens, those of padding zero
            layer.weight[first:].zero_().fill_diagonal_(1)
            layer.bias[first:].zero_()
        last = module(tokens, (2, 1, 1), (0, 0, 0))[0, 2, 0, 0]  # shares its window with one token of padding
        shares.append(last / tokens[0, 2, 0, 0])
    assert ((shares[0] > 0.01) & (shares[0] < 0.99)).all()
    assert (shares[1] == 1).all()


def test_a_mask_is_made_once_and_serves_training_after_prediction() -> None:
    cached_attention_mask.cache_clear()
    module = attention(window_size=2).train().requires_grad_(True)
    tokens = torch.randn(1, 4, 4, 4, 4, dtype=torch.float64)
    with torch.inference_mode():
        module(tokens, (2, 2, 2), (1, 1, 1))
    module(tokens, (2, 2, 2), (1, 1, 1)).sum().backward()
    assert module.relative_position_bias_table.grad is not None
    assert cached_attention_mask.cache_info().misses == 1
    mask = cached_attention_mask((4, 4, 4), (2, 2, 2), (1, 1, 1), CPU)
    assert not mask.is_inference() and not mask.requires_grad


def test_dropout_acts_on_the_attention_probabilities_in_training_alone() -> None:
    module = attention(window_size=2)
    module.proj_dropout.probability = 0.0
    tokens = torch.randn(1, 2, 2, 2, 4, dtype=torch.float64)
    still = module(tokens, (2, 2, 2), (0, 0, 0))
    assert torch.equal(module(tokens, (2, 2, 2), (0, 0, 0)), still)
    module.train()
    assert not torch.allclose(module(tokens, (2, 2, 2), (0, 0, 0)), still)
    module.attention_dropout = 0.0
    torch.testing.assert_close(module(tokens, (2, 2, 2), (0, 0, 0)), still)
