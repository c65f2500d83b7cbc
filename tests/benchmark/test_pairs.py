import pytest

from nnunetv2_misfm.benchmark.pairs import default_pairs, scratch_of, stock_of

STOCK, BASE = "nnUNetTrainer", "nnUNetTrainerBaseline"
PCT, PCT_VF, FM, FM_VF, VF = (f"nnUNetTrainer{kind}" for kind in ("PCTNet", "PCTNetVF", "FMUNet", "FMUNetVF", "VF"))


@pytest.mark.parametrize(
    ("trainers", "pairs"),
    [
        ([STOCK, PCT, PCT_VF], [(PCT, STOCK), (PCT_VF, STOCK), (PCT_VF, PCT)]),
        (
            [FM_VF, PCT_VF, FM, PCT, STOCK],
            [(t, STOCK) for t in (FM_VF, PCT_VF, FM, PCT)] + [(FM_VF, FM), (PCT_VF, PCT)],
        ),
        ([BASE, VF, PCT_VF], [(VF, BASE), (PCT_VF, BASE)]),
        ([STOCK, BASE, VF], [(BASE, STOCK), (VF, STOCK)]),
        ([PCT, PCT_VF], [(PCT_VF, PCT)]),
        ([PCT, "nnUNetTrainerOfAUser"], []),
        ([STOCK], []),
    ],
)
def test_pairs_are_all_against_stock_and_fine_tuned_against_scratch(
    trainers: list[str], pairs: list[tuple[str, str]]
) -> None:
    assert default_pairs(trainers) == pairs


def test_stock_is_the_untouched_trainer_or_its_short_twin() -> None:
    assert (stock_of([PCT, BASE, STOCK]), stock_of([PCT, BASE]), stock_of([PCT])) == (STOCK, BASE, None)


def test_scratch_is_an_ancestor_in_the_grid_and_a_trainer_from_scratch_has_none() -> None:
    assert scratch_of(PCT_VF, [STOCK, PCT, PCT_VF]) == PCT
    assert scratch_of(VF, [PCT, STOCK]) == STOCK
    assert scratch_of(PCT_VF, [PCT_VF]) is None and scratch_of(PCT, [STOCK, PCT]) is None
