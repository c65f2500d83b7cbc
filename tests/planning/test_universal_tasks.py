from collections.abc import Mapping

import pytest

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.universal_sources import Case, RawSource
from nnunetv2_misfm.planning.universal_tasks import has_side, number_tasks, with_mirror_axes
from nnunetv2_misfm.universe import Universe

UNIVERSAL = "Dataset950_Universal"


def source(name: str, *classes: str, modality: str = "CT", cases: int = 2) -> RawSource:
    values = {cls: (i + 1,) for i, cls in enumerate(classes)}
    listed = tuple(Case(f"case_{i}", ("i",), "l") for i in range(cases))
    return RawSource(name, {}, (modality,), values, False, None, "SimpleITKIO", listed)


BRAIN = source("Dataset004_Brain", "Anterior", "Posterior", modality="MR", cases=7)
ABDOMEN = source("Dataset101_Abdomen", "liver", "kidney_left", "kidney_right")
OTHER = source("Dataset102_Other", "Liver", "kidneys")
THREE = (BRAIN, ABDOMEN, OTHER)


def tasks_of(universe: Universe) -> list[tuple[int, ...]]:
    return [source.tasks for source in universe.sources]


# Numbers


def test_tasks_are_numbered_in_the_order_of_datasets_and_classes() -> None:
    universe = number_tasks(UNIVERSAL, [ABDOMEN, BRAIN])
    names = ("101:liver", "101:kidney_left", "101:kidney_right", "4:Anterior", "4:Posterior")
    assert universe.tasks == names and tasks_of(universe) == [(0, 1, 2), (3, 4)]
    assert universe.modalities == ("CT", "MR") and [s.modality for s in universe.sources] == [0, 1]
    assert [s.num_cases for s in universe.sources] == [2, 7]
    assert universe.dataset == UNIVERSAL and universe.source is None and universe.extends is None


def test_declared_classes_share_the_task_of_the_first() -> None:
    universe = number_tasks(UNIVERSAL, THREE, ["102:Liver=101:liver"])
    assert universe.tasks == (
        "4:Anterior", "4:Posterior", "101:liver", "101:kidney_left", "101:kidney_right", "102:kidneys"
    )  # fmt: skip
    assert tasks_of(universe) == [(0, 1), (2, 3, 4), (2, 5)]


@pytest.mark.parametrize(
    "same", [["4:Anterior=101:liver=102:Liver"], ["102:Liver=101:liver", "4:Anterior=102:Liver"]], ids=["one", "two"]
)
def test_chains_make_one_task(same: list[str]) -> None:
    universe = number_tasks(UNIVERSAL, THREE, same)
    assert tasks_of(universe) == [(0, 1), (0, 2, 3), (0, 4)]


def test_names_may_hold_the_signs_of_a_declaration() -> None:
    odd, plain = source("Dataset007_Odd", "a=b", "c:d"), source("Dataset008_Plain", "x")
    assert tasks_of(number_tasks(UNIVERSAL, [odd, plain], ["7:a=b=8:x"])) == [(0, 1), (0,)]
    assert tasks_of(number_tasks(UNIVERSAL, [odd, plain], ["8:x=7:c:d"])) == [(0, 1), (1,)]


@pytest.mark.parametrize(
    ("same", "sentence"),
    [
        ("4:anterior=101:liver", r"--same 4:anterior=101:liver, got 4:anterior; known are Anterior, Posterior\.$"),
        ("5:x=101:liver", r"got 5:x; known are 4:Anterior, 4:Posterior, 101:liver, 101:kidney_left, "),
        ("4:Anterior", r"of the form 4:Anterior=101:hippocampus, got '4:Anterior'\.$"),
        ("Anterior=Posterior", r"of the form 4:Anterior=101:hippocampus, got 'Anterior=Posterior'\.$"),
        ("4:Anterior=4:Posterior", r"Anterior and Posterior are two classes of Dataset004_Brain, so --same cannot"),
        ("101:kidney_left=102:kidneys=101:kidney_right", r"kidney_left and kidney_right are two classes of Dataset101"),
    ],
)
def test_impossible_declarations_are_refused(same: str, sentence: str) -> None:
    with pytest.raises(MisfmError, match=sentence):
        number_tasks(UNIVERSAL, THREE, [same])


# Extension


def test_known_tasks_and_modalities_keep_their_numbers() -> None:
    base = number_tasks("Dataset949_Base", [BRAIN, ABDOMEN])
    pet = source("Dataset103_Pet", "tumour", "hepar", modality="PET")
    universe = number_tasks(UNIVERSAL, [BRAIN, ABDOMEN, pet], ["103:hepar=101:liver"], base)
    assert universe.tasks == (*base.tasks, "103:tumour") and universe.modalities == ("MR", "CT", "PET")
    assert tasks_of(universe) == [(0, 1), (2, 3, 4), (5, 2)] and universe.extends == "Dataset949_Base"


def test_alone_new_classes_share_known_tasks_by_their_names() -> None:
    base = number_tasks("Dataset949_Base", [BRAIN, ABDOMEN])
    universe = number_tasks(UNIVERSAL, [OTHER], ["102:Liver=101:liver"], base)
    assert universe.tasks == (*base.tasks, "102:kidneys") and tasks_of(universe) == [(2, 5)]
    assert [s.dataset for s in universe.sources] == ["Dataset102_Other"] and universe.sources[0].modality == 1


def test_shared_tasks_stay_shared_in_an_extension() -> None:
    base = number_tasks("Dataset949_Base", THREE, ["101:liver=102:Liver"])
    again = number_tasks(UNIVERSAL, THREE, [], base)
    assert tasks_of(again) == tasks_of(base) and again.tasks == base.tasks


def test_extension_makes_no_two_known_tasks_one() -> None:
    base = number_tasks("Dataset949_Base", THREE)
    with pytest.raises(MisfmError, match=r"^101:liver and 102:Liver are two tasks of Dataset949_Base already, so"):
        number_tasks(UNIVERSAL, THREE, ["101:liver=102:Liver"], base)


@pytest.mark.parametrize(
    "changed", [source("Dataset004_Brain", "Anterior", modality="MR"), source("Dataset004_Brain", "a", "b")]
)
def test_changed_sources_are_refused_in_an_extension(changed: RawSource) -> None:
    base = number_tasks("Dataset949_Base", [BRAIN])
    with pytest.raises(MisfmError, match=r"^Dataset004_Brain has changed since Dataset949_Base was made of it"):
        number_tasks(UNIVERSAL, [changed, OTHER], [], base)


# Left and right


SIDED = (
    "kidney_left", "Right Kidney", "lung-L", "lt_optic_nerve", "RT.eye", "leftKidney", "hand R", "left1",
    "leftkidney", "kidneyleft", "RIGHTLUNG", "ribright", "leftward", "LeftOver", "left_over",
    "lh_cortex", "rh_cortex", "ctx-lh-insula", "LH", "rhCortex",
    "LKidney", "RAdrenal", "tumour of LBreast", "GTV_RLobe", "LV", "myo_RV", "LA wall",
    "Rkidney", "lkidney", "RLUNG", "lung_RLOBE", "l kidney", "LHIPPOCAMPUS", "reye",
)  # fmt: skip
PLAIN = (
    "liver", "Liver", "LIVER", "vertebra_L1", "R2", "alternative", "art", "Lr", "MLV",
    "bright", "BRIGHTNESS", "cleft", "cleftlip", "upright", "leftover", "leftovers", "aright", "Albright",
    "Rectum", "RECTUM", "rectum", "Lung", "LUNG", "lungs", "Renal", "RENAL", "renal_cortex", "LNs", "Lens", "Ribs",
    "Larynx", "Radius", "Lobe", "LAD", "Lateral ventricle", "anorhectal", "Ralph", "heart", "earth", "leg",
)  # fmt: skip


@pytest.mark.parametrize("name", SIDED)
def test_names_of_left_and_right_structures_are_known_in_common_spellings(name: str) -> None:
    assert has_side(name)


@pytest.mark.parametrize("name", PLAIN)
def test_other_names_with_such_letters_have_no_side(name: str) -> None:
    assert not has_side(name)


def axes_of(
    same: list[str], left_right: Mapping[str, int | None], transpose: list[int], never: list[int]
) -> list[tuple[int, ...]]:
    universe = number_tasks(UNIVERSAL, THREE, same)
    return [s.mirror_axes for s in with_mirror_axes(universe, THREE, left_right, transpose, never).sources]


WIDTH = {source.dataset: 2 for source in THREE}


def test_sided_classes_are_not_mirrored_along_left_right() -> None:
    assert axes_of([], WIDTH, [0, 1, 2], []) == [(0, 1, 2), (0, 1), (0, 1, 2)]


def test_left_right_axis_is_that_of_the_preprocessed_volume() -> None:
    # preprocessed axis 0 was array axis 2: that one is left out
    assert axes_of([], WIDTH, [2, 0, 1], [])[1] == (1, 2)
    assert axes_of([], {**WIDTH, "Dataset101_Abdomen": 0}, [2, 0, 1], [])[1] == (0, 2)


def test_datasets_that_share_a_sided_task_are_not_mirrored_along_left_right_either() -> None:
    assert axes_of(["102:kidneys=101:kidney_left"], WIDTH, [0, 1, 2], [])[2] == (0, 1)
    named_by_the_plain_one = number_tasks(UNIVERSAL, [OTHER, ABDOMEN], ["102:kidneys=101:kidney_left"])
    decided = with_mirror_axes(named_by_the_plain_one, [OTHER, ABDOMEN], WIDTH, [0, 1, 2])
    assert [s.mirror_axes for s in decided.sources] == [(0, 1), (0, 1)]


def test_unknown_orientation_of_sided_classes_forbids_all_mirroring() -> None:
    unknown = dict.fromkeys(WIDTH)
    assert axes_of([], unknown, [0, 1, 2], []) == [(0, 1, 2), (), (0, 1, 2)]


def test_user_forbids_mirroring() -> None:
    assert axes_of([], WIDTH, [0, 1, 2], [4, 102]) == [(), (0, 1), ()]
