"""What a command left half-written is put aside, so that the next one makes it anew instead of keeping it."""

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunetv2_misfm.benchmark.damage import is_whole_checkpoint, is_whole_segmentation
from nnunetv2_misfm.benchmark.grid import Cell, Grid
from nnunetv2_misfm.benchmark.scores import TEST, VALIDATION, ending_of, predictions_of
from nnunetv2_misfm.benchmark.state import checkpoints
from nnunetv2_misfm.plans_file import find_plans, read_json

UNREADABLE = ".unreadable"


def heal(grid: Grid, cell: Cell) -> None:
    """Renames truncated checkpoints of a cell and deletes truncated predictions.

    nnU-Net's `--c` would go on from the former, its `--continue_prediction` would keep the latter. Only predictions
    that were not scored yet are looked at.
    """
    for file in checkpoints(grid, cell):
        if file.is_file() and not is_whole_checkpoint(file):
            file.replace(file.with_name(file.name + UNREADABLE))
    compared = VALIDATION if grid.test is None else TEST
    scores, folder = grid.folder / cell.name / f"scores_{compared}.csv", predictions_of(grid, cell, compared)
    scored_s = scores.stat().st_mtime if scores.is_file() else 0.0
    reader = PlansManager(read_json(find_plans(grid.dataset, grid.plans))).image_reader_writer_class
    for file in sorted(folder.glob(f"*{ending_of(grid)}")):
        if file.stat().st_mtime >= scored_s and not is_whole_segmentation(file, reader):
            file.unlink()
            (folder / "summary.json").unlink(missing_ok=True)  # whose absence makes nnU-Net validate again
