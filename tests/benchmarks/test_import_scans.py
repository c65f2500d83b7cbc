import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nnunetv2_misfm.data.dicom import read_series
from nnunetv2_misfm.data.files import read_file
from nnunetv2_misfm.data.volume import Volume, canonical, orientation_of


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("import_scans")


def _written(benchmark: ModuleType, folder: Path, form: str) -> Volume:
    folder.mkdir()
    benchmark.write_ct(folder, form, (24, 20, 16), 0)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    (volume,) = read_series(files) if form == "DICOM" else read_file(files[0])
    assert isinstance(volume, Volume)
    return volume


def test_forms_hold_the_same_scan_and_ras_must_be_turned(benchmark: ModuleType, tmp_path: Path) -> None:
    volumes = {form: _written(benchmark, tmp_path / form, form) for form in benchmark.FORMS}
    assert [orientation_of(volume.affine) for volume in volumes.values()] == ["LPS", "RAS", "LPS"]
    first, *others = (canonical(volume) for volume in volumes.values())
    assert len(np.unique(first.voxels)) > 100
    for other in others:
        np.testing.assert_array_equal(other.voxels, first.voxels)
        np.testing.assert_allclose(other.affine, first.affine, atol=1e-4)


def test_scaled_form_has_fractions_of_its_slope(benchmark: ModuleType, tmp_path: Path) -> None:
    plain = _written(benchmark, tmp_path / "plain", "nii.gz")
    scaled = _written(benchmark, tmp_path / "scaled", "nii scaled int16")
    np.testing.assert_allclose(scaled.voxels, (plain.voxels + 1024.0) * 0.75 - 1024)


def test_sample_of_a_share_is_the_first_that_has_it(benchmark: ModuleType) -> None:
    samples = [benchmark.Sample(done, 0, []) for done in (0, 9, 11, 60, 99)]
    assert [benchmark.at_share(samples, share, 100).done for share in (0.1, 0.5, 1.0)] == [11, 60, 99]


def test_the_script_runs(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "benchmarks/import_scans.py"
    options = "--part throughput memory --shrink 16 --files 1 --rounds 1".split()
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| CT ") == 3 and "Memory of a worker" in done.stdout
