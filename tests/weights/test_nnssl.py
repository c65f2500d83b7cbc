import json
from typing import Any

import pytest
import torch
from nnssl_files import nnssl_checkpoint, primus_checkpoint, toy_network
from torch import Tensor, nn
from toy import toy_architecture, toy_plans

from nnunetv2_misfm.architectures.pct_net import PCTNet
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights.nnssl import adaptation_plan, is_nnssl, states_its_layout, transfer_from_nnssl
from nnunetv2_misfm.weights.transfer import TransferReport

STEM = "encoder.stem.convs.0.conv.weight"
DECODER_LEFT = "the decoder of an nnssl checkpoint is not taken"


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def transferred(checkpoint: dict[str, Any], network: nn.Module, label_channels: int = 0) -> TransferReport:
    return transfer_from_nnssl(checkpoint, checkpoint["network_weights"], network, label_channels)


def encoder_names(network: nn.Module) -> set[str]:
    return {name for name in network.state_dict() if name.startswith("encoder.")}


def assert_decoder_is_fresh(network: nn.Module, before: dict[str, Tensor], report: TransferReport) -> None:
    own = {name for name, _ in network.named_parameters() if name.startswith("decoder.")}
    assert own and all(torch.equal(network.state_dict()[name], before[name]) for name in own)
    heads = {name for name in own if ".seg_layers." in name}
    assert heads and {report.fresh[name] for name in heads} == {"output head"}
    assert {report.fresh[name] for name in own - heads} == {DECODER_LEFT}


# Reading nnssl's


def test_stem_and_encoder_arrive_and_the_decoder_stays_as_it_was() -> None:
    weights, network = copied(toy_network()), toy_network()
    before = copied(network)
    report = transferred(nnssl_checkpoint(weights), network)
    held = network.state_dict()
    assert all(torch.equal(held[name], weights[name]) for name in encoder_names(network))
    assert_decoder_is_fresh(network, before, report)
    assert set(report.moved) == {name for name, _ in network.named_parameters() if name.startswith("encoder.")}
    assert (report.transfer, report.share, report.adapted) == ("encoder", 1.0, {})


def test_stem_is_repeated_and_divided_for_more_channels_and_labels_start_at_zero() -> None:
    weights, network = copied(toy_network()), toy_network(channels=3)
    report = transferred(nnssl_checkpoint(weights), network, label_channels=1)
    held = network.state_dict()
    for channel in range(2):
        torch.testing.assert_close(held[STEM][:, channel], weights[STEM][:, 0] / 2)
    assert (held[STEM][:, 2] == 0).all()
    rest = {name for name in encoder_names(network) if held[name].shape == weights[name].shape}
    assert len(rest) == len(encoder_names(network)) - 2  # the stem's convolution, under both of its names
    assert all(torch.equal(held[name], weights[name]) for name in rest)
    assert list(report.adapted) == [STEM] and report.share == 1.0


def test_deeper_checkpoint_gives_the_stages_that_the_network_has() -> None:
    weights, network = copied(toy_network(num_stages=4)), toy_network()
    before = copied(network)
    report = transferred(nnssl_checkpoint(weights), network)
    held = network.state_dict()
    assert all(torch.equal(held[name], weights[name]) for name in encoder_names(network))
    assert report.share == 1.0
    assert_decoder_is_fresh(network, before, report)


def test_parts_are_taken_from_where_the_plan_says_they_lie() -> None:
    weights, network = copied(toy_network()), toy_network()
    elsewhere = {name.replace("encoder.", "online_encoder.", 1): t for name, t in weights.items()}
    decoys = {name: torch.zeros_like(weights[name]) for name in encoder_names(network)}
    keys = {"key_to_encoder": "online_encoder.stages", "key_to_stem": "online_encoder.stem"}
    transferred(nnssl_checkpoint({**elsewhere, **decoys}, **keys), network)
    assert all(torch.equal(network.state_dict()[name], weights[name]) for name in encoder_names(network))


def test_of_a_tensor_that_the_file_holds_twice_the_later_one_counts_as_in_load_state_dict() -> None:
    weights, network = copied(toy_network()), toy_network()
    untied = {name: t + 1 if ".all_modules." in name else t for name, t in weights.items()}
    transferred(nnssl_checkpoint(untied), network)
    expected = toy_network()
    expected.encoder.load_state_dict({n.removeprefix("encoder."): untied[n] for n in encoder_names(network)})
    assert torch.equal(expected.state_dict()[STEM], weights[STEM] + 1)
    assert all(torch.equal(network.state_dict()[n], expected.state_dict()[n]) for n in encoder_names(network))


def pct_net() -> nn.Module:
    return PCTNet(1, 3, features_per_stage=[4, 4, 8, 16, 32], num_heads=[1, 1, 1])


@pytest.mark.parametrize(
    ("checkpoint", "network", "sentence"),
    [
        (
            primus_checkpoint(),
            toy_network(),
            r"expected an nnssl checkpoint of a ResidualEncoderUNet \(ResEncL\), got one of PrimusM with its encoder "
            r"under 'eva' and its stem under 'down_projection'; take a ResEnc checkpoint, or",
        ),
        (
            nnssl_checkpoint(toy_network().state_dict(), architecture_plans=None, key_to_encoder=3, key_to_stem=None),
            toy_network(),
            "got one of no stated class with its encoder under 3 and its stem under None;",
        ),
        (nnssl_checkpoint(toy_network(residual=False).state_dict()), toy_network(), "got one of ResEncL with its enc"),
        (
            nnssl_checkpoint(toy_network().state_dict()),
            toy_network(residual=False),
            "expected a ResidualEncoderUNet for the encoder of an nnssl checkpoint, got PlainConvUNet; plan with "
            "nnUNetPlannerResEncM, L or XL and take a trainer of the plans' network",
        ),
        (nnssl_checkpoint(toy_network().state_dict()), pct_net(), "of an nnssl checkpoint, got PCTNet; plan with"),
        (
            nnssl_checkpoint(toy_network(features=2).state_dict()),
            toy_network(),
            "nnssl checkpoint of ResEncL: expected weights of the same network, but only 0.0 % .* Plans of "
            "nnUNetPlannerResEncM, L or XL have the encoder of an nnssl ResEncL",
        ),
    ],
    ids=["transformer", "no keys", "plain file", "plain network", "PCT-Net", "width"],
)
def test_what_does_not_fit_gets_one_sentence_and_changes_nothing(
    checkpoint: dict[str, Any], network: nn.Module, sentence: str
) -> None:
    before = copied(network)
    with pytest.raises(MisfmError, match=sentence):
        transferred(checkpoint, network)
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)


def test_checkpoint_is_nnssls_where_it_has_the_plan_and_not_ours() -> None:
    written = nnssl_checkpoint({})
    assert is_nnssl(written)
    assert not is_nnssl({**written, "misfm_meta": {}})
    assert not is_nnssl({"network_weights": {}})
    assert not is_nnssl({"nnssl_adaptation_plan": None})


# Writing nnssl's plan


@pytest.mark.parametrize("residual", [True, False])
def test_plan_is_plain_data_with_all_that_nnssl_and_nnunet_read(residual: bool) -> None:
    network, architecture = toy_network(residual), toy_architecture(3, residual)
    description = {
        "class": architecture["network_class_name"],
        "kwargs": architecture["arch_kwargs"],
        "kwargs_to_import": architecture["_kw_requires_import"],
    }
    plans = toy_plans(spacing=[3.0, 0.5, 0.5], patch_size=(16, 32, 32))
    configuration = plans["configurations"]["3d_fullres"]
    plan = adaptation_plan(network, description, plans, "3d_fullres", configuration, 2)
    assert json.loads(json.dumps(plan)) == plan
    assert plan["architecture_plans"] == {
        "arch_class_name": architecture["network_class_name"],
        "arch_kwargs": architecture["arch_kwargs"],
        "arch_kwargs_requiring_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    assert plan["architecture_kwargs"]["n_stages"] == 3
    assert (plan["pretrain_num_input_channels"], plan["recommended_downstream_patchsize"]) == (2, [16, 32, 32])
    stem = "encoder.stem" if residual else "encoder.stages.0"
    assert (plan["key_to_encoder"], plan["key_to_stem"], plan["key_to_lpe"]) == ("encoder.stages", stem, None)
    assert {network.get_submodule(key).weight.data_ptr() for key in plan["keys_to_in_proj"]} == {
        next(tensor for tensor in network.parameters() if tensor.ndim == 5).data_ptr()
    }
    pretrained = plan["pretrain_plan"]
    assert set(pretrained) == {
        *("dataset_name", "plans_name", "original_median_spacing_after_transp", "image_reader_writer"),
        *("transpose_forward", "transpose_backward", "configurations", "experiment_planner_used"),
    }
    assert pretrained["dataset_name"] == "Dataset555_Toy" and list(pretrained["configurations"]) == ["3d_fullres"]
    planned = pretrained["configurations"]["3d_fullres"]
    assert set(planned) == {
        *("data_identifier", "preprocessor_name", "spacing_style", "normalization_schemes", "use_mask_for_norm"),
        *("resampling_fn_data", "resampling_fn_data_kwargs", "resampling_fn_mask", "resampling_fn_mask_kwargs"),
        *("spacing", "patch_size"),
    }
    assert (planned["spacing"], planned["patch_size"]) == ([3.0, 0.5, 0.5], [16, 32, 32])
    assert (planned["spacing_style"], planned["normalization_schemes"]) == ("median", ["ZScoreNormalization"])
    assert planned["resampling_fn_mask_kwargs"]["is_seg"] is True
    assert None not in planned.values() and None not in pretrained.values()


def test_nnunets_networks_state_their_layout_and_pct_net_does_not() -> None:
    assert states_its_layout(toy_network()) and states_its_layout(toy_network(residual=False))
    assert not states_its_layout(pct_net())
