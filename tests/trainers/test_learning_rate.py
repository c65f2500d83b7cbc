import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

from nnunetv2_misfm.trainers.halving_lr import HalvingLRScheduler
from nnunetv2_misfm.trainers.learning_rate import WarmupLRScheduler, scaled_learning_rate


def two_groups() -> torch.optim.Optimizer:
    first, second = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    return torch.optim.SGD([{"params": [first]}, {"params": [second]}], lr=1.0)


def rates(scheduler, optimizer: torch.optim.Optimizer, epochs: range) -> list[float]:
    found = []
    for epoch in epochs:
        scheduler.step(epoch)
        first, second = (group["lr"] for group in optimizer.param_groups)
        assert first == second
        found.append(first)
    return found


@pytest.mark.parametrize(
    ("rule", "batch_size", "expected"),
    [
        ("none", 64, 0.1),
        ("linear", 4, 0.1),
        ("linear", 64, 1.6),
        ("linear", 2, 0.05),
        ("sqrt", 4, 0.1),
        ("sqrt", 64, 0.4),
        ("sqrt", 1, 0.05),
    ],
)
def test_rate_follows_the_batch_size_by_the_chosen_rule(rule, batch_size: int, expected: float) -> None:
    assert scaled_learning_rate(0.1, rule, batch_size, reference_batch_size=4) == pytest.approx(expected, rel=1e-12)


def test_warm_up_rises_in_equal_parts_to_the_halving_schedule() -> None:
    optimizer = two_groups()
    scheduler = WarmupLRScheduler(HalvingLRScheduler(optimizer, initial_lr=8.0, num_epochs=25), num_epochs=3)
    # halved at the epochs 5, 10, 15 and 20
    assert rates(scheduler, optimizer, range(11)) == [2.0, 4.0, 6.0, 8.0, 8.0, 4.0, 4.0, 4.0, 4.0, 4.0, 2.0]


def test_warm_up_longer_than_the_first_part_follows_the_schedule_it_wraps() -> None:
    optimizer = two_groups()
    scheduler = WarmupLRScheduler(HalvingLRScheduler(optimizer, initial_lr=8.0, num_epochs=10), num_epochs=3)
    assert rates(scheduler, optimizer, range(5)) == [2.0, 4.0, 3.0, 4.0, 2.0]  # halved at the epochs 2 and 4


def test_warm_up_of_nnunets_poly_schedule() -> None:
    optimizer = two_groups()
    scheduler = WarmupLRScheduler(PolyLRScheduler(optimizer, 0.01, 100), num_epochs=4)
    poly = [0.01 * (1 - epoch / 100) ** 0.9 for epoch in range(8)]
    shares = [0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]
    expected = [share * rate for share, rate in zip(shares, poly, strict=True)]
    assert rates(scheduler, optimizer, range(8)) == pytest.approx(expected, rel=1e-12)


def test_rate_of_an_epoch_does_not_depend_on_those_before() -> None:
    optimizer = two_groups()
    scheduler = WarmupLRScheduler(PolyLRScheduler(optimizer, 0.01, 100), num_epochs=4)
    whole = rates(scheduler, optimizer, range(8))
    resumed = two_groups()
    assert rates(WarmupLRScheduler(PolyLRScheduler(resumed, 0.01, 100), 4), resumed, range(2, 8)) == whole[2:]
    assert rates(scheduler, optimizer, range(2, 8)) == whole[2:]  # repeated calls do not add up


def test_no_warm_up_changes_nothing() -> None:
    bare, wrapped = two_groups(), two_groups()
    expected = rates(PolyLRScheduler(bare, 0.01, 5), bare, range(5))
    assert rates(WarmupLRScheduler(PolyLRScheduler(wrapped, 0.01, 5), 0), wrapped, range(5)) == expected
