"""Tasks and modalities of a universal model: their numbers, which are shared, and what may be mirrored."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.universal_sources import RawSource
from nnunetv2_misfm.universe import Source, Universe, dataset_number

# A class of a dataset: its number and the name of the class
_Class = tuple[int, str]

_CLASS = re.compile(r"(\d+):(.+)", re.DOTALL)
# Words with left or right in them that speak of no side (a short list of ours)
_NO_SIDE = re.compile(
    r"(?<![a-z])(albright|alright|aright|bright|cleft|downright|fright|leftovers?(?![a-z])|outright|upright|wright)"
)
# Left and right in lower case: anywhere in full, else as words (lh and rh: hemispheres); a single letter before a digit
# is none (vertebra L1)
_SIDE = re.compile(r"left|right|(?<![a-z])(lt|rt|lh|rh|[lr](?!\d))(?![a-z])")
# A capital L or R directly before a capitalised word (LKidney), and the four chambers of the heart (LV)
_CAPITAL_SIDE = re.compile(r"(?<![A-Za-z])[LR](?=[A-Z][a-z]{2}|[AV](?![A-Za-z]))")
# L or R directly before a paired structure in whatever case (Rkidney, RLUNG), since rectum and lung begin so too (a
# list of ours: stems of the common ones, none of which makes another word with l or r before it)
_PAIRED = (
    "adrenal", "amygdal", "atri(um|a)", "brachial", "breast", "carotid", "caudate", "cerebell", "cerebr", "clavic",
    "cochlea", "cortex", "eye", "femor", "femur", "fibula", "foot", "glute", "hand", "hemi", "hip", "humer", "iliac",
    "jugular", "kidney", "knee", "lens", "lobe", "lung", "masseter", "optic", "orbit", "ovary", "pallidum", "parotid",
    "psoas", "putamen", "scapula", "shoulder", "subclavia", "submandib", "testi", "thalam", "thigh", "tibia", "ureter",
    "ventric",
)  # fmt: skip
_SIDE_OF_PAIR = re.compile(rf"(?<![a-z])[lr]({'|'.join(_PAIRED)})")


def number_tasks(
    dataset: str, sources: Sequence[RawSource], same: Sequence[str] = (), base: Universe | None = None
) -> Universe:
    """Returns the tasks and modalities of some datasets, numbered in their order; mirror axes are not decided yet.

    Args:
        dataset: Full name of the universal dataset.
        sources: The datasets that it trains.
        same: Classes that share one task, as `4:Anterior=101:hippocampus`.
        base: What the universal model knew before: its tasks and modalities keep their numbers.

    Raises:
        MisfmError: An unknown class, two classes of one dataset declared the same, or a dataset of `base` that has
            changed.
    """
    numbers = {} if base is None else _known_numbers(base, sources)
    classes = [(source.number, name) for source in sources for name in source.classes]
    groups = _groups([*numbers, *classes], same)
    tasks = [] if base is None else list(base.tasks)
    by_group: dict[_Class, int] = {}
    for known, number in numbers.items():
        former = by_group.setdefault(groups[known], number)
        if former != number:
            raise MisfmError(
                f"{tasks[former]} and {tasks[number]} are two tasks of {base.dataset if base else dataset} already, "
                "so --same cannot make them one."
            )
    for one in classes:
        if groups[one] not in by_group:
            by_group[groups[one]] = len(tasks)
            tasks.append(_text(one))
    modalities = list(dict.fromkeys([*(base.modalities if base else ()), *(source.modality for source in sources)]))
    described = []
    for source in sources:
        own = tuple(by_group[groups[source.number, name]] for name in source.classes)
        _check_distinct(source, own)
        described.append(
            Source(
                source.dataset,
                own,
                tuple(source.classes.values()),
                modalities.index(source.modality),
                source.has_regions,
                source.ignore_label,
                num_cases=len(source.cases),
            )
        )
    extends = None if base is None else base.dataset
    return Universe(dataset, tuple(tasks), tuple(modalities), tuple(described), extends=extends)


def _known_numbers(base: Universe, sources: Sequence[RawSource]) -> dict[_Class, int]:
    """Returns the numbers of classes that a former universal model knows, by the tasks' names and its own sources."""
    numbers = {}
    for number, task in enumerate(base.tasks):
        dataset, _, name = task.partition(":")
        numbers[int(dataset), name] = number
    former = {source.dataset: source for source in base.sources}
    for source in sources:
        if source.dataset in former:
            known = former[source.dataset]
            if known.values != tuple(source.classes.values()) or base.modalities[known.modality] != source.modality:
                raise MisfmError(
                    f"{source.dataset} has changed since {base.dataset} was made of it: expected its former labels and "
                    "modality; join all datasets anew, without --extend."
                )
            numbers.update(zip([(source.number, name) for name in source.classes], known.tasks, strict=True))
    return numbers


def _groups(classes: Sequence[_Class], same: Sequence[str]) -> dict[_Class, _Class]:
    """Returns, for every class, the one that stands for all that are the same."""
    stands_for = {one: one for one in classes}
    for declared in same:
        members = [_parsed(text, declared, stands_for) for text in re.split(r"=(?=\d+:)", declared)]
        if len(members) < 2:
            raise MisfmError(f"expected --same of the form 4:Anterior=101:hippocampus, got {declared!r}.")
        first = stands_for[members[0]]
        merged = {stands_for[member] for member in members}
        stands_for = {one: first if group in merged else group for one, group in stands_for.items()}
    return stands_for


def _parsed(text: str, declared: str, known: Collection[_Class]) -> _Class:
    match = _CLASS.fullmatch(text)
    if match is None:
        raise MisfmError(f"expected --same of the form 4:Anterior=101:hippocampus, got {declared!r}.")
    number, name = int(match[1]), match[2]
    if (number, name) not in known:
        names = [other for dataset, other in known if dataset == number] or map(_text, known)
        raise MisfmError(f"expected a known class in --same {declared}, got {text}; known are {', '.join(names)}.")
    return number, name


def _text(one: _Class) -> str:
    return f"{one[0]}:{one[1]}"


def _check_distinct(source: RawSource, numbers: Sequence[int]) -> None:
    names = list(source.classes)
    for i, number in enumerate(numbers):
        if number in numbers[:i]:
            raise MisfmError(
                f"{names[numbers.index(number)]} and {names[i]} are two classes of {source.dataset}, so --same cannot "
                "declare them the same."
            )


def has_side(name: str) -> bool:
    """Returns whether a class's name speaks of left or right: kidney_left, Lt. lung, kidneyLeft, LKidney, lh_cortex.

    In doubt it does, for mirroring is then lost along one axis; the other way round left and right would be mixed up.
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    lower = _NO_SIDE.sub("", words.lower())
    return any((_CAPITAL_SIDE.search(words), _SIDE.search(lower), _SIDE_OF_PAIR.search(lower)))


def with_mirror_axes(
    universe: Universe,
    sources: Sequence[RawSource],
    left_right: Mapping[str, int | None],
    transpose_forward: Sequence[int],
    never: Iterable[int] = (),
) -> Universe:
    """Returns the universe with the axes along which each source may be mirrored.

    A source of which a task is a left or right structure, in its own words or in those of a dataset that shares the
    task, is not mirrored along its left-right axis, nor at all where that is unknown.

    Args:
        universe: Of these sources.
        sources: With the names of their classes.
        left_right: For each dataset the array axis that runs from left to right, before transposition.
        transpose_forward: For each axis of a preprocessed volume, the array axis that it was.
        never: Numbers of datasets that are not mirrored at all.
    """
    sided = {number for number, task in enumerate(universe.tasks) if has_side(task.partition(":")[2])}
    for source, raw in zip(universe.sources, sources, strict=True):
        sided.update(number for number, name in zip(source.tasks, raw.classes, strict=True) if has_side(name))
    forbidden = set(never)
    decided = []
    for source in universe.sources:
        axes: tuple[int, ...] = (0, 1, 2)
        axis = left_right[source.dataset]
        if dataset_number(source.dataset) in forbidden:
            axes = ()
        elif sided.intersection(source.tasks):
            axes = tuple(a for a in axes if axis is not None and transpose_forward[a] != axis)
        decided.append(replace(source, mirror_axes=axes))
    return replace(universe, sources=tuple(decided))
