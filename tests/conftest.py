"""Fixtures that every test file may use."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for `toy`

from toy import DATASET, toy_dataset_json, toy_plans, write_plans, write_toy_dataset  # noqa: E402


def pytest_configure() -> None:
    """Lets Ctrl-C and hang-ups be tested also where the shell ignores them for a command in the background."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
            if signal.getsignal(number) is signal.SIG_IGN:
                signal.signal(number, handler)


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Takes signals back from a training that a test began and did not end: forked pools would inherit its handlers."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    former = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, former, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and real scans beside the repository; tests that need it skip without it."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no ../shared beside the repository: this test needs its real scans or official fixtures")
    return folder


@dataclass
class Workspace:
    """nnU-Net's folders in a temporary place, with one toy dataset."""

    root: Path

    @property
    def preprocessed(self) -> Path:
        return self.root / "preprocessed"

    @property
    def base(self) -> Path:
        return self.preprocessed / DATASET

    @property
    def results(self) -> Path:
        return self.root / "results" / DATASET

    def plans(self, block: dict[str, Any] | None = None, **configuration: Any) -> dict[str, Any]:
        """Writes and returns plans with other numbers."""
        plans = toy_plans(block, **configuration)
        write_plans(self.preprocessed, plans)
        return plans

    def trainer(
        self,
        kind: type,
        block: dict[str, Any] | None = None,
        *,
        fold: int | str = 0,
        dataset_json: dict[str, Any] | None = None,
        continue_training: bool = False,
        configuration: str = "quick",
        plans: dict[str, Any] | None = None,
        **planned: Any,
    ) -> Any:
        """Makes a trainer on the CPU as nnU-Net's command does."""
        plans = {**(plans or toy_plans(block, **planned)), "continue_training": continue_training}
        return kind(plans, configuration, fold, dataset_json or toy_dataset_json(), torch.device("cpu"))


@pytest.fixture
def make_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workspace]:
    """Makes a workspace; the arguments are those of `write_toy_dataset`."""

    def make(**dataset: Any) -> Workspace:
        for name in ("raw", "preprocessed", "results"):
            (tmp_path / name).mkdir(exist_ok=True)
            monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        monkeypatch.setenv("nnUNet_compile", "f")
        monkeypatch.delenv("nnUNet_misfm_weights", raising=False)
        write_toy_dataset(tmp_path / "preprocessed", dataset.pop("plans", None) or toy_plans(), **dataset)
        return Workspace(tmp_path)

    return make


@pytest.fixture
def workspace(make_workspace: Callable[..., Workspace]) -> Workspace:
    """The default workspace: six cases of 20 x 22 x 20, one channel, two labels."""
    return make_workspace()
