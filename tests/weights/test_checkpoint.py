import collections
import errno
import hashlib
import io
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from toy import toy_dataset_json

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights import checkpoint as module
from nnunetv2_misfm.weights.checkpoint import (
    file_sha256,
    network_weights,
    plain,
    read_checkpoint,
    tensors_sha256,
    write_checkpoint,
)

Point = collections.namedtuple("Point", "x y")


def small(value: float = 1.0) -> dict[str, Any]:
    return {"network_weights": {"a.weight": torch.full((2, 3), value), "a.bias": torch.zeros(2)}, "current_epoch": 4}


def legacy(path: Path, content: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


# plain


def test_numpy_numbers_and_arrays_become_pythons_in_fresh_containers() -> None:
    tensor = torch.zeros(2)
    given = {
        np.int64(3): [np.float32(0.5), (np.bool_(True), np.str_("s"))],
        "array": np.array([[1, 2]], np.int16),
        "nested": collections.OrderedDict(t=tensor, none=None, text="x"),
        "tuples": (Point(np.float64(1), 2), torch.Size([np.int64(4)])),
    }
    made = plain(given)
    assert made == {
        3: [0.5, (True, "s")],
        "array": [[1, 2]],
        "nested": {"t": tensor, "none": None, "text": "x"},
        "tuples": ((1.0, 2), (4,)),
    }
    types = [type(next(iter(made))), *map(type, made[3]), *map(type, made[3][1]), type(made["array"][0][0])]
    assert types == [int, float, tuple, bool, str, int]
    assert [type(made["nested"]), *map(type, made["tuples"])] == [dict, tuple, tuple]
    assert made["nested"]["t"] is tensor
    assert isinstance(given["array"], np.ndarray) and isinstance(given["nested"], collections.OrderedDict)


# write_checkpoint


def test_what_is_written_loads_with_weights_only_and_shares_tensors_as_before(tmp_path: Path) -> None:
    shared = torch.arange(1000.0)
    content = {
        "network_weights": {
            "encoder.w": shared,
            "decoder.encoder.w": shared,
            "half": torch.ones(2, dtype=torch.bfloat16),
        },
        "optimizer_state": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": np.float64(0.01)}]},
        "_best_ema": np.float32(0.25),
        "init_args": {"device": torch.device("cuda", 1), "fold": "all", "none": None},
    }
    write_checkpoint(content, tmp_path / "c.pth")
    read = torch.load(tmp_path / "c.pth", weights_only=True)
    assert torch.equal(read["network_weights"]["encoder.w"], shared)
    assert read["network_weights"]["encoder.w"].data_ptr() == read["network_weights"]["decoder.encoder.w"].data_ptr()
    assert (tmp_path / "c.pth").stat().st_size < 2 * shared.numel() * 4
    assert read["network_weights"]["half"].dtype == torch.bfloat16
    assert (read["_best_ema"], type(read["_best_ema"])) == (0.25, float)
    assert read["optimizer_state"]["param_groups"] == [{"lr": 0.01}]
    assert read["init_args"] == content["init_args"]
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


KILLED = """
import builtins, os, signal, sys, time
import torch
from nnunetv2_misfm.weights import checkpoint

def block():
    print("blocked", flush=True)
    time.sleep(600)

class Blocking:
    def __init__(self, file):
        self.file, self.written = file, 0
    def write(self, data):
        if self.written + len(data) > 100_000:
            self.file.write(data[: 100_000 - self.written])
            self.file.flush()
            block()
        self.written += len(data)
        return self.file.write(data)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()
    def __getattr__(self, name):
        return getattr(self.file, name)

if sys.argv[2] == "data":
    checkpoint.open = lambda *arguments: Blocking(builtins.open(*arguments))
else:
    os.replace = lambda *paths: block()
checkpoint.write_checkpoint({"network_weights": {"w": torch.zeros(100_000)}}, sys.argv[1])
"""


@pytest.mark.parametrize("where", ["data", "rename"])
def test_process_that_is_killed_while_writing_leaves_the_former_file(tmp_path: Path, where: str) -> None:
    file = tmp_path / "c.pth"
    write_checkpoint(small(), file)
    before = file.read_bytes()
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(file), where], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None and child.stdout.readline() == "blocked\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    leftover = tmp_path / "c.pth.tmp"
    assert leftover.stat().st_size == 100_000 if where == "data" else leftover.stat().st_size > 400_000
    assert file.read_bytes() == before
    assert read_checkpoint(file)["current_epoch"] == 4
    write_checkpoint(small(2.0), file)  # what is left over is in nobody's way
    assert read_checkpoint(file)["network_weights"]["a.weight"][0, 0] == 2
    assert not leftover.exists()


@pytest.mark.parametrize("room", [0, 500, 100_000])
def test_file_that_cannot_grow_gives_a_sentence_and_leaves_the_former_file(tmp_path: Path, room: int) -> None:
    file = tmp_path / "c.pth"
    write_checkpoint(small(), file)
    before = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))  # the system refuses as it does on a full disk
    try:
        with pytest.raises(MisfmError) as refusal:
            write_checkpoint({"network_weights": {"w": torch.zeros(100_000)}}, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(refusal.value).startswith(f"{file} could not be written (")
    assert str(refusal.value).endswith("; the former checkpoint, if any, is intact.") and "\n" not in str(refusal.value)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, AttributeError])
def test_interrupted_write_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def interrupted(descriptor: int) -> None:
        raise error

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(error):
        write_checkpoint(small(), tmp_path / "c.pth")
    assert not list(tmp_path.iterdir())


def test_missing_folder_gives_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MisfmError, match="none/c.pth could not be written .*No such file or directory"):
        write_checkpoint(small(), tmp_path / "none" / "c.pth")


def test_objects_that_could_not_be_read_again_are_not_written(tmp_path: Path) -> None:
    file = tmp_path / "c.pth"
    write_checkpoint(small(), file)
    with pytest.raises(MisfmError, match=r"c.pth could not be written \(.*got pathlib\.\w+, so the file is not read"):
        write_checkpoint({**small(), "init_args": {"folder": tmp_path}}, file)
    assert read_checkpoint(file)["current_epoch"] == 4
    assert [p.name for p in tmp_path.iterdir()] == ["c.pth"]


# read_checkpoint


def test_read_tensors_may_be_changed_without_changing_the_file(tmp_path: Path) -> None:
    write_checkpoint(small(), tmp_path / "c.pth")
    before = (tmp_path / "c.pth").read_bytes()
    read_checkpoint(tmp_path / "c.pth")["network_weights"]["a.weight"].fill_(9)
    assert (tmp_path / "c.pth").read_bytes() == before


def test_legacy_container_is_read(tmp_path: Path) -> None:
    read = read_checkpoint(legacy(tmp_path / "old.pth", {**small(), "_best_ema": np.float64(0.5)}))
    assert torch.equal(read["network_weights"]["a.weight"], torch.ones(2, 3)) and read["_best_ema"] == 0.5


def test_stock_checkpoint_is_read(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainer)
    trainer.num_epochs = trainer.num_iterations_per_epoch = trainer.num_val_iterations_per_epoch = 1
    trainer.run_training()
    file = workspace.results / "nnUNetTrainer__nnUNetPlans__quick" / "fold_0" / "checkpoint_final.pth"
    with pytest.raises(pickle.UnpicklingError):  # so this file needs the allowance for NumPy's numbers
        torch.load(file, weights_only=True)
    read, trusted = read_checkpoint(file), torch.load(file, weights_only=False)
    assert plain(read["logging"]) == plain(trusted["logging"])
    assert read["init_args"]["device"] == torch.device("cpu")
    assert read["init_args"]["dataset_json"] == toy_dataset_json()
    assert tensors_sha256(network_weights(read, file)) == tensors_sha256(trainer.network.state_dict())


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int8", "int32", "int64", "uint8", "uint64", "bool"])
def test_numpy_numbers_are_read(tmp_path: Path, kind: str) -> None:
    number = np.dtype(kind).type(1)
    torch.save({"logging": {"curve": [number, [number]]}, "_best_ema": number}, tmp_path / "c.pth")
    read = read_checkpoint(tmp_path / "c.pth")
    assert (read["_best_ema"], read["logging"]["curve"]) == (1, [1, [1]])
    assert read["_best_ema"].dtype == kind


def test_missing_file_and_folder_get_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(MisfmError, match=f"expected a checkpoint file at {path}, found none; check the path"):
            read_checkpoint(path)


def test_file_that_may_not_be_read_gets_the_systems_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(small(), tmp_path / "c.pth")

    def forbidden(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(module, "open", forbidden, raising=False)
    with pytest.raises(MisfmError, match=r"c.pth could not be read \(Permission denied\); check disk and permissions"):
        read_checkpoint(tmp_path / "c.pth")


@pytest.mark.parametrize("save", [torch.save, lambda content, path: legacy(path, content)], ids=["zip", "legacy"])
def test_file_cut_anywhere_gets_a_sentence(tmp_path: Path, save: Callable) -> None:
    whole, cut = tmp_path / "c.pth", tmp_path / "cut.pth"
    save({"network_weights": {f"layers.{i}.weight": torch.zeros(4, 40) for i in range(40)}}, whole)
    content = whole.read_bytes()
    assert len(content) > 20_000  # cuts above some 4 kB fail at another place in PyTorch than shorter ones
    for size in [*range(4), *range(4, len(content), len(content) // 50), len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(MisfmError, match="cut.pth") as refusal:
            read_checkpoint(cut)
        truncated = f"cut.pth is truncated or no PyTorch checkpoint: its {size} bytes cannot be read as one"
        within_a_name = "cut.pth: expected tensors and plain data alone, got "  # PyTorch takes the rest for unknown
        assert truncated in str(refusal.value) or (save is not torch.save and within_a_name in str(refusal.value))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world\n", b"a\n", b"0\n", b"<!DOCTYPE html>\n", b"version https://git-lfs.github.com/spec/v1\n",
     b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80", bytes(100), pickle.dumps({"a": 1})],
)  # fmt: skip
def test_file_of_another_kind_gets_a_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(
        MisfmError, match="c.pth is truncated or no PyTorch checkpoint: .*; use another copy"
    ) as refusal:
        read_checkpoint(tmp_path / "c.pth")
    assert "\n" not in str(refusal.value) and "weights_only" not in str(refusal.value)


def test_archives_of_another_kind_get_a_sentence(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", a=np.zeros(3))
    with pytest.raises(MisfmError, match="a.npz is truncated or no PyTorch checkpoint"):
        read_checkpoint(tmp_path / "a.npz")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(MisfmError, match="list.pth: expected a checkpoint dictionary, got list"):
        read_checkpoint(tmp_path / "list.pth")


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.marker}",)


def malicious_files(folder: Path, marker: Path) -> list[Path]:
    torch.save({**small(), "init_args": Malicious(marker)}, folder / "zip.pth")
    legacy(folder / "legacy.pth", {**small(), "init_args": Malicious(marker)})
    (folder / "bare.pth").write_bytes(pickle.dumps(Malicious(marker)))
    (folder / "protocol_2.pth").write_bytes(pickle.dumps(Malicious(marker), protocol=2))
    return sorted(folder.glob("*.pth"))


def test_malicious_object_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    files = malicious_files(tmp_path, marker)
    assert len(files) == 4
    for file in files:
        with pytest.raises(MisfmError) as refusal:
            read_checkpoint(file)
        assert not marker.exists()
        assert "\n" not in str(refusal.value) and "weights_only" not in str(refusal.value)
        if file.stem in ("zip", "legacy"):
            assert f"{file}: expected tensors and plain data alone, got posix.system" in str(refusal.value)
            assert "nothing in it was run" in str(refusal.value)
    pickle.loads((tmp_path / "bare.pth").read_bytes())
    assert marker.exists()  # so the object does act where it is let


def test_other_objects_are_named(tmp_path: Path) -> None:
    torch.save({"network_weights": torch.nn.Linear(1, 1)}, tmp_path / "c.pth")
    with pytest.raises(MisfmError, match="alone, got torch.nn.modules.linear.Linear, so the file is not read"):
        read_checkpoint(tmp_path / "c.pth")


def test_the_allowance_for_numpy_ends_with_the_call(tmp_path: Path) -> None:
    torch.save({"a": np.float64(1)}, tmp_path / "c.pth")
    read_checkpoint(tmp_path / "c.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "c.pth", weights_only=True)


# network_weights


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrappers_are_removed(prefix: str) -> None:
    weights = {f"{prefix}stem.module.weight": torch.ones(1), f"{prefix}head.bias": torch.zeros(1)}
    assert list(network_weights({"network_weights": weights}, "c.pth")) == ["stem.module.weight", "head.bias"]


@pytest.mark.parametrize(
    "content",
    [{}, {"state_dict": {"a": 1}, "epoch": 3}, {"network_weights": {}}, {"network_weights": None},
     {"network_weights": [torch.zeros(1)]}, {"network_weights": {"a": torch.zeros(1), "b": [1.0]}}],
)  # fmt: skip
def test_checkpoint_without_tensors_of_a_network_gets_a_sentence(content: dict) -> None:
    keys = ", ".join(content) or "none"
    with pytest.raises(MisfmError, match=f"c.pth: expected .* under 'network_weights', got the keys {keys}; pass the"):
        network_weights(content, "c.pth")


# Hashes


def test_file_hash_is_that_of_all_its_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000  # more than one block
    (tmp_path / "f").write_bytes(content)
    assert file_sha256(tmp_path / "f") == hashlib.sha256(content).hexdigest()
    (tmp_path / "empty").write_bytes(b"")
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_tensor_hash_is_that_of_names_shapes_types_and_bytes() -> None:
    tensors = {"b": torch.tensor([[1.5, -2.0]]), "a": torch.tensor(7)}
    written = b"a () torch.int64" + struct.pack("<q", 7) + b"b (1, 2) torch.float32" + struct.pack("<2f", 1.5, -2.0)
    assert tensors_sha256(tensors) == hashlib.sha256(written).hexdigest()


def test_tensor_hash_depends_on_names_shapes_types_and_values_alone() -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    variants = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.reshape(3, 2)},
        {"a": tensor + 1},
        {"a": tensor.to(torch.bfloat16)},
        {"a": tensor.to(torch.bfloat16).view(torch.float16)},  # the same bytes of another type
        {"a": tensor, "b": torch.empty(0)},
        {"a": tensor > 2},
    ]
    assert len({tensors_sha256(v) for v in variants}) == len(variants)
    grad = tensor.clone().requires_grad_()
    transposed = tensor.t().contiguous().t()  # the same values in another order in memory
    assert not transposed.is_contiguous()
    assert {tensors_sha256({"a": t}) for t in (grad, transposed)} == {tensors_sha256({"a": tensor})}
    assert tensors_sha256({"a": tensor, "b": grad}) == tensors_sha256({"b": grad, "a": tensor})


def test_hash_of_saved_tensors_is_that_of_the_loaded_ones() -> None:
    buffer = io.BytesIO()
    tensors = {"w": torch.randn(3, 4, dtype=torch.bfloat16), "n": torch.tensor(3)}
    torch.save(tensors, buffer)
    buffer.seek(0)
    assert tensors_sha256(torch.load(buffer, weights_only=True)) == tensors_sha256(tensors)
