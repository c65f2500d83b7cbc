"""Binary cross-entropy and Dice over the tasks that each sample's dataset labels, and the loss of the modality.

Paper: Gao et al. (Hermes), CVPR 2024, arXiv:2306.02416: every pair of a sample and a task of its dataset counts the
same; other datasets' tasks say nothing about a sample. The Dice here is nnU-Net's soft Dice, not the weighted Tversky
index of the published code.
"""

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from nnunetv2_misfm.architectures.context_prior import Answer
from nnunetv2_misfm.trainers.task_labels import TaskLabels

# nnU-Net's smoothing of the Dice (nnUNetTrainer._build_loss)
SMOOTH = 1e-5


class PartialLabelLoss(nn.Module):
    """Cross-entropy minus Dice, averaged over pairs of sample and present task, plus the modality's cross-entropy.

    Args:
        modality_weight: Weight of the latter.
        across_ranks: Whether the pairs of all ranks of a DDP run count the same (their numbers differ).
    """

    def __init__(self, modality_weight: float, *, across_ranks: bool = False) -> None:
        super().__init__()
        self.modality_weight, self.across_ranks = modality_weight, across_ranks

    def forward(self, answer: Answer, labels: TaskLabels) -> Tensor:
        """Returns the loss, a number from -1 up.

        Args:
            answer: Of the network: logits (B, T, D, H, W), modality (B, M).
            labels: The truth; voxels that nobody labelled are left out.
        """
        logits = answer.logits[labels.present].float().flatten(1)  # (P, voxels)
        masks = labels.masks[labels.present].flatten(1).float()
        labelled = labels.labelled[labels.present.nonzero()[:, 0]].flatten(1).float()
        entropy = functional.binary_cross_entropy_with_logits(logits, masks, reduction="none")
        entropy = (entropy * labelled).sum(1) / labelled.sum(1).clamp(min=1)
        loss = (entropy - soft_dice(logits.sigmoid(), masks, labelled)).sum() / self._num_pairs(labels.present)
        modality = functional.cross_entropy(answer.modality.float(), labels.modality)
        return loss + self.modality_weight * modality

    def _num_pairs(self, present: Tensor) -> Tensor:
        number = present.sum().float()
        if self.across_ranks:  # DDP takes the mean of the ranks' gradients
            dist.all_reduce(number)
            number /= dist.get_world_size()
        return number


def soft_dice(probabilities: Tensor, masks: Tensor, labelled: Tensor) -> Tensor:
    """Returns nnU-Net's soft Dice of each pair (P,), from three tensors (P, voxels)."""
    probabilities, masks = probabilities * labelled, masks * labelled
    common = (probabilities * masks).sum(1)
    return (2 * common + SMOOTH) / (probabilities.sum(1) + masks.sum(1) + SMOOTH)


@torch.no_grad()
def counts(answer: Answer, labels: TaskLabels, tasks: Tensor, num_tasks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns true positive, false positive and false negative voxels of each task, (num_tasks,) float64 each.

    Args:
        answer: Of the network.
        labels: The truth.
        tasks: int64 (B, T), the tasks' global numbers.
        num_tasks: Of the universe.
    """
    said = (answer.logits[labels.present] > 0).flatten(1)
    masks = labels.masks[labels.present].flatten(1)
    labelled = labels.labelled[labels.present.nonzero()[:, 0]].flatten(1)
    found = (said & masks, said & ~masks, ~said & masks)
    total = torch.zeros(3, num_tasks, dtype=torch.float64)
    for row, which in zip(total, found, strict=True):
        row.index_add_(0, tasks[labels.present].cpu(), (which & labelled).sum(1).double().cpu())
    return total[0], total[1], total[2]
