"""How the machine is named in records."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnunetv2_misfm import scripts
from nnunetv2_misfm.scripts import describe_machine


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    scripts._gpu_name.cache_clear()
    yield
    scripts._gpu_name.cache_clear()


def put(folder: Path, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)


def test_the_driver_names_the_gpu_once_and_pytorch_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: pytest.fail("opened the GPU in this process"))
    put(tmp_path, f'echo asked >> {tmp_path}/log; echo "NVIDIA X1"; echo "NVIDIA X2"')
    assert describe_machine("cuda").startswith("NVIDIA X1, nnunetv2-misfm ")
    assert describe_machine("cuda").startswith("NVIDIA X1, ")
    assert (tmp_path / "log").read_text() == "asked\n"


def test_without_the_drivers_tool_another_python_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho PyTorch says X3\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_machine("cuda").startswith("PyTorch says X3, ")
    scripts._gpu_name.cache_clear()
    put(tmp_path, "exit 9")
    assert describe_machine("cuda").startswith("PyTorch says X3, ")
    scripts._gpu_name.cache_clear()
    python.write_text("#!/bin/sh\nexit 1\n")
    assert describe_machine("cuda").startswith("a GPU of unknown name, ")


def test_a_cpu_is_named_by_its_cores() -> None:
    assert " CPU cores, nnunetv2-misfm " in describe_machine("cpu")
