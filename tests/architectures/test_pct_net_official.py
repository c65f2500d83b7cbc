"""PCT-Net reproduces the outputs of the released network, from the released layout of weights."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nnunetv2_misfm.architectures.pct_net import PCTNet
from nnunetv2_misfm.cli import main
from nnunetv2_misfm.weights.checkpoint import read_checkpoint

STRIDES = {
    0: [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    1: [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
    2: [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]],
}
# Numbered members of the released nn.Sequential containers.
CONV_BLOCK = {
    "0": "norm_act1.norm",
    "1": "norm_act1.act",
    "2": "conv1",
    "3": "norm_act2.norm",
    "4": "norm_act2.act",
    "6": "conv2",
}
DOWN = {"0": "norm_act.norm", "1": "norm_act.act", "2": "conv"}
UP = {"0": "norm_act_up.norm", "1": "norm_act_up.act", "2": "up"}
CONCATENATION = {"0": "norm_act_cat.norm", "1": "norm_act_cat.act", "2": "conv"}
# Tensors that the released network saves and never uses, or that follow from the window size.
UNUSED = re.compile(r"norm_layer\.|relative_position_index$")


def our_key(key: str) -> str:
    """Our key for a released one that has lost `embeddings.{m}.`, `pred_heads.{m}.` or `pyramid_ct.`."""
    part, rest = key.split(".", 1)
    if part == "proj":
        return f"encoder.stem.{rest}"
    name, level = part[:-1], int(part[-1])
    if name in ("enc_conv", "dec_conv"):
        side = "encoder" if name == "enc_conv" else "decoder"
        _, index, leaf = rest.split(".")
        return f"{side}.stages.{level}.block.{CONV_BLOCK[index]}.{leaf}"
    if name == "down":
        _, index, leaf = rest.split(".")
        return f"encoder.stages.{level}.down.{DOWN[index]}.{leaf}"
    if name == "up":  # up{l} leads to level l - 1
        step, index, leaf = rest.split(".")
        return f"decoder.stages.{level - 1}.up.{(UP if step == 'up' else CONCATENATION)[index]}.{leaf}"
    if name == "out_conv":
        _, index, leaf = rest.split(".")
        head = {"0": f"seg_norms.{level}.norm", "1": f"seg_norms.{level}.act", "2": f"seg_layers.{level}"}
        return f"decoder.{head[index]}.{leaf}"
    assert name in ("convtrans_e", "convtrans_d"), key
    block = f"{'encoder' if name[-1] == 'e' else 'decoder'}.stages.{level}.block"
    branch, rest = rest.split(".", 1)
    if branch == "trans":
        return f"{block}.swin.{rest}"
    _, index, leaf = rest.split(".")
    return f"{block}.conv.{CONV_BLOCK[index]}.{leaf}"


def used_keys(state: dict[str, Tensor], mode: int) -> dict[str, str]:
    """Released key -> our key, for all that a resolution mode uses."""
    keys = {}
    for key in state:
        if UNUSED.search(key):
            continue
        if key.startswith("pyramid_ct."):
            keys[key] = our_key(key.removeprefix("pyramid_ct."))
        elif key.startswith(f"embeddings.{mode}."):
            keys[key] = our_key(re.sub(r"^conv", "enc_conv", key.removeprefix(f"embeddings.{mode}.")))
        elif key.startswith(f"pred_heads.{mode}."):
            keys[key] = our_key(re.sub(r"^conv", "dec_conv", key.removeprefix(f"pred_heads.{mode}.")))
    return keys


def reindexed(table: Tensor) -> Tensor:
    """A bias table of the released index, strides (3w-1, 2w-1, 1), for the one in which each offset owns a row."""
    base = round(len(table) ** (1 / 3))  # 2w - 1
    window = (base + 1) // 2
    ours = torch.empty_like(table)
    for z, y, x in itertools.product(range(base), repeat=3):
        ours[z * base**2 + y * base + x] = table[z * (3 * window - 1) + y * base + x]
    return ours


@pytest.fixture(scope="module")
def official(shared: Path) -> dict:
    return read_checkpoint(shared / "reference" / "fixtures" / "official_pctnet.pt")


@pytest.fixture(scope="module")
def converted(official: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict]:
    """Resolution mode -> what the command `convert` writes from the official file."""
    folder = tmp_path_factory.mktemp("official")
    torch.save(official["checkpoint"], folder / "official.pt")
    files = {mode: folder / f"mode_{mode}.pth" for mode in STRIDES}
    for mode, file in files.items():
        assert main(["convert", str(folder / "official.pt"), "-o", str(file), "--resolution-mode", str(mode)]) == 0
    return {mode: torch.load(file, weights_only=True) for mode, file in files.items()}


def network(converted: dict) -> PCTNet:
    description = converted["misfm_meta"]["network"]
    net = PCTNet(description["input_channels"], description["num_classes"], **description["kwargs"])
    net.load_state_dict(converted["network_weights"])  # strict: sets every key
    return net.eval()


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_every_official_tensor_in_use_finds_one_place_and_every_place_is_filled(official: dict, mode: int) -> None:
    state = official["checkpoint"]["model_state_dict"]
    keys = used_keys(state, mode)
    others = tuple(f"{part}.{m}." for part in ("embeddings", "pred_heads") for m in range(3) if m != mode)
    left_over = [key for key in state if key not in keys and not key.startswith(others)]
    assert len(left_over) == 5 * 2 + 10  # five LayerNorms that are never called, ten index buffers
    assert all(UNUSED.search(key) for key in left_over)
    assert len(set(keys.values())) == len(keys)
    net = PCTNet(1, 5, features_per_stage=official["feature_chns"], strides=STRIDES[mode])
    assert set(keys.values()) == set(net.state_dict())


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_convert_puts_every_official_tensor_in_its_place(official: dict, converted: dict, mode: int) -> None:
    state = official["checkpoint"]["model_state_dict"]
    keys, weights = used_keys(state, mode), converted[mode]["network_weights"]
    assert set(keys.values()) == set(weights)
    tables = [key for key in keys if key.endswith("bias_table")]
    assert len(tables) == 10
    for theirs, ours in keys.items():
        assert torch.equal(weights[ours], reindexed(state[theirs]) if theirs in tables else state[theirs])


def test_convert_takes_the_demonstrations_branch_where_all_were_trained_alike(
    official: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(official["checkpoint"], tmp_path / "official.pt")
    assert main(["convert", str(tmp_path / "official.pt")]) == 0
    printed = capsys.readouterr().out
    assert "took resolution mode 1, pools (1, 2, 2) and (2, 2, 2): modes 0 and 1 and 2 were trained equally" in printed
    assert "mapped 404 tensors; left out: 260 of the other resolution branches, 10 of LayerNorms" in printed
    meta = torch.load(tmp_path / "official_nnunet.pth", weights_only=True)["misfm_meta"]
    assert (meta["converted_from"]["resolution_mode"], meta["converted_from"]["iteration"]) == (1, 1000)


@pytest.mark.parametrize("case", [0, 1, 2])
@torch.inference_mode()
def test_outputs_of_what_convert_writes_are_those_of_the_released_network(
    official: dict, converted: dict, case: int
) -> None:
    expected = official["cases"][case]
    generator = torch.Generator().manual_seed(expected["input_seed"])
    image = torch.randn(1, 1, *expected["input_size"], generator=generator)
    assert image.double().sum().item() == pytest.approx(expected["input_sum"], abs=1e-3)
    net = network(converted[expected["resolution_mode"]])
    outputs = net(image)
    assert len(outputs) == len(expected["outputs"]) == 4
    for output, reference in zip(outputs, expected["outputs"], strict=True):
        assert list(output.shape) == reference["shape"]
        torch.testing.assert_close(output[:, :, ::4, ::4, ::4], reference["every4"], atol=1e-4, rtol=0)
        assert output.double().sum().item() == pytest.approx(reference["sum"], rel=1e-4)
        assert output.double().abs().sum().item() == pytest.approx(reference["abs_sum"], rel=1e-4)
