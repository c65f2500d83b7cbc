"""What a volume costs on its way from a raw scan to preprocessed data: processor time, memory and disk.

    python benchmarks/import_pipeline.py --volumes 6 --form nii.gz
    python benchmarks/import_pipeline.py --volumes 6 --form DICOM

CTs of 512x512x120 voxels (those of `import_scans.py`) go through the real commands, one process each: import, nnU-Net's
fingerprint, planning, our preprocessing and nnU-Net's. Processor time of a command is that of all its processes, start
included; memory is the peak of its largest process. All volumes have one spacing, so preprocessing resamples nothing.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from import_scans import FORMS, TYPICAL, write_all, write_ct

MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)}  # docs/performance.md


def main() -> None:
    """Prints one row per command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=6)
    parser.add_argument("--form", choices=FORMS, default="nii.gz")
    parser.add_argument("--shrink", type=int, default=1, help="divide every axis, to try the script")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        places = {f"nnUNet_{part}": str(folder / part) for part in ("raw", "preprocessed", "results")}
        one = {"OMP_NUM_THREADS": "1", "nnUNet_def_n_proc": "1", "nnUNet_n_proc_DA": "1"}
        variables = {**os.environ, **places, **one, **MALLOC}
        size = [axis // options.shrink for axis in TYPICAL]
        write_all(write_ct, folder / "scans", ((options.form, size, seed) for seed in range(options.volumes)))
        dataset, data = folder / "raw/Dataset900_CT", folder / "preprocessed/Dataset900_CT/nnUNetPlans_3d_fullres"
        os.makedirs(places["nnUNet_preprocessed"])
        print(f"{options.volumes} CTs of {'x'.join(map(str, size))}, {options.form}; one process each")
        print("| command | CPU s per volume | wall s per volume | peak MB | MB on disk per volume |")
        print("|---|---|---|---|---|")
        print(f"| (the scans) | | | | {disk_mb(folder / 'scans') / options.volumes:.0f} |")
        our_import = "nnUNetv2_misfm import -d 900 --name CT --modality CT --workers 1 --input"
        commands = {
            f"{our_import} {folder / 'scans'}": dataset,
            "nnUNetv2_extract_fingerprint -d 900 -np 1": None,
            "nnUNetv2_plan_experiment -d 900": None,
            "nnUNetv2_misfm preprocess -d 900 --workers 1": data,
            "nnUNetv2_preprocess -d 900 -c 3d_fullres -np 1": data,
        }
        for command, written in commands.items():
            if written == data:
                shutil.rmtree(data, ignore_errors=True)
            row(command.replace(f" {folder / 'scans'}", " SCANS"), command.split(), variables, options.volumes, written)


def row(name: str, command: list[str], variables: dict[str, str], volumes: int, written: Path | None) -> None:
    """Runs a command of this environment in a process of its own and prints what it cost."""
    measured = subprocess.run(
        [sys.executable, __file__, "--measure", str(Path(sys.executable).parent / command[0]), *command[1:]],
        env=variables,
        capture_output=True,
        text=True,
        check=True,
    )
    cpu_s, wall_s, peak_mb = map(float, measured.stdout.split()[-3:])
    disk = f"{disk_mb(written) / volumes:.0f}" if written else ""
    print(f"| {name} | {cpu_s / volumes:.1f} | {wall_s / volumes:.1f} | {peak_mb:.0f} | {disk} |", flush=True)


def measure(command: list[str]) -> None:
    """Runs a command and prints its processor seconds, wall seconds and peak MB as the last line."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(used.ru_utime + used.ru_stime, time.perf_counter() - start, used.ru_maxrss * 1024 / 1e6)  # ru_maxrss: KiB


def disk_mb(folder: Path) -> float:
    """Size of all files below a folder in MB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2:])
    else:
        main()
