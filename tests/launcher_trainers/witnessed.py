"""Trainers for tests of the launcher, found through `nnUNet_extTrainer`: ranks tell what they did, some are disturbed.

`MISFM_TEST_ACCOUNTS` names the folder of the accounts, RANK_START.json with starts counted from 0.
`MISFM_TEST_DISTURB` is "DEED RANK EPOCH STEP": what that rank does once, after that step (so a signal ends the next).
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from nnunetv2_misfm.trainers import resumable
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerPCTNetVF, nnUNetTrainerPCTNetVFPretrain
from nnunetv2_misfm.weights.checkpoint import tensors_sha256

HEAD = ".seg_layers."


class Witnessed:
    """Mixin: writes an account after every checkpoint, epoch and end."""

    def on_train_start(self: Any) -> None:
        folder = Path(os.environ["MISFM_TEST_ACCOUNTS"])
        folder.mkdir(exist_ok=True)
        starts = len(list(folder.glob(f"{self.local_rank}_*.json")))
        self.account_file = folder / f"{self.local_rank}_{starts}.json"
        self.written = []
        write = resumable.write_checkpoint

        def write_and_note(checkpoint: Any, path: Path, former: Any) -> None:
            write(checkpoint, path, former)
            self.written.append(path.name)

        resumable.write_checkpoint = write_and_note
        super().on_train_start()
        weights = self.bare_network.state_dict()
        self.account = {
            "device": str(self.device),
            "batch_size": self.batch_size,
            "lr": self.optimizer.param_groups[0]["lr"],
            "begins_with": [self.current_epoch, self.steps_done],
            "body": tensors_sha256({name: tensor for name, tensor in weights.items() if HEAD not in name}),
            "workers": self.dataloader_train._loader.num_workers if hasattr(self, "data_seed") else None,
            "losses": [],
        }
        self.tell()

    def tell(self: Any) -> None:
        logged = self.logger.local_logger.my_fantastic_logging
        logged = {name: [float(value) for value in logged[name]] for name in ("train_losses", "val_losses")}
        weights = tensors_sha256(self.bare_network.state_dict())
        self.account_file.write_text(
            json.dumps({**self.account, "written": self.written, "logged": logged, "weights": weights})
        )

    def train_step(self: Any, batch: Any) -> Any:
        result = super().train_step(batch)
        self.account["losses"].append(float(result["loss"]))
        self.tell()
        self.disturb()
        return result

    def disturb(self: Any) -> None:
        deed, *place = os.environ.get("MISFM_TEST_DISTURB", "none").split()
        if deed == "none" or [*map(int, place)] != [self.local_rank, self.current_epoch, self.steps_done]:
            return
        marker = self.account_file.with_name("disturbed")
        if marker.exists():
            return
        marker.touch()
        if deed == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif deed == "signal_agent":
            os.kill(os.getppid(), signal.SIGTERM)
            deadline = time.monotonic() + 30  # until the agent has passed it on
            while self.interruption.requested is None and time.monotonic() < deadline:
                time.sleep(0.01)
        elif deed == "signal_me":
            os.kill(os.getpid(), signal.SIGUSR1)

    def on_epoch_end(self: Any) -> None:
        super().on_epoch_end()
        self.tell()

    def on_train_end(self: Any) -> None:
        super().on_train_end()
        self.tell()


class nnUNetTrainerPCTNetVFPretrainWitnessed(Witnessed, nnUNetTrainerPCTNetVFPretrain):  # noqa: N801
    """Pretraining."""


class nnUNetTrainerPCTNetVFWitnessed(Witnessed, nnUNetTrainerPCTNetVF):  # noqa: N801
    """Fine-tuning."""
