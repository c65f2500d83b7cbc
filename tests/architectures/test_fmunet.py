import json
import math
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv3d

from nnunetv2_misfm.architectures import FMUNet
from nnunetv2_misfm.architectures.anisotropy import grid_sizes
from nnunetv2_misfm.architectures.dropout import Dropout

POOL, FLAT = (2, 2, 2), (1, 2, 2)
MODES = {
    0: ((1, 1, 1), POOL, POOL, POOL, POOL),
    1: ((1, 1, 1), FLAT, POOL, POOL, POOL),
    2: ((1, 1, 1), FLAT, FLAT, POOL, POOL),
}
WIDTHS = (4, 4, 6, 8, 10)
NO_DROPOUT = (0.0,) * 5


def tiny_net(**kwargs) -> FMUNet:
    torch.manual_seed(0)
    return FMUNet(**{"input_channels": 1, "num_classes": 3, "features_per_stage": WIDTHS, **kwargs})


def assert_close(actual: list[Tensor], expected: list[Tensor], atol: float = 1e-5) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("input_size", "strides"),
    [
        ((32, 32, 32), MODES[0]),
        ((48, 16, 24), MODES[0]),
        ((17, 33, 47), MODES[0]),
        ((16, 48, 48), MODES[1]),
        ((19, 33, 30), MODES[1]),
        ((16, 16, 16), MODES[2]),
        ((5, 31, 48), MODES[2]),
        ((48, 16, 32), ((1, 1, 1), (2, 1, 2), (2, 1, 2), POOL, POOL)),
        ((33, 32, 16), ((1, 1, 1), (2, 2, 1), POOL, POOL, POOL)),
        ((1, 17, 32), MODES[0]),
    ],
)
@torch.inference_mode()
def test_outputs_have_the_size_of_the_input_divided_and_rounded_up(input_size, strides) -> None:
    expected = []
    for level in range(4):
        steps = [math.prod(axis) for axis in zip(*strides[: level + 1], strict=True)]
        expected.append([math.ceil(size / step) for size, step in zip(input_size, steps, strict=True)])
    assert [list(grid) for grid in grid_sizes(input_size, strides)[:4]] == expected
    outputs = tiny_net(strides=strides, input_channels=2).eval()(torch.randn(1, 2, *input_size))
    assert [list(output.shape) for output in outputs] == [[1, 3, *size] for size in expected]
    assert all(output.isfinite().all() for output in outputs)


def resampled(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Linear interpolation axis by axis, first and last voxel on first and last voxel."""
    for axis, new in enumerate(size, start=2):
        old = x.shape[axis]
        matrix = torch.zeros(new, old, dtype=x.dtype)
        for i in range(new):
            at = i * (old - 1) / max(new - 1, 1)
            low = min(int(at), old - 1)
            matrix[i, low] += 1 - (at - low)
            matrix[i, min(low + 1, old - 1)] += at - low
        x = torch.tensordot(x, matrix, dims=([axis], [1])).movedim(-1, axis)
    return x


def slow_outputs(state: dict[str, Tensor], x: Tensor, strides: tuple[tuple[int, ...], ...]) -> list[Tensor]:
    """The network written out from the fact sheet, on the keys of the state dict."""

    def conv(x: Tensor, key: str, stride: tuple[int, ...] = (1, 1, 1)) -> Tensor:
        weight = state[f"{key}.weight"]
        return conv3d(x, weight, state[f"{key}.bias"], stride, [n // 2 for n in weight.shape[2:]])

    def norm_act(x: Tensor, key: str) -> Tensor:
        centred = x - x.mean((2, 3, 4), keepdim=True)
        x = centred / (centred.square().mean((2, 3, 4), keepdim=True) + 1e-5).sqrt()
        x = x * state[f"{key}.weight"].reshape(1, -1, 1, 1, 1) + state[f"{key}.bias"].reshape(1, -1, 1, 1, 1)
        return torch.where(x > 0, x, 0.01 * x)

    def block(x: Tensor, key: str) -> Tensor:
        for i in range(2):
            x = x + conv(norm_act(x, f"{key}.conv_list.{i}.0"), f"{key}.conv_list.{i}.3")
        return x

    features = [block(conv(x, "encoder.project"), "encoder.en_conv0")]
    for level in range(4):
        down = f"encoder.down{level}.down"
        low = conv(norm_act(features[-1], f"{down}.0"), f"{down}.2", strides[level + 1])
        features.append(block(low, f"encoder.en_conv{level + 1}"))
    x, outputs = block(features[4], "decoder.de_conv4"), []
    for level in (3, 2, 1, 0):
        key, skip = f"decoder.upcat{level}", features[level]
        up = resampled(conv(norm_act(x, f"{key}.up.0"), f"{key}.up.2"), skip.shape[2:])
        x = conv(norm_act(torch.cat([skip, up], 1), f"{key}.conv.0"), f"{key}.conv.2")
        x = block(x, f"decoder.de_conv{level}")
        outputs = [conv(norm_act(x, f"decoder.seg_norms.{level}"), f"decoder.seg_layers.{level}"), *outputs]
    return outputs


@pytest.mark.parametrize(("mode", "size"), [(0, (19, 16, 33)), (1, (16, 32, 21)), (2, (7, 18, 32))])
def test_outputs_and_gradients_are_those_of_the_network_written_out(mode: int, size: tuple[int, ...]) -> None:
    net = tiny_net(strides=MODES[mode], dropout_per_stage=NO_DROPOUT).double()
    for name, p in net.named_parameters():  # norms that do something
        if p.ndim == 1:
            nn.init.normal_(p, mean=float("weight" in name), std=0.3)
    image = torch.randn(2, 1, *size, dtype=torch.float64, requires_grad=True)
    outputs, expected = net(image), slow_outputs(dict(net.named_parameters()), image, MODES[mode])
    assert_close(outputs, expected, atol=1e-9)
    gradients = [torch.autograd.grad(sum(o.sin().mean() for o in each), image)[0] for each in (outputs, expected)]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-9 * gradients[1].abs().max()


@torch.inference_mode()
def test_one_state_dict_serves_every_patch_size() -> None:
    first, second = tiny_net().eval(), tiny_net().eval()
    nn.init.normal_(second.encoder.project.weight)
    first(torch.randn(1, 1, 16, 24, 40))
    second.load_state_dict(first.state_dict())
    for size in ((16, 24, 40), (33, 20, 16)):
        image = torch.randn(1, 1, *size)
        assert_close(second(image), first(image), atol=0)


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_every_parameter_gets_a_gradient(mode: int) -> None:
    net = tiny_net(strides=MODES[mode])
    sum(output.square().sum() for output in net(torch.randn(2, 1, 32, 16, 16))).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None] == []


@torch.inference_mode()
def test_without_deep_supervision_only_head_zero_is_computed() -> None:
    net = tiny_net().eval()
    image = torch.randn(1, 1, 16, 16, 32)
    computed: list[int] = []
    for level, layer in enumerate(net.decoder.seg_layers):
        layer.register_forward_hook(lambda *_, level=level: computed.append(level))
    heads = net(image)
    assert isinstance(heads, list) and len(heads) == 4 and computed == [3, 2, 1, 0]
    assert net.decoder.deep_supervision is True
    net.decoder.deep_supervision = False
    assert torch.equal(net(image), heads[0])
    assert computed[4:] == [0]
    assert tiny_net(deep_supervision=False).state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("mode", "depth", "total"),
    [  # measured on the official code: 1 channel, 5 classes
        (0, 2, 47_371_572),
        (1, 2, 47_220_660),
        (2, 2, 46_625_076),
        (0, 3, 66_233_460),
        (1, 3, 66_045_684),
        (2, 3, 65_302_644),
    ],
)
def test_parameters_are_those_of_the_released_network(mode: int, depth: int, total: int) -> None:
    with torch.device("meta"):
        net = FMUNet(input_channels=1, num_classes=5, strides=MODES[mode], depth=depth)
    assert sum(p.numel() for p in net.parameters()) == total
    assert len(net.state_dict()) == {2: 146, 3: 186}[depth]


def test_parts_have_the_released_sizes() -> None:
    with torch.device("meta"):
        net = FMUNet(input_channels=1, num_classes=5)
    sizes = {
        "encoder.project": [896],
        "encoder.en_conv": [55_488, 221_568, 885_504, 3_540_480, 14_158_848],
        "decoder.de_conv": [55_488, 221_568, 885_504, 3_540_480, 14_158_848],
        "encoder.down": [55_424, 221_440, 885_248, 3_539_968],
        "decoder.upcat": [57_664, 230_016, 918_784, 3_672_576],
    }
    for prefix, expected in sizes.items():
        names = [prefix] if len(expected) == 1 else [f"{prefix}{level}" for level in range(len(expected))]
        assert [sum(p.numel() for p in net.get_submodule(name).parameters()) for name in names] == expected
    heads = [[*net.decoder.seg_norms[i].parameters(), *net.decoder.seg_layers[i].parameters()] for i in range(4)]
    assert [sum(p.numel() for p in head) for head in heads] == [4_389, 8_773, 17_541, 35_077]


@pytest.mark.parametrize(
    ("strides", "level_0", "level_1", "num_changed"),
    [
        (MODES[0], (3, 3, 3), (3, 3, 3), 0),
        (MODES[1], (1, 3, 3), (3, 3, 3), 8),
        (MODES[2], (1, 3, 3), (1, 3, 3), 15),
        (((1, 1, 1), (2, 2, 1), (2, 2, 1), POOL, POOL), (3, 3, 1), (3, 3, 1), 15),
        (((1, 1, 1), (2, 1, 2), POOL, POOL, POOL), (3, 1, 3), (3, 3, 3), 8),
    ],
)
def test_kernels_are_flat_along_axes_that_are_not_yet_pooled(strides, level_0, level_1, num_changed) -> None:
    net = tiny_net(strides=strides)
    convolutions = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv3d)}
    assert {m.kernel_size for name, m in convolutions.items() if ".up." in name} == {(1, 1, 1)}
    for level in range(5):
        parts = [f"encoder.en_conv{level}.", f"encoder.down{level}.", f"decoder.de_conv{level}."]
        parts += [f"decoder.upcat{level}.conv.", f"decoder.seg_layers.{level}"] + ["encoder.project"] * (level == 0)
        found = {name: m for name, m in convolutions.items() if name.startswith(tuple(parts))}
        assert len(found) == {0: 8, 4: 4}.get(level, 7)
        assert {m.kernel_size for m in found.values()} == {{0: level_0, 1: level_1}.get(level, (3, 3, 3))}
        downs = [m.stride for name, m in found.items() if ".down." in name]
        assert downs == list(strides[level + 1 : level + 2])
    reference, shapes = tiny_net().state_dict(), net.state_dict()
    assert reference.keys() == shapes.keys()
    assert sum(reference[key].shape != shapes[key].shape for key in reference) == num_changed


def test_weights_start_as_released() -> None:
    net = tiny_net(features_per_stage=(8, 8, 16, 32, 64))
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv3d):
            fan_in = module.weight[0].numel()
            if module.weight.numel() > 20_000:
                assert module.weight.std().item() == pytest.approx(math.sqrt(2 / (1.0001 * fan_in)), rel=0.03), name
            assert not module.bias.any()
        if isinstance(module, nn.InstanceNorm3d):
            assert (module.weight == 1).all() and not module.bias.any() and module.running_mean is None


def test_dropout_stands_before_each_convolution_of_the_three_deep_levels() -> None:
    rates = {name: m.probability for name, m in tiny_net().named_modules() if isinstance(m, Dropout)}
    assert len(rates) == 2 * 5 * 2
    for name, rate in rates.items():
        level = int(name.split("_conv", 1)[1][0])
        assert name.endswith(".2") and rate == (0.2 if level >= 2 else 0)
    net, image = tiny_net(), torch.randn(1, 1, 32, 16, 16)
    assert not torch.equal(net(image)[0], net(image)[0])
    net.eval()
    assert torch.equal(net(image)[0], net(image)[0])


def test_only_the_heads_convolutions_depend_on_the_classes_and_only_the_stem_on_the_channels() -> None:
    reference = {key: value.shape for key, value in tiny_net().state_dict().items()}
    assert next(iter(reference)) == "encoder.project.weight"
    classes = tiny_net(num_classes=7).state_dict()
    changed = {key for key, shape in reference.items() if classes[key].shape != shape}
    assert changed == {key for key in reference if ".seg_layers." in key}
    assert changed == {f"decoder.seg_layers.{level}.{leaf}" for level in range(4) for leaf in ("weight", "bias")}
    channels = tiny_net(input_channels=2).state_dict()
    assert {key for key, shape in reference.items() if channels[key].shape != shape} == {"encoder.project.weight"}


def test_arguments_survive_json() -> None:
    kwargs = {
        "features_per_stage": WIDTHS,
        "strides": MODES[1],
        "depth": 3,
        "dropout_per_stage": (0.0, 0.0, 0.1, 0.1, 0.1),
        "deep_supervision": True,
    }
    image = torch.randn(1, 1, 16, 16, 32)
    with torch.inference_mode():
        original = tiny_net(**kwargs).eval()(image)
        assert_close(tiny_net(**json.loads(json.dumps(kwargs))).eval()(image), original, atol=0)


@torch.inference_mode()
def test_samples_of_a_batch_do_not_see_each_other() -> None:
    net = tiny_net().eval().double()
    batch = torch.randn(3, 1, 30, 16, 18, dtype=torch.float64)
    together = net(batch)
    for index in range(3):
        assert_close([output[index : index + 1] for output in together], net(batch[index : index + 1]), atol=1e-9)


def test_compiles_into_one_graph_without_warning() -> None:
    net = tiny_net(dropout_per_stage=NO_DROPOUT)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    image = torch.randn(1, 1, 32, 16, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for training in (True, False):
            net.train(training)
            assert_close(compiled(image), net(image))


@torch.inference_mode()
def test_runs_under_autocast_to_bfloat16() -> None:
    net = tiny_net().eval()
    image = torch.randn(1, 1, 32, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(image)
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    for output, expected in zip(outputs, net(image), strict=True):
        assert (output - expected).abs().mean() < 0.1 * expected.abs().mean()  # 8 bits of mantissa, 26 layers


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize(("mode", "depth"), [(0, 2), (1, 1), (2, 3)])
@torch.inference_mode()
def test_feature_map_size_counts_what_the_convolutions_put_out(mode: int, depth: int, deep_supervision: bool) -> None:
    net = tiny_net(strides=MODES[mode], depth=depth, deep_supervision=deep_supervision).eval()
    counted = []
    for module in net.modules():
        if isinstance(module, nn.Conv3d):
            module.register_forward_hook(lambda _module, _inputs, output: counted.append(output.numel()))
    net(torch.randn(1, 1, 20, 17, 24))
    size = net.compute_conv_feature_map_size((20, 17, 24))
    assert type(size) is int and size == sum(counted)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"features_per_stage": (4, 8, 8, 16)}, "features_per_stage: FMUNet needs 5 entries, got 4"),
        ({"features_per_stage": (4, 8, 0, 16, 16)}, "features_per_stage: expected at least 1 channel, got .*0"),
        ({"strides": MODES[0][:4]}, "strides: FMUNet needs 5 entries, got 4"),
        ({"strides": ((1, 1),) + MODES[0][1:]}, r"expected three values \(D, H, W\), got \(1, 1\)"),
        ({"strides": (POOL,) + MODES[0][1:]}, r"strides: the first entry must be \(1, 1, 1\), got \(2, 2, 2\)"),
        ({"strides": MODES[0][:4] + ((3, 2, 2),)}, "strides: FMUNet pools by 1 or 2"),
        ({"depth": 0}, "depth: expected at least 1 convolution per block, got 0"),
        ({"dropout_per_stage": (0.2,)}, "dropout_per_stage: FMUNet needs 5 entries, got 1"),
        ({"dropout_per_stage": (0, 0, 0, 0, 1)}, r"dropout_per_stage: expected probabilities in \[0, 1\)"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_net(**kwargs)


def test_an_image_that_is_not_3d_is_refused() -> None:
    with pytest.raises(ValueError, match=r"FMUNet is a 3D network: .* got shape \(1, 1, 32, 32\)"):
        tiny_net()(torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize("training", [True, False])
def test_a_single_bottleneck_voxel_is_refused_whatever_the_batch_and_two_are_not(training: bool) -> None:
    net = tiny_net().train(training)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 16, 16, 16\) leaves at the deepest level: use a larger patch"):
        net(torch.randn(2, 1, 16, 16, 16))
    assert len(net(torch.randn(1, 1, 16, 16, 17))) == 4
