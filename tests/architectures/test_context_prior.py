from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from prior_networks import NETWORKS, NUM_MODALITIES, NUM_TASKS, pct_entry, prior_network, sample, unet_entry
from torch import nn

from nnunetv2_misfm.architectures.context_prior import MODALITY_TOKENS, ContextPriorNetwork
from nnunetv2_misfm.errors import MisfmError

SITES = {
    3: {"encoder_2": 2},
    4: {"encoder_2": 2, "encoder_3": 2, "decoder_2": 2},
    5: {"encoder_2": 2, "encoder_3": 2, "encoder_4": 4, "decoder_3": 2, "decoder_2": 2},
    6: {"encoder_2": 2, "encoder_3": 2, "encoder_4": 4, "decoder_3": 2, "decoder_2": 2},
}

parametrize_networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)


def bare(network: dict[str, Any], num_classes: int = 2) -> nn.Module:
    return get_network_from_plans(
        network["class"], network["kwargs"], network["kwargs_to_import"], 1, num_classes, deep_supervision=True
    )


@pytest.mark.parametrize("num_stages", SITES)
def test_priors_act_at_strides_4_8_16_then_8_4_where_a_network_has_them(num_stages: int) -> None:
    net = prior_network(unet_entry(num_stages))
    assert {name: len(fusion.blocks) for name, fusion in net.fusions.items()} == SITES[num_stages]
    widths = {level: width for level, width in enumerate([4, 8, 16, 16, 16, 16])}
    for name, fusion in net.fusions.items():
        width = widths[int(name[-1])]
        assert fusion.task_tokens.shape == (NUM_TASKS, width)
        assert fusion.modality_tokens.shape == (NUM_MODALITIES, 10, width)


@pytest.mark.parametrize("num_stages", [3, 4, 5])
def test_every_site_reaches_logits_and_modality(num_stages: int) -> None:
    net, batch = prior_network(unet_entry(num_stages)), sample([[0, 1]], [[True, True]], [2])
    for part in ("logits", "modality"):
        net.zero_grad()
        getattr(net(batch), part).square().sum().backward()
        for name, fusion in net.fusions.items():
            tokens = fusion.task_tokens.grad if part == "logits" else fusion.modality_tokens.grad[2]
            assert tokens is not None and tokens.abs().sum() > 0, name


def test_two_levels_are_refused() -> None:
    with pytest.raises(
        MisfmError,
        match=r"^nnUNetTrainerHermes expected a network of three levels at least \(priors act from stride 4 on\), got "
        r"2: plan with larger patches\.$",
    ):
        ContextPriorNetwork(1, 2, num_modalities=1, network=unet_entry(2))


def test_an_unknown_network_is_refused() -> None:
    network = {"class": "nnunetv2_misfm.architectures.fmunet.FMUNet", "kwargs": {}, "kwargs_to_import": []}
    with pytest.raises(MisfmError, match=r"^nnUNetTrainerHermes expected PlainConvUNet, .* got FMUNet: plan with"):
        ContextPriorNetwork(1, 2, num_modalities=1, network=network)


def test_deep_supervision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^expected deep_supervision=False: a network with context priors has one"):
        ContextPriorNetwork(1, 2, num_modalities=1, network=unet_entry(), deep_supervision=True)


def test_hermes_r_has_the_published_number_of_parameters() -> None:
    network = unet_entry()
    network["kwargs"] |= {"features_per_stage": [32, 64, 128, 256, 320], "n_blocks_per_stage": [2] * 5}
    with torch.device("meta"):  # 72 tasks and the null token of the published pools; six modalities
        net = ContextPriorNetwork(1, 73, num_modalities=6, network=network)
    fusion = sum(parameter.numel() for parameter in net.fusions.parameters())
    heads = [*net.kernel_head.parameters(), *net.modality_head.parameters()]
    assert fusion == pytest.approx(17.91e6, rel=0.05)
    assert sum(parameter.numel() for parameter in heads) == pytest.approx(2.42e6, rel=0.05)
    pools = [tokens for site in net.fusions.values() for tokens in (site.task_tokens, site.modality_tokens)]
    assert sum(tokens.numel() for tokens in pools) == (73 + 6 * MODALITY_TOKENS) * 1088


@parametrize_networks
def test_encoder_and_decoder_keep_the_bare_networks_names_and_shapes(network: dict[str, Any]) -> None:
    expected = {key: value.shape for key, value in bare(network).state_dict().items() if ".seg_layers." not in key}
    ours = {key: value.shape for key, value in prior_network(network).state_dict().items()}
    added = ("fusions.", "kernel_head.", "modality_head.")
    assert {key: shape for key, shape in ours.items() if not key.startswith(added)} == expected


@parametrize_networks
def test_nnunets_flag_starts_a_bare_network_from_it(network: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = prior_network(network), bare(network, 5)
    torch.save({"network_weights": ours.state_dict()}, tmp_path / "checkpoint.pth")
    load_pretrained_weights(theirs, str(tmp_path / "checkpoint.pth"))
    moved = theirs.state_dict()
    for key in (key for key in moved if ".seg_layers." not in key):
        torch.testing.assert_close(moved[key], ours.state_dict()[key], rtol=0, atol=0)


@torch.no_grad()
@parametrize_networks
def test_a_state_dict_makes_the_same_network_again(network: dict[str, Any], tmp_path: Path) -> None:
    net, batch = prior_network(network).eval(), sample([[3, 0]], [[True, True]], [1])
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    torch.manual_seed(9)
    again = ContextPriorNetwork(1, NUM_TASKS, num_modalities=NUM_MODALITIES, network=network).eval()
    again.load_state_dict(torch.load(tmp_path / "weights.pth", weights_only=True), strict=True)
    for found, expected in zip(again(batch), net(batch), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("step", range(2))
@parametrize_networks
def test_every_parameter_that_learns_gets_a_gradient(network: dict[str, Any], step: int) -> None:
    """As DDP needs it, whichever tasks and modality a batch has."""
    net = prior_network(network)
    answer = net(sample([[step, 1], [2, 2]], [[True, True], [True, False]], [step, step]))
    (answer.logits.mean() + answer.modality.logsumexp(1).mean()).backward()
    without = {name for name, parameter in net.named_parameters() if parameter.grad is None}
    assert without == {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    # PCT-Net's norms before the coarser heads, which nothing reads
    assert all(".seg_norms." in name and ".seg_norms.0." not in name for name in without)


def test_a_sample_is_moved_with_all_that_is_asked_of_it() -> None:
    moved = sample([[1, 2]], [[True, False]], [0]).to(torch.device("meta"))
    assert {tensor.device.type for tensor in (moved.image, *moved.context[:3])} == {"meta"}
    assert moved.context.asked is None
    assert moved.context.labelled.dtype == torch.int64 and moved.context.present.dtype == torch.bool


@torch.no_grad()
def test_an_anisotropic_odd_patch_goes_through_pct_net() -> None:
    network = pct_entry()
    network["kwargs"]["strides"] = [[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    batch = sample([[0, 1, 6]] * 2, [[True] * 3] * 2, [0, 1], size=(13, 37, 22))
    answer = prior_network(network).train()(batch)
    assert answer.logits.shape == (2, 3, 13, 37, 22) and answer.modality.shape == (2, NUM_MODALITIES)
    assert answer.logits.isfinite().all()
