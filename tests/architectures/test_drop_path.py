import pytest
import torch
from torch import Tensor, nn

from nnunetv2_misfm.architectures.drop_path import DropPath


class Branch(nn.Module):
    """Each sample by itself; remembers how many it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.given: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.given.append(x.shape[0])
        return self.linear(x)


@pytest.mark.parametrize("compiling", [False, True])
def test_whole_samples_are_dropped_and_the_others_scaled(monkeypatch: pytest.MonkeyPatch, compiling: bool) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    torch.manual_seed(0)
    x = torch.ones(1000, 2, 3)
    added = DropPath(0.2)(x, lambda some: 3 * some) - x
    assert set(added.unique().tolist()) == {0.0, 3.75}
    assert torch.equal(added, added[:, :1, :1].expand_as(x))
    assert added.mean().item() == pytest.approx(3, abs=0.15)


def test_nothing_is_dropped_in_evaluation_or_without_a_probability() -> None:
    x = torch.randn(4, 3)
    for drop_path in (DropPath(0.9).eval(), DropPath(0.0)):
        assert torch.equal(drop_path(x, torch.sin), x + x.sin())


def test_branch_sees_the_kept_samples_alone_and_its_gradients_are_those_of_the_slow_way() -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 2, 3, dtype=torch.float64, requires_grad=True)
    branch = Branch().double()
    y = DropPath(0.5)(x, branch, [branch])
    kept = (y != x).flatten(1).any(1)
    assert 0 < kept.sum() < 8 and branch.given == [int(kept.sum())]
    weight = torch.randn_like(y)
    names = ("x", "weight", "bias")
    grads = dict(zip(names, torch.autograd.grad(y, (x, *branch.parameters()), weight), strict=True))
    slow = x + branch(x) * (kept * 2.0).view(-1, 1, 1)
    expected = dict(zip(names, torch.autograd.grad(slow, (x, *branch.parameters()), weight), strict=True))
    torch.testing.assert_close(y, slow)
    torch.testing.assert_close(grads, expected)


def test_parameters_of_a_branch_that_nobody_keeps_get_zero_gradients() -> None:
    x = torch.randn(1, 3, requires_grad=True)
    branch = Branch()
    for seed in range(20):
        torch.manual_seed(seed)
        branch.zero_grad(set_to_none=True)
        branch.given.clear()
        x.grad = None
        DropPath(0.5)(x, branch, [branch]).sum().backward()
        gradients = [parameter.grad for parameter in branch.parameters()]
        assert all(gradient is not None for gradient in gradients)
        if not branch.given:
            assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)
            assert torch.equal(x.grad, torch.ones_like(x))
            return
    raise AssertionError("never dropped")


@pytest.mark.parametrize("probability", [-0.1, 1.0])
def test_probability_out_of_range_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match=r"drop_path: expected a probability in \[0, 1\)"):
        DropPath(probability)
