"""Import of scans: throughput per core, memory of a worker, memory over many volumes, and workers of a Dask cluster.

    python benchmarks/import_scans.py
    python benchmarks/import_scans.py --part throughput memory --scans ~/scans

throughput: one thread. The floor is SimpleITK's ReadImage (a list of slices for DICOM) and WriteImage to .nii.gz, at
the one zlib level that it has for NIfTI; beside it `import_source` on the same files, in the page cache: reading,
checks, hashes, body mask, image and mask written by igzip. The ways alternate file by file, in reversed order
every other round. Ratios are floor / import of one file in one round, median (lowest to highest); seconds are sums over
files of the median over rounds. Scans of --scans that import refuses or SimpleITK cannot read are left out and counted.
--link links canonical .nii.gz, .nrrd and .mha and writes the rest. "Stored" is the size of the files.

memory: highest peak resident memory, over all rounds, of a fresh process that imports one volume and of one that only
loads the same modules (VmHWM; ru_maxrss would start at the parent's). "Decoded" is in the type that SimpleITK reads.

flat: many small volumes imported by `import_scans` with two worker processes; resident memory, sampled every second, by
the share of the volumes that is done; then a run with nothing to do and one after 100 more came.

cluster: wall time of a call of `import_scans` in a fresh process, on a running local Dask cluster of one and of two
workers and on one and two processes, which it starts; ratios are one worker / two of the same round.
The CTs are the demo's phantoms enlarged to an adult's field of view, with noise in every voxel and a round field.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext, suppress
from functools import partial
from importlib.metadata import version
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pydicom
import SimpleITK as sitk
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from nnunetv2_misfm.data.import_dataset import Workers, import_scans
from nnunetv2_misfm.data.import_scan import import_source
from nnunetv2_misfm.data.modality import MODALITIES, probe_modality
from nnunetv2_misfm.data.outcome import Settings
from nnunetv2_misfm.data.phantoms import AIR_HU, NOISE_HU, STORED_HU, make_phantom
from nnunetv2_misfm.data.records import State
from nnunetv2_misfm.data.sources import Source, folders_below, scan_folder, sources_in

FIELD_OF_VIEW_MM = (384.0, 384.0, 300.0)  # x, y, z: 0.75 x 0.75 x 2.5 mm at 512x512x120; as of an adult's body CT
TYPICAL, LARGEST, MEDIUM, SMALL = (512, 512, 120), (512, 512, 400), (256, 256, 100), (24, 24, 24)
FORMS = ("nii.gz", "nii.gz RAS", "DICOM")
MEMORY_FORMS = (*FORMS, "nii.gz float32", "nii scaled int16")
SCALED = (0.75, -1024.0)  # slope and intercept: most intensities are no whole numbers
DATASET, ADDED, SHARES = "Dataset900_Benchmark", 100, (0.1, 0.5, 1.0)
DASK = {"threads_per_worker": 1, "processes": True, "dashboard_address": None}
# glibc's variables, as in networks.py
MALLOC = {"default": {}, "tuned": {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "68719476736"}}


def make_ct(seed: int, size: Sequence[int]) -> sitk.Image:
    """Returns a CT-like image, int16, LPS, of `size` voxels along x, y and z, -1024 outside a round field."""
    generator = np.random.default_rng(seed)
    small = sitk.GetImageFromArray(make_phantom(generator).image)
    small.SetSpacing([extent / count for extent, count in zip(FIELD_OF_VIEW_MM, small.GetSize(), strict=True)])
    grid = sitk.Image(list(size), sitk.sitkInt16)
    grid.SetSpacing([extent / count for extent, count in zip(FIELD_OF_VIEW_MM, size, strict=True)])
    voxels = sitk.GetArrayFromImage(sitk.Resample(small, grid, sitk.Transform(), sitk.sitkLinear, AIR_HU))
    x, y = (np.linspace(-1, 1, count) for count in size[:2])
    for plane in voxels:
        noisy = plane + NOISE_HU * generator.standard_normal(plane.shape, np.float32)
        plane[:] = np.where(y[:, None] ** 2 + x**2 <= 1, np.clip(np.rint(noisy), *STORED_HU), STORED_HU[0])
    image = sitk.GetImageFromArray(voxels)
    image.CopyInformation(grid)
    return image


def write_ct(folder: Path, form: str, size: Sequence[int], seed: int) -> None:
    """Writes a CT in one of `MEMORY_FORMS` into a folder."""
    image = make_ct(seed, size)
    file = folder / f"ct_{seed:03d}.nii.gz"
    if form == "DICOM":
        write_series(image, folder / f"ct_{seed:03d}")
    elif form == "nii scaled int16":
        sitk.WriteImage(image - STORED_HU[0], str(file.with_suffix("")))
        with open(file.with_suffix(""), "r+b") as stream:
            stream.seek(112)  # scl_slope and scl_inter (nifti1.h)
            stream.write(np.array(SCALED, "<f4").tobytes())
    else:
        image = sitk.DICOMOrient(image, "RAS") if form == "nii.gz RAS" else image
        image = sitk.Cast(image, sitk.sitkFloat32) * 1.001 if form == "nii.gz float32" else image
        sitk.WriteImage(image, str(file))


def write_series(image: sitk.Image, folder: Path) -> None:
    """Writes an image as a DICOM series of 12 bits, uncompressed, one file per slice."""
    folder.mkdir()
    x, y, z = image.GetSpacing()
    uids = {f"{level}InstanceUID": generate_uid() for level in ("Study", "Series")}
    common = uids | {
        "SOPClassUID": CTImageStorage, "Modality": "CT", "SliceThickness": z, "PixelSpacing": [y, x],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "Columns": image.GetWidth(), "Rows": image.GetHeight(),
        "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2", "PixelRepresentation": 0,
        "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "RescaleSlope": 1, "RescaleIntercept": STORED_HU[0],
    }  # fmt: skip
    for number, plane in enumerate(sitk.GetArrayViewFromImage(image)):
        one = pydicom.Dataset()
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        for keyword, value in common.items():
            setattr(one, keyword, value)
        one.SOPInstanceUID, one.InstanceNumber = generate_uid(), number + 1
        one.ImagePositionPatient = [0, 0, number * z]
        one.PixelData = (plane - STORED_HU[0]).astype("<u2").tobytes()
        one.save_as(folder / f"IM{number:04d}.dcm", enforce_file_format=True)


def write_small(folder: Path, seeds: range) -> None:
    """Writes small CTs that differ in their noise alone, uncompressed."""
    base = sitk.GetArrayFromImage(make_ct(0, SMALL))
    place = folder / f"from_{seeds.start:06d}"
    place.mkdir()
    for seed in seeds:
        noise = np.random.default_rng(seed).integers(-15, 16, base.shape, np.int16)
        sitk.WriteImage(sitk.GetImageFromArray(base + noise), str(place / f"ct_{seed:06d}.nii"))


def write_all(write: Callable[..., None], folder: Path, tasks: Iterable[tuple]) -> None:
    """Writes scans into a folder, on all processors."""
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(write, repeat(folder), *zip(*tasks, strict=True)))


def floor(files: Sequence[Path], target: Path) -> int:
    """Reads the files of one scan and writes it, and nothing else; returns the bytes of its voxels."""
    names = [str(file) for file in files]
    image = sitk.ReadImage(names if len(names) > 1 and files[0].suffix != ".mhd" else names[0])
    sitk.WriteImage(image, str(target))
    return image.GetNumberOfPixels() * image.GetSizeOfPixelComponent()


def timed(way: Callable[[], object]) -> tuple[float, float]:
    """Returns wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    way()
    return time.perf_counter() - wall, time.process_time() - cpu


def find(top: Path, folder: Path) -> tuple[State, list[Source]]:
    """Returns the state of an import, kept in a folder, and what lies below `top`."""
    state = State(folder, folder)
    folders = list(folders_below([top]))
    for folder in folders:
        scan_folder(folder, state.scanned)
    return state, sources_in(folders, state.scanned)


def is_taken(source: Source, state: State) -> bool:
    """Tells whether a source that was imported is in the dataset as a whole."""
    return all(row["verdict"] in ("accepted", "repaired") for row in state.imported.last(source.key)["outcomes"])


def throughput_row(kind: str, sources: list[Source], modality: str, state: State, options: argparse.Namespace) -> list:
    """Returns the row of scans of one kind."""
    decoded, stored, times, steps = 0, 0, [], ([1, -1] * options.rounds)[: options.rounds]
    for source in sources:
        files = source.files(state.scanned)
        ways: list[partial] = [partial(floor, files, state.folder / "floor.nii.gz")]
        for settings in (Settings(modality), Settings(modality, link=True)):
            ways.append(partial(import_source, source, state.folder / f"{settings.link}", state, settings, again=True))
        try:
            size = ways[0]()
            ways[1]()
        except RuntimeError:  # SimpleITK cannot read it
            continue
        if is_taken(source, state):
            decoded, stored = decoded + size, stored + sum(file.stat().st_size for file in files)
            times.append([[timed(way) for way in ways[::step]][::step] for step in steps])
    number = f"{len(times)} ({len(sources) - len(times)} left out)"
    if not times:
        return [kind, number, *["-"] * 8, setting(options, 0)]
    figures = np.array(times)  # [file, round, way, wall or CPU]
    seconds = [f"{wall:.2f} ({cpu:.2f})" for wall, cpu in np.median(figures, axis=1).sum(0)]
    ratios = (figures[:, :, :1] / figures[:, :, 1:]).reshape(-1, 2, 2)  # [, import or import --link, wall or CPU]
    shares = [spread(ratios[:, 0, 1]), spread(ratios[:, 0, 0]), spread(ratios[:, 1, 1])]
    return [kind, number, mb([decoded]), mb([stored]), *seconds, *shares, setting(options, len(ratios))]


def throughput(options: argparse.Namespace, folder: Path) -> None:
    """Prints floor and import side by side for every kind of scan."""
    rows, size = [], options.smaller(TYPICAL)
    for form in FORMS:
        write_all(write_ct, folder / form, ((form, size, seed) for seed in range(options.files)))
        state, sources = find(folder / form, folder / f"state of {form}")
        rows.append(throughput_row(f"CT {size} {form}", sources, "CT", state, options))
    if options.scans:
        state, sources = find(options.scans, folder / "state of scans")
        kinds: dict[str, list[Source]] = {modality: [] for modality in MODALITIES}
        for source in sources:
            kinds.setdefault(probe_modality(source, state, Settings("auto")) or "", []).append(source)
        for kind in MODALITIES:
            rows.append(throughput_row(f"{kind} of {options.scans.name}", kinds[kind], kind, state, options))
    columns = "scans | number | decoded MB | stored MB | floor s (CPU) | import s (CPU) | import --link s (CPU)"
    columns += " | CPU ratio floor / import (target 0.7) | wall ratio | CPU ratio floor / import --link"
    table("Throughput of one core", columns, rows)


def peak_bytes() -> int:
    """Returns the peak resident memory of this process (Linux)."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def peak_of_import(options: argparse.Namespace, folder: Path) -> None:
    """Imports the scan below a folder, if any, in this process and prints the peak memory."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        state, sources = find(folder / "scans", Path(place))
        for source in sources:
            import_source(source, Path(place), state, Settings("CT"))
            assert is_taken(source, state)
    print(peak_bytes())


def memory(options: argparse.Namespace, folder: Path) -> None:
    """Prints the peak memory of a worker for every form of the largest volume."""

    def peak() -> int:
        command = [sys.executable, __file__, "--child", "peak_of_import", str(folder)]
        return max(int(subprocess.check_output(command)) for _ in range(options.rounds))

    scans, size, rows = folder / "scans", options.smaller(LARGEST), []
    scans.mkdir()
    idle = peak()
    for form in MEMORY_FORMS:
        write_all(write_ct, scans, [(form, size, 0)])
        decoded = floor(sorted(file for file in scans.rglob("*") if file.is_file()), folder / "floor.nii.gz")
        top = peak()
        figures = [mb([decoded]), mb([top]), mb([idle]), f"{top / decoded:.2f}", f"{(top - idle) / decoded:.2f}"]
        rows.append([f"{size} {form}", *figures, setting(options, options.rounds)])
        shutil.rmtree(scans)
    columns = "volume | decoded MB | peak MB | idle MB | peak / decoded (target 4) | (peak - idle) / decoded"
    table("Memory of a worker", columns, rows)


class Sample(NamedTuple):
    """Resident memory in bytes when some volumes were done."""

    done: int
    coordinator: int
    workers: list[int]


def at_share(samples: Sequence[Sample], share: float, total: int) -> Sample:
    """Returns the first sample with a share of the volumes done; the last one where none has."""
    return next((sample for sample in samples if sample.done >= share * total), samples[-1])


def take_sample(process: psutil.Process, masks: Path) -> Sample:
    """Looks at a running import; the process that tracks multiprocessing's resources is no worker."""
    workers = [other for other in process.children() if any("spawn_main" in word for word in other.cmdline())]
    done = sum(1 for _ in os.scandir(masks)) if masks.is_dir() else 0
    return Sample(done, process.memory_info().rss, [worker.memory_info().rss for worker in workers])


def import_here(options: argparse.Namespace, folder: Path, workers: str, scheduler: str) -> None:
    """Calls the command's function in this process and prints JSON: wall seconds, peak memory, number of cases."""
    start = time.perf_counter()
    import_scans([folder], 900, "Benchmark", Settings("CT"), Workers(int(workers), scheduler or None))
    wall_s = time.perf_counter() - start
    dataset = json.loads(Path(os.environ["nnUNet_raw"], DATASET, "dataset.json").read_text())
    print(json.dumps({"wall_s": wall_s, "peak": peak_bytes(), "cases": dataset["numTraining"]}))


def import_below(folder: Path, raw: Path, workers: int, scheduler: str = "") -> tuple[dict, list[Sample]]:
    """Imports the CTs below a folder to nnUNet_raw in a fresh process; returns its figures and samples of it."""
    raw.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--child", "import_here", str(folder), str(workers), scheduler]
    with open(raw / "output", "w+") as output, open(raw / "log", "w+") as log:
        running = subprocess.Popen(command, env={**os.environ, "nnUNet_raw": str(raw)}, stdout=output, stderr=log)
        process, samples = psutil.Process(running.pid), []
        while running.poll() is None:
            with suppress(psutil.Error):  # it may just have ended
                samples.append(take_sample(process, raw / DATASET / "labelsTr"))
            with suppress(subprocess.TimeoutExpired):
                running.wait(1)
    if running.returncode:
        raise SystemExit(f"import failed:\n{(raw / 'log').read_text()}")
    return json.loads((raw / "output").read_text().splitlines()[-1]), samples


def flat(options: argparse.Namespace, folder: Path) -> None:
    """Prints memory over a run of many small volumes, and how long it takes to go on."""
    scans, raw, total = folder / "scans", folder / "raw", options.volumes
    about = setting(options, 1, "2 workers")
    write_all(write_small, scans, ((range(first, min(first + 500, total)),) for first in range(0, total, 500)))
    first, samples = import_below(scans, raw, 2)
    again, _ = import_below(scans, raw, 2)
    write_all(write_small, scans, [(range(total, total + ADDED),)])
    more, _ = import_below(scans, raw, 2)
    seen = [(f"{share:.0%} done", at_share(samples, share, total)) for share in SHARES] + [("last", samples[-1])]
    rows = [[when, str(one.done), mb([one.coordinator]), mb(one.workers), about] for when, one in seen]
    most = f"up to {mb([max(max(one.workers, default=0) for one in samples)])}"
    rows.append(["peak of the run", str(first["cases"]), mb([first["peak"]]), most, about])
    table(f"Memory over {total} volumes {SMALL}", "when | volumes | coordinator MB | workers MB", rows)
    rows = []
    for name, new, run in (("all", total, first), ("nothing to do", 0, again), (f"{ADDED} more", ADDED, more)):
        rate = f"{new / run['wall_s']:.1f}"
        rows.append([name, str(run["cases"]), f"{run['wall_s']:.1f}", rate, mb([run["peak"]]), about])
    table("Going on", "run | cases after it | wall s | new volumes / s | coordinator peak MB", rows)


def cluster(options: argparse.Namespace, folder: Path) -> None:
    """Prints wall times of one and two workers, of Dask and of the process pool."""
    from distributed import LocalCluster

    size, scans, raw, rows = options.smaller(MEDIUM), folder / "scans", folder / "raw", []
    write_all(write_ct, scans, (("nii.gz", size, seed) for seed in range(options.items)))
    ways = [("Dask", 1), ("Dask", 2), ("processes", 1), ("processes", 2)]
    times: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
    for number in range(options.rounds):
        for kind, workers in ways[:: -1 if number % 2 else 1]:
            with LocalCluster(n_workers=workers, **DASK) if kind == "Dask" else nullcontext() as dask:
                run, _ = import_below(scans, raw, workers, dask.scheduler_address if dask else "")
            assert run["cases"] == options.items
            times[kind, workers].append(run["wall_s"])
            shutil.rmtree(raw)
    for (kind, workers), walls in times.items():
        figures = [spread(walls), f"{options.items / np.median(walls):.1f}", spread(np.divide(times[kind, 1], walls))]
        rows.append([kind, str(workers), *figures, setting(options, len(walls))])
    columns = "by | workers | wall s | volumes / s | ratio to one worker (target 1.7)"
    table(f"Workers side by side, {options.items} CTs {size} nii.gz", columns, rows)


def spread(values: Any) -> str:
    """Returns median (lowest to highest)."""
    return f"{np.median(values):.3g} ({np.min(values):.3g} to {np.max(values):.3g})"


def mb(sizes: Sequence[int]) -> str:
    """Returns sizes in MB."""
    return " and ".join(f"{size / 1e6:.0f}" for size in sizes)


def setting(options: argparse.Namespace, n: int, more: str = "") -> str:
    """Returns what a row was measured with."""
    versions = [f"{name} {version(name)}" for name in ("nnunetv2-misfm", "numpy", "SimpleITK", "nibabel", "pydicom")]
    parts = [f"n = {n}", more, "1 thread", f"{os.cpu_count()} CPUs", f"{options.malloc} malloc", *versions]
    parts.append(f"Python {sys.version.split()[0]}")
    return ", ".join(filter(None, parts))


def table(title: str, columns: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table."""
    print(f"\n{title} (load of the machine at the end: {os.getloadavg()[0]:.1f}):\n\n| {columns} | n and setting |")
    print("|---" * len(rows[0]) + "|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)


PARTS = {"throughput": throughput, "memory": memory, "flat": flat, "cluster": cluster}
CHILDREN: dict[str, Callable[..., None]] = {**PARTS, "peak_of_import": peak_of_import, "import_here": import_here}


def main() -> None:
    """Reads the command line and runs every part in a process of its own, which malloc's setting acts on."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=tuple(PARTS))
    parser.add_argument("--scans", type=Path, help="a folder of scans for throughput, beside the CTs made here")
    parser.add_argument("--files", type=int, default=3, help="CTs of every form in throughput")
    parser.add_argument("--volumes", type=int, default=10_000, help="of flat")
    parser.add_argument("--items", type=int, default=60, help="volumes of cluster")
    parser.add_argument("--rounds", type=int, default=3, help="of all parts but flat")
    parser.add_argument("--shrink", type=int, default=1, help="divides the sizes of the CTs, to try this script")
    parser.add_argument("--malloc", default="default", choices=tuple(MALLOC), help="glibc's")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.smaller = lambda size: tuple(count // options.shrink for count in size)
    if options.child:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        sitk.ProcessObject.GlobalWarningDisplayOff()
        function, folder, *arguments = options.child
        CHILDREN[function](options, Path(folder), *arguments)
    else:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        environment |= {**MALLOC[options.malloc], "OMP_NUM_THREADS": "1"}
        for part in options.part:
            with tempfile.TemporaryDirectory() as place:
                command = [sys.executable, __file__, *sys.argv[1:], "--child", part, place]
                subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
