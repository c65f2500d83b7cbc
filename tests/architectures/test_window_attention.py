import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from nnunetv2_misfm.architectures.window_attention import (
    DropPath,
    Size3,
    SwinLayer,
    WindowAttention,
    attention_mask,
    cached_attention_mask,
    relative_position_index,
    window_and_shift,
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
    """Shifted-window attention of one sample (D, H, W, C), token pair by token pair."""
    grid, heads, full = tokens.shape[:3], module.num_heads, module.window_size
    head_dim = tokens.shape[-1] // heads
    padded = tuple(math.ceil(size / w) * w for size, w in zip(grid, window, strict=True))
    weight, bias = module.qkv.weight.numpy(), module.qkv.bias.numpy()
    table = module.relative_position_bias_table.numpy()
    filled = np.zeros((*padded, tokens.shape[-1]))
    filled[: grid[0], : grid[1], : grid[2]] = tokens.numpy()
    attended = np.zeros_like(filled)
    for group in windows_of(padded, window, shift).values():
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


def attention(window_size: int, channels: int = 4, num_heads: int = 2) -> WindowAttention:
    torch.manual_seed(0)
    module = WindowAttention(channels, num_heads, window_size=window_size, attention_dropout=0.2, dropout=0.2)
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


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [
        ((3, 3, 3), (3, 3, 3), (0, 0, 0)),  # one full window
        ((2, 3, 1), (2, 3, 1), (0, 0, 0)),  # cut along two axes
        ((2, 4, 5), (2, 3, 3), (0, 0, 0)),  # cut along one axis, padded along the others
        ((4, 5, 2), (3, 3, 2), (1, 1, 0)),  # the same, shifted where it is not cut
        ((6, 4, 3), (2, 2, 2), (1, 1, 1)),  # an even window, padded along the last axis
        ((1, 1, 1), (1, 1, 1), (0, 0, 0)),
    ],
)
def test_attention_is_that_of_a_slow_loop_over_token_pairs(grid: Size3, window: Size3, shift: Size3) -> None:
    module = attention(window_size=3)
    tokens = torch.randn(2, *grid, 4, dtype=torch.float64)
    expected = torch.stack([slow_attention(module, sample, window, shift) for sample in tokens])
    torch.testing.assert_close(module(tokens, window, shift), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [((6, 4, 4), (3, 2, 2), (1, 1, 1)), ((2, 6, 4), (2, 3, 2), (0, 1, 1)), ((4, 4, 4), (4, 4, 4), (0, 0, 0))],
)
def test_the_mask_parts_the_tokens_whose_distance_the_shift_changed(grid: Size3, window: Size3, shift: Size3) -> None:
    mask = attention_mask(grid, window, shift, CPU)
    groups = windows_of(grid, window, shift)
    assert mask.shape == (len(groups), math.prod(window), math.prod(window))
    for index, key in enumerate(sorted(groups)):
        for (i, first), (j, second) in itertools.product(enumerate(groups[key]), repeat=2):
            assert mask[index, i, j] == (0 if are_neighbours(first, second) else -100)


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


def test_nothing_that_is_saved_depends_on_the_grid() -> None:
    layer = SwinLayer(
        8,
        2,
        window_size=3,
        window_shrink="per_axis",
        dropout=0.0,
        attention_dropout=0.0,
        drop_path=0.0,
    )
    shapes = {key: value.shape for key, value in layer.state_dict().items()}
    assert shapes["blocks.0.attn.relative_position_bias_table"] == (5**3, 2)
    assert not any("index" in key for key in shapes)
    for grid in ((1, 2, 9), (3, 3, 3)):
        assert layer(torch.randn(1, *grid, 8)).shape == (1, *grid, 8)
    assert {key: value.shape for key, value in layer.state_dict().items()} == shapes


def test_only_the_second_block_of_a_layer_shifts() -> None:
    torch.manual_seed(0)
    kwargs = {"dropout": 0.0, "attention_dropout": 0.0, "drop_path": 0.0}
    layer = SwinLayer(4, 1, window_size=2, window_shrink="per_axis", **kwargs).eval()
    tokens = torch.randn(1, 4, 4, 4, 4)
    changed = tokens.clone()
    changed[0, 0, 0, 0, 0] += 1
    for block, reach in zip(layer.blocks, (8, 1), strict=True):  # a window of eight; alone in its corner
        touched = (block(changed) - block(tokens)).abs().amax(dim=-1) > 1e-6
        assert touched.sum() == reach


def test_drop_path_keeps_or_drops_whole_samples() -> None:
    torch.manual_seed(0)
    x = torch.ones(1000, 2, 3)
    dropped = DropPath(0.2)(x)
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(x))
    assert dropped.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(DropPath(0.2).eval()(x), x)


def test_dropout_acts_on_the_attention_probabilities_in_training_alone() -> None:
    module = attention(window_size=2)
    module.proj_dropout.p = 0.0
    tokens = torch.randn(1, 2, 2, 2, 4, dtype=torch.float64)
    still = module(tokens, (2, 2, 2), (0, 0, 0))
    assert torch.equal(module(tokens, (2, 2, 2), (0, 0, 0)), still)
    module.train()
    assert not torch.allclose(module(tokens, (2, 2, 2), (0, 0, 0)), still)
    module.attention_dropout = 0.0
    torch.testing.assert_close(module(tokens, (2, 2, 2), (0, 0, 0)), still)
