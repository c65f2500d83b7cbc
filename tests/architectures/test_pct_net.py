import json
import math

import pytest
import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures.anisotropy import grid_sizes
from nnunetv2_misfm.architectures.pct_net import PCTNet
from nnunetv2_misfm.architectures.window_attention import cached_attention_mask

POOL, FLAT = (2, 2, 2), (1, 2, 2)
MODES = {
    0: ((1, 1, 1), POOL, POOL, POOL, POOL),
    1: ((1, 1, 1), FLAT, POOL, POOL, POOL),
    2: ((1, 1, 1), FLAT, FLAT, POOL, POOL),
}
TINY = {"features_per_stage": (4, 8, 8, 16, 32), "num_heads": (2, 2, 4)}


def tiny_net(**kwargs) -> PCTNet:
    torch.manual_seed(0)
    return PCTNet(**{"input_channels": 1, "num_classes": 3, **TINY, **kwargs})


def assert_close(actual: list[Tensor], expected: list[Tensor], atol: float = 1e-5) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("input_size", "strides"),
    [
        ((32, 32, 32), MODES[0]),
        ((48, 16, 24), MODES[0]),
        ((40, 28, 20), MODES[0]),
        ((17, 33, 47), MODES[0]),
        ((16, 48, 48), MODES[1]),
        ((19, 33, 30), MODES[1]),
        ((16, 48, 32), MODES[2]),
        ((5, 31, 48), MODES[2]),
        ((48, 16, 32), ((1, 1, 1), (2, 1, 2), (2, 1, 2), POOL, POOL)),
        ((33, 32, 16), ((1, 1, 1), (2, 2, 1), POOL, POOL, POOL)),
        ((1, 32, 32), MODES[2]),
        ((24, 1, 17), MODES[0]),
        ((20, 16, 1), MODES[0]),
        ((1, 1, 1), MODES[0]),
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


@pytest.mark.parametrize("window_shrink", ["per_axis", "cube"])
def test_trained_at_one_patch_size_it_predicts_at_every_other(window_shrink: str) -> None:
    trained = tiny_net(window_shrink=window_shrink).train()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
    sum(output.square().mean() for output in trained(torch.randn(2, 1, 16, 24, 40))).backward()
    optimizer.step()
    trained.eval()
    # 16 is the least; tokens at level 2: fewer than a window of 6, a multiple of it, and neither
    for size in ((16, 24, 40), (16, 16, 16), (17, 33, 20), (48, 24, 16), (5, 31, 48)):
        fresh = tiny_net(window_shrink=window_shrink).eval()
        fresh.load_state_dict(trained.state_dict())
        cached_attention_mask.cache_clear()
        image = torch.randn(1, 1, *size)
        with torch.inference_mode():
            expected = fresh(image)
            cached_attention_mask.cache_clear()
            assert_close(trained(image), expected, atol=0)
            assert not torch.allclose(tiny_net(window_shrink=window_shrink).eval()(image)[0], expected[0])


@torch.inference_mode()
def test_masking_the_padding_acts_where_a_grid_does_not_divide_by_the_window() -> None:
    seen, masked = (tiny_net(mask_padding=mask_padding).eval() for mask_padding in (False, True))
    divides, does_not = torch.randn(1, 1, 24, 24, 48), torch.randn(1, 1, 24, 24, 32)  # 6, 6, 12 and 6, 6, 8 tokens
    assert_close(masked(divides), seen(divides), atol=0)
    assert not torch.allclose(masked(does_not)[0], seen(does_not)[0])


def test_the_same_seed_gives_the_same_training_step() -> None:
    image = torch.randn(1, 1, 32, 20, 16)

    def step(seed: int) -> list[Tensor]:
        net = tiny_net().train()  # dropout and drop path at their defaults
        torch.manual_seed(seed)
        loss = sum(output.square().mean() for output in net(image))
        loss.backward()
        return [loss.detach()] + [parameter.grad for parameter in net.parameters()]

    assert_close(step(1), step(1), atol=0)
    assert step(1)[0] != step(2)[0]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_every_parameter_gets_a_gradient(mode: int) -> None:
    net = tiny_net(strides=MODES[mode], dropout_per_stage=(0.0,) * 5, attention_dropout=0.0, drop_path=0.0)
    sum(output.square().sum() for output in net(torch.randn(2, 1, 32, 32, 32))).backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


@torch.inference_mode()
def test_without_deep_supervision_the_output_is_head_zero() -> None:
    net = tiny_net().eval()
    image = torch.randn(1, 1, 16, 16, 16)
    heads = net(image)
    assert isinstance(heads, list) and len(heads) == 4
    net.decoder.deep_supervision = False
    assert torch.equal(net(image), heads[0])
    assert tiny_net(deep_supervision=False).state_dict().keys() == net.state_dict().keys()


@pytest.mark.parametrize(
    ("mode", "total", "never_used", "full_tables"),
    [
        (
            0,
            45_257_938,
            1_024_100,
            31_616,
        ),  # measured on the official code; two (1331 - 343) x 16 tables more at level 4
        (1, 45_289_554, 1_091_348, 0),
        (2, 45_289_554, 1_385_492, 0),
    ],
)
def test_parameters_are_those_that_the_released_network_uses(mode, total, never_used, full_tables) -> None:
    assert full_tables in (0, 2 * (1331 - 343) * 16)
    with torch.device("meta"):
        net = PCTNet(input_channels=1, num_classes=5, strides=MODES[mode])
    assert sum(p.numel() for p in net.parameters()) == total - never_used + full_tables


@pytest.mark.parametrize(
    ("strides", "level_0", "level_1"),
    [
        (MODES[0], (3, 3, 3), (3, 3, 3)),
        (MODES[1], (1, 3, 3), (3, 3, 3)),
        (MODES[2], (1, 3, 3), (1, 3, 3)),
        (((1, 1, 1), (2, 2, 1), (2, 2, 1), POOL, POOL), (3, 3, 1), (3, 3, 1)),
        (((1, 1, 1), (2, 1, 2), POOL, POOL, POOL), (3, 1, 3), (3, 3, 3)),
    ],
)
def test_kernels_are_flat_along_axes_that_are_not_yet_pooled(strides, level_0, level_1) -> None:
    net = tiny_net(strides=strides)
    kernels = {name: m.kernel_size for name, m in net.named_modules() if isinstance(m, nn.Conv3d)}
    assert kernels.pop("encoder.stem") == level_0
    for level in range(5):
        expected = {0: level_0, 1: level_1}.get(level, (3, 3, 3))
        found = {name: k for name, k in kernels.items() if f".stages.{level}." in name}
        # block of the encoder; with a step down; with a step up and the decoder's block
        assert len(found) == {0: 5, 4: 3}.get(level, 6)
        assert set(found.values()) == {expected}, level
    ups = [m for m in net.modules() if isinstance(m, nn.ConvTranspose3d)]
    assert [up.kernel_size for up in ups] == [up.stride for up in ups] == list(strides[1:])


def test_only_the_heads_convolutions_depend_on_the_classes_and_only_the_stem_on_the_channels() -> None:
    reference = {key: value.shape for key, value in tiny_net().state_dict().items()}
    assert next(iter(reference)) == "encoder.stem.weight"
    classes = tiny_net(num_classes=7).state_dict()
    changed = {key for key, shape in reference.items() if classes[key].shape != shape}
    assert changed == {key for key in reference if ".seg_layers." in key}
    assert changed == {f"decoder.seg_layers.{level}.{leaf}" for level in range(4) for leaf in ("weight", "bias")}
    channels = tiny_net(input_channels=2).state_dict()
    assert {key for key, shape in reference.items() if channels[key].shape != shape} == {"encoder.stem.weight"}


def test_arguments_survive_json() -> None:
    kwargs = {
        **TINY,
        "strides": MODES[1],
        "window_size": 4,
        "window_shrink": "cube",
        "mask_padding": True,
        "dropout_per_stage": (0.0, 0.0, 0.1, 0.1, 0.1),
        "attention_dropout": 0.1,
        "drop_path": 0.1,
    }
    image = torch.randn(1, 1, 16, 16, 16)
    with torch.inference_mode():
        original = tiny_net(**kwargs).eval()(image)
        assert_close(tiny_net(**json.loads(json.dumps(kwargs))).eval()(image), original, atol=0)


@torch.inference_mode()
def test_samples_of_a_batch_do_not_see_each_other() -> None:
    net = tiny_net().eval()
    batch = torch.randn(3, 1, 30, 32, 34)
    together = net(batch)
    for index in range(3):
        assert_close([output[index : index + 1] for output in together], net(batch[index : index + 1]))


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("mode", [0, 1, 2])
@torch.inference_mode()
def test_feature_map_size_counts_what_the_convolutions_put_out(mode: int, deep_supervision: bool) -> None:
    net = tiny_net(strides=MODES[mode], deep_supervision=deep_supervision).eval()
    counted = []
    for module in net.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            module.register_forward_hook(lambda _module, _inputs, output: counted.append(output.numel()))
    net(torch.randn(1, 1, 20, 17, 24))
    size = net.compute_conv_feature_map_size((20, 17, 24))
    assert type(size) is int and size == sum(counted)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"features_per_stage": (4, 8, 8, 16)}, "features_per_stage: PCT-Net needs 5 entries, got 4"),
        ({"strides": MODES[0][:4]}, "strides: PCT-Net needs 5 entries, got 4"),
        ({"strides": ((1, 1),) + MODES[0][1:]}, r"expected three values \(D, H, W\), got \(1, 1\)"),
        ({"strides": (POOL,) + MODES[0][1:]}, r"strides: the first entry must be \(1, 1, 1\), got \(2, 2, 2\)"),
        ({"strides": MODES[0][:4] + ((3, 2, 2),)}, "strides: PCT-Net pools by 1 or 2"),
        ({"num_heads": (2, 4)}, "num_heads: PCT-Net needs 3 entries, got 2"),
        ({"num_heads": (2, 3, 4)}, "num_heads: 3 heads do not divide the 16 channels of level 3"),
        ({"dropout_per_stage": (0.2,)}, "dropout_per_stage: PCT-Net needs 5 entries, got 1"),
        ({"dropout_per_stage": (0, 0, 0, 0, 2)}, r"dropout_per_stage: expected probabilities in \[0, 1\)"),
        ({"attention_dropout": 1.0}, r"attention_dropout: expected probabilities in \[0, 1\)"),
        ({"drop_path": -0.1}, r"drop_path: expected probabilities in \[0, 1\)"),
        ({"window_size": 0}, "window_size: expected at least 1 token, got 0"),
        ({"window_shrink": "none"}, "window_shrink: expected one of .*, got 'none'"),
    ],
)
def test_wrong_arguments_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_net(**kwargs)


def test_an_image_that_is_not_3d_is_refused() -> None:
    with pytest.raises(ValueError, match=r"PCT-Net is a 3D network: .* got shape \(1, 1, 32, 32\)"):
        tiny_net()(torch.randn(1, 1, 32, 32))


def test_training_on_a_single_bottleneck_voxel_is_refused_and_on_two_is_not() -> None:
    net = tiny_net().train()
    with pytest.raises(ValueError, match=r"shape \(1, 1, 16, 16, 16\) leaves at the deepest level"):
        net(torch.randn(1, 1, 16, 16, 16))
    assert len(net(torch.randn(2, 1, 16, 16, 16))) == 4
    assert len(net(torch.randn(1, 1, 16, 16, 17))) == 4
