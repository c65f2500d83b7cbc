"""Which cases a run learns from, nested low-label splits behind the user's folds, and which it is tested on.

nnU-Net trains on the entry of `splits_final.json` that a fold's number names, and on a random split where there is no
such entry. So fewer cases are an entry more; those that are there stay as they are.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from filelock import FileLock
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split

from nnunetv2_misfm.benchmark.grid import ALL, Draw
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.plans_file import read_json, write_json

SPLITS_FILE = "splits_final.json"
# nnU-Net's own cross-validation (nnUNetTrainer.do_split)
_FOLDS_SEED, _NUM_FOLDS = 12345, 5

Split = dict[str, list[str]]


def nested_cases(cases: Sequence[str], count: int, seed: int) -> list[str]:
    """Returns `count` of the cases, sorted by name.

    A seed puts the cases into an order (that of the SHA-256 of seed and name), of which the first ones are taken. So
    the five are among the ten, and the same cases are taken on every machine and in every version.
    """
    order = sorted(cases, key=lambda case: hashlib.sha256(f"{seed} {case}".encode()).digest())
    return sorted(order[:count])


def preprocessed_cases(folder: Path) -> list[str]:
    """Returns the names of the cases in a folder of preprocessed data.

    Raises:
        MisfmError: There is no such folder, or it is empty.
    """
    files = folder.is_dir() and any(folder.iterdir())
    cases = sorted(infer_dataset_class(str(folder)).get_identifiers(str(folder))) if files else []
    if not cases:
        raise MisfmError(f"expected preprocessed cases in {folder}, found none: run nnUNetv2_preprocess first.")
    return cases


def read_splits(base: Path, cases: Sequence[str]) -> list[Split]:
    """Returns the folds of a dataset; where there is no file yet, those that nnU-Net's trainer would write.

    Args:
        base: The dataset's folder in nnUNet_preprocessed.
        cases: All preprocessed cases.

    Raises:
        MisfmError: The file is damaged or holds no list of `train` and `val` cases.
    """
    file = base / SPLITS_FILE
    if not file.is_file():
        if len(cases) < _NUM_FOLDS:
            return []
        folds = generate_crossval_split(sorted(cases), seed=_FOLDS_SEED, n_splits=_NUM_FOLDS)
        return [{part: list(map(str, names)) for part, names in fold.items()} for fold in folds]
    splits: object = read_json(file)
    if not isinstance(splits, list) or not all(isinstance(s, dict) and {"train", "val"} <= {*s} for s in splits):
        raise MisfmError(f"{file}: expected a list of folds with 'train' and 'val', got other data; mend or delete it.")
    return splits


def split_of(draw: Draw, splits: Sequence[Split], cases: Sequence[str]) -> Split:
    """Returns the training and validation cases of a draw.

    With the fold `all`, all cases are there to learn from. nnU-Net then validates on the very same; a draw of fewer
    validates on the others.

    Raises:
        MisfmError: There is no such fold, or it has fewer training cases than asked for.
    """
    if draw.fold == ALL:
        fold = {"train": list(cases), "val": list(cases)}
    elif not isinstance(draw.fold, int) or draw.fold >= len(splits):
        known = (
            f"one of the folds 0 to {len(splits) - 1} or 'all'" if splits else "the fold 'all' (too few cases for five)"
        )
        raise MisfmError(
            f"expected {known}, got {draw.fold} (nnU-Net would draw a random split): name another or add it to "
            f"{SPLITS_FILE}."
        )
    else:
        fold = splits[draw.fold]
    unknown = sorted({*fold["train"], *fold["val"]} - {*cases})
    if unknown:
        raise MisfmError(
            f"fold {draw.fold}: expected preprocessed cases alone, got {', '.join(unknown[:5])}"
            f"{' and more' if len(unknown) > 5 else ''}: preprocess them or mend {SPLITS_FILE}."
        )
    if draw.train_cases == ALL:
        return {"train": list(fold["train"]), "val": list(fold["val"])}
    count = int(draw.train_cases)
    if count > len(fold["train"]):
        raise MisfmError(
            f"expected at most the {len(fold['train'])} training cases of fold {draw.fold}, got --train-cases {count}: "
            "ask for fewer, or for all."
        )
    train = nested_cases(fold["train"], count, draw.seed)
    others = [case for case in fold["val"] if draw.fold != ALL or case not in train]
    return {"train": train, "val": others or train}


def with_splits(splits: Sequence[Split], draws: Mapping[Draw, Split]) -> tuple[list[Split], dict[Draw, int | str]]:
    """Returns the folds with those of the draws appended, and the fold that nnU-Net is to be given for each draw.

    An entry that is there already serves again. Draws of all cases use the user's own fold.
    """
    extended = list(splits)
    folds: dict[Draw, int | str] = {}
    for draw, split in draws.items():
        if draw.train_cases == ALL:
            folds[draw] = draw.fold
            continue
        if split not in extended:
            extended.append(split)
        folds[draw] = extended.index(split)
    return extended, folds


def append_splits(base: Path, cases: Sequence[str], draws: Mapping[Draw, Split]) -> dict[Draw, int | str]:
    """Writes the splits of the draws behind the folds in `splits_final.json` and returns the fold of each draw.

    Raises:
        MisfmError: The file could not be written; the former one is intact.
    """
    with FileLock(base / f".{SPLITS_FILE}.lock"):  # two benchmarks of one dataset at once
        splits = read_splits(base, cases)
        extended, folds = with_splits(splits, draws)
        if extended != splits or not (base / SPLITS_FILE).is_file():
            write_json(extended, base / SPLITS_FILE)
    return folds


def test_truths(test: Path, ending: str) -> dict[str, Path]:
    """Returns the label files of a test folder by the names of their cases."""
    return {file.name.removesuffix(ending): file for file in sorted((test / "labelsTs").glob(f"*{ending}"))}


def splits_sha256(split: Split) -> str:
    """Returns the SHA-256 over the training and validation cases of a draw."""
    text = "\n".join([*sorted(split["train"]), "", *sorted(split["val"])])
    return hashlib.sha256(text.encode()).hexdigest()
