from collections.abc import Callable
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn
from toy import toy_architecture

from nnunetv2_misfm.architectures.encoder_decoder import last_features, require_known_stages, stage_widths
from nnunetv2_misfm.architectures.pct_net import PCTNet

IN_PLANE_FIRST = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2]]


def unet(num_stages: int, residual: bool, strides: list[list[int]] | None = None) -> Any:
    entry = toy_architecture(num_stages, residual, strides)
    return get_network_from_plans(
        entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], 2, 3, deep_supervision=False
    )


def pct_net(**kwargs: Any) -> PCTNet:
    without_dropout = {"dropout_per_stage": (0.0,) * 5, "attention_dropout": 0.0, "drop_path": 0.0}
    widths = {"features_per_stage": (4, 8, 8, 16, 32), "num_heads": (2, 2, 4)}
    return PCTNet(2, 3, **widths, **without_dropout, deep_supervision=False, **kwargs)


NETWORKS: dict[str, tuple[Callable[[], Any], tuple[int, int, int], int]] = {
    "PlainConvUNet": (lambda: unet(3, False), (16, 16, 16), 3),
    "PlainConvUNet of one pool": (lambda: unet(2, False), (8, 8, 8), 2),
    "PlainConvUNet in-plane first": (lambda: unet(4, False, IN_PLANE_FIRST), (8, 16, 32), 4),
    "ResidualEncoderUNet": (lambda: unet(5, True), (32, 32, 32), 5),
    "ResidualEncoderUNet in-plane first": (lambda: unet(4, True, IN_PLANE_FIRST), (8, 32, 16), 4),
    "PCTNet": (lambda: pct_net(), (16, 32, 32), 5),
    "PCTNet of odd sizes": (lambda: pct_net(), (17, 21, 35), 5),
    "PCTNet in-plane first": (
        lambda: pct_net(strides=[[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]), (5, 33, 48), 5,
    ),
}  # fmt: skip


@pytest.fixture(params=NETWORKS)
def case(request: pytest.FixtureRequest) -> tuple[Any, Tensor, int]:
    """A network, an image for it, and how many levels it has."""
    make, size, levels = NETWORKS[request.param]
    torch.manual_seed(0)
    return make(), torch.randn(2, 2, *size), levels


def keep(side: str, level: int, x: Tensor) -> Tensor:
    return x


def finest_head(network: Any) -> nn.Module:
    return network.decoder.seg_layers[0 if isinstance(network, PCTNet) else -1]


@torch.no_grad()
def test_without_changes_it_is_what_the_finest_head_reads(case: tuple[Any, Tensor, int]) -> None:
    network, image, _ = case
    network.eval()
    read: list[Tensor] = []
    hook = finest_head(network).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    network(image)
    hook.remove()
    features = last_features(network.encoder, network.decoder, image, keep)
    assert features.shape == (2, stage_widths(network)[0], *image.shape[2:])
    torch.testing.assert_close(features, read[0])


@torch.no_grad()
def test_in_training_the_finest_head_makes_the_networks_logits_of_it(case: tuple[Any, Tensor, int]) -> None:
    network, image, _ = case
    logits = network.train()(image)
    features = last_features(network.encoder, network.decoder, image, keep)
    torch.testing.assert_close(finest_head(network)(features), logits, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_visits_go_down_the_encoder_and_up_the_decoder_with_each_levels_width(case: tuple[Any, Tensor, int]) -> None:
    network, image, levels = case
    visits: list[tuple[str, int, int]] = []

    def note(side: str, level: int, x: Tensor) -> Tensor:
        visits.append((side, level, x.shape[1]))
        return x

    last_features(network.encoder, network.decoder, image, note)
    widths = [4, 8, 8, 16, 32] if isinstance(network, PCTNet) else [4, 8, 16, 16, 16][:levels]
    down = [("encoder", level, widths[level]) for level in range(levels)]
    up = [("decoder", level, widths[level]) for level in range(levels - 2, -1, -1)]
    assert visits == down + up and stage_widths(network) == widths


@torch.no_grad()
def test_what_a_visit_returns_goes_on_and_into_the_skips(case: tuple[Any, Tensor, int]) -> None:
    network, image, levels = case
    network.eval()

    def bend(side: str, level: int, x: Tensor) -> Tensor:
        return x * (1 + level / 4) + x.roll(1, 1) * (0.5 if side == "encoder" else -0.3)

    unchanged = finest_head(network)(last_features(network.encoder, network.decoder, image, keep))
    features = last_features(network.encoder, network.decoder, image, bend)
    found = finest_head(network)(features)
    for side in ("encoder", "decoder"):  # PyTorch's hooks replace what the same stages put out in the bare network
        for index, stage in enumerate(getattr(network, side).stages):
            coarsest_first = side == "decoder" and not isinstance(network, PCTNet)
            level = levels - 2 - index if coarsest_first else index
            stage.register_forward_hook(lambda _, __, out, side=side, level=level: bend(side, level, out))
    torch.testing.assert_close(found, network(image), atol=1e-5, rtol=1e-4)
    assert (found - unchanged).abs().max() > 1e-3


def other_network() -> nn.Module:
    architecture = toy_architecture(3, residual=True)["arch_kwargs"]
    kinds = {"conv_op": nn.Conv3d, "norm_op": nn.InstanceNorm3d, "nonlin": nn.LeakyReLU, "dropout_op": None}
    decoder = {"n_conv_per_stage_decoder": 1}
    return ResidualUNet(1, num_classes=2, **{**architecture, **kinds, **decoder})


@pytest.mark.parametrize("network", [other_network(), nn.Conv3d(1, 2, 3)], ids=["ResidualUNet", "Conv3d"])
def test_an_unknown_network_is_refused_by_name(network: nn.Module) -> None:
    with pytest.raises(
        TypeError,
        match=r"^expected PlainConvUNet, ResidualEncoderUNet or PCT-Net, whose stages are known, got "
        rf"{type(network).__name__}: plan with one of these networks\.$",
    ):
        require_known_stages(network)


def test_known_networks_pass(case: tuple[Any, Tensor, int]) -> None:
    require_known_stages(case[0])
