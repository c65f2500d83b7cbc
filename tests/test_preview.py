import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.image import imread
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from toy import toy_case, toy_dataset_json, toy_plans

import nnunetv2_misfm.trainers.pretext_picture
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.preview import find_pretraining_trainer, preview
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.pretext_figure import Sample

PRETRAINING = [name for name in nnunetv2_misfm_trainers.__all__ if name.endswith("Pretrain")]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Sample]:
    """The samples of every picture, in place of which an empty one is written."""
    samples: list[Sample] = []

    def keep(given: list[Sample], method: str, caption: str, num_levels: int) -> Figure:
        samples.extend(given)
        return Figure()

    monkeypatch.setattr(nnunetv2_misfm.trainers.pretext_picture, "draw", keep)
    return samples


def named(sample: Sample) -> dict[str, np.ndarray]:
    """The volumes of a sample by the first lines of their titles."""
    return {column.title.split("\n")[0]: column.volume for column in sample.columns}


# Volume Fusion


def test_picture_is_written_and_shows_every_level(workspace: Workspace, tmp_path: Path) -> None:
    file = tmp_path / "new" / "picture"  # no ending: the name stays as it is
    assert preview("555", "quick", file, num_samples=1) == file
    assert file.read_bytes().startswith(b"\x89PNG")
    pixels = imread(file, format="png")[..., :3]
    assert min(pixels.shape[:2]) > 500
    for k in range(5):
        colour = np.array(colormaps["viridis"].resampled(5)(k)[:3])
        assert (np.abs(pixels - colour).max(-1) < 0.01).sum() > 1000, k
    grey = (np.ptp(pixels, axis=-1) < 0.01) & (pixels[..., 0] > 0.05) & (pixels[..., 0] < 0.95)
    assert grey.mean() > 0.2


def test_what_is_shown_is_the_task_on_the_preprocessed_cases(
    make_workspace: Callable[..., Workspace], tmp_path: Path, shown: list[Sample]
) -> None:
    make_workspace(num_cases=2, plans=toy_plans(patch_size=[20, 22, 20], spacing=[5.0, 1.0, 2.0]))
    preview("555", "quick", tmp_path / "picture.png", num_samples=3)
    preview("555", "quick", tmp_path / "picture.png", num_samples=1, seed=1)
    names, levels = [], []
    for one in shown:
        background, foreground, fused, label = (column.volume for column in one.columns)
        titles = [column.title.split("\n") for column in one.columns]
        assert [first for first, _ in titles] == ["background", "foreground", "fused", "levels"]
        assert [second for _, second in titles[2:]] == ["(input)", "(label)"]
        assert np.allclose(fused, background + (foreground - background) * label / 4, atol=1e-5)
        names.append([name for _, name in titles[:2]])
        for volume, name in zip((background, foreground), names[-1], strict=True):
            image, _ = toy_case(int(name[-1]), (20, 22, 20), 1)  # no geometry in its properties: ITK's default
            assert np.array_equal(volume, image[0, ::-1])
        assert one.spacing == (5.0, 1.0, 2.0)
        levels.append(label)
    assert len(shown) == 3 + 1 and set(levels[0].flat) > {0, 4}
    assert [foreground for _, foreground in names[1:3]] == [background for background, _ in names[:2]]
    assert not np.array_equal(levels[3], levels[0])


def test_legend_says_what_a_level_means(workspace: Workspace) -> None:
    trainer = find_pretraining_trainer("nnUNetTrainerVFPretrain")
    _, recipe = trainer.read_recipes(PlansManager(workspace.plans()).get_configuration("quick"))
    assert "k/4 foreground, the rest background" in trainer.preview_caption(recipe)


def test_seed_makes_the_picture(workspace: Workspace, tmp_path: Path) -> None:
    files = [preview("555", "quick", tmp_path / str(i), num_samples=1, seed=s) for i, s in enumerate((3, 3, 4))]
    first, again, other = (f.read_bytes() for f in files)
    assert first == again != other


def test_recipe_and_several_channels_and_samples_act(make_workspace: Callable[..., Workspace], tmp_path: Path) -> None:
    plans = toy_plans({"volume_fusion": {"num_levels": 1, "num_boxes": [0, 0]}}, spacing=[5.0, 1.0, 1.0])
    make_workspace(plans=plans, dataset_json=toy_dataset_json(num_channels=3), num_cases=2)
    made = [preview("555", "quick", tmp_path / f"{n}.png", num_samples=n) for n in (1, 2)]
    heights = [imread(file).shape[0] for file in made]
    assert heights[1] > 1.8 * heights[0]
    pixels = imread(made[0])[..., :3]
    yellow = (np.abs(pixels - [0.993, 0.906, 0.144]).max(-1) < 0.02).mean(1)  # the highest level
    assert yellow.max() > 0.4 and (yellow[: int(0.8 * len(yellow))] == 0).all()  # in the legend alone: no box was drawn


# Every method


@pytest.mark.parametrize("name", PRETRAINING)
def test_columns_of_every_pretraining_trainer(
    workspace: Workspace, tmp_path: Path, shown: list[Sample], name: str
) -> None:
    for _ in range(2):
        preview("555", "quick", tmp_path / "picture", num_samples=1, seed=5, trainer=name)
    for column, again in zip(shown[0].columns, shown[1].columns, strict=True):
        assert np.array_equal(column.volume, again.volume, equal_nan=True)
    titles = list(named(shown[0]))
    if "VF" in name:
        assert titles == ["background", "foreground", "fused", "levels"]
    elif "MIM" in name:
        assert titles == ["volume", "input", "target"]
    else:
        assert titles == ["volume (target)", "input"]
    assert shown[0].columns[0].title.split("\n")[1].startswith("case_")


def test_target_of_masking_is_what_the_input_lacks(workspace: Workspace, tmp_path: Path, shown: list[Sample]) -> None:
    workspace.plans({"masked_image_modelling": {"block_size": [4, 4, 4]}})
    preview("555", "quick", tmp_path / "picture.png", trainer="nnUNetTrainerMIMPretrain")
    for one in map(named, shown):
        asked = ~np.isnan(one["target"])
        assert asked.mean() == 0.75
        assert np.array_equal(one["target"][asked], one["volume"][asked]) and not one["input"][asked].any()
        assert np.array_equal(one["input"][~asked], one["volume"][~asked])


def test_the_first_of_several_channels_is_shown(
    make_workspace: Callable[..., Workspace], tmp_path: Path, shown: list[Sample]
) -> None:
    make_workspace(dataset_json=toy_dataset_json(num_channels=2), plans=toy_plans(patch_size=[20, 22, 20]))
    preview("555", "quick", tmp_path / "picture.png", trainer="nnUNetTrainerPatchSwappingPretrain")
    for one in shown:
        image, _ = toy_case(int(one.columns[0].title[-1]), (20, 22, 20), 2)
        volume, swapped = named(one).values()
        assert np.array_equal(volume, image[0, ::-1])
        assert not np.array_equal(swapped, volume) and np.array_equal(np.sort(swapped, None), np.sort(volume, None))


OWN_TRAINERS = """
from nnunetv2_misfm.trainers.patch_swapping import PatchSwappingRecipe
from nnunetv2_misfm.trainers.pretext import PretextTrainer

class nnUNetTrainerOwnLevels(PretextTrainer):
    method = PatchSwappingRecipe
    make_task = staticmethod(lambda volumes, recipe, generator=None: (volumes + 1, (volumes[:, :1] > 0).long()))
    num_task_classes = num_outputs = classmethod(lambda cls, *given: 2)

class nnUNetTrainerOwnRestoration(PretextTrainer):
    method = PatchSwappingRecipe
    make_task = staticmethod(lambda volumes, recipe, generator=None: (volumes + 1, -volumes))
    num_outputs = classmethod(lambda cls, recipe, channels: channels)
"""


def test_a_users_own_methods_are_drawn(
    workspace: Workspace, tmp_path: Path, shown: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "methods.py").write_text(OWN_TRAINERS)
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "own"))
    for name in ("nnUNetTrainerOwnLevels", "nnUNetTrainerOwnRestoration"):
        preview("555", "quick", tmp_path / f"{name}.png", num_samples=1, trainer=name)
    levels, restoration = map(named, shown)
    assert np.array_equal(levels["levels"], levels["volume"] > 0) and shown[0].columns[2].has_levels
    assert np.array_equal(levels["input"], levels["volume"] + 1)
    assert np.array_equal(restoration["target"], -restoration["volume"])


# A trained network's answer


def write_checkpoint_of(workspace: Workspace, name: str) -> Any:
    """Saves a network whose BatchNorm knows other numbers than a batch's and returns its trainer."""
    trainer = workspace.trainer(getattr(nnunetv2_misfm_trainers, name), fold="all")
    trainer.initialize()
    trainer.data_fingerprint = {}
    trainer.network(3 * torch.randn(2, 1, 16, 16, 16) + 1)  # in training mode
    trainer.save_checkpoint(str(workspace.root / "trained.pth"))
    trainer.network.eval()
    return trainer


def answer_to(trainer: Any, shown_input: np.ndarray) -> np.ndarray:
    """The finest head's answer [C, D, H, W] to an input as viewed, as viewed."""
    with torch.no_grad():
        heads = trainer.network(torch.from_numpy(shown_input[::-1].copy())[None, None])
    return heads[0][0].numpy()[:, ::-1]


def test_predicted_levels_are_the_networks_likeliest(workspace: Workspace, tmp_path: Path, shown: list[Sample]) -> None:
    trainer = write_checkpoint_of(workspace, "nnUNetTrainerVFPretrain")
    preview("555", "quick", tmp_path / "picture.png", num_samples=3, checkpoint=workspace.root / "trained.pth")
    preview("555", "quick", tmp_path / "plain.png", num_samples=3)
    for one, without in zip(map(named, shown[:3]), map(named, shown[3:]), strict=True):
        predicted = one.pop("predicted levels")
        assert np.array_equal(predicted, answer_to(trainer, one["fused"]).argmax(0)) and np.ptp(predicted) > 0
        assert all(np.array_equal(one[key], without[key]) for key in without) and one.keys() == without.keys()


@pytest.mark.parametrize("name", ["nnUNetTrainerMIMPretrain", "nnUNetTrainerPCTNetModelsGenesisPretrain"])
def test_restoration_is_the_networks_answer_where_it_is_asked(
    workspace: Workspace, tmp_path: Path, shown: list[Sample], name: str
) -> None:
    trainer = write_checkpoint_of(workspace, name)
    file = workspace.root / "trained.pth"
    preview("555", "quick", tmp_path / "picture.png", trainer=name, checkpoint=file)
    for one in map(named, shown):
        *_, target = (volume for title, volume in one.items() if "target" in title)
        expected = np.where(np.isnan(target), np.nan, answer_to(trainer, one["input"])[0])
        assert np.allclose(one["restoration"], expected, atol=1e-5, equal_nan=True)


def test_checkpoint_of_another_network_or_no_checkpoint_is_refused(workspace: Workspace, tmp_path: Path) -> None:
    write_checkpoint_of(workspace, "nnUNetTrainerPCTNetVFPretrain")
    (tmp_path / "cut.pth").write_bytes((workspace.root / "trained.pth").read_bytes()[:1000])
    workspace.plans({"features_per_stage": [4, 4, 8, 16, 64]})
    for trainer, file, sentence in (
        ("VF", "trained.pth", "expected a checkpoint of nnUNetTrainerVFPretrain, got one of nnUNetTrainerPCTNetVFPre"),
        ("PCTNetVF", "trained.pth", r"configuration quick, got those of another network \(\d+ tensors differ, first "),
        ("PCTNetVF", "cut.pth", "is truncated or no PyTorch checkpoint"),
        ("PCTNetVF", "none.pth", "expected a checkpoint file at .*none.pth, found none"),
    ):
        arguments = {"trainer": f"nnUNetTrainer{trainer}Pretrain", "checkpoint": tmp_path / file}
        with pytest.raises(MisfmError, match=sentence):
            preview("555", "quick", tmp_path / "picture.png", **arguments)
    assert not (tmp_path / "picture.png").exists()


# Faults


@pytest.mark.parametrize("name", ["nnUNetTrainerVF", "nnUNetTrainer", "VFPretrain"])
def test_a_name_that_does_not_pretrain_gets_the_list(workspace: Workspace, tmp_path: Path, name: str) -> None:
    with pytest.raises(MisfmError, match=f"expected the name of a pretraining trainer, got '{name}'") as caught:
        preview("555", "quick", tmp_path / "picture.png", trainer=name)
    assert f"name one of {', '.join(PRETRAINING)}, or one of your own" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"configuration": "3d_lowres"}, "expected one of the configurations 3d_fullres, quick of .*, got '3d_lowres'"),
        ({"dataset": "556"}, "expected the number or name of a dataset, got '556'"),
        ({"plans": "other"}, "expected plans at .*other.json, found none"),
        ({"num_samples": 0}, "expected at least 1 sample to show, got 0"),
        ({"output": "a_file/picture.png"}, "a_file/picture.png could not be written .*: choose another file"),
    ],
)
def test_faulty_argument_gets_a_sentence(workspace: Workspace, tmp_path: Path, arguments: dict, sentence: str) -> None:
    (tmp_path / "a_file").write_text("")
    output = tmp_path / arguments.pop("output", "picture.png")
    with pytest.raises(MisfmError, match=sentence):
        preview(**{"dataset": "555", "configuration": "quick", "output": output, **arguments})
    assert not output.exists()


def test_unpreprocessed_dataset_gets_the_command(workspace: Workspace, tmp_path: Path) -> None:
    folder = workspace.base / "nnUNetPlans_3d_fullres"
    for file in folder.iterdir():
        file.unlink()
    sentence = f"expected preprocessed cases in {folder}, found none: run nnUNetv2_preprocess -d Dataset555_Toy"
    for _ in range(2):  # an empty folder, then none
        with pytest.raises(MisfmError, match=sentence):
            preview("555", "quick", tmp_path / "picture.png")
        if folder.exists():
            folder.rmdir()


def test_one_case_cannot_be_fused(make_workspace: Callable[..., Workspace], tmp_path: Path) -> None:
    make_workspace(num_cases=1)
    with pytest.raises(MisfmError, match="expected at least two cases in .*nnUNetPlans_3d_fullres, got 1; add scans"):
        preview("555", "quick", tmp_path / "picture.png")


def test_2d_and_faulty_blocks_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    workspace.plans(patch_size=[16, 16])
    with pytest.raises(NotImplementedError, match="expected a 3D configuration, got one with the 2D patch"):
        preview("555", "quick", tmp_path / "picture.png")
    plans = workspace.plans()
    plans["configurations"]["quick"]["misfm"] = {"volume_fusion": {"levels": 4}}
    (workspace.base / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(MisfmError, match="unknown key 'volume_fusion.levels'"):
        preview("555", "quick", tmp_path / "picture.png")
