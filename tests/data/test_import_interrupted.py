"""Real processes of a real import are killed in its middle; the result must be that of an import left in peace."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from scans import ct, tree, write

from nnunetv2_misfm.data.import_dataset import Workers, import_scans
from nnunetv2_misfm.data.outcome import Settings

NUM_SCANS = 24
COMMAND = [sys.executable, "-c", "from nnunetv2_misfm.cli import main; raise SystemExit(main())", "import"]


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    for number in range(NUM_SCANS):
        write(folder / f"{number % 4}/scan {number}.nii.gz", ct(number, (40, 40, 30)))
    write(folder / "0/copy.nii", ct(3, (40, 40, 30)))
    (folder / "1/broken.nii.gz").write_bytes(b"no gzip")
    return folder


@pytest.fixture(scope="module")
def peaceful(pool, tmp_path_factory) -> dict[str, bytes]:
    raw = tmp_path_factory.mktemp("peaceful")
    subprocess.run(command(pool), env=environment(raw), check=True, capture_output=True, timeout=300)
    return tree(raw)


def command(pool: Path) -> list[str]:
    return [*COMMAND, *f"--input {pool} -d 900 --name Pool --modality CT --workers 2".split()]


def environment(raw: Path) -> dict[str, str]:
    return {**os.environ, "nnUNet_raw": str(raw), "OMP_NUM_THREADS": "1"}


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came to this"
        time.sleep(0.005)


def num_written(raw: Path) -> int:
    return sum(1 for _ in raw.glob("Dataset900_Pool/labelsTr/*"))


def test_an_import_killed_again_and_again_ends_with_the_same_bytes(pool, peaceful, tmp_path):
    for stop_at in (0, 4, 11, 19):
        process = subprocess.Popen(
            command(pool), env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(lambda: (tmp_path / ".misfm_import").exists() and num_written(tmp_path) >= stop_at)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "Dataset900_Pool/dataset.json").exists(), "killed too late to mean anything"
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("Dataset900_Pool/imagesTr/*")}
    recorded = len(list(tmp_path.glob(".misfm_import/Dataset900/imported/*/*.json")))
    subprocess.run(command(pool), env=environment(tmp_path), check=True, capture_output=True, timeout=300)
    assert tree(tmp_path) == peaceful
    untouched = [file for file, time_ns in before.items() if file.exists() and file.stat().st_mtime_ns == time_ns]
    assert len(untouched) >= min(recorded, 10)


def test_a_disk_that_takes_no_more_stops_the_run_and_room_lets_it_go_on(pool, peaceful, tmp_path):
    limit = 20_000  # bytes of a file, less than a scan needs; writing on fails as on a full disk
    stopped = subprocess.run(
        command(pool),
        env=environment(tmp_path),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert stopped.returncode == 2
    assert "could not be written" in stopped.stderr and "start the same command again" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not list(tmp_path.glob("Dataset900_Pool/*/*"))
    subprocess.run(command(pool), env=environment(tmp_path), check=True, capture_output=True, timeout=300)
    assert tree(tmp_path) == peaceful


def test_a_worker_killed_in_the_middle_changes_nothing(pool, peaceful, tmp_path):
    process = subprocess.Popen(
        command(pool), env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(lambda: num_written(tmp_path) >= 3)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    workers = [pid for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    assert process.wait(timeout=300) == 0
    assert tree(tmp_path) == peaceful


def test_a_dask_worker_killed_in_the_middle_changes_nothing(pool, peaceful, tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed")
    monkeypatch.setenv("nnUNet_raw", str(tmp_path))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        victim = next(iter(cluster.workers.values())).pid

        def kill() -> None:
            wait_for(lambda: num_written(tmp_path) >= 3)
            os.kill(victim, signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        import_scans([pool], 900, "Pool", Settings("CT"), Workers(scheduler=cluster.scheduler_address))
        killer.join()
    assert tree(tmp_path) == peaceful
