"""How fast an epoch goes, said now and then: samples per second, waiting for data, time left."""

from datetime import timedelta
from time import perf_counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.base import MisfmTrainer

# Seconds between two lines of a run's log (ours): some in an epoch of nnU-Net's usual length of minutes
SECONDS_BETWEEN_LINES = 60


class Progress:
    """The clock of an epoch's training steps; times are seconds."""

    def __init__(self) -> None:
        self._rest = 0.0  # what an epoch takes beside its training steps, in the epoch before
        self._epoch_began = self._epoch_trained = self._last_line = perf_counter()
        self._first_step = 0
        self._waited = 0.0

    def start(self, trainer: "MisfmTrainer") -> None:
        """Starts the clock of an epoch."""
        self._epoch_began = self._epoch_trained = self._last_line = perf_counter()
        self._first_step = trainer.steps_done
        self._waited = getattr(trainer.dataloader_train, "seconds_waited", 0.0)

    def note(self, trainer: "MisfmTrainer") -> None:
        """Ends a step; writes a line to the log if the last one is long ago."""
        now = self._epoch_trained = perf_counter()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            trainer.print_to_log_file(self.line(trainer, now - self._epoch_began))

    def end(self) -> None:
        """Ends an epoch's validation."""
        self._rest = perf_counter() - self._epoch_trained

    def line(self, trainer: "MisfmTrainer", seconds: float) -> str:
        """Returns where an epoch stands after so many seconds of training steps."""
        steps = trainer.steps_done - self._first_step
        seconds_per_step = seconds / steps
        samples = steps * trainer.samples_per_step
        epoch_left = (trainer.steps_per_epoch - trainer.steps_done) * seconds_per_step
        epochs_left = trainer.num_epochs - trainer.current_epoch - 1
        whole_epoch = trainer.steps_per_epoch * seconds_per_step + self._rest
        run_left = epoch_left + self._rest + epochs_left * whole_epoch
        waited = getattr(trainer.dataloader_train, "seconds_waited", None)
        waiting = "" if waited is None else f", {(waited - self._waited) / seconds:.1%} of the time waiting for data"
        return (
            f"epoch {trainer.current_epoch}: step {trainer.steps_done} of {trainer.steps_per_epoch}, "
            f"{samples / seconds:.2f} samples/s{waiting}; left in this epoch {_duration(epoch_left)}, "
            f"in this run {_duration(run_left)}"
        )


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
