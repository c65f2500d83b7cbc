"""From raw scans to pretrained weights by the README's commands, stock nnU-Net's among them."""

import json
from pathlib import Path

import pytest
from commands import World
from scans import ct, mr, report, tree, write

from nnunetv2_misfm.trainers.pretext import PretextTrainer

pytestmark = pytest.mark.slow

PRETRAINERS = ("nnUNetTrainerVFPretrain", "nnUNetTrainerPCTNetVFPretrain")
QUICK = (
    *("num_epochs=1", "num_iterations_per_epoch=2", "num_val_iterations_per_epoch=1", "batch_size=2"),
    *("patch_size=[16,16,16]", "features_per_stage=[8,8,16,16,32]", "num_heads=[1,1,1]"),
)
# canonical, and of an ending that nnU-Net's reader knows
LINKED = {"ct": 8, "mr": 10}
# label maps of `odd` and what its README names; every other file there is judged by its content below
ODD = {
    "rejected": {
        "2d_flair.nii.gz": "2D",
        "4d_pcasl.nii.gz": "time series",
        "4d_vector_V1.nii.gz": "vectors",
        "5d_warp_float_max.nii.gz": "vectors",
        "DERIVED_truncated_gzip.nii.gz": "damaged",
        "analyze75/analyze.hdr": ".img",
        "dicom_ct_gantry_tilt_nonuniform/": "non-uniform spacing",
        "dicom_missing_slice/": "1 slice is missing",
        "git_lfs_pointer_not_gzip.nii.gz": "git LFS",
        "header_extension_LPI_trailing_dim.nii.gz": "label map",
        "labels256_LIA.nii.gz": "label map",
        "rgb24_ct_perfusion.nii.gz": "colour",
        "rgba32_CIT168.nii.gz": "colour",
        "torsoLabel_11organs_labels_only.nii.gz": "label map",
        "udacity_trap/labels_hippocampus_010.nii.gz": "label map",
        "udacity_trap/labels_hippocampus_281.nii.gz": "label map",
        "uncompressed_prostate_mask.nii": "label map",
    },
    "accepted": {
        "float64_narps.nii.gz": "",
        "nifti2.nii.gz": "",
        "oblique_5mm_PSR.nii.gz": "",
        "udacity_trap/images_hippocampus_118.nii.gz": "",
        "orient/AIL.nii.gz": "",
    },
    "duplicate": {f"orient/{name}.nii.gz": "orient/AIL.nii.gz" for name in "ARS IRP LPS LSA PIR RAS SPL".split()},
}


def run(world: World, step: str, *command: str | Path, **variables: str) -> str:
    world.run(step, *command, **variables)
    finished = world.finished[step]
    assert finished.returncode == 0, finished.stdout[-2000:] + finished.stderr[-4000:]
    return finished.stdout


def world_in(folder: Path) -> World:
    for name in ("raw", "preprocessed", "results"):
        (folder / name).mkdir()
    return World(folder)


def test_imported_scans_pass_every_stock_command_and_pretrain_both_networks(tmp_path: Path) -> None:
    world = world_in(tmp_path)
    for number in range(5):
        write(tmp_path / f"scans/{number}/scan.nii.gz", ct(number, (24, 26, 28)))
    (tmp_path / "scans/4/broken.nii.gz").write_bytes(b"")
    said = run(
        world, "import", "nnUNetv2_misfm", "import", "--input", tmp_path / "scans", "--dataset", "900",
        "--name", "Pool", "--modality", "CT", "--workers", "1",
    )  # fmt: skip
    assert "accepted          5" in said and "rejected          1" in said
    dataset_json = json.loads((tmp_path / "raw/Dataset900_Pool/dataset.json").read_text())
    assert PretextTrainer.labels_are_body_masks(dataset_json)  # so that crops are centred on the patient
    one = ("-npfp", "1", "-np", "1")
    planned = run(
        world, "plan", "nnUNetv2_plan_and_preprocess", "-d", "900", "-c", "3d_fullres", "--verify_dataset_integrity",
        *one, nnUNet_n_proc_DA="1",
    )  # fmt: skip
    assert "then your dataset is most likely OK" in planned and "Error" not in planned
    data = tmp_path / "preprocessed/Dataset900_Pool/nnUNetPlans_3d_fullres"
    stock = {name: content for name, content in tree(data).items() if name.endswith(".pkl")}
    assert len(stock) == 5
    again = run(world, "preprocess", "nnUNetv2_misfm", "preprocess", "-d", "900", "-c", "3d_fullres", "--workers", "1")
    assert "preprocessed 5 cases" in again
    assert {name: content for name, content in tree(data).items() if name.endswith(".pkl")} == stock
    run(world, "configure", "nnUNetv2_misfm", "configure", "-d", "900", "-c", "3d_fullres", "--name", "quick", *QUICK)
    for trainer in PRETRAINERS:
        world.train(trainer, trainer, target=("900", "quick", "all"))
        assert world.finished[trainer].returncode == 0, world.finished[trainer].stderr[-4000:]
        model = tmp_path / f"results/Dataset900_Pool/{trainer}__nnUNetPlans__quick"
        assert (model / "fold_all/checkpoint_final.pth").is_file()


def test_odd_files_get_the_verdict_that_they_warrant(shared: Path, tmp_path: Path) -> None:
    world, odd = world_in(tmp_path), shared / "data/odd"
    run(
        world, "import", "nnUNetv2_misfm", "import", "--input", odd, "--dataset", "901", "--name", "Odd",
        "--modality", "MR", "--workers", "2",
    )  # fmt: skip
    rows = {
        Path(row["path"]).relative_to(odd.absolute()).as_posix(): row for row in report(tmp_path / "raw/Dataset901_Odd")
    }
    for verdict, items in ODD.items():
        for name, reason in items.items():
            [row] = [
                row for path, row in rows.items() if path == name or (name.endswith("/") and path.startswith(name))
            ]
            assert row["verdict"] == verdict, (name, row)
            assert reason in row["reason"], (name, row)
    time_points = [row for path, row in rows.items() if path.startswith("dicom_4d/")]
    assert len(time_points) == 19 and {row["verdict"] for row in time_points} == {"rejected"}
    files = [file for file in odd.rglob("*") if file.is_file()]
    assert sum(int(row["files"]) for row in rows.values()) == len(files)


def test_the_dicom_head_is_imported_as_the_nifti_of_it_and_orientations_are_equal_images(
    shared: Path, tmp_path: Path
) -> None:
    import numpy as np
    import SimpleITK as sitk

    world, odd = world_in(tmp_path), shared / "data/odd"
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool/dicom").symlink_to(odd / "dicom_ct_head_64x64x93")
    (tmp_path / "pool/nifti.nii.gz").symlink_to(shared / "data/unannotated/ct/slicer_CTHeadAxial.nii.gz")
    command = ("nnUNetv2_misfm", "import", "--workers", "1", "--input")
    run(world, "head", *command, tmp_path / "pool", "--dataset", "902", "--name", "Head", "--modality", "CT")
    first, second = report(tmp_path / "raw/Dataset902_Head")
    assert (first["verdict"], first["files"], first["shape"]) == ("accepted", "93", "64x64x93")
    assert second["verdict"] == "duplicate"
    kept = ("--dataset", "903", "--name", "Orient", "--modality", "MR", "--keep-duplicates")
    run(world, "orient", *command, odd / "orient", *kept)
    images = [sitk.ReadImage(str(file)) for file in (tmp_path / "raw/Dataset903_Orient/imagesTr").glob("*")]
    assert len(images) == 8
    for image in images:
        np.testing.assert_array_equal(sitk.GetArrayViewFromImage(image), sitk.GetArrayViewFromImage(images[0]))
        for geometry in ("GetOrigin", "GetSpacing", "GetDirection"):
            np.testing.assert_allclose(getattr(image, geometry)(), getattr(images[0], geometry)(), atol=1e-3)


def test_all_unannotated_scans_are_imported_and_pretrain_both_networks(shared: Path, tmp_path: Path) -> None:
    world, pool = world_in(tmp_path), shared / "data/unannotated"
    run(
        world, "import", "nnUNetv2_misfm", "import", "--input", pool, "--dataset", "900", "--name", "Pool",
        "--split-by-modality", "--link", "--workers", "2",
    )  # fmt: skip
    for dataset, folder in (("Dataset900_PoolCT", "ct"), ("Dataset901_PoolMR", "mr")):
        rows = [row for row in report(tmp_path / "raw" / dataset) if not row["path"].endswith("sources.tsv")]
        assert len(rows) == sum(1 for _ in (pool / folder).iterdir())
        assert {row["verdict"] for row in rows} == {"accepted"}
        assert {Path(row["path"]).parent.name for row in rows} == {folder}
        described = json.loads((tmp_path / "raw" / dataset / "dataset.json").read_text())
        assert described["numTraining"] == len(rows)
        linked = sum(Path(files["images"][0]).is_absolute() for files in described["dataset"].values())
        assert linked == LINKED[folder]
        assert all(0.2 < float(row["body_share"]) <= 1 for row in rows)
    run(
        world, "plan", "nnUNetv2_plan_and_preprocess", "-d", "900", "901", "-c", "3d_fullres",
        "--verify_dataset_integrity", "-npfp", "2", "-np", "2", nnUNet_n_proc_DA="1",
    )  # fmt: skip
    for dataset in ("900", "901"):
        configure = ("nnUNetv2_misfm", "configure", "-d", dataset, "-c", "3d_fullres", "--name", "quick")
        run(world, "configure", *configure, *QUICK, "patch_size=[32,32,32]")  # planned networks pool up to 16 times
        for trainer in PRETRAINERS:
            world.train(trainer, trainer, target=(dataset, "quick", "all"))
            assert world.finished[trainer].returncode == 0, world.finished[trainer].stderr[-4000:]


def test_a_mixed_pool_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    world = world_in(tmp_path)
    write(tmp_path / "scans/a.nii", ct(0))
    write(tmp_path / "scans/b.nii", mr(0))
    world.run("mixed", "nnUNetv2_misfm", "import", "--input", tmp_path / "scans", "-d", "900", "--name", "Pool")
    assert world.finished["mixed"].returncode == 2
    last = world.finished["mixed"].stderr.strip().splitlines()[-1]
    assert last.startswith("nnUNetv2_misfm import: expected scans of one modality, got 1 of CT and 1 of MR: ")
