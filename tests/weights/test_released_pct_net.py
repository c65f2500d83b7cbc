import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from released_layout import released_index, released_pct_net, released_row
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.window_attention import WindowAttention
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights.checkpoint import read_checkpoint
from nnunetv2_misfm.weights.released_pct_net import choose_mode, convert, inspect
from nnunetv2_misfm.weights.released_pct_net_layout import reindexed

STRIDES = {
    0: [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    1: [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    2: [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
}
STEM = "embeddings.1.proj.weight"
TABLE = "pyramid_ct.convtrans_d3.trans.blocks.1.attn.relative_position_bias_table"


def built(state: dict[str, Tensor], mode: int | None = None, **options: Any) -> PCTNet:
    """The network that a conversion describes, with its weights."""
    conversion = convert(state, mode)
    sizes = {key: conversion.description[key] for key in ("input_channels", "num_classes")}
    network = PCTNet(**sizes, **conversion.description["kwargs"], **options)
    network.load_state_dict(conversion.weights)  # strict: sets every key
    return network.eval()


def test_layout_of_the_tests_is_that_of_the_official_code(shared: Path) -> None:
    official = read_checkpoint(shared / "reference" / "fixtures" / "official_pctnet.pt")
    given = official["checkpoint"]["model_state_dict"]
    ours = released_pct_net(official["feature_chns"], official["class_num"], official["in_chns"], heads=(4, 8, 16))
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {k: (v.shape, v.dtype) for k, v in given.items()}
    indices = [key for key in given if key.endswith("index")]
    assert len(indices) == 10 and all(torch.equal(given[key], ours[key]) for key in indices)


# Bias tables


@pytest.mark.parametrize("window", range(1, 7))
def test_reindexed_table_gives_every_pair_of_tokens_the_bias_it_had(window: int) -> None:
    table = torch.randn((2 * window - 1) ** 3, 2, generator=torch.Generator().manual_seed(window))
    attention = WindowAttention(4, 2, mask_padding=False, window_size=6, attention_dropout=0.0, dropout=0.0)
    attention.relative_position_bias_table.data = reindexed(table)
    bias = attention.position_bias((window, window, window))  # h, N, N
    assert torch.equal(bias, table[released_index(window)].permute(2, 0, 1))


@pytest.mark.parametrize("window", range(1, 7))
def test_reindexed_table_has_a_row_for_every_offset_and_zeros_where_there_was_none(window: int) -> None:
    table = torch.rand((2 * window - 1) ** 3, 3) + 1
    made = reindexed(table)
    assert made.shape == (1331, 3)
    for row, offset in zip(made, itertools.product(range(-5, 6), repeat=3), strict=True):
        known = max(map(abs, offset)) < window
        assert torch.equal(row, table[released_row(offset, window)] if known else torch.zeros(3))


def attended_slowly(x: Tensor, state: dict[str, Tensor], block: str, window: int, heads: int) -> Tensor:
    """The released transformer block on one unshifted window: x is (N, C) with N = w^3."""
    count, channels = x.shape
    weight = {key.removeprefix(f"{block}."): value for key, value in state.items() if key.startswith(f"{block}.")}
    normed = layer_norm(x, (channels,), weight["norm1.weight"], weight["norm1.bias"])
    qkv = linear(normed, weight["attn.qkv.weight"], weight["attn.qkv.bias"]).view(count, 3, heads, channels // heads)
    answers = []
    for head in range(heads):
        query, key, value = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
        logits = query @ key.T * (channels // heads) ** -0.5
        for i, j in itertools.product(range(count), repeat=2):
            offset = [a - b for a, b in zip(*(np.unravel_index(n, [window] * 3) for n in (i, j)), strict=True)]
            logits[i, j] += weight["attn.relative_position_bias_table"][released_row(offset, window), head]
        answers.append(logits.softmax(-1) @ value)
    x = x + linear(torch.cat(answers, -1), weight["attn.proj.weight"], weight["attn.proj.bias"])
    normed = layer_norm(x, (channels,), weight["norm2.weight"], weight["norm2.bias"])
    hidden = gelu(linear(normed, weight["mlp.fc1.weight"], weight["mlp.fc1.bias"]))
    return x + linear(hidden, weight["mlp.fc2.weight"], weight["mlp.fc2.bias"])


@pytest.mark.parametrize(("level", "window"), [(4, 4), (3, 3), (4, 1)])
@torch.inference_mode()
def test_shrunken_windows_attend_as_the_released_code_does(level: int, window: int) -> None:
    heads, windows = (2, 2, 4), [6, 6, 6]
    windows[level - 2] = window
    state = released_pct_net(heads=heads, windows=windows)
    network = built(state, window_shrink="cube")
    tokens = torch.randn(window**3, (8, 16, 32)[level - 2], generator=torch.Generator().manual_seed(1))
    for block in (0, 1):  # neither shifts where the window was shrunk
        made = network.encoder.stages[level].block.swin.blocks[block](tokens.view(1, window, window, window, -1))
        name = f"pyramid_ct.convtrans_e{level}.trans.blocks.{block}"
        expected = attended_slowly(tokens, state, name, window, heads[level - 2])
        torch.testing.assert_close(made.flatten(0, 3), expected, atol=1e-5, rtol=1e-5)


# What is found, and what is taken


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_any_widths_classes_and_channels_convert_and_run(mode: int) -> None:
    state = released_pct_net((4, 6, 8, 8, 16), 2, 3, heads=(2, 4, 1), windows=(6, 4, 2), batches={mode: 5})
    assert vars(inspect(state)) == {
        "input_channels": 3, "num_classes": 2, "features_per_stage": (4, 6, 8, 8, 16), "num_heads": (2, 4, 1),
        "windows": (6, 4, 2), "batches": {m: 5 * (m == mode) for m in range(3)},
    }  # fmt: skip
    conversion = convert(state)
    assert conversion.description == {
        "class": "nnunetv2_misfm.architectures.PCTNet", "kwargs_to_import": [],
        "kwargs": {"features_per_stage": [4, 6, 8, 8, 16], "strides": STRIDES[mode], "num_heads": [2, 4, 1]},
        "input_channels": 3, "label_channels": 0, "num_classes": 2,
    }  # fmt: skip
    assert sum(conversion.left_out.values()) + len(conversion.weights) == len(state) == 684
    assert [*conversion.left_out.values()] == [260, 10, 10]
    outputs = built(state)(torch.randn(1, 3, 16, 16, 16))
    assert [o.shape[1] for o in outputs] == [2] * 4 and all(o.isfinite().all() for o in outputs)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_tensors_of_the_other_branches_have_no_part_in_it(mode: int) -> None:
    state = released_pct_net(batches={0: 1, 1: 1, 2: 1})
    others = {k for k in state if k.startswith(("embeddings.", "pred_heads.")) and k.split(".")[1] != str(mode)}
    assert len(others) == 260
    spoilt = {k: v * torch.nan if k in others and v.is_floating_point() else v for k, v in state.items()}
    plain, made = convert(state, mode).weights, convert(spoilt, mode).weights
    assert all(torch.equal(plain[key], made[key]) for key in plain)


def test_notes_say_what_the_trainers_do_differently() -> None:
    shrunken, heads, widths = convert(released_pct_net(heads=(1, 2, 1), windows=(6, 6, 4))).notes
    assert "windows shrank to 4x4x4 tokens at level 4" in shrunken and 'PCTNet(window_shrink="cube")' in shrunken
    assert "its attention has [1, 2, 1] heads" in heads
    assert "configure -d DATASET -c 3d_fullres --name NAME features_per_stage=[4,4,8,16,32] and train NAME" in widths


@pytest.mark.parametrize(
    ("batches", "wanted", "strides", "mode", "why"),
    [
        ((0, 9, 0), None, None, 1, "the only one that was trained"),
        ((0, 0, 3), None, STRIDES[0], 2, "the only one that was trained"),
        ((5, 9, 7), None, None, 1, "trained on the most batches; --resolution-mode chooses another"),
        ((9, 5, 7), None, None, 0, "trained on the most batches"),
        ((7, 7, 7), None, None, 1, "modes 0 and 1 and 2 were trained equally long; --resolution-mode chooses another"),
        ((7, 0, 7), None, None, 0, "modes 0 and 2 were trained equally long"),
        ((5, 9, 7), None, STRIDES[2], 2, "the trained one that pools as the target does; --resolution-mode chooses"),
        ((5, 9, 7), None, [[1, 1, 1], [2, 2, 1], *[[2, 2, 2]] * 3], 1, "trained on the most batches"),
        ((5, 9, 0), None, STRIDES[2], 1, "trained on the most batches"),
        ((5, 9, 7), 0, STRIDES[2], 0, "asked for"),
        ((0, 9, 0), 2, None, 2, "asked for; WARNING: no training batch is counted for it, so its stem and heads may"),
        ((None, None, None), 1, None, 1, "asked for; WARNING"),
    ],
)  # fmt: skip
def test_branch_is_the_one_asked_for_or_the_one_trained(
    batches: tuple, wanted: int | None, strides: list | None, mode: int, why: str
) -> None:
    taken, said = choose_mode(dict(enumerate(batches)), wanted, strides)
    assert taken == mode and said.startswith(why)
    assert ("WARNING" in said) == ("WARNING" in why)


@pytest.mark.parametrize("counted", [True, False])
def test_without_a_trained_branch_one_must_be_chosen(counted: bool) -> None:
    state = released_pct_net(batches={})
    if not counted:
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    with pytest.raises(MisfmError, match=r"got none, so the trained one cannot be told: choose with --resolution-mode"):
        convert(state)
    assert built(state, 2).encoder.stages[0].block.norm_act1.norm.num_batches_tracked == 0


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32_in_memory_of_their_own(kind: torch.dtype) -> None:
    state = released_pct_net()
    given = {key: value.to(kind) if value.is_floating_point() else value for key, value in state.items()}
    made = convert(given).weights
    assert {value.dtype for value in made.values()} == {torch.float32, torch.int64}
    assert torch.equal(made["encoder.stem.weight"], given[STEM].float())
    pointers = {value.data_ptr() for value in convert(state).weights.values()}
    assert not pointers & {value.data_ptr() for value in state.values()}


# What is refused


def changed(**entries: Any) -> dict[str, Tensor]:
    state = released_pct_net()
    for key, value in entries.items():
        key = key.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    return state


NAN, INFINITE = torch.full((4, 1, 1, 3, 3), torch.nan), torch.full((4, 1, 1, 3, 3), torch.inf)


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({STEM: None}, rf"expected a whole PCT-Net, got one that lacks 1 of its tensors \(the first is {STEM}\)"),
        ({"pred_heads.2.up1.up.2.bias": None, TABLE: None}, r"lacks 2 of its tensors \(the first is pyramid_ct"),
        ({TABLE.replace("bias_table", "index"): None}, "lacks 1 of its tensors .the first is pyramid_ct.*index"),
        ({"pyramid_ct.gate": torch.zeros(1)}, r"got 1 that it does not have \(the first is pyramid_ct.gate\)"),
        ({"optimizer": torch.zeros(1), "x": torch.zeros(1)}, r"got 2 that it does not have \(the first is optimizer"),
        ({STEM: torch.zeros(4, 2, 1, 3, 3)}, rf"expected {STEM} of shape \(4, 1, 1, 3, 3\) in this PCT-Net, got"),
        ({STEM: torch.zeros(4, 1, 3, 3, 3)}, rf"expected {STEM} of shape \(4, 1, 1, 3, 3\) in this PCT-Net, got"),
        ({STEM: NAN}, f"expected finite numbers in {STEM}, got NaN or infinity"),
        ({STEM: INFINITE}, f"expected finite numbers in {STEM}, got NaN or infinity"),
        ({STEM: NAN.to(torch.int32)}, f"expected floating-point numbers in {STEM}, got torch.int32"),
        ({STEM: NAN.to(torch.complex64)}, f"expected floating-point numbers in {STEM}, got torch.complex64"),
        ({"embeddings.0.proj.weight": torch.zeros(4)}, r"embeddings.0.proj.weight to have 5 axes, got the shape \(4"),
        ({TABLE: torch.zeros(343, 1)}, rf"expected {TABLE} of shape \(1331, 1\) in this PCT-Net, got \(343, 1\)"),
        ({TABLE.replace("d3.trans.blocks.1", "e3.trans.blocks.0"): torch.zeros(2197, 1)},
         r"e3.*table with \(2w-1\)\^3 rows for a window w of 1 to 6 tokens, got 2197 rows"),
        ({TABLE.replace("d3.trans.blocks.1", "e3.trans.blocks.0"): torch.zeros(1331, 3)},
         r"expected a PCT-Net that can be built, got .*num_heads: 3 heads do not divide the 16 channels of level 3"),
        ({TABLE.replace("bias_table", "index"): released_index(6).T}, "expected the released code's index of token"),
        ({TABLE.replace("bias_table", "index"): released_index(4)}, "expected the released code's index of token"),
        ({"embeddings.1.conv0.conv_conv.0.num_batches_tracked": torch.tensor(1.5)},
         "expected a whole number in embeddings.1.conv0.conv_conv.0.num_batches_tracked, got torch.float32"),
        ({"embeddings.1.conv0.conv_conv.0.num_batches_tracked": torch.zeros(4, dtype=torch.int64)},
         r"expected a whole number in embeddings.1.conv0.conv_conv.0.num_batches_tracked, got torch.int64 of shape"),
    ],
)  # fmt: skip
def test_damaged_or_other_networks_get_a_sentence(entries: dict[str, Tensor | None], sentence: str) -> None:
    with pytest.raises(MisfmError, match=sentence) as refusal:
        convert(changed(**entries))
    assert "\n" not in str(refusal.value)


def test_half_a_file_gets_a_sentence_wherever_it_is_cut() -> None:
    state = list(released_pct_net().items())
    for end in range(1, len(state), 97):
        with pytest.raises(MisfmError, match="expected a whole PCT-Net, got one that lacks"):
            convert(dict(state[:end]))
        with pytest.raises(MisfmError, match="expected a whole PCT-Net, got one that lacks"):
            convert(dict(state[end:]))
