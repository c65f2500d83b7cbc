import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nnunetv2_misfm.architectures.context_prior import Answer
from nnunetv2_misfm.trainers.partial_label_loss import PartialLabelLoss, counts
from nnunetv2_misfm.trainers.task_labels import TaskLabels

SHAPE = (2, 3, 4)
NUM_MODALITIES = 3
PRESENT = torch.tensor([[True, True, False], [True, False, False], [True, True, True]])


def example(seed: int = 0, present: Tensor = PRESENT) -> tuple[Answer, TaskLabels]:
    """Samples with three slots, not all filled; overlapping structures and some voxels that nobody labelled."""
    generator = torch.Generator().manual_seed(seed)
    batch, slots = present.shape
    logits = 2 * torch.randn(batch, slots, *SHAPE, generator=generator)
    masks = (torch.rand(logits.shape, generator=generator) < 0.4) & present[:, :, None, None, None]
    labelled = torch.rand(batch, *SHAPE, generator=generator) < 0.8
    modality = torch.randn(batch, NUM_MODALITIES, generator=generator)
    truth = torch.randint(0, NUM_MODALITIES, (batch,), generator=generator)
    answer = Answer(logits.requires_grad_(), modality.requires_grad_())
    return answer, TaskLabels(masks, present, labelled, truth)


def all_labelled(*mask_rows: list[int]) -> TaskLabels:
    """One sample of a row of voxels, all tasks present."""
    masks = torch.tensor(mask_rows, dtype=torch.bool)[None, :, None, None]
    return TaskLabels(masks, torch.ones(1, len(mask_rows), dtype=torch.bool), torch.ones_like(masks[:, 0]),
                      torch.tensor([0]))  # fmt: skip


def says(*logit_rows: list[float]) -> Answer:
    return Answer(torch.tensor(logit_rows)[None, :, None, None], torch.zeros(1, NUM_MODALITIES))


def slow_loss(answer: Answer, labels: TaskLabels, weight: float) -> float:
    """By loops over samples, tasks and voxels, in Python's floats."""
    pairs = []
    for sample in range(len(labels.present)):
        labelled = labels.labelled[sample].flatten().tolist()
        for slot in labels.present[sample].nonzero().flatten().tolist():
            logits = answer.logits[sample, slot].flatten().tolist()
            truth = labels.masks[sample, slot].flatten().tolist()
            entropy, number, common, sizes = 0.0, 0, 0.0, 0.0
            for logit, true, counted in zip(logits, truth, labelled, strict=True):
                if not counted:
                    continue
                p = 1 / (1 + math.exp(-logit))
                entropy -= math.log(p if true else 1 - p)
                number += 1
                common += p * true
                sizes += p + true
            pairs.append(entropy / number - (2 * common + 1e-5) / (sizes + 1e-5))
    modality = 0.0
    for logits, true in zip(answer.modality.tolist(), labels.modality.tolist(), strict=True):
        modality += math.log(sum(map(math.exp, logits))) - logits[true]
    return sum(pairs) / len(pairs) + weight * modality / len(labels.present)


@pytest.mark.parametrize("weight", [0.0, 0.01, 3.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_slow_loop_over_samples_and_tasks_agrees(seed: int, weight: float) -> None:
    answer, labels = example(seed)
    assert PartialLabelLoss(weight)(answer, labels).item() == pytest.approx(slow_loss(answer, labels, weight), abs=1e-5)


def test_every_pair_counts_the_same_however_many_tasks_its_sample_has() -> None:
    both, labels = example()
    alone = []
    for sample, slot in labels.present.nonzero().tolist():
        one = torch.zeros_like(labels.present)
        one[sample, slot] = True
        alone.append(PartialLabelLoss(0)(both, labels._replace(present=one)).item())
    assert len(alone) == 6
    assert PartialLabelLoss(0)(both, labels).item() == pytest.approx(sum(alone) / 6, abs=1e-6)


def test_absent_tasks_get_no_gradient_and_change_nothing() -> None:
    answer, labels = example()
    loss = PartialLabelLoss(0.01)
    loss(answer, labels).backward()
    gradient = answer.logits.grad
    assert gradient is not None and (gradient[~labels.present] == 0).all()
    assert all(gradient[sample, slot].any() for sample, slot in labels.present.nonzero().tolist())
    other = answer.logits.detach().clone()
    other[~labels.present] = 1e4
    assert torch.equal(loss(Answer(other, answer.modality), labels), loss(answer, labels))


def test_voxels_that_nobody_labelled_do_not_count() -> None:
    answer, labels = example()
    loss = PartialLabelLoss(0.01)
    loss(answer, labels).backward()
    gradient = answer.logits.grad
    hidden = (~labels.labelled)[:, None].expand_as(answer.logits)
    assert gradient is not None and (gradient[hidden] == 0).all() and hidden.any()
    logits, masks = answer.logits.detach().clone(), labels.masks.clone()
    logits[hidden], masks[hidden] = 50, True
    assert torch.equal(loss(Answer(logits, answer.modality), labels._replace(masks=masks)), loss(answer, labels))


def test_a_crop_without_a_labelled_voxel_is_finite_and_teaches_nothing() -> None:
    answer, labels = example(present=PRESENT[:1])
    value = PartialLabelLoss(0)(answer, labels._replace(labelled=torch.zeros_like(labels.labelled)))
    value.backward()
    assert value.isfinite() and answer.logits.grad is not None and not answer.logits.grad.any()


def test_overlapping_structures_can_both_be_right() -> None:
    labels = all_labelled([1, 1, 1, 0], [0, 1, 1, 0])
    right = says([40, 40, 40, -40], [-40, 40, 40, -40])
    assert PartialLabelLoss(0)(right, labels).item() == pytest.approx(-1, abs=1e-4)


def test_a_structure_that_is_not_in_the_crop_is_answered_by_nothing() -> None:
    labels = all_labelled([0, 0, 0, 0])
    # probabilities of one half: entropy log 2, Dice 1e-5 / (4 * 0.5 + 1e-5)
    assert PartialLabelLoss(0)(says([0, 0, 0, 0.0]), labels).item() == pytest.approx(math.log(2) - 5e-6, abs=2e-6)
    assert PartialLabelLoss(0)(says([-60.0] * 4), labels).item() == pytest.approx(-1, abs=1e-5)
    wrong = says([60.0] * 4)
    assert PartialLabelLoss(0)(wrong, labels).item() == pytest.approx(60, abs=1e-3)  # no saturation


def test_the_modality_weighs_what_it_should() -> None:
    answer, labels = example()
    values = [PartialLabelLoss(weight)(answer, labels).item() for weight in (0, 1, 2)]
    expected = torch.nn.functional.cross_entropy(answer.modality, labels.modality).item()
    assert values[1] - values[0] == pytest.approx(expected, abs=1e-5)
    assert values[2] - values[0] == pytest.approx(2 * expected, abs=1e-5)
    PartialLabelLoss(0.5)(answer, labels).backward()
    share = answer.modality.softmax(1) - torch.eye(NUM_MODALITIES)[labels.modality]
    torch.testing.assert_close(answer.modality.grad, 0.5 * share / len(labels.present))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_reckoned_in_float32(dtype: torch.dtype) -> None:
    shape = (1, 1, 48, 48, 48)  # 110592 voxels: sums of ones pass the end of float16
    logits = torch.linspace(-30, 60, 48**3).reshape(shape).to(dtype).requires_grad_()
    masks = torch.zeros(shape, dtype=torch.bool)
    masks[..., 24:] = True
    labels = TaskLabels(masks, torch.ones(1, 1, dtype=torch.bool), torch.ones(1, *shape[2:], dtype=torch.bool),
                        torch.tensor([1]))  # fmt: skip
    modality = torch.tensor([[1.0, 2.0, -30.0]], dtype=dtype)
    value = PartialLabelLoss(0.01)(Answer(logits, modality), labels)
    value.backward()
    assert value.dtype == torch.float32 and logits.grad is not None and logits.grad.isfinite().all()
    p, true = torch.sigmoid(logits.detach().double()), masks.double()
    entropy = (torch.nn.functional.softplus(logits.detach().double()) - logits.detach().double() * true).mean()
    dice = 2 * (p * true).sum() / (p.sum() + true.sum())
    told = math.log(sum(math.exp(x) for x in modality[0].tolist())) - 2.0
    assert value.item() == pytest.approx((entropy - dice).item() + 0.01 * told, abs=1e-4)


@pytest.mark.parametrize("numbers", [(3, 1), (1, 3), (2, 2)])
def test_ranks_with_other_numbers_of_pairs_add_up_to_one_process(
    monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, int]
) -> None:
    """The mean of the ranks' losses, as DDP takes of gradients, is the loss of the whole batch."""
    present = torch.stack([torch.arange(3) < number for number in numbers])
    answer, labels = example(present=present)

    def all_reduce(number: Tensor) -> None:
        number.fill_(float(sum(numbers)))

    patched: dict[str, Callable] = {"all_reduce": all_reduce, "get_world_size": lambda: 2}
    for name, function in patched.items():
        monkeypatch.setattr(f"torch.distributed.{name}", function)
    ranks = []
    for rank in (slice(0, 1), slice(1, 2)):
        mine = Answer(*(tensor[rank] for tensor in answer))
        ranks.append(PartialLabelLoss(0.01, across_ranks=True)(mine, TaskLabels(*(t[rank] for t in labels))))
    whole = PartialLabelLoss(0.01)(answer, labels)
    assert (sum(ranks) / 2).item() == pytest.approx(whole.item(), abs=1e-6)


# ---------------------------------------------------------------------- counts


def test_counts_by_hand() -> None:
    labels = all_labelled([1, 1, 0, 0, 1], [1, 0, 0, 0, 0])
    labelled = torch.tensor([1, 1, 1, 1, 0], dtype=torch.bool)[None, None, None]
    answer = says([3, -1, 2, -5, 9], [0, -1, 4, 4, 4.0])  # a logit of 0 is no yes
    tp, fp, fn = counts(answer, labels._replace(labelled=labelled), torch.tensor([[4, 1]]), 6)
    assert tp.tolist() == [0, 0, 0, 0, 1, 0]
    assert fp.tolist() == [0, 2, 0, 0, 1, 0]
    assert fn.tolist() == [0, 1, 0, 0, 1, 0]
    assert {tensor.dtype for tensor in (tp, fp, fn)} == {torch.float64}


def test_counts_add_up_where_datasets_share_a_task() -> None:
    answer, labels = example()
    tasks = torch.tensor([[0, 1, 0], [2, 0, 0], [1, 0, 3]])  # task 0 in slots 0 and 1; padding says 0 too
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for sample, slot in labels.present.nonzero().tolist():
        said = answer.logits[sample, slot].flatten().tolist()
        true = labels.masks[sample, slot].flatten().tolist()
        for logit, is_true, counted in zip(said, true, labels.labelled[sample].flatten().tolist(), strict=True):
            kind = {(True, True): 0, (True, False): 1, (False, True): 2}.get((logit > 0, is_true))
            if counted and kind is not None:
                expected[kind, tasks[sample, slot]] += 1
    assert torch.equal(torch.stack(counts(answer, labels, tasks, 5)), expected)
    assert not expected[:, 4].any() and expected[0, :4].all()
