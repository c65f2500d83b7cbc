"""What an answer of a network with context priors depends on, and in whose convention it comes."""

import random
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from prior_networks import NETWORKS, NUM_MODALITIES, NUM_TASKS, doubled, prior_network, relative, sample, unet_entry
from torch import Tensor, nn

from nnunetv2_misfm.architectures.context_prior import Answer, Context, ContextPriorNetwork, Sample
from nnunetv2_misfm.errors import MisfmError

EXACT = 1e-9  # of double precision, relative
FELT = 1e-4

parametrize_networks = pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
parametrize_seeds = pytest.mark.parametrize("seed", range(3))


def double_network(network: dict[str, Any] | None = None, **kwargs: Any) -> ContextPriorNetwork:
    return prior_network(network, **kwargs).double().eval()


@torch.no_grad()
def answers(net: ContextPriorNetwork, tasks: list, present: list, modality: list) -> Answer:
    return net(doubled(sample(tasks, present, modality)))


@parametrize_seeds
@parametrize_networks
def test_absent_tasks_that_are_asked_too_and_padding_change_no_answer(network: dict[str, Any], seed: int) -> None:
    net, draw = double_network(network), random.Random(seed)
    own, *others = [draw.sample(range(NUM_TASKS), NUM_TASKS)[:3] for _ in range(4)]
    expected = answers(net, [own], [[True] * 3], [seed])
    for other in others:
        found = answers(net, [own + other], [[True] * 3 + [False] * 3], [seed])
        assert relative(found.logits[:, :3], expected.logits) < EXACT
        assert relative(found.modality, expected.modality) < EXACT
    changed = answers(net, [own + others[0]], [[True] * 6], [seed])
    assert relative(changed.logits[:, :3], expected.logits) > FELT  # features do feel what is present


@parametrize_seeds
def test_an_absent_tasks_own_answer_depends_on_no_other_absent_task(seed: int) -> None:
    net, draw = double_network(), random.Random(seed)
    own, asked, *others = draw.sample(range(NUM_TASKS), 4)
    expected = answers(net, [[own, asked]], [[True, False]], [0]).logits[:, 1]
    found = answers(net, [[*others, own, asked]], [[False, False, True, False]], [0]).logits[:, 3]
    assert relative(found, expected) < EXACT


@parametrize_seeds
@parametrize_networks
def test_asking_one_task_many_or_those_of_other_datasets_changes_no_answer(network: dict[str, Any], seed: int) -> None:
    net, draw = double_network(network), random.Random(seed)
    labelled = draw.sample(range(NUM_TASKS), 3)
    batch = doubled(sample([labelled], [[True, True, False]], [seed]))
    expected = answers(net, [labelled], [[True, True, False]], [seed])
    everything = list(range(NUM_TASKS))
    for asked in ([labelled[0]], labelled[:2], labelled[1::-1], everything, [*everything, labelled[0]]):
        with torch.no_grad():
            found = net(batch._replace(context=batch.context._replace(asked=torch.tensor([asked]))))
        assert found.logits.shape[1] == len(asked)
        for slot, task in enumerate(labelled[:2]):
            if task in asked:
                assert relative(found.logits[:, asked.index(task)], expected.logits[:, slot]) < EXACT
        assert relative(found.modality, expected.modality) < EXACT


@parametrize_seeds
@parametrize_networks
def test_other_samples_of_the_batch_change_no_answer(network: dict[str, Any], seed: int) -> None:
    net, draw = double_network(network), random.Random(seed)
    tasks = [draw.sample(range(NUM_TASKS), 4) for _ in range(3)]
    present = [[True] + [draw.random() < 0.5 for _ in range(3)] for _ in range(3)]
    modality = [draw.randrange(NUM_MODALITIES) for _ in range(3)]
    batch = doubled(sample(tasks, present, modality))
    with torch.no_grad():
        together = net(batch)
        for i in range(3):
            alone = net(Sample(batch.image[i : i + 1], Context(*(tensor[i : i + 1] for tensor in batch.context[:3]))))
            assert relative(together.logits[i], alone.logits[0]) < EXACT
            assert relative(together.modality[i], alone.modality[0]) < EXACT


@parametrize_seeds
def test_tasks_answer_in_the_order_in_which_they_are_asked(seed: int) -> None:
    net, draw = double_network(), random.Random(seed)
    tasks, present = draw.sample(range(NUM_TASKS), 5), [True, False, True, True, False]
    order = draw.sample(range(5), 5)
    expected = answers(net, [tasks], [present], [1])
    found = answers(net, [[tasks[i] for i in order]], [[present[i] for i in order]], [1])
    assert relative(found.logits, expected.logits[:, order]) < EXACT
    assert relative(found.modality, expected.modality) < EXACT


def test_modality_and_task_change_an_answer() -> None:
    net = double_network()
    answer = answers(net, [[0]], [[True]], [0]).logits
    assert relative(answers(net, [[1]], [[True]], [0]).logits, answer) > FELT
    assert relative(answers(net, [[0]], [[True]], [1]).logits, answer) > FELT


def touched(tokens: nn.Parameter) -> set[int]:
    """Rows of a pool with a gradient."""
    assert tokens.grad is not None
    return set(tokens.grad.flatten(1).abs().amax(1).nonzero().flatten().tolist())


@pytest.mark.parametrize("case", range(3))
@parametrize_networks
def test_gradients_of_a_case_reach_only_rows_of_its_own_tasks_and_modality(network: dict[str, Any], case: int) -> None:
    net = double_network(network)
    tasks = [[4, 1, 0], [6, 3, 3], [5, 0, 0]]  # padded with other cases' tasks
    present = [[True, True, False], [True, True, False], [True, False, False]]
    modality = [2, 0, 1]
    answer = net(doubled(sample(tasks, present, modality)))
    (answer.logits[case, torch.tensor(present[case])].square().sum() + answer.modality[case].square().sum()).backward()
    own = {task for task, known in zip(tasks[case], present[case], strict=True) if known}
    for fusion in net.fusions.values():
        assert touched(fusion.task_tokens) == own
        assert touched(fusion.modality_tokens) == {modality[case]}


@torch.no_grad()
@parametrize_networks
def test_a_grown_pool_leaves_old_answers_as_they_were(network: dict[str, Any]) -> None:
    old, new = double_network(network), double_network(network, num_tasks=12, num_modalities=5)
    grown = new.state_dict()
    for key, value in old.state_dict().items():
        if grown[key].shape != value.shape:
            grown[key].normal_()
            grown[key][: len(value)] = value
        else:
            grown[key].copy_(value)
    adapted = {key for key, value in old.state_dict().items() if grown[key].shape != value.shape}
    pools = {f"fusions.{name}.{pool}_tokens" for name in old.fusions for pool in ("task", "modality")}
    assert adapted == pools | {"modality_head.2.weight", "modality_head.2.bias"}
    asked = [[2, 5, 0], [6, 1, 1]], [[True, True, True], [True, True, False]], [2, 0]
    expected, found = answers(old, *asked), answers(new, *asked)
    assert relative(found.logits, expected.logits) < EXACT
    assert relative(found.modality[:, :NUM_MODALITIES], expected.modality) < EXACT


def by_rule(logits: Tensor) -> np.ndarray:
    """Voxel by voxel: 0 where no task (T, D, H, W) is above one half, else one more than the most likely task."""
    probabilities = 1 / (1 + np.exp(-logits.double().numpy()))
    labels = np.zeros(probabilities.shape[1:], np.int64)
    for place in product(*map(range, labels.shape)):
        values = probabilities[(slice(None), *place)]
        if max(values) > 0.5:
            labels[place] = 1 + list(values).index(max(values))
    return labels


@torch.no_grad()
def test_with_background_nnunet_takes_the_most_likely_class_above_one_half() -> None:
    net = prior_network(unet_entry(3)).eval()
    image = sample([[0]] * 2, [[True]] * 2, [0], size=(8, 8, 12)).image
    net.answer_for([5, 2], 1)
    found = net(image)
    assert found.shape == (2, 3, 8, 8, 12) and not found[:, 0].any()
    context = Context(torch.tensor([[5, 2]] * 2), torch.ones(2, 2, dtype=torch.bool), torch.tensor([1, 1]))
    asked = net(Sample(image, context)).logits
    torch.testing.assert_close(found[:, 1:], asked)
    manager = LabelManager({"background": 0, "a": 1, "b": 2}, None)
    for answer, logits in zip(found, asked, strict=True):
        labels = manager.convert_logits_to_segmentation(answer).numpy()
        np.testing.assert_array_equal(labels, by_rule(logits))
        assert set(np.unique(labels)) == {0, 1, 2}


@torch.no_grad()
def test_without_background_regions_overlap() -> None:
    net = prior_network(unet_entry(3)).eval()
    for parameter in net.kernel_head.parameters():
        nn.init.normal_(parameter)  # else all tasks of a new network say nearly the same
    image = sample([[0]], [[True]], [0], size=(8, 8, 12)).image
    net.answer_for((4, 1), 2, background=False)
    regions = net(image)
    net.answer_for((4, 1), 2)
    torch.testing.assert_close(regions, net(image)[:, 1:], rtol=0, atol=0)
    manager = LabelManager({"background": 0, "whole": [1, 2], "core": 2}, [1, 2])
    labels = manager.convert_logits_to_segmentation(regions[0])
    expected = torch.zeros(8, 8, 12, dtype=labels.dtype)
    expected[regions[0, 0] > 0] = 1
    expected[regions[0, 1] > 0] = 2  # nnU-Net's order: later regions paint over
    assert labels.unique().tolist() == [0, 1, 2] and torch.equal(labels, expected)


def test_plain_images_need_a_dataset_to_answer_for() -> None:
    net, image = prior_network(unet_entry(3)), torch.zeros(1, 1, 8, 8, 8)
    sentence = r"^a universal model answers in the convention of one of its source datasets: predict with -d and -p of"
    with pytest.raises(MisfmError, match=sentence):
        net(image)
    net.answer_for([0])
    assert net(image).shape == (1, 2, 8, 8, 8)
    net.answer_for(None)
    with pytest.raises(MisfmError, match=sentence):
        net(image)


def test_whom_it_answers_for_is_no_weight() -> None:
    net = prior_network(unet_entry(3))
    keys = list(net.state_dict())
    net.answer_for([0, 1], 2)
    assert list(net.state_dict()) == keys
