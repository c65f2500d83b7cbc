"""The body of `nnUNetv2_misfm benchmark`: plan the grid, run it, measure costs, say what to do next."""

from nnunetv2_misfm.benchmark.commands import configure_command, predict_command, train_command
from nnunetv2_misfm.benchmark.cost import measure_cost
from nnunetv2_misfm.benchmark.costs import known_costs, write_cost
from nnunetv2_misfm.benchmark.grid import Cell, Grid
from nnunetv2_misfm.benchmark.prepare import Request, cells_of, plan_grid, prepare
from nnunetv2_misfm.benchmark.run import Options, check_options, describe, run_grid
from nnunetv2_misfm.errors import MisfmError


def benchmark(request: Request, options: Options, dry_run: bool = False) -> tuple[str, int]:
    """Runs a grid and returns what to tell the user and the exit status, 1 where a cell failed.

    Args:
        request: What to compare.
        options: How to run it.
        dry_run: Only return the exact commands; nothing is written.

    Raises:
        MisfmError: A fault in the request, before anything is written or run.
    """
    grid = plan_grid(request)
    cells = cells_of(grid, request)
    if dry_run:  # also where there is no GPU, as on a cluster's login node
        return dry(grid, cells, options), 0
    check_options(grid, options)
    prepare(grid)
    outcomes = run_grid(grid, cells, options)
    said = [describe(outcomes)]
    for cell in {c.trainer: c for c in cells}.values():
        if cell.trainer not in known_costs(grid):
            try:
                cost = measure_cost(grid.dataset, cell.configuration, cell.run_trainer, grid.plans, options.device)
                write_cost(grid, cell.trainer, cost)
            except MisfmError as error:
                said.append(f"the cost of {cell.trainer} could not be measured: {error}")
    name = "" if grid.name == Request.name else f" --name {grid.name}"
    said.append(f"Next: nnUNetv2_misfm report -d {request.dataset} -o report/{name}")
    return "\n".join(said), int(any(outcome.state == "failed" for outcome in outcomes))


def dry(grid: Grid, cells: list[Cell], options: Options) -> str:
    """Returns all commands of the cells as a shell would take them, and what else the benchmark would write."""
    appended = {cell.run_fold for cell in cells if cell.run_fold != cell.draw.fold}
    lines = (
        [f"# the folds {', '.join(map(str, sorted(appended)))} behind those in splits_final.json"] if appended else []
    )
    lines.append("# configurations, one per number of cases and seed")
    lines += [str(configure_command(grid, cell.draw)) for cell in {c.configuration: c for c in cells}.values()]
    for draw, fold in {cell.draw: cell.run_fold for cell in cells}.items():
        split = grid.splits[draw.name]
        lines.append(
            f"# {draw}: nnU-Net's fold {fold}, {len(split['train'])} training and {len(split['val'])} validation cases"
        )
        for cell in cells:
            if cell.draw != draw:
                continue
            lines.append(str(train_command(grid, cell, options.device, skip_validation=options.skip_validation)))
            if grid.test is not None:
                lines.append(str(predict_command(grid, cell, options.device)))
    return "\n".join(lines)
