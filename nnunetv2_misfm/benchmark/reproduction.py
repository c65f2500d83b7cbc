"""What a report tells to repeat a benchmark: commands, configuration, weights and the cases of every draw."""

from dataclasses import dataclass

import pandas as pd

from nnunetv2_misfm.benchmark.explanations import KEY_READERS
from nnunetv2_misfm.benchmark.grid import STOCK, STOCK_WITH_LENGTH
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.tables import Table, display_name

_SPLIT = "splits_sha256"


@dataclass(frozen=True)
class Commands:
    """Command lines below a heading.

    Attributes:
        title: What they are.
        lines: One command each.
        unfolded: Whether they are seen at once.
    """

    title: str
    lines: list[str]
    unfolded: bool = False


def commands(results: Results) -> list[Commands]:
    """Returns those of the benchmark, then those it ran, by draw, each once (trainers share a configuration)."""
    names = {(str(c.draw.train_cases), str(c.draw.fold), c.draw.seed): str(c.draw) for c in results.grid.cells}
    grouped: dict[str, list[str]] = {}
    for row in results.runs.to_dict("records"):
        lines = grouped.setdefault(names[str(row["train_cases"]), str(row["fold"]), int(row["seed"])], [])
        lines += [line for line in known(row["train_commands"]).splitlines() if line and line not in lines]
    asked = Commands("The benchmark", list(results.grid.requests), unfolded=True)
    return [block for block in (asked, *(Commands(f"With {draw}", of) for draw, of in grouped.items())) if block.lines]


def settings(results: Results) -> list[tuple[str, str]]:
    """Returns terms and what they are in this benchmark."""
    grid = results.grid
    untouched = any(cell.run_trainer == STOCK for cell in grid.cells)
    terms = [
        ("Dataset", grid.dataset),
        ("Plans and configuration", f"{grid.plans}, {grid.configuration}"),
        ("Configuration, the same for every trainer", " ".join(grid.settings) or "that of the plans"),
        ("Who reads which key", KEY_READERS),
        ("Compared on", _compared_on(results)),
    ]
    if STOCK in grid.trainers:
        ran = "untouched, which reads neither another length nor a seed" if untouched else f"run as {STOCK_WITH_LENGTH}"
        why = "" if untouched else ": stock nnU-Net in another length; at the same seed its losses are stock's"
        terms.append(("Stock nnU-Net", f"{STOCK}, {ran}{why}."))
    for trainer, file in grid.weights.items():
        digest = grid.weights_sha256.get(trainer)
        terms.append((f"Weights of {trainer}", f"{file} (SHA-256 {digest})" if digest else file))
    return terms


def weights_table(results: Results) -> Table | None:
    """Returns the files that finished runs started from; None where there are none."""
    found = dict.fromkeys(
        (display_name(run["trainer"]), known(run["weights_file"]), known(run["weights_sha256"]), _share(run))
        for run in results.runs.to_dict("records")
        if known(run["weights_sha256"])
    )
    if not found:
        return None
    return Table(
        slug="weights",
        title="Pretrained weights",
        caption="Files that fine-tuning started from, and the share of the network's parameters that came from them.",
        columns=["trainer", "file", "SHA-256", "share"],
        rows=[list(row) for row in found],
    )


def draws_table(results: Results) -> Table:
    """Returns the number of cases and the hash of every draw."""
    found = dict.fromkeys(
        (str(run["train_cases"]), str(run["fold"]), str(run["seed"]), str(run["num_train"]), known(run[_SPLIT]))
        for run in results.runs.to_dict("records")
    )
    return Table(
        slug="draws",
        title="Splits",
        caption="The cases that a draw learns from and is validated on; every trainer of a draw has the same. The file "
        "csv/splits.csv of the report's folder names them all.",
        columns=["labelled cases", "fold", "seed", "training cases", "SHA-256"],
        rows=[list(row) for row in found],
    )


def split_cases(results: Results) -> pd.DataFrame:
    """Returns every case of every draw.

    Returns:
        Columns `train_cases`, `fold`, `seed`, `use` (train or val), `case` and `splits_sha256` (of the draw's lists).
    """
    keys = ["train_cases", "fold", "seed"]
    hashes = {
        (str(run["train_cases"]), str(run["fold"]), int(run["seed"])): known(run[_SPLIT])
        for run in results.runs.to_dict("records")
    }
    rows = []
    for draw in dict.fromkeys(cell.draw for cell in results.grid.cells):
        key = (str(draw.train_cases), str(draw.fold), draw.seed)
        for use in ("train", "val"):
            rows += [(*key, use, case, hashes.get(key, "")) for case in results.grid.splits[draw.name][use]]
    return pd.DataFrame(rows, columns=[*keys, "use", "case", _SPLIT])


def known(value: object) -> str:
    """Returns a cell of a table as text, empty where there is nothing in it."""
    return "" if value is None or (isinstance(value, float) and pd.isna(value)) else str(value)


def _compared_on(results: Results) -> str:
    if results.compared == "test":
        mirroring = "with" if results.grid.mirroring else "without"
        return f"{results.grid.test} (imagesTs, labelsTs), predicted {mirroring} nnU-Net's mirroring"
    return "the folds' validation cases, as nnU-Net predicts them at the end of a training: with mirroring"


def _share(run: dict) -> str:
    return "–" if pd.isna(run["weights_share"]) else f"{100 * run['weights_share']:.1f} %"
