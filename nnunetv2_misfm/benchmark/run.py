"""Runs a grid through nnU-Net's own commands: one cell after another, or one per GPU.

What is finished is skipped, what was cut goes on, a cell that fails is listed and the others go on. A cell that another
process runs at the moment (a second benchmark command on the same folders, on another node, say) is left to it.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import torch
from filelock import FileLock, Timeout

from nnunetv2_misfm.benchmark.commands import environment, predict_command, test_predictions, train_command
from nnunetv2_misfm.benchmark.grid import Cell, Grid
from nnunetv2_misfm.benchmark.heal import heal
from nnunetv2_misfm.benchmark.process import run_process, stopped_by_signals
from nnunetv2_misfm.benchmark.progress import Progress, RunProgress, num_epochs
from nnunetv2_misfm.benchmark.scores import TEST, VALIDATION, ending_of, scores_of, truths_of
from nnunetv2_misfm.benchmark.state import (
    RUN_FILE,
    State,
    is_validated,
    log_file,
    mismatch,
    note_start,
    recorded_steps,
    state_of,
    unpredicted,
)
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import write_json
from nnunetv2_misfm.scripts import Command, describe_machine, find_script
from nnunetv2_misfm.trainers.base import SKIP_VALIDATION_VARIABLE
from nnunetv2_misfm.trainers.finetune import WEIGHTS_VARIABLE

# Lines of a failed command's output that the list of failures shows
_SHOWN_LINES = 3
# Variables of the user that nnU-Net's training heeds through our trainers, and that its record must therefore repeat
_INHERITED = (WEIGHTS_VARIABLE, SKIP_VALIDATION_VARIABLE)


@dataclass(frozen=True)
class Options:
    """How a grid is run; none of it changes what is compared.

    Attributes:
        device: cuda, cpu or mps.
        jobs: Runs at a time; on cuda each has a GPU of its own.
        skip_validation: Leave out the final validation where a trainer of this package runs and a test folder is there.
    """

    device: str = "cuda"
    jobs: int = 1
    skip_validation: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a cell has come to.

    Attributes:
        cell: The cell.
        state: finished, failed, or elsewhere (another process has it).
        why: One sentence where it failed.
    """

    cell: Cell
    state: str
    why: str = ""


def remaining(grid: Grid, cell: Cell, options: Options) -> list[Command]:
    """Returns the commands that a cell still needs, in order."""
    commands = []
    state = state_of(grid, cell)
    if state is not State.TRAINED:
        option = "--c" if state is State.CUT else ""
        commands.append(
            train_command(grid, cell, options.device, skip_validation=options.skip_validation, option=option)
        )
    elif not options.skip_validation and not is_validated(grid, cell):
        commands.append(train_command(grid, cell, options.device, option="--val"))
    if _outstanding(grid, cell):
        commands.append(predict_command(grid, cell, options.device))
    return commands


def check_options(grid: Grid, options: Options) -> None:
    """Looks for what would keep a grid from being run.

    Raises:
        MisfmError: No GPU, fewer than asked for, or skipped validation where validation cases are compared.
    """
    if options.skip_validation and grid.test is None:
        raise MisfmError("expected --test DIR with --skip-validation, got none: nothing would be left to compare.")
    if options.device != "cuda":
        return
    known = _gpus()
    if not known:
        raise MisfmError("expected a GPU for --device cuda, PyTorch finds none: use --device cpu.")
    if len(known) < options.jobs:
        raise MisfmError(
            f"expected at most {len(known)} GPUs, as many as PyTorch finds, got --gpus {options.jobs}: ask for fewer, "
            "or for --device cpu."
        )


def _gpus() -> list[str]:
    """Returns the GPUs that the user's CUDA_VISIBLE_DEVICES shows, by the names that it gives them."""
    count, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return (visible.split(",") if visible else [str(gpu) for gpu in range(count)])[:count]


@dataclass(frozen=True)
class _Work:
    """What the threads of a running grid share.

    Attributes:
        grid: The grid.
        options: How it is run.
        slots: The GPUs that are free, or nothing for every run that may start.
        progress: The bar.
        stopping: Set when all commands are to be ended.
    """

    grid: Grid
    options: Options
    slots: "SimpleQueue[str | None]"
    progress: Progress
    stopping: Event


def run_grid(grid: Grid, cells: Sequence[Cell], options: Options) -> list[Outcome]:
    """Runs the cells and returns what each has come to; a bar shows progress and time left.

    Ctrl-C, SIGTERM and SIGHUP end the commands that run, with all that they started.

    Raises:
        MisfmError: What `check_options` raises.
    """
    check_options(grid, options)
    slots: SimpleQueue[str | None] = SimpleQueue()
    for slot in _gpus()[: options.jobs] if options.device == "cuda" else [None] * options.jobs:
        slots.put(slot)
    epochs = [_epochs(grid, cell, options) for cell in cells]
    progress = Progress(sum(epochs))
    progress.say(f"{len(cells)} runs, {epochs.count(0)} of them trained and predicted already")
    work = _Work(grid, options, slots, progress, Event())
    pool = ThreadPoolExecutor(options.jobs)
    with stopped_by_signals():
        try:
            futures = [pool.submit(_run_cell, work, cell, left) for cell, left in zip(cells, epochs, strict=True)]
            pending = {*futures}
            while pending:  # in slices, so that Ctrl-C is heard
                pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED).not_done
        except BaseException:
            work.stopping.set()
            raise
        finally:
            pool.shutdown(cancel_futures=work.stopping.is_set())
            progress.close()
    return [future.result() for future in futures]


def _epochs(grid: Grid, cell: Cell, options: Options) -> int:
    """Returns a cell's share of the bar, 0 where nothing is left to run or that cannot be told (its run says why)."""
    try:
        return num_epochs(cell.run_trainer, grid.settings) if remaining(grid, cell, options) else 0
    except Exception:
        return 0


def _run_cell(work: _Work, cell: Cell, epochs: int) -> Outcome:
    """Runs what a cell still needs on the next free slot; whatever goes wrong, the other cells go on."""
    folder = work.grid.folder / cell.name
    share = work.progress.run(epochs)
    slot = work.slots.get()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            _run_commands(work, cell, slot, share)
    except Timeout:
        work.progress.say(f"{cell}: another process runs it, left to that")
        return Outcome(cell, "elsewhere")
    except Exception as error:
        why = str(error) if isinstance(error, MisfmError) else f"{type(error).__name__}: {error}"
        work.progress.say(f"{cell}: stopped" if work.stopping.is_set() else f"{cell}: FAILED: {why}")
        return Outcome(cell, "failed", why)
    finally:
        share.finish()
        work.slots.put(slot)
    work.progress.say(f"{cell}: finished")
    return Outcome(cell, "finished")


def _run_commands(work: _Work, cell: Cell, slot: str | None, share: RunProgress) -> None:
    """Runs the commands that a cell still needs, and scores its predictions."""
    grid = work.grid
    if why := mismatch(grid, cell):
        raise MisfmError(why)
    heal(grid, cell)
    if state_of(grid, cell) is State.NEW:
        note_start(grid, cell)
    try:
        for command in remaining(grid, cell, work.options):
            work.progress.say(f"{cell}: {command.title}")
            _run_command(work, cell, command, slot, share)
        scores_of(grid, cell, VALIDATION if grid.test is None else TEST)
    finally:
        heal(grid, cell)


def _run_command(work: _Work, cell: Cell, command: Command, slot: str | None, share: RunProgress) -> None:
    """Runs a command, its output going into the cell's log, and records it.

    Raises:
        MisfmError: It failed, or was stopped.
    """
    grid = work.grid
    if work.stopping.is_set():
        raise MisfmError(f"`{command}` was not started: the benchmark was stopped.")
    if command.arguments[0] == "nnUNetv2_train":
        inherited = {name: os.environ[name] for name in _INHERITED if os.environ.get(name)}
        command = replace(command, variables={**inherited, **command.variables})
    former = recorded_steps(grid, cell)
    for file in unpredicted(grid, cell, _predicted(grid, cell), ending_of(grid)):
        file.unlink()  # nnU-Net would keep the prediction of a former training
    kept, log, started = _predicted(grid, cell), log_file(grid, cell), time.time()
    with log.open("ab") as stream:
        stream.write(f"$ {command}\n".encode())
        stream.flush()
        status = run_process(
            [find_script(command.arguments[0]), *command.arguments[1:]],
            {**environment(slot), **command.variables, "PYTHONUNBUFFERED": "1"},
            stream,
            share.read,
            work.stopping,
        )
    step = {
        "title": command.title,
        "command": str(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started)),
        "seconds": round(time.time() - started, 1),
        "status": status,
        "cases": len(_predicted(grid, cell)) - len(kept),
        "machine": describe_machine(work.options.device),
    }
    write_json([*former, step], grid.folder / cell.name / RUN_FILE)
    if status != 0:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = " | ".join(lines[-_SHOWN_LINES:])
        raise MisfmError(f"`{command}` ended with status {status}: {last} (all of it in {log})")
    if command.arguments[0] == "nnUNetv2_train" and state_of(grid, cell) is not State.TRAINED:
        raise MisfmError(f"`{command}` ended without a final checkpoint in {grid.results(cell)} (output in {log})")


def _predicted(grid: Grid, cell: Cell) -> list[str]:
    """Returns the cases of the test folder that are predicted, those without a truth among them."""
    ending = ending_of(grid)
    return [file.name.removesuffix(ending) for file in test_predictions(grid, cell).glob(f"*{ending}")]


def _outstanding(grid: Grid, cell: Cell) -> list[Path]:
    """Returns the prediction files that a cell still lacks."""
    return [] if grid.test is None else unpredicted(grid, cell, [*truths_of(grid, cell, TEST)], ending_of(grid))


def describe(outcomes: Sequence[Outcome]) -> str:
    """Returns the list of what failed, and the counts."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    lines = [f"failed: {outcome.cell}: {outcome.why}" for outcome in failed]
    counts = {state: sum(o.state == state for o in outcomes) for state in ("finished", "failed", "elsewhere")}
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items() if count)])
