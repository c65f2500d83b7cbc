"""What a checkpoint of this package says of itself: the plain data under its key `misfm_meta`, and to nnU-Net."""

import hashlib
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nnunetv2_misfm.weights.checkpoint import plain
from nnunetv2_misfm.weights.nnssl import ADAPTATION_PLAN, adaptation_plan, states_its_layout

if TYPE_CHECKING:
    from nnunetv2_misfm.trainers.base import MisfmTrainer

_RECORDED_PACKAGES = (
    "nnunetv2-misfm",
    "nnunetv2",
    "torch",
    "batchgeneratorsv2",
    "dynamic-network-architectures",
)


def data_fingerprint(trainer: "MisfmTrainer") -> dict[str, Any]:
    """Returns dataset, number of training cases, and a SHA-256 over their names and nnU-Net's dataset fingerprint."""
    cases = sorted(trainer.do_split()[0])
    digest = hashlib.sha256("\n".join(cases).encode())
    digest.update((Path(trainer.preprocessed_dataset_folder_base) / "dataset_fingerprint.json").read_bytes())
    return {
        "dataset": trainer.plans_manager.dataset_name,
        "num_training_cases": len(cases),
        "sha256": digest.hexdigest(),
    }


def added_keys(trainer: "MisfmTrainer") -> dict[str, Any]:
    """Returns what a checkpoint holds beside nnU-Net's keys: `misfm_meta`, and what nnU-Net's fine-tuning reads.

    The latter, an nnssl adaptation plan and `citations` in the form that nnU-Net prints, only for pretrained networks
    that say where their parts lie: nnU-Net's own.
    """
    added = {"misfm_meta": checkpoint_metadata(trainer)}
    if trainer.method is None or not states_its_layout(trainer.bare_network):
        return added
    plan = adaptation_plan(
        trainer.bare_network,
        trainer.network_description(trainer.plans_manager, trainer.configuration_manager),
        trainer.plans_manager.plans,
        trainer.configuration_name,
        trainer.configuration_manager.configuration,
        trainer.num_input_channels,
    )
    papers = {"type": "Pretraining", "name": trainer.method.method, "apa_citations": list(trainer.citations)}
    return {**added, ADAPTATION_PLAN: plan, "citations": [papers]}


def checkpoint_metadata(trainer: "MisfmTrainer") -> dict[str, Any]:
    """Returns `misfm_meta`: method, recipe, network (enough to rebuild it), data, versions, citations.

    `network.label_channels` of the input channels, the last ones, hold labels of a cascade's previous stage.
    `network.kwargs` together with `input_channels`, `num_classes` and `deep_supervision` are the arguments of
    `network.class`; the values listed in `network.kwargs_to_import` are dotted paths themselves.
    """
    description = trainer.network_description(trainer.plans_manager, trainer.configuration_manager)
    recipe = asdict(trainer.recipe)
    if trainer.method is not None and trainer.method_recipe is not None:
        recipe[trainer.method.method] = asdict(trainer.method_recipe)
    return plain(
        {
            "method": trainer.method.method if trainer.method else "supervised",
            "recipe": recipe,
            "network": {
                **description,
                "input_channels": trainer.num_input_channels,
                "label_channels": trainer.num_label_channels,
                "num_classes": trainer.num_network_outputs,
            },
            "patch_size": list(trainer.configuration_manager.patch_size),
            "batch_size": trainer.configuration_manager.batch_size,
            "data": trainer.data_fingerprint,
            "pretrained_weights": trainer.weights_report,
            "versions": {name: version(name) for name in _RECORDED_PACKAGES},
            "citations": list(trainer.citations),
        }
    )
