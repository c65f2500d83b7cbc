"""What one universal model knows: its tasks and modalities, and how each source dataset's labels map to them.

Plans hold it as plain data under `misfm_universal`: the plans of the universal dataset, and those of every source,
which also say which source they answer for. So a model folder of nnU-Net, with its `plans.json`, is all that
prediction needs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from nnunetv2_misfm.errors import MisfmError

PLANS_KEY = "misfm_universal"


def dataset_number(name: str) -> int:
    """Returns the number in a dataset's full name: 4 of Dataset004_Hippocampus."""
    return int(name.removeprefix("Dataset")[:3])


@dataclass(frozen=True)
class Source:
    """A dataset of nnU-Net that a universal model learns and answers for.

    Attributes:
        dataset: Full name, e.g. Dataset004_Hippocampus.
        tasks: Global number of each of its foreground classes or regions, in nnU-Net's order of them.
        values: The values of its label maps that make up each of them, in the same order.
        modality: Number of its modality.
        has_regions: Whether nnU-Net trains it on regions, which may overlap; else on one class per voxel.
        ignore_label: Value of the voxels that nobody labelled, None where all are.
        mirror_axes: Axes of a preprocessed volume (0 to 2 for D, H, W) along which its classes may be mirrored.
        num_cases: Cases with labels.
    """

    dataset: str
    tasks: tuple[int, ...]
    values: tuple[tuple[int, ...], ...]
    modality: int
    has_regions: bool = False
    ignore_label: int | None = None
    mirror_axes: tuple[int, ...] = (0, 1, 2)
    num_cases: int = 0

    @property
    def prefix(self) -> str:
        """What precedes the names of this source's cases in the universal dataset: its number, as in `004_`."""
        return f"{dataset_number(self.dataset):03d}_"


@dataclass(frozen=True)
class Universe:
    """Tasks, modalities and sources of one universal model.

    Attributes:
        dataset: Full name of the universal dataset.
        tasks: Name of each task, by its global number.
        modalities: Name of each modality, by its number.
        sources: The joined datasets.
        source: Name of the dataset whose convention plans answer in; None in the universal dataset's own plans.
        extends: Name of the universal dataset whose tasks and modalities come first here, under the same numbers.
    """

    dataset: str
    tasks: tuple[str, ...]
    modalities: tuple[str, ...]
    sources: tuple[Source, ...]
    source: str | None = None
    extends: str | None = None

    @classmethod
    def from_plans(cls, plans: Mapping[str, Any]) -> "Universe":
        """Returns what plans say of a universal model.

        Raises:
            MisfmError: They say nothing, so they are not a universal dataset's nor one of its sources'.
        """
        if PLANS_KEY not in plans:
            raise MisfmError(
                f"expected plans of a universal dataset or of one of its sources, got {plans.get('plans_name')} of "
                f"{plans.get('dataset_name')}, which know of none: join datasets with nnUNetv2_misfm universal, and "
                "predict with -p and the name of the plans that it wrote for the dataset."
            )
        content = plans[PLANS_KEY]
        return cls(
            content["dataset"],
            tuple(content["tasks"]),
            tuple(content["modalities"]),
            tuple(
                Source(
                    **{
                        **source,
                        "tasks": tuple(source["tasks"]),
                        "values": tuple(tuple(values) for values in source["values"]),
                        "mirror_axes": tuple(source["mirror_axes"]),
                    }
                )
                for source in content["sources"]
            ),
            content["source"],
            content["extends"],
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns plain data for plans (`PLANS_KEY`)."""
        return asdict(self)

    def answering(self, dataset: str) -> "Universe":
        """Returns the same for the plans of one source."""
        return replace(self, source=dataset)

    def source_plans_name(self, plans_name: str) -> str:
        """Returns the name of the plans under which a source is preprocessed and predicted, e.g. nnUNetPlansOf950.

        Args:
            plans_name: Name of the universal dataset's plans.
        """
        return f"{plans_name}Of{dataset_number(self.dataset)}"

    @property
    def max_tasks(self) -> int:
        """The most tasks that a source has."""
        return max(len(source.tasks) for source in self.sources)

    @cached_property
    def _by_prefix(self) -> dict[str, Source]:
        return {source.prefix: source for source in self.sources}

    def source_of(self, case: str) -> Source:
        """Returns the source of a case of the universal dataset, by the case's name."""
        return self._by_prefix[case[:4]]

    def named(self, dataset: str) -> Source:
        """Returns the source of a name.

        Raises:
            MisfmError: There is none.
        """
        for source in self.sources:
            if source.dataset == dataset:
                return source
        known = ", ".join(source.dataset for source in self.sources)
        raise MisfmError(f"expected a source of {self.dataset} ({known}), got {dataset}.")
