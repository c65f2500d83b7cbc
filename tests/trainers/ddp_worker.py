"""One rank of a run over two processes: nnU-Net's own `run_ddp`, with gloo in place of nccl, so that no GPU is needed.

The variables are torchrun's (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). The only argument names a JSON
file with the scenarios, which run one after the other in the same process group; each writes NAME_RANK.json beside it.
"""

import json
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from nnunetv2_misfm.trainers.pretext import PretextTrainer
from nnunetv2_misfm.weights.checkpoint import tensors_sha256
from nnunetv2_misfm.weights.transfer import HEAD_MARK

# A rank that waits for the other in vain gives up after so long; a busy machine may keep a rank waiting for minutes
TIMEOUT = timedelta(minutes=5)


def is_write(event: str, arguments: tuple) -> bool:
    """Whether an audit event of Python opens a file for writing, or makes, moves or deletes one."""
    if event == "open":
        _, mode, flags = arguments
        return bool(mode and set(mode) & set("wax+")) or bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event in ("os.rename", "os.remove", "os.rmdir")


def body_sha256(weights: dict[str, torch.Tensor]) -> str:
    """SHA-256 over all tensors of a network but those of its output heads."""
    return tensors_sha256({name: tensor for name, tensor in weights.items() if HEAD_MARK not in name})


class Fed:
    """A loader with other batches."""

    def __init__(self, loader: Any, batches: Iterator[dict]) -> None:
        self.loader, self.batches_given = loader, batches

    def __next__(self) -> dict:
        return next(self.batches_given)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class Rank:
    """Runs scenarios in this process and keeps an account of each."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.scenario: dict[str, Any] = {}
        self.account: dict[str, Any] = {}
        sys.addaudithook(self.note_write)

    def note_write(self, event: str, arguments: tuple) -> None:
        results = os.environ.get("nnUNet_results")
        if self.scenario and is_write(event, arguments) and str(arguments[0]).startswith(str(results)):
            self.account["written"].append(str(Path(os.fsdecode(arguments[0])).relative_to(str(results))))

    def install(self) -> None:
        """Puts gloo in place of nccl, and the hooks of this class into the trainers."""
        run_training.setup_ddp = lambda rank, world_size: None
        run_training.cleanup_ddp = dist.barrier
        torch.cuda.set_device = lambda device: None
        start, end_epoch, pose = nnUNetTrainer.on_train_start, nnUNetTrainer.on_epoch_end, PretextTrainer.pose_task
        validate = nnUNetTrainer.perform_actual_validation

        def on_train_start(trainer: Any) -> None:
            start(trainer)
            self.account |= {"device": str(trainer.device), "batch_size": trainer.batch_size}
            self.account["body_at_start"] = body_sha256(trainer.bare_network.state_dict())
            trainer.dataloader_train = Fed(trainer.dataloader_train, self.feed(trainer.dataloader_train))
            if "batches" in self.scenario and not isinstance(trainer, PretextTrainer):
                trainer.dataloader_val = Fed(trainer.dataloader_val, self.feed(trainer.dataloader_val))
            end_validation = trainer.on_validation_epoch_end

            def on_validation_epoch_end(outputs: list[dict]) -> None:
                self.account["validation"].append([float(output["loss"]) for output in outputs])
                end_validation(outputs)

            trainer.on_validation_epoch_end = on_validation_epoch_end

        def on_epoch_end(trainer: Any) -> None:
            network = trainer.bare_network
            self.account["epochs"].append(trainer.current_epoch)
            self.account["parameters"].append(tensors_sha256(dict(network.named_parameters())))
            self.account["buffers"].append(tensors_sha256(dict(network.named_buffers())))
            end_epoch(trainer)
            log = trainer.logger.local_logger.my_fantastic_logging
            names = ("train_losses", "val_losses", "dice_per_class_or_region")
            self.account["logged"] = {name: torch.tensor(log[name], dtype=torch.float64).tolist() for name in names}
            if "batches" in self.scenario and self.rank == 0:
                torch.save(network.state_dict(), self.scenario["batches"].replace("batches", "ddp"))

        def pose_task(trainer: Any, batch: dict, generator: torch.Generator) -> dict:
            phase = "training" if torch.is_grad_enabled() else "validation"
            if "batches" in self.scenario and phase == "training":
                return batch
            draws = tensors_sha256({"state": generator.get_state()})
            posed = pose(trainer, batch, generator)
            volumes = {name: batch[name] for name in ("data", "foreground") if name in batch}
            digests = {name: tensors_sha256({"volumes": volume}) for name, volume in volumes.items()}
            digests |= {"draws": draws, "answer": tensors_sha256({"answer": posed["target"][0]})}
            self.account["tasks"].append({**digests, "case": batch["keys"][0], "phase": phase})
            return posed

        nnUNetTrainer.on_train_start, nnUNetTrainer.on_epoch_end = on_train_start, on_epoch_end
        nnUNetTrainer.perform_actual_validation = lambda t, npz: (
            validate(t, npz) if "validate" in self.scenario else None
        )
        PretextTrainer.pose_task = pose_task

    def feed(self, loader: Any) -> Iterator[dict]:
        """Yields the loader's batches, or this rank's share of given ones, with a NaN where the scenario has one."""
        given = torch.load(self.scenario["batches"]) if "batches" in self.scenario else None
        step = 0
        while True:
            if given is None:
                batch = next(loader)
                self.account["drawn"].append([tensors_sha256({"volumes": batch["data"]}), batch["keys"][0]])
            else:
                whole = given[step % len(given)]
                size = len(whole["keys"]) // self.world_size
                share = slice(self.rank * size, (self.rank + 1) * size)
                batch = {"data": whole["data"][share], "target": [t[share] for t in whole["target"]]}
                batch["keys"] = whole["keys"][share]
            if self.scenario.get("nan") == [self.rank, step]:
                batch["data"].fill_(torch.nan)
            step += 1
            yield batch

    def run(self, scenario: dict[str, Any], folder: Path) -> None:
        """Runs a scenario as nnU-Net runs a rank, and writes the account of it."""
        os.environ["nnUNet_results"] = str(folder / scenario["results"])
        os.environ["nnUNet_misfm_weights"] = scenario.get("weights", "")
        lists = ("written", "epochs", "parameters", "buffers", "tasks", "drawn", "validation")
        self.account = {"error": "", **{name: [] for name in lists}}
        self.scenario = scenario
        dataset, configuration, trainer = (scenario[key] for key in ("dataset", "configuration", "trainer"))
        try:
            run_training.run_ddp(
                self.rank, dataset, configuration, 0, trainer, "nnUNetPlans", False, scenario.get("continue", False),
                False, None, False, False, self.world_size,
            )  # fmt: skip
        except Exception as error:
            self.account["error"] = f"{type(error).__name__}: {error}"
        self.scenario = {}
        (folder / f"{scenario['name']}_{self.rank}.json").write_text(json.dumps(self.account))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    this = Rank(dist.get_rank(), dist.get_world_size())
    this.install()
    scenarios_file = Path(sys.argv[1])
    for one in json.loads(scenarios_file.read_text()):
        this.run(one, scenarios_file.parent)
    dist.destroy_process_group()
