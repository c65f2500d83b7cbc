import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.logging.nnunet_logger import MetaLogger
from torch import Tensor
from toy_universe import (
    BRAIN,
    INTENSITIES,
    TRUNK,
    TUMOUR,
    source_json,
    source_plans,
    toy_universe,
    universal_trainer,
    with_audible_priors,
    write_toy_universe,
)

from nnunetv2_misfm.architectures.context_prior import Context, Sample
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import discovery_folder
from nnunetv2_misfm.trainers.source_models import inference_axes, read_source_files, write_source_models
from nnunetv2_misfm.weights.checkpoint import tensors_sha256

SOURCES = [BRAIN, TRUNK, TUMOUR]
FINAL, BEST = "checkpoint_final.pth", "checkpoint_best.pth"


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A universal training that has ended, its folders in place; its final weights know their priors apart."""
    root = tmp_path_factory.mktemp("universe")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        for name, value in {"n_proc_DA": "0", "compile": "f", "extTrainer": str(discovery_folder())}.items():
            patch.setenv(f"nnUNet_{name}", value)
        patch.delenv("nnUNet_misfm_weights", raising=False)
        patch.setattr(MetaLogger, "plot_progress_png", lambda _, folder: Path(folder, "progress.png").write_text("pic"))
        write_toy_universe(root / "preprocessed")
        (root / "preprocessed" / TRUNK / "dataset_fingerprint.json").write_text('{"of": "trunk"}')
        trainer = universal_trainer(Workspace(root))
        trainer.run_training()
        with_audible_priors(trainer.bare_network).eval()
        trainer.current_epoch -= 1  # as nnU-Net does for the final one
        trainer.save_checkpoint(str(Path(trainer.output_folder) / FINAL))
        yield trainer


def model_folder(trainer: Any, dataset: str) -> Path:
    results = Path(trainer.output_folder).parents[2]
    return results / dataset / "nnUNetTrainerHermes__nnUNetPlansOf950__quick"


def checkpoint(trainer: Any, dataset: str, name: str = FINAL) -> dict[str, Any]:
    return torch.load(model_folder(trainer, dataset) / "fold_0" / name, weights_only=True)


def predictor_of(trainer: Any, dataset: str, use_mirroring: bool = False) -> nnUNetPredictor:
    predictor = nnUNetPredictor(
        use_gaussian=False, use_mirroring=use_mirroring, perform_everything_on_device=False, device=torch.device("cpu"),
        allow_tqdm=False,
    )  # fmt: skip
    predictor.initialize_from_trained_model_folder(str(model_folder(trainer, dataset)), (0,), FINAL)
    return predictor


def window() -> Tensor:
    """An image of one patch."""
    return 3 * torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def direct_answer(trainer: Any, image: Tensor, tasks: list[int], modality: int) -> Tensor:
    """What the trained network says when asked for tasks by their global numbers."""
    context = Context(torch.tensor([tasks]), torch.ones(1, len(tasks), dtype=torch.bool), torch.tensor([modality]))
    return trainer.bare_network(Sample(image[None], context)).logits[0]


ASKED = {BRAIN: ([0, 1], 0), TRUNK: ([2, 0], 1), TUMOUR: ([3, 4], 0)}


# ---------------------------------------------------------------------- what is written


@pytest.mark.parametrize("name", [FINAL, BEST])
def test_every_model_folder_holds_the_weights_of_the_universal_run(trainer: Any, name: str) -> None:
    trained = torch.load(Path(trainer.output_folder) / name, weights_only=True)["network_weights"]
    for dataset in SOURCES:
        given = checkpoint(trainer, dataset, name)
        assert list(given["network_weights"]) == list(trained)
        assert all(torch.equal(given["network_weights"][key], tensor) for key, tensor in trained.items())
        assert given["misfm_meta"]["weights_sha256"] == tensors_sha256(trained)
        assert given["misfm_meta"]["source_of"] == "Dataset950_Toy"


@pytest.mark.parametrize("dataset", SOURCES)
def test_plans_and_dataset_json_are_the_sources_own_with_the_trained_configuration(trainer: Any, dataset: str) -> None:
    folder = model_folder(trainer, dataset)
    plans = json.loads((folder / "plans.json").read_text())
    expected = json.loads(json.dumps(source_plans(dataset)))
    quick = trainer.plans_manager.plans["configurations"]["quick"]
    assert plans == {**expected, "configurations": {**expected["configurations"], "quick": quick}}
    assert plans["misfm_universal"]["source"] == dataset
    assert json.loads((folder / "dataset.json").read_text()) == source_json(dataset)
    arguments = checkpoint(trainer, dataset)["init_args"]
    assert json.loads(json.dumps(arguments["plans"])) == plans and arguments["dataset_json"] == source_json(dataset)
    assert (arguments["configuration"], arguments["fold"]) == ("quick", 0)


def test_prediction_mirrors_where_the_sources_classes_allow_it(trainer: Any) -> None:
    axes = {dataset: checkpoint(trainer, dataset)["inference_allowed_mirroring_axes"] for dataset in SOURCES}
    assert axes == {BRAIN: (0, 1, 2), TRUNK: (0, 1), TUMOUR: None}
    assert inference_axes(replace(toy_universe().sources[0], mirror_axes=())) is None


@pytest.mark.parametrize("name", [FINAL, BEST])
def test_a_checkpoint_is_small_and_holds_nothing_to_train_on(trainer: Any, name: str) -> None:
    for dataset in SOURCES:
        given = checkpoint(trainer, dataset, name)
        assert set(given) == {
            "network_weights", "trainer_name", "init_args", "current_epoch", "inference_allowed_mirroring_axes",
            "misfm_meta",
        }  # fmt: skip
        assert given["trainer_name"] == "nnUNetTrainerHermes" and given["current_epoch"] == 1


def test_fingerprint_and_progress_lie_beside(trainer: Any) -> None:
    for dataset in SOURCES:
        assert (model_folder(trainer, dataset) / "fold_0" / "progress.png").read_text() == "pic"
    fingerprints = [(model_folder(trainer, d) / "dataset_fingerprint.json").read_text() for d in SOURCES]
    assert fingerprints == ["{}", '{"of": "trunk"}', "{}"]


def test_checkpoints_that_are_not_there_are_passed_over(trainer: Any, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    write_source_models(trainer, ("checkpoint_of_no_run.pth", BEST))
    files = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*.pth"))
    assert files == [f"{d}/nnUNetTrainerHermes__nnUNetPlansOf950__quick/fold_0/{BEST}" for d in SOURCES]


@pytest.mark.parametrize("missing", ["nnUNetPlansOf950.json", "dataset.json"])
def test_a_source_whose_files_are_gone_is_named(trainer: Any, missing: str) -> None:
    file = Path(trainer.preprocessed_dataset_folder_base).with_name(TRUNK) / missing
    aside = file.rename(file.with_suffix(".aside"))
    try:
        with pytest.raises(MisfmError) as caught:
            read_source_files(trainer.universe, trainer.plans_manager.plans)
    finally:
        aside.rename(file)
    assert str(caught.value) == (
        f"expected {file} of a source of Dataset950_Toy, found none: run nnUNetv2_misfm universal again."
    )


# ---------------------------------------------------------------------- what nnU-Net predicts with it


@pytest.mark.parametrize(("dataset", "num_heads"), [(BRAIN, 3), (TRUNK, 3), (TUMOUR, 2)])
def test_nnunets_predictor_answers_with_the_heads_of_the_source(trainer: Any, dataset: str, num_heads: int) -> None:
    predictor, image = predictor_of(trainer, dataset), window()
    logits = predictor.predict_logits_from_preprocessed_data(image).float()
    expected = direct_answer(trainer, image, *ASKED[dataset])
    assert predictor.label_manager.num_segmentation_heads == len(logits) == num_heads
    assert expected.std((1, 2, 3)).min() > 0.05  # else nothing would be compared
    torch.testing.assert_close(logits[-2:], expected, atol=2e-2, rtol=1e-2)  # nnU-Net adds windows up in float16
    assert num_heads == 2 or not logits[0].any()


def test_mirrored_prediction_is_the_mean_over_the_sources_axes(trainer: Any) -> None:
    image = window()
    logits = predictor_of(trainer, TRUNK, use_mirroring=True).predict_logits_from_preprocessed_data(image)
    flips = [axes for n in range(3) for axes in itertools.combinations((1, 2), n)]
    assert len(flips) == 4
    mean = sum(direct_answer(trainer, image.flip(axes), *ASKED[TRUNK]).flip(axes) for axes in flips) / 4
    torch.testing.assert_close(logits[1:].float(), mean, atol=2e-2, rtol=1e-2)


def test_two_sources_differ_in_convention_alone(trainer: Any) -> None:
    brain, trunk = predictor_of(trainer, BRAIN), predictor_of(trainer, TRUNK)
    image = window()[None]
    networks: list[Any] = [brain.network.eval(), trunk.network.eval()]
    for network, predictor in zip(networks, (brain, trunk), strict=True):
        network.load_state_dict(predictor.list_of_parameters[0])
    with torch.no_grad():
        before = [network(image) for network in networks]
        assert not torch.equal(*before)
        networks[0].answer_for(*ASKED[TRUNK])
        networks[1].answer_for(*ASKED[BRAIN])
        assert [torch.equal(n(image), other) for n, other in zip(networks, reversed(before), strict=True)] == [True] * 2


def test_a_plain_image_is_answered_in_the_sources_values_after_its_own_normalisation(trainer: Any) -> None:
    image = 30 * window().numpy()
    found = predictor_of(trainer, TRUNK).predict_single_npy_array(image, {"spacing": [1.0, 1.0, 1.0]})
    clipped = np.clip(image, INTENSITIES["percentile_00_5"], INTENSITIES["percentile_99_5"])
    normalised = torch.from_numpy((clipped - INTENSITIES["mean"]) / INTENSITIES["std"]).float()
    kidney, organ = direct_answer(trainer, normalised, *ASKED[TRUNK]).numpy()
    expected = np.where((kidney > 0) | (organ > 0), np.where(kidney > organ, 1, 2), 0)
    assert len(np.unique(expected)) > 1 and (found == expected).mean() > 0.99  # ties within float16


def test_regions_are_answered_one_by_one_in_the_order_of_the_dataset(trainer: Any) -> None:
    image = window()
    found = predictor_of(trainer, TUMOUR).predict_single_npy_array(image.numpy(), {"spacing": [1.0, 1.0, 1.0]})
    normalised = (image - image.mean()) / image.std(unbiased=False)
    whole, core = direct_answer(trainer, normalised, *ASKED[TUMOUR]).numpy()
    expected = np.where(core > 0, 2, np.where(whole > 0, 1, 0))
    assert len(np.unique(expected)) > 1 and (found == expected).mean() > 0.99
