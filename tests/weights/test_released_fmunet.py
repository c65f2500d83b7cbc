import re
from pathlib import Path

import pytest
import torch
from released_layout import released_fmunet
from torch import Tensor

from nnunetv2_misfm.architectures import FMUNet
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights.checkpoint import read_checkpoint
from nnunetv2_misfm.weights.released_fmunet import convert, recognises

STRIDES = {
    0: [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    1: [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    2: [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
}


def our_key(key: str) -> str:
    key = re.sub(r"^project", "encoder.project", key)
    key = re.sub(r"^out_layers\.(\d)\.0", r"decoder.seg_norms.\1", key)
    return re.sub(r"^out_layers\.(\d)\.2", r"decoder.seg_layers.\1", key)


def test_official_file_converts_tensor_by_tensor(shared: Path) -> None:
    official = read_checkpoint(shared / "reference" / "fixtures" / "official_fmunet.pt")
    state = official["cases"][0]["checkpoint"]["model_state_dict"]
    layout = released_fmunet(official["feature_chns"], official["class_num"], official["in_chns"])
    assert {k: (v.shape, v.dtype) for k, v in layout.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    made = convert(state)
    assert made.weights.keys() == {our_key(key) for key in state} and len(made.weights) == 146
    assert all(torch.equal(made.weights[our_key(key)], tensor) for key, tensor in state.items())
    assert made.resolution_mode == official["cases"][0]["res_mode"] == 0


@pytest.mark.parametrize(("mode", "depth"), [(0, 2), (1, 2), (2, 3), (1, 1)])
def test_any_widths_classes_channels_depth_and_mode_convert_and_run(mode: int, depth: int) -> None:
    state = released_fmunet((4, 6, 8, 10, 12), 2, 3, mode, depth)
    made = convert(state)
    kwargs = {"features_per_stage": [4, 6, 8, 10, 12], "strides": STRIDES[mode], "depth": depth}
    assert made.description == {
        "class": "nnunetv2_misfm.architectures.FMUNet", "kwargs": kwargs, "kwargs_to_import": [],
        "input_channels": 3, "label_channels": 0, "num_classes": 2,
    }  # fmt: skip
    assert made.left_out == {} and len(made.weights) == len(state)
    assert made.taken.startswith(f"took resolution mode {mode}, pools ")
    network = FMUNet(3, 2, **kwargs)
    network.load_state_dict(made.weights)  # strict: sets every key
    outputs = network.eval()(torch.randn(1, 3, 16, 16, 32))
    assert [o.shape[1] for o in outputs] == [2] * 4 and all(o.isfinite().all() for o in outputs)


def test_notes_say_what_the_trainers_do_differently() -> None:
    widths, depth = convert(released_fmunet(depth=3)).notes
    assert "have [32, 64, 128, 256, 512] channels by default: first run" in widths
    assert "features_per_stage=[4,4,8,16,32]" in widths
    assert depth == "its blocks have 3 convolutions, the trainers' have 2: let the plans name FMUNet with that depth"


def test_our_own_network_is_not_taken_for_a_released_one() -> None:
    assert recognises(released_fmunet())
    assert not recognises(FMUNet(1, 2, features_per_stage=(4, 4, 4, 4, 4)).state_dict())


STEM, DEEP = "project.weight", "decoder.de_conv4.conv_list.1.3.bias"


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({DEEP: None}, rf"expected a whole FMUNet, got one that lacks 1 of its tensors \(the first is {DEEP}\)"),
        ({STEM: None, DEEP: None}, rf"lacks 2 of its tensors \(the first is {STEM}\)"),
        ({"decoder.gate": torch.zeros(1)}, r"got 1 that it does not have \(the first is decoder.gate\)"),
        ({STEM: torch.zeros(4)}, rf"expected {STEM} to have 5 axes, got the shape \(4,\)"),
        ({STEM: torch.zeros(4, 1, 1, 3, 3)}, r"expected .*weight of shape \(4, 4, 1, 3, 3\) in this FMUNet"),
        ({DEEP: torch.zeros(31)}, rf"expected {DEEP} of shape \(32,\) in this FMUNet, got \(31,\)"),
        ({DEEP: torch.full((32,), torch.nan)}, f"expected finite numbers in {DEEP}, got NaN or infinity"),
        ({DEEP: torch.zeros(32, dtype=torch.uint8)}, f"expected floating-point numbers in {DEEP}, got torch.uint8"),
        ({STEM: torch.zeros(0, 1, 3, 3, 3)}, "expected a FMUNet that can be built, got .*at least 1 channel"),
    ],
)  # fmt: skip
def test_damaged_or_other_networks_get_a_sentence(entries: dict[str, Tensor | None], sentence: str) -> None:
    state = {key: value for key, value in {**released_fmunet(), **entries}.items() if value is not None}
    with pytest.raises(MisfmError, match=sentence) as refusal:
        convert(state)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("mode", [0, 1])
def test_there_is_no_resolution_mode_to_choose(mode: int) -> None:
    with pytest.raises(MisfmError, match=f"expected no --resolution-mode with FMUNet, got {mode}: its file holds one"):
        convert(released_fmunet(mode=mode), mode)
