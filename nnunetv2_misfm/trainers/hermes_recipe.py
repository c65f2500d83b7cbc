"""The numbers of a universal training (Hermes)."""

from dataclasses import dataclass
from typing import ClassVar

from nnunetv2_misfm.trainers.recipe import MethodRecipe, require


@dataclass(frozen=True)
class HermesRecipe(MethodRecipe):
    """Numbers of a universal training.

    Attributes:
        modality_loss_weight: Of the modality's cross-entropy. The paper's: 0.01.
        balance: Datasets of n training cases are drawn in proportion to n ** balance. Ours: the square root.
        dataset_weights: Weights of the datasets in a draw instead, in the order in which they were joined.
        evaluate_every_epochs: Epochs between two evaluations of whole validation cases per dataset; 0 leaves them out.
            The authors': 25 of 200 epochs; ours, for nnU-Net's 1000: 50.
        evaluation_cases: Validation cases of each dataset that these look at. Ours.
    """

    method: ClassVar[str] = "hermes"
    modality_loss_weight: float = 0.01
    balance: float = 0.5
    dataset_weights: tuple[float, ...] | None = None
    evaluate_every_epochs: int = 50
    evaluation_cases: int = 5

    def __post_init__(self) -> None:
        for key in ("modality_loss_weight", "evaluate_every_epochs"):
            require(getattr(self, key) >= 0, f"hermes.{key}", "a number of at least 0", getattr(self, key))
        require(0 <= self.balance <= 1, "hermes.balance", "from 0 to 1", self.balance)
        require(self.evaluation_cases >= 1, "hermes.evaluation_cases", "at least 1", self.evaluation_cases)
        weights = self.dataset_weights
        require(weights is None or min(weights, default=0) > 0, "hermes.dataset_weights", "positive numbers", weights)
