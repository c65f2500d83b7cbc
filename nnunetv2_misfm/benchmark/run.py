"""Runs a grid through nnU-Net's own commands: one cell after another, or one per GPU.

What is finished is skipped, what was cut goes on, a cell that fails is listed and the others go on. A cell that another
process runs at the moment (a second benchmark command on the same folders, on another node, say) is left to it.
"""

import os
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from filelock import FileLock, Timeout

from nnunetv2_misfm.benchmark.commands import environment, predict_command, train_command
from nnunetv2_misfm.benchmark.grid import Cell, Grid
from nnunetv2_misfm.benchmark.progress import Progress, RunProgress, num_epochs
from nnunetv2_misfm.benchmark.scores import TEST, VALIDATION, ending_of, scores_of, truths_of
from nnunetv2_misfm.benchmark.state import (
    RUN_FILE,
    State,
    is_validated,
    log_file,
    mismatch,
    recorded_steps,
    state_of,
    unpredicted,
)
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.plans_file import write_json
from nnunetv2_misfm.scripts import Command, describe_machine, find_script

# Lines of a failed command's output that the list of failures shows
_SHOWN_LINES = 3


@dataclass(frozen=True)
class Options:
    """How a grid is run; none of it changes what is compared but `mirroring`, which is the same for all.

    Attributes:
        device: cuda, cpu or mps.
        jobs: Runs at a time; on cuda each has a GPU of its own.
        mirroring: nnU-Net's test-time mirroring when the test folder is predicted.
        skip_validation: Leave out the final validation where a trainer of this package runs and a test folder is there.
    """

    device: str = "cuda"
    jobs: int = 1
    mirroring: bool = True
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
        commands.append(predict_command(grid, cell, options.device, mirroring=options.mirroring))
    return commands


def run_grid(grid: Grid, cells: Sequence[Cell], options: Options) -> list[Outcome]:
    """Runs the cells and returns what each has come to; a bar shows progress and time left.

    Raises:
        MisfmError: Fewer GPUs than asked for, or skipped validation where validation cases are compared.
    """
    if options.skip_validation and grid.test is None:
        raise MisfmError("expected --test DIR with --skip-validation, got none: nothing would be left to compare.")
    slots: SimpleQueue[str | None] = SimpleQueue()
    for slot in _slots(options):
        slots.put(slot)
    todo = [cell for cell in cells if remaining(grid, cell, options)]
    progress = Progress(sum(num_epochs(cell.run_trainer, grid.settings) for cell in todo))
    progress.say(f"{len(cells)} runs, {len(cells) - len(todo)} of them trained and predicted already")
    running: set[subprocess.Popen] = set()
    pool = ThreadPoolExecutor(options.jobs)
    futures = [pool.submit(_run_cell, grid, cell, options, slots, progress, running) for cell in cells]
    try:
        pending = {*futures}
        while pending:  # in slices, so that Ctrl-C is heard
            pending = wait(pending, timeout=1, return_when=FIRST_COMPLETED).not_done
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in [*running]:
            process.terminate()
        raise
    finally:
        pool.shutdown()
        progress.close()
    return [future.result() for future in futures]


def _slots(options: Options) -> list[str | None]:
    """Returns a GPU per job on cuda (those that the user's CUDA_VISIBLE_DEVICES shows), else nothing per job."""
    if options.device != "cuda":
        return [None] * options.jobs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = visible.split(",") if visible else [str(gpu) for gpu in range(torch.cuda.device_count())]
    if len(known) < options.jobs:
        raise MisfmError(
            f"expected at most {len(known)} GPUs, as many as PyTorch finds, got --gpus {options.jobs}: ask for fewer, "
            "or for --device cpu."
        )
    return list(known[: options.jobs])


def _run_cell(
    grid: Grid,
    cell: Cell,
    options: Options,
    slots: "SimpleQueue[str | None]",
    progress: Progress,
    running: set[subprocess.Popen],
) -> Outcome:
    """Runs what a cell still needs on the next free slot."""
    folder = grid.folder / cell.name
    folder.mkdir(parents=True, exist_ok=True)
    share = progress.run(num_epochs(cell.run_trainer, grid.settings) if remaining(grid, cell, options) else 0)
    slot = slots.get()
    try:
        with FileLock(folder / ".lock", timeout=0):
            if why := mismatch(grid, cell):
                raise MisfmError(why)
            for command in remaining(grid, cell, options):
                progress.say(f"{cell}: {command.title}")
                _run_command(grid, cell, command, options, slot, share, running)
            scores_of(grid, cell, VALIDATION if grid.test is None else TEST)
    except Timeout:
        progress.say(f"{cell}: another process runs it, left to that")
        return Outcome(cell, "elsewhere")
    except (MisfmError, OSError) as error:
        progress.say(f"{cell}: FAILED: {error}")
        return Outcome(cell, "failed", str(error))
    finally:
        share.finish()
        slots.put(slot)
    progress.say(f"{cell}: finished")
    return Outcome(cell, "finished")


def _run_command(
    grid: Grid,
    cell: Cell,
    command: Command,
    options: Options,
    slot: str | None,
    share: RunProgress,
    running: set[subprocess.Popen],
) -> None:
    """Runs a command, its output going into the cell's log, and records it.

    Raises:
        MisfmError: It failed.
    """
    log = log_file(grid, cell)
    outstanding = _outstanding(grid, cell)
    for file in outstanding:
        file.unlink(missing_ok=True)  # nnU-Net would keep the prediction of a former training
    started = time.time()
    with log.open("a") as stream:
        stream.write(f"$ {command}\n")
        stream.flush()
        process = subprocess.Popen(
            [find_script(command.arguments[0]), *command.arguments[1:]],
            env={**environment(slot), **command.variables, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        running.add(process)
        assert process.stdout is not None
        for line in process.stdout:
            stream.write(line)
            share.read(line)
        status = process.wait()
        running.discard(process)
    step = {
        "title": command.title,
        "command": str(command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started)),
        "seconds": round(time.time() - started, 1),
        "status": status,
        "cases": len(outstanding) - len(_outstanding(grid, cell)),
        "machine": describe_machine(options.device),
    }
    write_json([*recorded_steps(grid, cell), step], grid.folder / cell.name / RUN_FILE)
    if status != 0:
        tail = " | ".join(line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip())
        last = " | ".join(tail.split(" | ")[-_SHOWN_LINES:])
        raise MisfmError(f"`{command}` ended with status {status}: {last} (all of it in {log})")
    if command.arguments[0] == "nnUNetv2_train" and state_of(grid, cell) is not State.TRAINED:
        raise MisfmError(f"`{command}` ended without a final checkpoint in {grid.results(cell)} (output in {log})")


def _outstanding(grid: Grid, cell: Cell) -> list[Path]:
    """Returns the prediction files that a cell still lacks."""
    return [] if grid.test is None else unpredicted(grid, cell, [*truths_of(grid, cell, TEST)], ending_of(grid))


def describe(outcomes: Sequence[Outcome]) -> str:
    """Returns the list of what failed, and the counts."""
    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    lines = [f"failed: {outcome.cell}: {outcome.why}" for outcome in failed]
    counts = {state: sum(o.state == state for o in outcomes) for state in ("finished", "failed", "elsewhere")}
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items() if count)])
