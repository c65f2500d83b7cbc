import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from nnunetv2_misfm.trainers.random_state import random_state, set_random_state
from nnunetv2_misfm.weights.checkpoint import read_checkpoint, write_checkpoint

CPU = torch.device("cpu")


def draws() -> list[float]:
    """Two of each kind; Python's and NumPy's normal draws come in pairs, of which one half is kept for later."""
    made: list[float] = []
    for _ in range(2):
        made += [random.random(), random.gauss(0, 1), random.randrange(10**9)]
        made += [np.random.rand(), np.random.normal(), np.random.randint(2**31)]
        made += [*torch.rand(3).tolist(), *torch.randn(1).tolist(), *torch.randperm(50).tolist()]
    return made


def in_memory(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    return state


def through_a_file(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    write_checkpoint({"misfm_state": {"ranks": [{"random": state}]}}, folder / "c.pth")
    return read_checkpoint(folder / "c.pth")["misfm_state"]["ranks"][0]["random"]


@pytest.mark.parametrize("way", [in_memory, through_a_file])
@pytest.mark.parametrize("half", [False, True], ids=["even", "half a pair is kept"])
def test_all_generators_repeat(tmp_path: Path, way: Callable, half: bool) -> None:
    if half:
        random.gauss(0, 1)
        np.random.normal()
    state = way(random_state(CPU), tmp_path)
    expected = draws()
    assert draws() != expected
    for _ in range(2):  # a state is not used up
        set_random_state(state, CPU)
        assert draws() == expected


def test_taking_the_state_draws_nothing() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    random_state(CPU)
    assert torch.equal(torch.rand(4), expected)


def test_a_state_is_a_snapshot() -> None:
    state = random_state(CPU)
    before = (state["numpy"][1].clone(), state["torch"].clone())
    np.random.rand(10_000)
    torch.rand(10_000)
    assert torch.equal(state["numpy"][1], before[0]) and torch.equal(state["torch"], before[1])


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A generator of a device that is not there: its state is the list's last entry."""
    states: list[Any] = [torch.tensor([1, 2])]
    module = SimpleNamespace(get_rng_state=lambda: states[-1], set_rng_state=states.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: {"cuda": module}[device.type])
    return states


def test_a_devices_own_generator_repeats(accelerator: list[Any], tmp_path: Path) -> None:
    state = through_a_file(random_state(torch.device("cuda", 0)), tmp_path)
    accelerator.append(torch.tensor([9, 9]))
    set_random_state(state, torch.device("cuda", 0))
    assert accelerator[-1].tolist() == [1, 2]


def test_a_device_of_another_kind_keeps_its_own(accelerator: list[Any]) -> None:
    set_random_state(random_state(CPU), torch.device("cuda", 0))
    set_random_state(random_state(torch.device("cuda", 0)), CPU)
    assert len(accelerator) == 1
