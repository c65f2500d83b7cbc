"""A training that loses no work: checkpoints within an epoch, exact resume, signals of a scheduler, broken files.

Hooks of nnU-Net 2.8 that are overridden, and what each does instead: `save_checkpoint` (atomic, plain data, more keys,
the state that an exact resume needs, also in the middle of an epoch; the last few are kept), `load_checkpoint` (falls
back from an unreadable file under `--c`), `train_step` / `validation_step` (stop at a loss that is not finite; write a
checkpoint where one is due; end the process where a scheduler asks for it), `on_train_epoch_start` /
`on_train_epoch_end` (an epoch that was begun before is finished, not begun anew). `on_train_start`, `on_epoch_end` and
`on_train_end` only add to nnU-Net's.
"""

import io
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.interruption import EXIT_CODE, Interruption
from nnunetv2_misfm.trainers.random_state import random_state, set_random_state
from nnunetv2_misfm.weights.checkpoint import read_checkpoint, write_checkpoint

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"
# Key of a checkpoint under which lies what an exact resume needs beside nnU-Net's keys
STATE_KEY = "misfm_state"
# Checkpoints that were the newest one, two, ... checkpoints ago
EARLIER = "checkpoint_earlier_{}.pth"

# How nnU-Net's loader tells that its workers died, and how much later (seconds, ours) a signal that ended them may come
_WORKERS_DIED = "background workers are no longer alive"
_SIGNAL_DELAY = 1


class ResumableTrainer(nnUNetTrainer):
    """nnU-Net's trainer that goes on after an interruption as if there had been none.

    A run repeats bit for bit on the CPU, with data that come in a fixed order: pretraining's always do, nnU-Net's
    loader's with `nnUNet_n_proc_DA=0`. (nnU-Net's own blur, a part of its augmentation on the CPU, chooses between two
    algorithms by their times, so that with it runs are equal up to rounding.)

    Attributes:
        was_resumed: Whether a checkpoint was loaded.
        checkpoint_every_minutes: Time between two checkpoints in the middle of an epoch; 0 writes none.
        keep_checkpoints: How many checkpoints of the newest state are kept.
        steps_per_epoch: Training steps of a whole epoch.
    """

    is_ddp: bool
    network: Any
    num_iterations_per_epoch: int
    checkpoint_every_minutes: float
    keep_checkpoints: int

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int | str,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 - nnU-Net reads this very signature
    ) -> None:
        self._may_fall_back = bool(plans.get("continue_training", False))  # nnU-Net's constructor pops this key
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.interruption = Interruption()
        self.was_resumed = False
        self._resumed_epoch: int | None = None
        self._saved_state: dict[str, Any] | None = None
        self._done: list[float] = []  # losses of this epoch's steps, until it ends
        self._done_before: list[float] = []  # those of them that another process took
        self.steps_per_epoch = self.num_iterations_per_epoch
        self._step = 0  # of this epoch's training or validation
        self._asked_to_end = False
        self._random_before_validation: dict[str, Any] | None = None  # in a validation, which is done anew
        self._last_checkpoint = monotonic()
        self._replaces_former_run = False  # until its first checkpoint

    # ------------------------------------------------------------------ what is added to a checkpoint

    def added_keys(self) -> dict[str, Any]:
        """Returns what a checkpoint holds beside nnU-Net's keys and the state."""
        return {}

    def read_added_keys(self, checkpoint: dict[str, Any]) -> None:
        """Takes what `added_keys` put into a checkpoint that is resumed from."""

    def run_state(self) -> dict[str, Any]:
        """Returns what this rank needs to go on exactly here: plain data and tensors."""
        return {"losses": self._done, "random": self._random_before_validation or random_state(self.device)}

    def set_run_state(self, state: dict[str, Any]) -> None:
        """Puts this rank where `run_state` was taken."""
        self._done_before = list(state["losses"])
        self._done = list(state["losses"])
        set_random_state(state["random"], self.device)

    @property
    def steps_done(self) -> int:
        """Training steps that this epoch has behind it."""
        return len(self._done)

    @property
    def saved_run_state(self) -> dict[str, Any] | None:
        """This rank's state in the checkpoint that was loaded; None without one or where the ranks are not as many."""
        ranks = (self._saved_state or {}).get("ranks", [])
        world_size = dist.get_world_size() if self.is_ddp else 1
        return ranks[self.local_rank] if len(ranks) == world_size else None

    # ------------------------------------------------------------------ writing

    def save_checkpoint(self, filename: str) -> None:
        """Writes nnU-Net's checkpoint plus our keys, atomically and as plain data; every rank has to call it.

        nnU-Net writes to a buffer here, so that whatever keys its version has are kept. In the middle of an epoch the
        file says that this epoch is the next to do, so that any nnU-Net could begin it anew.

        Raises:
            MisfmError: The file could not be written; the former one is intact.
        """
        path = Path(filename)
        if path.name == LATEST:
            self._last_checkpoint = monotonic()
        if self.disable_checkpointing:
            super().save_checkpoint(filename)  # nnU-Net's own word on it
            return
        ranks = self._of_all_ranks(self.run_state())
        if self.local_rank != 0:
            return
        buffer = io.BytesIO()
        super().save_checkpoint(buffer)
        buffer.seek(0)
        checkpoint = torch.load(buffer, map_location="cpu", weights_only=False)  # what was just written
        if self._done:
            checkpoint["current_epoch"] = self.current_epoch
            logged = checkpoint["logging"]
            checkpoint["logging"] = {name: values[: self.current_epoch] for name, values in logged.items()}
        checkpoint |= {**self.added_keys(), STATE_KEY: {"ranks": ranks, **self.shared_state(checkpoint)}}
        if self._replaces_former_run:
            self._set_former_run_aside()
        num_former = self.keep_checkpoints - 1 if path.name == LATEST else 0
        write_checkpoint(checkpoint, path, [path.with_name(EARLIER.format(i + 1)) for i in range(num_former)])

    def shared_state(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Returns state that all ranks share; may change what the checkpoint holds."""
        return {}

    def _of_all_ranks(self, value: Any) -> list[Any]:
        if not self.is_ddp:
            return [value]
        values: list[Any] | None = [None] * dist.get_world_size() if self.local_rank == 0 else None
        dist.gather_object(value, values)
        return values or []

    def _save_latest(self) -> None:
        self.save_checkpoint(os.path.join(self.output_folder, LATEST))

    # ------------------------------------------------------------------ reading

    def load_checkpoint(self, filename: str) -> None:
        """Resumes from a checkpoint; under `--c` an unreadable one gives way to the newest that can be read.

        Raises:
            MisfmError: The file cannot be read and no other may stand in.
        """
        path = Path(filename)
        try:
            checkpoint = read_checkpoint(path)
        except MisfmError as error:
            if not self._may_fall_back:
                raise
            path, checkpoint = self._newest_readable(path.parent, error)
            self.print_to_log_file(
                f"WARNING: {error} Going on from {path} (epoch {checkpoint['current_epoch']}) instead."
            )
        super().load_checkpoint(str(path))
        averages = [value for value in checkpoint["logging"]["ema_fg_dice"] if np.isfinite(value)]
        if averages:  # nnU-Net writes the newest checkpoint before it looks for a new best
            self._best_ema = max(averages)
        self.read_added_keys(checkpoint)
        self._saved_state = checkpoint.get(STATE_KEY)
        self.was_resumed = True
        self._resumed_epoch = self.current_epoch

    def _newest_readable(self, folder: Path, error: MisfmError) -> tuple[Path, dict[str, Any]]:
        readable = []
        for path in [folder / FINAL, folder / LATEST, *sorted(folder.glob(EARLIER.format("*"))), folder / BEST]:
            try:
                checkpoint = read_checkpoint(path)
            except MisfmError:
                continue
            if isinstance(checkpoint.get("current_epoch"), int):
                readable.append((path, checkpoint))
        if not readable:
            raise MisfmError(
                f"{error} No other checkpoint in {folder} can be read either: start anew without --c."
            ) from error
        return max(readable, key=lambda entry: (entry[1]["current_epoch"], _steps_done(entry[1])))

    # ------------------------------------------------------------------ the run

    def on_train_start(self) -> None:
        """Starts as nnU-Net does, then goes on where the checkpoint was written."""
        if self.local_rank == 0:
            for path in Path(self.output_folder).glob("checkpoint_*.pth.tmp"):  # of a process that was killed
                path.unlink()
        self.steps_per_epoch = self.num_iterations_per_epoch
        super().on_train_start()
        if self.was_resumed:
            if (state := self.saved_run_state) is not None:
                self.set_run_state(state)
            else:
                self.print_to_log_file(
                    "The checkpoint holds no state of its random numbers for as many processes: they start anew."
                )
        self._saved_state = None  # its tensors keep the file open
        self._replaces_former_run = not self.was_resumed
        self._last_checkpoint = monotonic()

    def on_epoch_start(self) -> None:
        """Starts an epoch as nnU-Net does; from the first one on signals are noted."""
        self.interruption.watch((signal.SIGINT,) if self.is_ddp else ())  # as which launchers pass others on
        super().on_epoch_start()

    def run_training(self) -> None:
        """Trains as nnU-Net does; a signal that also ended nnU-Net's data workers is obeyed between two steps."""
        try:
            super().run_training()
        except RuntimeError as error:
            if _WORKERS_DIED not in str(error) or self.is_ddp:  # other ranks may wait for this one in their step
                raise
            sleep(_SIGNAL_DELAY)
            if self.interruption.requested is None:
                raise
            self._end_early()
        finally:
            if not self._asked_to_end:  # else this process ends, undisturbed by what launchers send to the last ranks
                self.interruption.release()

    def on_train_epoch_start(self) -> None:
        """Starts an epoch as nnU-Net does; of one that was begun before, the rest is to do."""
        if self.current_epoch == self._resumed_epoch and not self._done:
            self._write_missing_best()
        super().on_train_epoch_start()
        self._step = len(self._done)
        self.num_iterations_per_epoch = self.steps_per_epoch - self._step

    def _write_missing_best(self) -> None:
        """Writes the best checkpoint where the last epoch was the best and a process was killed before it said so."""
        averages = list(self.logger.get_value("ema_fg_dice", step=None))
        if not averages or averages.index(max(averages)) != len(averages) - 1:
            return
        path = Path(self.output_folder) / BEST
        try:
            if read_checkpoint(path).get("current_epoch") == self.current_epoch:
                return
        except MisfmError:
            pass  # none, or half of one that another program wrote
        self.current_epoch -= 1  # nnU-Net adds one
        self.save_checkpoint(str(path))
        self.current_epoch += 1

    def on_validation_epoch_start(self) -> None:
        """Starts the validation of an epoch as nnU-Net does and counts its steps from zero."""
        self._random_before_validation = random_state(self.device)
        super().on_validation_epoch_start()
        self._step = 0

    def train_step(self, batch: dict) -> dict:
        """Takes a training step, and writes a checkpoint or ends the process where that is due.

        Raises:
            MisfmError: The loss is not finite; the last good checkpoint stays.
            SystemExit: A signal asked for it; with `EXIT_CODE`, after a checkpoint.
        """
        batch = self.prepare_batch(batch, training=True)
        result = self.optimisation_step(batch)
        minutes = (monotonic() - self._last_checkpoint) / 60
        due = self.local_rank == 0 and 0 < self.checkpoint_every_minutes <= minutes
        due = self._agree(result, batch, "training", due)
        self._done.append(float(result["loss"]))
        self._step += 1
        if self._asked_to_end:
            self._end_early()
        elif due:
            self._save_latest()
        return result

    def prepare_batch(self, batch: dict, training: bool) -> dict:
        """Returns what a step takes, made from what the loader gave."""
        return batch

    def optimisation_step(self, batch: dict) -> dict:
        """Takes nnU-Net's training step on a prepared batch."""
        return super().train_step(batch)

    def validation_step(self, batch: dict) -> dict:
        """Takes a validation step; errors and exits are those of `train_step`."""
        batch = self.prepare_batch(batch, training=False)
        result = self.evaluation_step(batch)
        self._agree(result, batch, "validation", False)
        self._step += 1
        if self._asked_to_end:
            self._end_early()
        return result

    def evaluation_step(self, batch: dict) -> dict:
        """Takes nnU-Net's validation step on a prepared batch."""
        return super().validation_step(batch)

    def _agree(self, result: dict, batch: dict, phase: str, due: bool) -> bool:
        """Returns whether a checkpoint is due on any rank; all ranks learn of a bad loss or a signal on one of them.

        Raises:
            MisfmError: A loss that is not finite, on any rank.
        """
        finite = bool(np.isfinite(result["loss"]))
        bad, due, self._asked_to_end = self._on_any_rank(not finite, due, self.interruption.requested is not None)
        if bad:
            cases = ", ".join(map(str, batch["keys"]))
            here = "loss not finite on another rank" if finite else f"loss {result['loss']}"
            raise MisfmError(
                f"{phase} stopped in epoch {self.current_epoch}, step {self._step}, rank {self.local_rank}: {here}; "
                f"cases of the batch: {cases}. The last good checkpoint is kept: look at these cases or lower "
                "initial_lr, then go on with --c."
            )
        return due

    def _on_any_rank(self, *flags: bool) -> list[bool]:
        """Returns which flags are set on one of the ranks at least."""
        if not self.is_ddp:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.float32, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.bool().tolist()

    def _end_early(self) -> None:
        self._asked_to_end = True
        self._save_latest()
        if self.is_ddp:
            dist.barrier()  # else launchers end the first rank while it writes
        kept, code = f"go on with --c. Exit code {EXIT_CODE}", EXIT_CODE
        if self.disable_checkpointing:
            kept, code = "nothing was kept, since checkpointing is disabled", 1
        self.print_to_log_file(
            f"Ended by {self.interruption.requested or 'a signal to another rank'} in epoch {self.current_epoch} after "
            f"{self.steps_done} of {self.steps_per_epoch} steps; {kept}."
        )
        self.end_workers()
        raise SystemExit(code)

    def end_workers(self) -> None:
        """Ends the processes that make batches."""

    def on_train_epoch_end(self, train_outputs: Sequence[dict]) -> None:
        """Logs the epoch as nnU-Net does, with the steps that were taken before an interruption."""
        super().on_train_epoch_end([*({"loss": np.float32(loss)} for loss in self._done_before), *train_outputs])

    def on_epoch_end(self) -> None:
        """Ends an epoch as nnU-Net does; from here on a checkpoint says that it is done."""
        self._done, self._done_before = [], []
        self._random_before_validation = None
        averages = self.logger.get_value("ema_fg_dice", step=None)
        averages[-1] = float(averages[-1])  # as in a checkpoint, whose next average builds on it
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Ends as nnU-Net does; what it keeps for a resume goes."""
        super().on_train_end()
        self.end_workers()
        if self.local_rank == 0:
            for path in Path(self.output_folder).glob(EARLIER.format("*")):
                path.unlink()
        (self._asked_to_end,) = self._on_any_rank(self.interruption.requested is not None)
        if self._asked_to_end:
            raise SystemExit(EXIT_CODE)

    def _set_former_run_aside(self) -> None:
        """Renames the checkpoints of an earlier run in this folder, so that --c finds those of this one."""
        self._replaces_former_run = False
        folder = Path(self.output_folder)
        if found := sorted(folder.glob("checkpoint_*.pth")):
            for path in found:
                path.replace(folder / f"former_{path.name}")
            self.print_to_log_file(
                f"A new training: checkpoints of an earlier one in {folder} are now called former_checkpoint_*.pth."
            )


def _steps_done(checkpoint: dict[str, Any]) -> int:
    ranks = checkpoint.get(STATE_KEY, {}).get("ranks", [])
    return len(ranks[0]["losses"]) if ranks else 0
