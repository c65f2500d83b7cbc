import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional

from nnunetv2_misfm.architectures import UNETR, SwinUNETR
from nnunetv2_misfm.architectures.padded import PaddedNetwork, multiple_above
from nnunetv2_misfm.errors import MisfmError

NARROW = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2}


class Doubling(nn.Module):
    """Doubles its input, and keeps it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return 2 * x


class ToFours(PaddedNetwork):
    def padded_size(self, size: tuple[int, ...]) -> tuple[int, ...]:
        return multiple_above(size, 4)


@pytest.mark.parametrize(
    ("size", "divisor", "expected"),
    [((32, 33, 1), 32, (32, 64, 32)), ((40, 56, 40), 16, (48, 64, 48)), ((96, 96, 96), 16, (96, 96, 96))],
)
def test_sizes_are_rounded_up(size: tuple, divisor: int, expected: tuple) -> None:
    assert multiple_above(size, divisor) == expected


def test_input_is_padded_with_zeros_at_the_far_end_and_the_output_cropped() -> None:
    inner = Doubling()
    x = torch.randint(1, 9, (2, 3, 4, 5, 7)).float()
    out = ToFours("Test", inner, deep_supervision=False)(x)
    assert inner.seen.shape == (2, 3, 4, 8, 8)
    assert torch.equal(inner.seen[..., :5, :7], x) and inner.seen.sum() == x.sum()
    assert torch.equal(out, 2 * x)


def test_deep_supervision_is_refused() -> None:
    sentence = r"Test has one output: expected deep_supervision=False, got True; train it with nnUNetTrainerTest"
    with pytest.raises(ValueError, match=sentence):
        ToFours("Test", Doubling(), deep_supervision=True)


def test_other_than_3d_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Test is a 3D network: expected \(B, C, D, H, W\), got shape \(1, 1, 4, 4\)"):
        ToFours("Test", Doubling(), deep_supervision=False)(torch.zeros(1, 1, 4, 4))


@pytest.mark.parametrize("build", [lambda: SwinUNETR(1, 2), lambda: UNETR(1, 2, patch_size=(16, 16, 16))])
def test_without_monai_one_sentence_says_what_to_install(build: object, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("monai", "monai.networks", "monai.networks.nets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MisfmError, match=r"expected MONAI .*: pip install 'nnunetv2-misfm\[monai\]'\.$") as refusal:
        build()  # type: ignore[operator]
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((40, 56, 40), (64, 64, 64)),
        ((33, 8, 32), (64, 32, 32)),
        ((32, 32, 32), (32, 32, 64)),  # 32^3 would leave one voxel at the deepest level
        ((64, 32, 96), (64, 32, 96)),
    ],
)
def test_swin_unetr_pads_to_what_monai_takes(size: tuple, expected: tuple) -> None:
    network = SimpleNamespace()
    assert SwinUNETR.padded_size(network, size) == expected  # type: ignore[arg-type]


def test_swin_unetr_is_monais_on_the_padded_image() -> None:
    pytest.importorskip("monai")
    torch.manual_seed(0)
    network = SwinUNETR(2, 3, feature_size=12).eval()
    x = torch.randn(1, 2, 16, 24, 40)
    with torch.no_grad():
        expected = network.network(functional.pad(x, (0, 24, 0, 8, 0, 16)))[:, :, :16, :24, :40]
        assert torch.equal(network(x), expected)
    assert expected.shape == (1, 3, 16, 24, 40)


def test_unetr_is_monais_on_the_padded_image_whatever_the_input() -> None:
    pytest.importorskip("monai")
    torch.manual_seed(0)
    network = UNETR(2, 3, patch_size=(20, 16, 33), **NARROW).eval()
    assert network.img_size == (32, 16, 48)
    for size in ((20, 16, 33), (32, 16, 48), (8, 9, 10)):
        x = torch.randn(1, 2, *size)
        margins = [n for most, s in zip(network.img_size[::-1], size[::-1], strict=True) for n in (0, most - s)]
        with torch.no_grad():
            inside = network.network(functional.pad(x, margins))
            assert torch.equal(network(x), inside[:, :, : size[0], : size[1], : size[2]])


def test_unetr_refuses_what_is_larger_than_its_patch() -> None:
    pytest.importorskip("monai")
    network = UNETR(1, 2, patch_size=(16, 16, 16), **NARROW)
    with pytest.raises(ValueError, match=r"at most \(16, 16, 16\) voxels, got \(16, 17, 16\)"):
        network(torch.zeros(1, 1, 16, 17, 16))


@pytest.mark.parametrize("name", ["SwinUNETR", "UNETR"])
def test_every_parameter_learns_at_the_smallest_patch(name: str) -> None:
    pytest.importorskip("monai")
    build = {
        "SwinUNETR": lambda: SwinUNETR(1, 2, feature_size=12),
        "UNETR": lambda: UNETR(1, 2, patch_size=(16, 16, 16), **NARROW),
    }[name]
    network = build()
    network(torch.randn(1, 1, 16, 16, 16)).square().sum().backward()
    assert not [name for name, p in network.named_parameters() if p.grad is None]
