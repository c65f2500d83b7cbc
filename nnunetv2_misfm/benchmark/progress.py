"""What a running benchmark shows: a bar over the epochs of all runs with the time left, and a line for every event."""

import re
import sys
from threading import Lock

from tqdm import tqdm

# How nnU-Net's trainer begins an epoch in its output
_EPOCH = re.compile(r"\bEpoch (\d+)\s*$")
# nnU-Net's own length, and the variants of nnUNetTrainer that name theirs
_NNUNET_EPOCHS = 1000
_NAMED_LENGTH = re.compile(r"_(\d+)epochs?")
# Seconds between two lines where the output is a file
_SECONDS_IN_FILES = 60


def num_epochs(trainer: str, settings: tuple[str, ...]) -> int:
    """Returns how many epochs a run takes by its settings or its trainer's name, for the estimate of the time left."""
    for setting in reversed(settings):  # as in `configure`, the last one counts
        key, _, value = setting.partition("=")
        if key == "num_epochs" and value.isdigit():
            return int(value)
    named = _NAMED_LENGTH.search(trainer)
    return int(named[1]) if named else _NNUNET_EPOCHS


class Progress:
    """A bar in epochs, for several runs at once; safe to use from several threads."""

    def __init__(self, total_epochs: int) -> None:
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total_epochs, unit="epoch", mininterval=0.5 if terminal else _SECONDS_IN_FILES)
        self._lock = Lock()

    def say(self, text: str) -> None:
        """Writes a line above the bar."""
        with self._lock:
            tqdm.write(text)
            sys.stdout.flush()

    def run(self, epochs: int) -> "RunProgress":
        """Returns the share of the bar that belongs to a run of so many epochs."""
        return RunProgress(self, epochs)

    def advance(self, epochs: int) -> None:
        """Moves the bar on."""
        with self._lock:
            self._bar.update(epochs)

    def close(self) -> None:
        """Ends the bar."""
        self._bar.close()


class RunProgress:
    """One run's share of the bar, moved by the lines that nnU-Net prints."""

    def __init__(self, progress: Progress, epochs: int) -> None:
        self._progress, self._epochs, self._done = progress, epochs, 0

    def read(self, line: str) -> None:
        """Takes a line of nnU-Net's output; `Epoch 12` means that twelve epochs are over."""
        if match := _EPOCH.search(line):
            self._move_to(int(match[1]))

    def finish(self) -> None:
        """Fills the share, however the run ended."""
        self._move_to(self._epochs)

    def _move_to(self, epoch: int) -> None:
        epoch = min(epoch, self._epochs)
        self._progress.advance(max(epoch - self._done, 0))
        self._done = max(epoch, self._done)
