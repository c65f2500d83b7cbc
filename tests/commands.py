"""Tiny raw datasets, and nnU-Net's scripts run on them as a user's shell does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from toy import toy_case, toy_dataset_json

from nnunetv2_misfm.installation import discovery_folder

SHAPE = (24, 28, 24)
POOL, ORGANS = "Dataset900_Pool", "Dataset901_Organs"
PCT_PRETRAIN, PCT_VF = "nnUNetTrainerPCTNetVFPretrain", "nnUNetTrainerPCTNetVF"

QUICK = (
    "num_epochs=2", "num_iterations_per_epoch=2", "num_val_iterations_per_epoch=1", "seed=3", "batch_size=2",
    "features_per_stage=[4,4,8,16,32]", "num_heads=[1,1,1]", "architecture.features_per_stage=[4,8,16]",
)  # fmt: skip


def write_dataset(folder: Path, labelled: bool) -> None:
    """Six training cases and one test case of the toy dataset, as files; without labels, all but a margin is body."""
    for case in range(7):
        image, labels = (array[0] for array in toy_case(case + 100 * labelled, SHAPE, 1))
        if not labelled:
            labels = np.pad(np.ones([n - 4 for n in SHAPE]), 2)
        part = "Tr" if case < 6 else "Ts"
        files = {f"images{part}/case_{case}_0000": image, f"labels{part}/case_{case}": labels.astype(np.uint8)}
        for name, array in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(array), str(folder / f"{name}.nii.gz"))
    unlabelled = {"labels": {"background": 0, "body": 1}, "misfm": {"labels": "body_mask"}}
    (folder / "dataset.json").write_text(json.dumps(toy_dataset_json(**({} if labelled else unlabelled))))


@dataclass
class World:
    """Folders, variables, and what every command came to (by a name that the tests know)."""

    root: Path
    finished: dict[str, subprocess.CompletedProcess] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        folders = {f"nnUNet_{name}": str(self.root / name) for name in ("raw", "preprocessed", "results")}
        one_process = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
        malloc = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(64 * 2**30)}
        return {
            **folders,
            "nnUNet_extTrainer": str(discovery_folder()),
            **one_process,
            **malloc,
            "OMP_WAIT_POLICY": "passive",
        }

    def run(self, step: str, *command: str | Path, **variables: str | Path | None) -> None:
        """Runs a script of this environment, or this Python; a variable of value None is unset."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("nnUNet_")}
        environment = {**inherited, **self.variables, **variables}
        program, *arguments = map(str, command)
        self.finished[step] = subprocess.run(
            [str(Path(sys.executable).parent / program), *arguments],
            env={name: str(value) for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def train(
        self,
        step: str,
        trainer: str,
        *options: str | Path,
        target: tuple[str, str, str] = ("901", "quick", "0"),
        **variables: str | Path | None,
    ) -> None:
        """Runs `nnUNetv2_train DATASET CONFIGURATION FOLD -tr TRAINER OPTIONS` on the CPU."""
        self.run(step, "nnUNetv2_train", *target, "-tr", trainer, *options, "-device", "cpu", **variables)

    def fold(self, trainer: str, results: str = "results") -> Path:
        return self.root / results / ORGANS / f"{trainer}__nnUNetPlans__quick" / "fold_0"

    @property
    def weights(self) -> Path:
        """What pretraining on dataset 901 ends in."""
        return self.fold(PCT_PRETRAIN) / "checkpoint_final.pth"

    @property
    def pool_weights(self) -> Path:
        """What pretraining on dataset 900 ends in."""
        run = f"{PCT_PRETRAIN}__nnUNetPlans__quick"
        return self.root / "results" / POOL / run / "fold_all" / "checkpoint_final.pth"


def parallel(*jobs: Callable[[], None]) -> None:
    """Runs jobs two at a time, and raises what one of them raises."""
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()


def plan_and_configure(world: World, number: str) -> None:
    plan = ("nnUNetv2_plan_and_preprocess", "-d", number, "-c", "3d_fullres", "-npfp", "1", "-np", "1")
    # without data workers nnU-Net's planner asks PyTorch for no thread at all, an error
    world.run(f"plan {number}", *plan, "--verify_dataset_integrity", nnUNet_n_proc_DA="1")
    configure = ("nnUNetv2_misfm", "configure", "-d", number, "-c", "3d_fullres", "--name", "quick")
    world.run(f"configure {number}", *configure, *QUICK)
