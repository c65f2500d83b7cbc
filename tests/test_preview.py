import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import Workspace
from matplotlib import colormaps
from matplotlib.image import imread
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from toy import toy_case, toy_dataset_json, toy_plans

import nnunetv2_misfm.preview
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.preview import Sample, as_viewed, axis_directions, draw, preview

ORIENTATIONS = [
    a + b + c
    for a in "LRPASI" for b in "LRPASI" for c in "LRPASI"
    if len({"LR".find(e) >= 0 and "x" or "PA".find(e) >= 0 and "y" or "z" for e in (a, b, c)}) == 3
]  # fmt: skip


def numbered(shape: tuple[int, ...] = (3, 4, 5)) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape)


# Orientation


def test_every_orientation_is_turned_as_simpleitk_turns_it() -> None:
    assert len(ORIENTATIONS) == 48
    image = sitk.GetImageFromArray(numbered())
    wanted = sitk.GetArrayFromImage(image)[::-1]  # ITK's own runs to L, P and S: the radiologist's begins at the top
    for orientation in ORIENTATIONS:
        turned = sitk.DICOMOrient(image, orientation)
        axes = axis_directions({"sitk_stuff": {"direction": turned.GetDirection()}}, [0, 1, 2])
        assert axes == orientation[::-1]  # array axes are z, y, x
        assert np.array_equal(as_viewed(sitk.GetArrayFromImage(turned), axes), wanted)


def test_nibabels_affine_means_the_same() -> None:
    image = nibabel.Nifti1Image(numbered().astype(np.int16), np.diag([-2.0, 1.0, -3.0, 1.0]))
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt("LPI"))
    wanted = np.asanyarray(image.as_reoriented(turn).dataobj).T
    stuff = {"original_affine": image.affine}
    axes = axis_directions({"nibabel_stuff": stuff}, [0, 1, 2])
    assert axes == "IAL"
    assert np.array_equal(as_viewed(np.asanyarray(image.dataobj).T, axes), wanted)
    stuff["reoriented_affine"] = np.eye(4)  # nnU-Net's other reader turns the array to R, A, S
    assert axis_directions({"nibabel_stuff": stuff}, [0, 1, 2]) == "SAR"


def test_nnunets_order_of_the_axes_is_followed() -> None:
    properties = {"sitk_stuff": {"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}}
    assert axis_directions(properties, [0, 1, 2]) == "SAR"
    assert axis_directions(properties, [2, 0, 1]) == "RSA"
    volume = numbered()
    expected = as_viewed(volume, "SAR")
    assert np.array_equal(as_viewed(volume.transpose(2, 0, 1), "RSA"), expected)


def test_oblique_volumes_take_the_nearest_ends_and_unclear_ones_itks_default() -> None:
    c, s = np.cos(0.3), np.sin(0.3)
    direction = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    assert axis_directions({"sitk_stuff": {"direction": direction.ravel()}}, [0, 1, 2]) == "SPL"
    unclear = np.array([[0.8, 0.7, 0], [0.6, 0.3, 0.7], [0, 0.6, 0.7]])  # two axes run mostly to the left
    assert axis_directions({"sitk_stuff": {"direction": unclear.ravel()}}, [0, 1, 2]) == "SPL"
    assert axis_directions({}, [1, 2, 0]) == "PLS"


# The figure


def sample(shape: tuple[int, ...] = (3, 5, 4), spacing: tuple[float, ...] = (4.0, 1.0, 2.0)) -> Sample:
    background = numbered(shape).astype(np.float32)
    levels = (numbered(shape) % 5).astype(np.int16)
    return Sample(background, background + 100, background + 50, levels, ("one", "two"), spacing)


def test_panels_show_the_middle_slices_of_the_three_planes_at_true_proportions() -> None:
    shown = sample()
    (part, _) = draw([shown], 4).subfigs
    panels = np.array(part.axes).reshape(3, 4)
    for column, volume in enumerate((shown.background, shown.foreground, shown.fused, shown.levels)):
        for row, middle in enumerate((volume[1], volume[:, 2], volume[:, :, 2])):
            (image,) = panels[row, column].images
            assert np.array_equal(image.get_array(), middle)
            assert image.origin == "upper"
    assert [panel.get_aspect() for panel in panels[:, 0]] == [1 / 2, 4 / 2, 4 / 1]  # mm down / mm across
    assert [panel.get_ylabel() for panel in panels[:, 0]] == ["axial", "coronal", "sagittal"]
    assert [panel.get_title() for panel in panels[0]] == [
        "background\none",
        "foreground\ntwo",
        "fused\n(input)",
        "levels\n(label)",
    ]


def test_edges_bear_the_ends_of_the_body_as_radiologists_look() -> None:
    (part, _) = draw([sample()], 4).subfigs
    for panel, (left, right, top, bottom) in zip(part.axes[::4], ("RLAP", "RLSI", "APSI"), strict=True):
        at = {text.get_text(): text.get_position() for text in panel.texts}
        assert at[left][0] < 0.5 < at[right][0] and at[bottom][1] < 0.5 < at[top][1]


def test_greys_of_a_sample_share_one_scale_and_every_level_has_its_colour() -> None:
    shown = sample()
    (part, legend) = draw([shown], 4).subfigs
    scales = {panel.images[0].get_clim() for i, panel in enumerate(part.axes) if i % 4 < 3}
    assert scales == {tuple(np.percentile(np.stack([shown.background, shown.foreground]), (0.5, 99.5)))}
    image = part.axes[3].images[0]
    assert len({tuple(image.cmap(image.norm(k))) for k in range(5)}) == 5
    (bar,) = legend.axes
    assert [tick.get_text() for tick in bar.get_xticklabels()] == list("01234")
    assert "k/4 foreground, the rest background" in bar.get_xlabel()


def test_legend_of_many_levels_stays_readable() -> None:
    (_, legend) = draw([sample()], 100).subfigs
    ticks = [int(tick.get_text()) for tick in legend.axes[0].get_xticklabels()]
    assert ticks[0] == 0 and len(ticks) <= 9 and ticks[-1] > 80


# From a dataset


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
    make_workspace: Callable[..., Workspace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_workspace(num_cases=2, plans=toy_plans(patch_size=[20, 22, 20], spacing=[5.0, 1.0, 2.0]))
    shown: list[Sample] = []
    monkeypatch.setattr(nnunetv2_misfm.preview, "draw", lambda samples, k: shown.extend(samples) or draw(samples, k))
    preview("555", "quick", tmp_path / "picture.png", num_samples=3)
    preview("555", "quick", tmp_path / "picture.png", num_samples=1, seed=1)
    for one in shown:
        mixture = one.background + (one.foreground - one.background) * one.levels / 4
        assert np.allclose(one.fused, mixture, atol=1e-5)
        for volume, name in zip((one.background, one.foreground), one.names, strict=True):
            image, _ = toy_case(int(name[-1]), (20, 22, 20), 1)  # no geometry in its properties: ITK's default
            assert np.array_equal(volume, image[0, ::-1])
        assert one.spacing == (5.0, 1.0, 2.0)
    assert len(shown) == 3 + 1 and set(shown[0].levels.flat) > {0, 4}
    assert [one.names[1] for one in shown[1:3]] == [one.names[0] for one in shown[:2]]
    assert not np.array_equal(shown[3].levels, shown[0].levels)


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
