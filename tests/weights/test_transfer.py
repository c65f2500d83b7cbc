import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from torch.nn.functional import conv_transpose3d
from toy import toy_architecture

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights.transfer import TransferReport, transfer_weights

WIDTHS = (4, 8, 8, 16, 32)
ISOTROPIC = ((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
FLAT_AT_FIRST = ((1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 2, 2), (2, 2, 2))
ATTENDING = [*(f"encoder.stages.{i}" for i in (2, 3, 4)), *(f"decoder.stages.{i}" for i in (2, 3))]
TABLES = [f"{s}.block.swin.blocks.{b}.attn.relative_position_bias_table" for s in ATTENDING for b in (0, 1)]


def pct_net(seed: int, channels: int = 1, classes: int = 3, **options: Any) -> PCTNet:
    torch.manual_seed(seed)
    options = {"features_per_stage": WIDTHS, "num_heads": (2, 2, 4), "window_size": 2, **options}
    network = PCTNet(channels, classes, **options)
    for buffer in network.buffers():  # as after training
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return network


def unet(seed: int, channels: int = 1, classes: int = 3, stages: int = 3, residual: bool = False, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    entry = toy_architecture(stages, residual)
    kwargs, imported = {**entry["arch_kwargs"], **kwargs}, entry["_kw_requires_import"]
    return get_network_from_plans(
        entry["network_class_name"], kwargs, imported, channels, classes, deep_supervision=True
    )


def residual_unet(seed: int, **options: Any) -> Any:
    return unet(seed, residual=True, **options)


ALL_KINDS = pytest.mark.parametrize("make", [pct_net, unet, residual_unet])


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def unchanged(network: nn.Module, before: dict[str, torch.Tensor], names: Sequence[str] | None = None) -> bool:
    now = network.state_dict()
    assert list(now) == list(before)
    return all(torch.equal(now[name], before[name]) for name in (before if names is None else names))


def heads(network: nn.Module) -> list[str]:
    return [name for name, _ in network.named_parameters() if ".seg_layers." in name]


class Tiny(nn.Module):
    """A convolution, a norm, a linear layer and a head."""

    def __init__(self, channels: int = 1, width: int = 2, hidden: int = 5, classes: int = 2) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv3d(channels, width, 3, padding=1), nn.BatchNorm3d(width))
        self.decoder = nn.Module()
        self.decoder.mix = nn.Linear(width, hidden)
        self.decoder.seg_layers = nn.ModuleList([nn.Linear(hidden, classes)])


# The account


def test_account_lists_every_tensor_once_and_the_share_is_that_of_the_parameters() -> None:
    source, network = Tiny(classes=7), Tiny()
    source.encoder[1].running_mean.fill_(3.0)
    before = snapshot(network)
    report = transfer_weights(source.state_dict(), network)
    assert report.moved == [
        "encoder.0.weight", "encoder.0.bias", "encoder.1.weight", "encoder.1.bias", "decoder.mix.weight",
        "decoder.mix.bias", "encoder.1.running_mean", "encoder.1.running_var", "encoder.1.num_batches_tracked",
    ]  # fmt: skip
    assert report.fresh == {f"decoder.seg_layers.0.{p}": "output head" for p in ("weight", "bias")}
    assert (report.adapted, report.share, report.transfer) == ({}, 1.0, "all")
    assert unchanged(network, {**before, **{n: source.state_dict()[n] for n in report.moved}})
    assert report.summary() == "9 tensors moved, 0 adapted, 2 left fresh; 100.0 % of the parameters (heads aside)"
    expected = {"transfer": "all", "moved": report.moved, "adapted": {}, "fresh": report.fresh, "share": 1.0}
    assert report.as_dict() == expected


def test_share_counts_scalars_of_parameters_heads_and_buffers_aside() -> None:
    # wanted: convolution 2 * 27 + 2, norm 2 + 2, linear 2 * 5 + 5 = 75; the file's linear layer has another width
    report = transfer_weights(Tiny(hidden=6).state_dict(), Tiny())
    assert report.share == (75 - 15) / 75
    assert report.fresh["decoder.mix.weight"] == "shape (6, 2) in the file, (5, 2) in the network"
    without = {name: t for name, t in Tiny().state_dict().items() if name != "encoder.1.weight"}
    report = transfer_weights(without, Tiny(), "encoder")
    assert report.share == (60 - 2) / 60
    assert report.fresh["encoder.1.weight"] == "not in the file"
    assert report.fresh["decoder.mix.bias"] == "outside the encoder"


@pytest.mark.parametrize(("hidden", "enough"), [(14, True), (15, False)])
def test_half_of_the_parameters_is_the_least_that_is_taken(hidden: int, enough: bool) -> None:
    source, network = Tiny(hidden=1), Tiny(width=2, hidden=hidden)
    network.encoder[0] = nn.Conv3d(1, 2, 3, bias=False)  # 54 parameters move, and 4 of the norm
    network.decoder.extra = nn.Linear(1, 16, bias=False)  # 16 do not, nor do 3 * hidden of the linear layer
    before = snapshot(network)
    if enough:
        assert transfer_weights(source.state_dict(), network).share == 58 / 116
    else:
        with pytest.raises(MisfmError, match=r"only 48.7 % of its parameters fit the file \(at least 50 % needed"):
            transfer_weights(source.state_dict(), network)
        assert unchanged(network, before)


def test_too_little_gets_a_sentence_and_leaves_the_network_bitwise() -> None:
    network = pct_net(0)
    before = snapshot(network)
    wider = pct_net(1, features_per_stage=(6, 12, 12, 24, 48)).state_dict()
    heads_alone = {name: t for name, t in pct_net(1).state_dict().items() if ".seg_layers." in name}
    missing, misfit = "not in the file", "shape (6, 1, 3, 3, 3) in the file, (4, 1, 3, 3, 3) in the network"
    for source, why in (({}, missing), (unet(1).state_dict(), missing), (wider, misfit), (heads_alone, missing)):
        for transfer in ("all", "encoder"):
            with pytest.raises(MisfmError, match="expected weights of the same network, but only") as refusal:
                transfer_weights(source, network, transfer)
            assert f"the first misfit is encoder.stem.weight: {why}); use a checkpoint" in str(refusal.value)
            assert unchanged(network, before)


@pytest.mark.parametrize("residual", [False, True])
def test_the_other_kind_of_unet_is_refused(residual: bool) -> None:
    network = unet(0, residual=residual)
    before = snapshot(network)
    with pytest.raises(MisfmError, match="expected weights of the same network"):
        transfer_weights(unet(1, residual=not residual).state_dict(), network, "encoder")
    assert unchanged(network, before)


def test_network_without_an_encoder_gets_a_sentence_where_one_is_asked_for() -> None:
    with pytest.raises(MisfmError, match="the first misfit is the network: it has no parameters to fill"):
        transfer_weights({"0.weight": torch.zeros(2, 2)}, nn.Sequential(nn.Linear(2, 2)), "encoder")


# Real networks


@ALL_KINDS
@pytest.mark.parametrize("classes", [3, 5])
def test_all_but_the_heads_moves_whatever_the_number_of_classes(make: Any, classes: int) -> None:
    source, network = make(1, classes=classes), make(2, classes=3)
    before, given = snapshot(network), snapshot(source)
    report = transfer_weights(given, network)
    assert (report.adapted, report.share, sorted(report.fresh)) == ({}, 1.0, sorted(heads(network)))
    assert unchanged(source, given)
    now = network.state_dict()
    for name, tensor in now.items():  # every name, those under which a tensor is registered again too
        expected = before if ".seg_layers." in name else given
        assert torch.equal(tensor, expected[name]), name


@ALL_KINDS
def test_encoder_alone_leaves_the_decoder_bitwise(make: Any) -> None:
    source, network = make(1), make(2)
    before, given = snapshot(network), source.state_dict()
    report = transfer_weights(given, network, "encoder")
    # the U-Nets' decoders hold the encoder a second time
    own = [n for n in before if n.startswith("decoder.") and not n.startswith("decoder.encoder.")]
    assert own and unchanged(network, before, own)
    for name in before.keys() - set(own):
        assert torch.equal(network.state_dict()[name], given[name])
    assert report.share == 1.0
    assert all(name.startswith("encoder.") for name in report.moved)
    assert {why for n, why in report.fresh.items() if n not in heads(network)} == {"outside the encoder"}


def test_half_precision_in_the_file_fills_full_precision() -> None:
    network, given = (
        pct_net(2),
        {n: t.half() if t.is_floating_point() else t for n, t in pct_net(1).state_dict().items()},
    )
    transfer_weights(given, network)
    assert network.encoder.stem.weight.dtype == torch.float32
    assert torch.equal(network.encoder.stem.weight, given["encoder.stem.weight"].float())


# Input channels


@ALL_KINDS
@pytest.mark.parametrize(("given", "wanted"), [(1, 3), (3, 1), (2, 3)])
def test_equal_channels_give_the_same_output_under_another_number_of_channels(
    make: Any, given: int, wanted: int
) -> None:
    source, network = make(1, channels=given).eval(), make(2, channels=wanted).eval()
    # another order of the file's tensors must not matter
    report = transfer_weights(dict(sorted(source.state_dict().items())), network)
    shape = [next(p for p in n.parameters() if p.ndim == 5).shape for n in (source, network)]
    (how,) = report.adapted.values()
    assert how == f"input channels adapted: {tuple(shape[0])} -> {tuple(shape[1])}"
    assert report.share == 1.0
    network.decoder.seg_layers.load_state_dict(source.decoder.seg_layers.state_dict())
    x = torch.randn(2, 1, 16, 16, 16)
    for a, b in zip(network(x.repeat(1, wanted, 1, 1, 1)), source(x.repeat(1, given, 1, 1, 1)), strict=True):
        assert torch.allclose(a, b, atol=1e-4)


def test_new_channels_weigh_the_same_and_sum_to_the_files() -> None:
    source, network = pct_net(1, channels=2), pct_net(2, channels=3)
    transfer_weights(source.state_dict(), network)
    given, made = source.encoder.stem.weight, network.encoder.stem.weight
    for channel in range(3):
        assert torch.allclose(made[:, channel], (given[:, 0] + given[:, 1]) / 3)


@pytest.mark.parametrize(("given", "images", "labels"), [(1, 1, 2), (1, 2, 3), (2, 1, 1), (3, 1, 1)])
def test_label_channels_of_a_cascade_start_at_zero(given: int, images: int, labels: int) -> None:
    source, network = pct_net(1, channels=given).eval(), pct_net(2, channels=images + labels).eval()
    report = transfer_weights(source.state_dict(), network, num_label_channels=labels)
    assert list(report.adapted) == ["encoder.stem.weight"]
    weight = network.encoder.stem.weight
    assert (weight[:, images:] == 0).all()
    if given == images:
        assert torch.equal(weight[:, :images], source.encoder.stem.weight)
    x, anything = torch.randn(1, 1, 8, 8, 8), torch.randn(1, labels, 8, 8, 8)
    made = network.encoder.stem(torch.cat([x.repeat(1, images, 1, 1, 1), anything], 1))
    assert torch.allclose(made, source.encoder.stem(x.repeat(1, given, 1, 1, 1)), atol=1e-5)


# Kernels


class OneConvolution(nn.Module):
    """A convolution behind another, so that it is not the first."""

    def __init__(self, kernel: Any, transposed: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 2, 1)
        kind = nn.ConvTranspose3d if transposed else nn.Conv3d
        options = {"stride": kernel} if transposed else {"padding": [k // 2 for k in kernel]}
        self.layer = kind(2, 4, kernel, **options)


def resized(given: Sequence[int], wanted: Sequence[int], transposed: bool = False) -> tuple[Any, Any]:
    torch.manual_seed(0)
    source, network = OneConvolution(given, transposed), OneConvolution(wanted, transposed)
    report = transfer_weights(source.state_dict(), network)
    assert list(report.adapted) == ["layer.weight"] and report.share == 1.0
    return source.layer, network.layer


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flat_kernel_made_thick_is_the_same_function(axis: int) -> None:
    flat = [3, 3, 3]
    flat[axis] = 1
    source, network = resized(flat, (3, 3, 3))
    x = torch.randn(2, 2, 5, 6, 7)
    assert torch.allclose(network(x), source(x), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_thick_kernel_made_flat_answers_the_same_to_what_is_constant_along_the_axis(axis: int) -> None:
    flat = [3, 3, 3]
    flat[axis] = 1
    source, network = resized((3, 3, 3), flat)
    shape = [2, 2, 5, 5, 5]
    shape[2 + axis] = 1
    x = torch.randn(shape).expand(2, 2, 5, 5, 5)
    # at the border the thick kernel sees its padding
    made, expected = (layer(x).narrow(2 + axis, 1, 3) for layer in (network, source))
    assert torch.allclose(made, expected, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_transposed_kernel_made_thick_repeats_its_output(axis: int) -> None:
    flat = [2, 2, 2]
    flat[axis] = 1
    source, network = resized(flat, (2, 2, 2), transposed=True)
    x = torch.randn(1, 2, 3, 4, 5)
    assert torch.allclose(network(x), source(x).repeat_interleave(2, 2 + axis), atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_transposed_kernel_made_flat_gives_the_mean_of_the_pair(axis: int) -> None:
    flat = [2, 2, 2]
    flat[axis] = 1
    source, network = resized((2, 2, 2), flat, transposed=True)
    x = torch.randn(1, 2, 3, 4, 5)
    pairs = conv_transpose3d(x, source.weight, source.bias, (2, 2, 2)).unflatten(2 + axis, (-1, 2))
    assert torch.allclose(network(x), pairs.mean(3 + axis), atol=1e-6)


def test_kernels_of_other_sizes_stay_fresh() -> None:
    source, network = OneConvolution((3, 3, 3)), OneConvolution((5, 5, 5))
    source.first, network.first = nn.Conv3d(1, 1000, 1), nn.Conv3d(1, 1000, 1)  # so that enough moves
    before = snapshot(network)
    report = transfer_weights(source.state_dict(), network)
    assert report.fresh == {"layer.weight": "shape (4, 2, 3, 3, 3) in the file, (4, 2, 5, 5, 5) in the network"}
    assert unchanged(network, before, ["layer.weight"])


def adapted_and_runs(source: nn.Module, network: nn.Module, size: Sequence[int] = (8, 16, 16)) -> TransferReport:
    report = transfer_weights(source.state_dict(), network)
    assert report.share == 1.0 and sorted(report.fresh) == sorted(heads(network))
    outputs = network.eval()(torch.randn(1, 1, *size))
    assert outputs[0].shape == (1, 3, *size) and all(torch.isfinite(o).all() for o in outputs)
    return report


@pytest.mark.parametrize("flatten", [True, False])
def test_pct_net_of_another_anisotropy_adapts_level_0_and_runs(flatten: bool) -> None:
    strides = (ISOTROPIC, FLAT_AT_FIRST) if flatten else (FLAT_AT_FIRST, ISOTROPIC)
    report = adapted_and_runs(*(pct_net(seed, strides=s) for seed, s in enumerate(strides)))
    level_0 = ["stem", "stages.0.block.conv1", "stages.0.block.conv2"]
    decoder_0 = ["up.up", "up.conv", "block.conv1", "block.conv2"]
    expected = [f"encoder.{n}.weight" for n in level_0] + [f"decoder.stages.0.{n}.weight" for n in decoder_0]
    assert sorted(report.adapted) == sorted(expected)
    thick, flat = "(4, 1, 3, 3, 3)", "(4, 1, 1, 3, 3)"
    given, wanted = (thick, flat) if flatten else (flat, thick)
    assert report.adapted["encoder.stem.weight"] == f"kernel resized: {given} -> {wanted}"


@pytest.mark.parametrize("residual", [False, True])
def test_unet_of_another_anisotropy_adapts_and_runs(residual: bool) -> None:
    flat = {"kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]], "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]]}
    for source, network in (({}, flat), (flat, {})):
        report = adapted_and_runs(unet(1, residual=residual, **source), unet(2, residual=residual, **network))
        assert "decoder.transpconvs.1.weight" in report.adapted
        assert "decoder.transpconvs.0.weight" in report.moved


def test_stem_adapts_kernel_and_channels_at_once() -> None:
    source, network = pct_net(1, strides=FLAT_AT_FIRST), pct_net(2, channels=3)
    report = transfer_weights(source.state_dict(), network)
    sentence = "kernel resized and input channels adapted: (4, 1, 1, 3, 3) -> (4, 3, 3, 3, 3)"
    assert report.adapted["encoder.stem.weight"] == sentence
    x = torch.randn(1, 1, 6, 6, 6)
    assert torch.allclose(network.encoder.stem(x.repeat(1, 3, 1, 1, 1)), source.encoder.stem(x), atol=1e-6)


# U-Nets of another depth


@pytest.mark.parametrize(("given", "wanted"), [(4, 3), (3, 4), (5, 3)])
def test_decoder_of_another_depth_is_matched_level_by_level(given: int, wanted: int) -> None:
    # equal widths throughout, so that no shape tells the levels apart
    source, network = (unet(i, stages=n, features_per_stage=[4] * n) for i, n in enumerate((given, wanted)))
    before = snapshot(network)
    report = transfer_weights(source.state_dict(), network)
    for level in range(wanted - 1):  # nnU-Net numbers its decoder from the deepest level on
        there, here = given - 2 - level, wanted - 2 - level
        for part in ("stages.{}.convs.0.conv", "transpconvs.{}"):
            name, origin = (f"decoder.{part.format(i)}.weight" for i in (here, there))
            if level < given - 1:
                assert torch.equal(network.state_dict()[name], source.state_dict()[origin])
                assert report.adapted[name] == f"from {origin}"
            else:
                assert unchanged(network, before, [name]) and report.fresh[name] == "not in the file"
    assert (report.share == 1.0) == (given > wanted)


# Attention windows and patch sizes


def test_every_patch_size_is_served_by_the_same_tensors() -> None:
    source, network = pct_net(1), pct_net(2)
    source(torch.randn(2, 1, 16, 16, 16))
    report = transfer_weights(source.state_dict(), network)
    assert (report.adapted, report.share) == ({}, 1.0)
    for size in ((20, 12, 8), (16, 16, 16)):
        assert network.eval()(torch.randn(1, 1, *size))[0].shape == (1, 3, *size)


@pytest.mark.parametrize(("given", "wanted"), [(2, 3), (3, 2), (2, 4)])
def test_table_of_another_window_keeps_the_bias_of_every_shared_offset(given: int, wanted: int) -> None:
    source, network = pct_net(1, window_size=given), pct_net(2, window_size=wanted)
    report = transfer_weights(source.state_dict(), network)
    assert sorted(report.adapted) == sorted(TABLES) and len(TABLES) == 10
    rows = (2 * given - 1) ** 3, (2 * wanted - 1) ** 3
    attention = [n.encoder.stages[3].block.swin.blocks[1].attn for n in (source, network)]
    name = "encoder.stages.3.block.swin.blocks.1.attn.relative_position_bias_table"
    assert report.adapted[name] == f"position table re-indexed: ({rows[0]}, 2) -> ({rows[1]}, 2)"
    biases = []
    for module, window in zip(attention, (given, wanted), strict=True):
        matrix = module.position_bias((window, window, window))
        tokens = list(itertools.product(range(window), repeat=3))
        by_offset = {}
        for i, query in enumerate(tokens):
            for j, key in enumerate(tokens):
                by_offset[tuple(a - b for a, b in zip(query, key, strict=True))] = matrix[:, i, j]
        biases.append(by_offset)
    assert (len(biases[0]), len(biases[1])) == rows
    for offset, bias in biases[1].items():
        assert torch.equal(bias, biases[0].get(offset, torch.zeros(2)))


def test_table_that_is_no_cube_stays_fresh() -> None:
    network = pct_net(2)
    before = snapshot(network)
    given = pct_net(1).state_dict()
    for name in TABLES:
        given[name] = torch.zeros(28, given[name].shape[1])
    report = transfer_weights(given, network)
    assert unchanged(network, before, TABLES)
    assert report.fresh[TABLES[0]] == "shape (28, 2) in the file, (27, 2) in the network"


def test_labels_of_a_former_cascade_never_pass_for_images() -> None:
    source = {"encoder.weight": torch.tensor([1.0, 100.0, 200.0]).reshape(1, 3, 1, 1, 1)}  # image, two labels

    def moved(num_channels: int, num_labels: int) -> list[float]:
        network = nn.ModuleDict({"encoder": nn.Conv3d(num_channels, 1, 1, bias=False)})
        transfer_weights(source, network, num_label_channels=num_labels, num_source_label_channels=2)
        return network["encoder"].weight.flatten().tolist()

    assert moved(3, 2) == [1.0, 100.0, 200.0]  # the same cascade
    assert moved(1, 0) == [1.0]
    assert moved(2, 1) == [1.0, 0.0]
    assert moved(4, 2) == [0.5, 0.5, 0.0, 0.0]  # two image channels
