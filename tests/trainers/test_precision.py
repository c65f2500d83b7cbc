from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import Tensor, nn

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.precision import autocast_dtype, use_autocast_dtype


@pytest.fixture(autouse=True)
def _default_is_restored() -> Iterator[None]:
    before = torch.get_autocast_dtype("cuda")
    yield
    torch.set_autocast_dtype("cuda", before)


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, with_bfloat16: set[int]) -> None:
    """GPUs 0 and 1, of which some compute in bfloat16 and all emulate it; GPU 0 is the current one."""
    current = [0]

    @contextmanager
    def on_device(device: torch.device) -> Iterator[None]:
        before, current[0] = current[0], device.index if device.index is not None else current[0]
        yield
        current[0] = before

    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return including_emulation or current[0] in with_bfloat16

    monkeypatch.setattr(torch.cuda, "device", on_device)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)


@pytest.mark.parametrize(
    ("choice", "device", "expected"),
    [
        ("auto", "cuda:1", torch.bfloat16),
        ("auto", "cuda:0", torch.float16),
        ("auto", "cuda", torch.float16),
        ("float16", "cuda:0", torch.float16),
        ("float16", "cuda:1", torch.float16),
        ("bfloat16", "cuda:1", torch.bfloat16),
    ],
)
def test_dtype_is_what_the_asked_gpu_computes_in(monkeypatch, choice, device: str, expected: torch.dtype) -> None:
    pretend_gpus(monkeypatch, with_bfloat16={1})
    assert autocast_dtype(choice, torch.device(device)) is expected


def test_bfloat16_on_a_gpu_that_only_emulates_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, with_bfloat16={1})
    with pytest.raises(MisfmError) as error:
        autocast_dtype("bfloat16", torch.device("cuda", 0))
    assert str(error.value) == (
        "expected a GPU that computes in bfloat16 (NVIDIA: compute capability 8.0 or higher), got cuda:0 without it; "
        "choose the precision auto or float16."
    )


@pytest.mark.parametrize("choice", ["auto", "float16", "bfloat16"])
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_other_devices_do_not_autocast(choice, device: str) -> None:
    assert autocast_dtype(choice, torch.device(device)) is None


@pytest.mark.filterwarnings("ignore:.*Disabling autocast")  # no GPU is needed to see the dtype
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_without_a_dtype_takes_the_chosen_one(dtype: torch.dtype) -> None:
    use_autocast_dtype(dtype)
    assert torch.get_autocast_dtype("cuda") is dtype
    assert torch.autocast("cuda", enabled=True).fast_dtype is dtype


class Recorder(nn.Linear):
    """A layer that notes under which dtype of autocast it is called."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = torch.get_autocast_dtype("cuda")
        return super().forward(x)


@pytest.mark.filterwarnings("ignore:.*Disabling autocast")
def test_nnunets_training_step_computes_in_the_chosen_dtype() -> None:
    network = Recorder(2, 1)
    trainer = SimpleNamespace(
        device=SimpleNamespace(type="cuda"),
        network=network,
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD(network.parameters(), lr=0.1),
        grad_scaler=None,
    )
    use_autocast_dtype(torch.bfloat16)
    batch = {
        "data": Mock(to=Mock(return_value=torch.ones(3, 2))),
        "target": Mock(to=Mock(return_value=torch.ones(3, 1))),
    }
    nnUNetTrainer.train_step(trainer, batch)
    assert network.seen is torch.bfloat16
