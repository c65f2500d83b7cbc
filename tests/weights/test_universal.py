from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn
from toy import toy_architecture

from nnunetv2_misfm.architectures.context_prior import Answer, Context, ContextPriorNetwork, Sample
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.universe import Source, Universe
from nnunetv2_misfm.weights.transfer import TransferReport
from nnunetv2_misfm.weights.universal import transfer_to_universal

OLD = ("004:anterior", "004:posterior", "102:liver")
# the old ones in another order, with one dropped and two new
NEW = ("102:liver", "103:spleen", "004:anterior", "103:kidney")
MODALITY_HEAD = ["modality_head.2.weight", "modality_head.2.bias"]
NETWORKS = ("PlainConvUNet", "ResidualEncoderUNet", "PCTNet")
ALL_KINDS = pytest.mark.parametrize("kind", NETWORKS)


def universe(tasks: Sequence[str], modalities: Sequence[str] = ("CT", "MR")) -> Universe:
    source = Source("Dataset004_Any", tuple(range(len(tasks))), tuple((i + 1,) for i in range(len(tasks))), 0)
    return Universe("Dataset950_Universal", tuple(tasks), tuple(modalities), (source,))


def description(kind: str, stages: int = 4, **kwargs: Any) -> dict[str, Any]:
    if kind == "PCTNet":
        widths = {"features_per_stage": [4, 8, 8, 16, 32], "num_heads": [2, 2, 4], "window_size": 2}
        return {"class": "nnunetv2_misfm.architectures.PCTNet", "kwargs": {**widths, **kwargs}, "kwargs_to_import": []}
    entry = toy_architecture(stages, kind == "ResidualEncoderUNet")
    kwargs = {**entry["arch_kwargs"], **kwargs}
    return {"class": entry["network_class_name"], "kwargs": kwargs, "kwargs_to_import": entry["_kw_requires_import"]}


def bare(seed: int, kind: str = "PlainConvUNet", classes: int = 3, channels: int = 1, **kwargs: Any) -> nn.Module:
    torch.manual_seed(seed)
    network = description(kind, **kwargs)
    return get_network_from_plans(
        network["class"], network["kwargs"], network["kwargs_to_import"], channels, classes, deep_supervision=True
    )


def universal(seed: int, known: Universe, kind: str = "PlainConvUNet", **kwargs: Any) -> ContextPriorNetwork:
    torch.manual_seed(seed)
    network = description(kind, **kwargs)
    num_modalities = len(known.modalities)
    return ContextPriorNetwork(1, len(known.tasks), num_modalities=num_modalities, network=network).eval()


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(network: nn.Module, expected: dict[str, torch.Tensor]) -> bool:
    now = network.state_dict()
    return list(now) == list(expected) and all(torch.equal(now[name], expected[name]) for name in now)


def answer(network: ContextPriorNetwork, tasks: Sequence[int], modality: int) -> Answer:
    image = torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    context = Context(torch.tensor([tasks]), torch.ones(1, len(tasks), dtype=torch.bool), torch.tensor([modality]))
    with torch.no_grad():
        return network.answer(Sample(image, context))


def transferred(
    old: Universe, new: Universe, **options: Any
) -> tuple[TransferReport, ContextPriorNetwork, ContextPriorNetwork, dict[str, torch.Tensor]]:
    source, network = universal(1, old), universal(2, new)
    before = snapshot(network)
    return transfer_to_universal(source.state_dict(), old, network, new, **options), source, network, before


# A universal file


def test_the_same_tasks_and_modalities_move_as_they_are() -> None:
    report, source, network, _ = transferred(universe(OLD), universe(OLD))
    assert (report.adapted, report.fresh, report.share) == ({}, {}, 1.0)
    assert same(network, snapshot(source))


def test_rows_of_tasks_move_by_name_and_new_ones_stay_fresh() -> None:
    report, source, network, before = transferred(universe(OLD), universe(NEW))
    pools = [f"fusions.{site}.task_tokens" for site in ("encoder_2", "encoder_3", "decoder_2")]
    given, now = source.state_dict(), network.state_dict()
    for name in pools:
        assert torch.equal(now[name], torch.stack([given[name][2], before[name][1], given[name][0], before[name][3]]))
    assert same(network, {**given, **{name: now[name] for name in pools}})
    sentence = "2 of 4 tasks moved, fresh: 103:spleen, 103:kidney; not taken: 004:posterior"
    assert report.adapted == dict.fromkeys(pools, sentence)
    assert (report.fresh, report.share) == ({}, 1.0)
    assert sorted(report.moved + pools) == sorted(name for name, _ in network.named_parameters())


def test_rows_of_modalities_move_by_name_in_pools_and_head() -> None:
    report, source, network, before = transferred(universe(OLD, ("CT", "MR")), universe(OLD, ("PET", "MR", "CT")))
    names = [*(f"fusions.{site}.modality_tokens" for site in ("encoder_2", "encoder_3", "decoder_2")), *MODALITY_HEAD]
    given, now = source.state_dict(), network.state_dict()
    for name in names:
        assert torch.equal(now[name], torch.stack([before[name][0], given[name][1], given[name][0]])), name
    assert same(network, {**given, **{name: now[name] for name in names}})
    assert report.adapted == dict.fromkeys(names, "2 of 3 modalities moved, fresh: PET")


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (OLD[::-1], "3 of 3 tasks moved, in another order"),
        (OLD[:2], "2 of 2 tasks moved; not taken: 102:liver"),
        ((*OLD, "103:spleen"), "3 of 4 tasks moved, fresh: 103:spleen"),
    ],
)
def test_report_says_which_tasks_moved(wanted: Sequence[str], sentence: str) -> None:
    report, _, _, _ = transferred(universe(OLD), universe(wanted))
    assert report.adapted["fusions.encoder_2.task_tokens"] == sentence


def test_old_tasks_answer_bit_for_bit_as_before_beside_new_ones() -> None:
    old, new = universe(OLD, ("CT", "MR")), universe((*NEW, "004:posterior"), ("PET", "MR", "CT"))
    _, source, network, _ = transferred(old, new)
    for modality in ("CT", "MR"):
        before = answer(source, [0, 1, 2], old.modalities.index(modality))
        after = answer(network, [2, 4, 0], new.modalities.index(modality))
        assert torch.equal(after.logits, before.logits)
        assert torch.allclose(after.modality[:, [2, 1]], before.modality, atol=1e-6)
        assert not torch.equal(answer(network, [1, 4, 0], 0).logits, before.logits)


def test_pools_without_a_common_name_stay_fresh() -> None:
    report, _, network, before = transferred(universe(OLD), universe(("103:spleen",)))
    name = "fusions.encoder_3.task_tokens"
    assert torch.equal(network.state_dict()[name], before[name])
    why = "none of these tasks is in the file (it knows 004:anterior, 004:posterior, 102:liver)"
    assert report.fresh == {f"fusions.{site}.task_tokens": why for site in ("encoder_2", "encoder_3", "decoder_2")}
    assert 0.99 < report.share < 1


def test_pools_of_another_width_stay_fresh() -> None:
    old, new = universe(OLD), universe(NEW)
    source = universal(1, old).state_dict()
    source["fusions.encoder_3.task_tokens"] = torch.zeros(3, 20)
    network = universal(2, new)
    report = transfer_to_universal(source, old, network, new)
    assert report.fresh == {"fusions.encoder_3.task_tokens": "shape (3, 20) in the file, (4, 16) in the network"}
    assert "fusions.encoder_2.task_tokens" in report.adapted


def test_half_precision_rows_fill_full_precision() -> None:
    old, new = universe(OLD), universe(NEW)
    source = {name: tensor.half() for name, tensor in universal(1, old).state_dict().items()}
    network = universal(2, new)
    transfer_to_universal(source, old, network, new)
    name = "fusions.encoder_2.task_tokens"
    assert network.state_dict()[name].dtype == torch.float32
    assert torch.equal(network.state_dict()[name][0], source[name][2].float())


def test_encoder_alone_leaves_the_priors() -> None:
    report, source, network, before = transferred(universe(OLD), universe(NEW), transfer="encoder")
    given = source.state_dict()
    taken = {name for name in before if name.startswith(("encoder.", "decoder.encoder."))}
    assert same(network, {name: given[name] if name in taken else before[name] for name in before})
    assert (report.adapted, report.share, report.transfer) == ({}, 1.0, "encoder")
    assert set(report.fresh.values()) == {"outside the encoder"}


# An ordinary file


@ALL_KINDS
@pytest.mark.parametrize("known", [None, universe(OLD)])  # a stock trainer under a source's plans has a universe too
def test_ordinary_file_gives_encoder_and_decoder_and_the_share_counts_these(kind: str, known: Universe | None) -> None:
    source, network = bare(1, kind), universal(2, universe(OLD), kind)
    before, given = snapshot(network), source.state_dict()
    report = transfer_to_universal(given, known, network, universe(OLD))
    body = {name for name in before if name.startswith(("encoder.", "decoder."))}
    assert same(network, {name: given[name] if name in body else before[name] for name in before})
    priors = [name for name in before if name not in body]
    assert (report.adapted, report.share) == ({}, 1.0)
    assert report.fresh == dict.fromkeys(priors, "not in the file")


def test_ordinary_file_is_adapted_as_for_an_ordinary_network() -> None:
    flat = {"kernel_sizes": [[1, 3, 3], *[[3, 3, 3]] * 3], "strides": [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 2]}
    network = universal(2, universe(OLD))
    report = transfer_to_universal(bare(1, channels=2, **flat).state_dict(), None, network, universe(OLD))
    stem = "encoder.stages.0.0.convs.0.conv.weight"
    sentence = "kernel resized and input channels adapted: (4, 2, 1, 3, 3) -> (4, 1, 3, 3, 3)"
    assert report.adapted[stem] == sentence and report.share == 1.0
    encoder = transfer_to_universal(bare(1).state_dict(), None, network, universe(OLD), "encoder")
    assert set(encoder.fresh.values()) == {"outside the encoder"} and encoder.share == 1.0


def test_labels_of_a_cascade_never_pass_for_images() -> None:
    source = bare(1, channels=3)
    for num_labels, channels in ((0, [0, 1, 2]), (2, [0])):
        network = universal(2, universe(OLD))
        transfer_to_universal(source.state_dict(), None, network, universe(OLD), num_source_label_channels=num_labels)
        stem = "encoder.stages.0.0.convs.0.conv.weight"
        expected = source.state_dict()[stem][:, channels].sum(1, keepdim=True)
        assert torch.allclose(network.state_dict()[stem], expected)


# Refusals


@pytest.mark.parametrize("universal_file", [True, False])
def test_less_than_half_is_refused_and_changes_nothing(universal_file: bool) -> None:
    wide = {"features_per_stage": [6, 12, 24, 24]}
    source = universal(1, universe(OLD), **wide) if universal_file else bare(1, **wide)
    network = universal(2, universe(NEW))
    before = snapshot(network)
    with pytest.raises(MisfmError, match="expected weights of the same network, but only .* first misfit is encoder"):
        transfer_to_universal(source.state_dict(), universe(OLD), network, universe(NEW))
    assert same(network, before)


@pytest.mark.parametrize(
    ("known", "sentence"),
    [
        (None, "expected plans that name the tasks of these context priors, got a file without"),
        (universe(OLD[:2]), r"rows of fusions.encoder_2.task_tokens as the file's plans have tasks \(2\), got 3"),
        (universe(OLD, ("CT",)), r"rows of fusions.\w+.modality_tokens .* have modalities \(1\), got 2: weights and"),
    ],
)
def test_priors_without_their_names_are_refused_and_change_nothing(known: Universe | None, sentence: str) -> None:
    source, network = universal(1, universe(OLD)), universal(2, universe(NEW))
    before = snapshot(network)
    with pytest.raises(MisfmError, match=sentence):
        transfer_to_universal(source.state_dict(), known, network, universe(NEW))
    assert same(network, before)


# The other way round


@ALL_KINDS
def test_nnunets_own_flag_takes_a_universal_checkpoint_into_the_bare_network(kind: str, tmp_path: Path) -> None:
    source, network = universal(1, universe(OLD), kind), bare(2, kind)
    given, before = source.state_dict(), snapshot(network)
    torch.save({"network_weights": given}, tmp_path / "checkpoint_final.pth")
    load_pretrained_weights(network, tmp_path / "checkpoint_final.pth")
    assert same(network, {name: before[name] if ".seg_layers." in name else given[name] for name in before})
    assert any(".seg_layers." in name for name in before)
