import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import discovery_folder
from nnunetv2_misfm.trainers.monai_networks import nnUNetTrainerSwinUNETR, nnUNetTrainerUNETR

NARROW: dict[type, dict[str, int]] = {
    nnUNetTrainerSwinUNETR: {"feature_size": 12},
    nnUNetTrainerUNETR: {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 2},
}
BOTH = pytest.mark.parametrize("kind", list(NARROW))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("monai")
    for kind, arguments in NARROW.items():
        monkeypatch.setattr(kind, "network_arguments", arguments)


@BOTH
@pytest.mark.usefixtures("narrow")
def test_one_epoch_moves_every_weight_and_the_checkpoint_rebuilds(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    monkeypatch.setenv("nnUNet_extTrainer", str(discovery_folder()))  # by which nnU-Net's predictor finds the trainer
    trainer = workspace.trainer(kind, patch_size=[12, 16, 14])
    trainer.initialize()
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters() if name.endswith("weight")}
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("val_losses", 0))
    after = dict(trainer.network.named_parameters())
    assert not [name for name, p in before.items() if torch.equal(p, after[name])]

    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_final.pth", weights_only=True)
    meta = checkpoint["misfm_meta"]["network"]
    rebuilt = get_network_from_plans(
        meta["class"], meta["kwargs"], meta["kwargs_to_import"], meta["input_channels"], meta["num_classes"],
        deep_supervision=False,
    )  # fmt: skip
    rebuilt.load_state_dict(checkpoint["network_weights"])

    predictor = nnUNetPredictor(device=torch.device("cpu"), use_mirroring=False)
    predictor.initialize_from_trained_model_folder(str(Path(trainer.output_folder).parent), (0,))
    image = torch.randn(1, 12, 20, 14)  # two patches along the second axis
    logits = predictor.predict_logits_from_preprocessed_data(image)
    assert logits.shape == (3, 12, 20, 14) and torch.isfinite(logits).all()


@BOTH
def test_recipe_is_that_of_monais_examples(workspace: Workspace, kind: type) -> None:
    recipe = workspace.trainer(kind).recipe
    assert (recipe.optimizer, recipe.initial_lr, recipe.weight_decay) == ("adamw", 1e-4, 1e-5)
    assert (recipe.lr_schedule, recipe.augmentation) == ("poly", "nnunet")


def test_widths_of_other_networks_are_left_alone(workspace: Workspace) -> None:
    block = {"features_per_stage": [4, 4, 8, 16, 32], "num_heads": [1, 1, 1], "attention_dropout": 0.5}
    for kind, expected in (
        (nnUNetTrainerSwinUNETR, {"feature_size": 48}),
        (
            nnUNetTrainerUNETR,
            {"feature_size": 16, "hidden_size": 768, "mlp_dim": 3072, "num_heads": 12, "patch_size": [16, 16, 16]},
        ),
    ):
        trainer = workspace.trainer(kind, block)
        assert trainer.network_description(trainer.plans_manager, trainer.configuration_manager)["kwargs"] == expected
        recipe = trainer.recipe
        assert (recipe.features_per_stage, recipe.num_heads, recipe.attention_dropout) == (None, None, None)
    assert "patch_size" not in nnUNetTrainerUNETR.network_arguments


def test_swin_unetr_has_the_published_width(workspace: Workspace) -> None:
    pytest.importorskip("monai")
    trainer = workspace.trainer(nnUNetTrainerSwinUNETR)
    network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 14)
    # "Swin UNETR/Base" of MONAI's example for BTCV has 62.1 million parameters for one channel and 14 classes
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(62.1e6, abs=0.1e6)


def test_unetr_has_the_transformer_of_vit_b_for_the_patch(workspace: Workspace) -> None:
    pytest.importorskip("monai")
    trainer = workspace.trainer(nnUNetTrainerUNETR, patch_size=[96, 90, 81])
    with torch.device("meta"):
        network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 14)
    attention = 768 * 3 * 768 + 768 * 768 + 768  # queries, keys and values without bias, projection
    mlp = 768 * 3072 + 3072 + 3072 * 768 + 768
    tokens = 16**3 * 768 + 768 + 6**3 * 768  # patch embedding, position embedding of 96^3
    expected = tokens + 12 * (attention + mlp + 2 * 2 * 768) + 2 * 768
    assert sum(p.numel() for p in network.network.vit.parameters()) == expected


@BOTH
@pytest.mark.usefixtures("narrow")
def test_one_output_whatever_is_asked(workspace: Workspace, kind: type) -> None:
    trainer = workspace.trainer(kind)
    network = trainer.build_network_architecture(trainer.plans_manager, trainer.configuration_manager, 1, 3, True)
    assert isinstance(network.eval()(torch.zeros(1, 1, 16, 16, 16)), torch.Tensor)
    assert trainer.enable_deep_supervision is False and trainer._get_deep_supervision_scales() is None


@BOTH
def test_2d_is_refused_at_once(workspace: Workspace, kind: type) -> None:
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} expected a 3D configuration"):
        workspace.trainer(kind, patch_size=[16, 16])
    assert not workspace.results.exists()


@BOTH
def test_papers_are_cited(kind: Any) -> None:
    paper = {nnUNetTrainerSwinUNETR: "2201.01266", nnUNetTrainerUNETR: "2103.10504"}[kind]
    assert len(kind.citations) == 2 and "nnU-Net" in kind.citations[0] and paper in kind.citations[1]


@BOTH
def test_without_monai_the_run_ends_with_a_sentence(
    workspace: Workspace, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("monai", "monai.networks", "monai.networks.nets"):
        monkeypatch.setitem(sys.modules, module, None)
    trainer = workspace.trainer(kind)
    with pytest.raises(MisfmError, match=r"pip install 'nnunetv2-misfm\[monai\]'"):
        trainer.run_training()


def test_the_search_of_nnunet_works_without_monai() -> None:
    """A fresh process, since here MONAI may have been imported already."""
    code = (
        "import sys, json; sys.modules['monai'] = None; sys.path.insert(0, sys.argv[1])\n"
        "import nnunetv2_misfm_trainers as found\n"
        "import nnunetv2_misfm.planning.configure\n"
        "print(json.dumps(found.__all__))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(discovery_folder())], capture_output=True, text=True, check=True
    )
    assert {"nnUNetTrainerSwinUNETR", "nnUNetTrainerUNETR"} <= set(json.loads(ended.stdout.splitlines()[-1]))
