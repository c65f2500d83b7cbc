from pathlib import Path

import nibabel
import numpy as np
import SimpleITK as sitk
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from nnunetv2_misfm.trainers.pretext_figure import Column, Sample, as_viewed, axis_directions, draw, spacing_as_viewed

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


def test_spacing_is_turned_with_the_volume() -> None:
    assert spacing_as_viewed([5, 1, 2], "SPL") == (5.0, 1.0, 2.0)
    assert spacing_as_viewed([5, 1, 2], "RSA") == (1.0, 2.0, 5.0)


# The figure


def sample(shape: tuple[int, ...] = (3, 5, 4), spacing: tuple[float, ...] = (4.0, 1.0, 2.0)) -> Sample:
    background = numbered(shape).astype(np.float32)
    levels = (numbered(shape) % 5).astype(np.int16)
    columns = (
        *(Column("background", background, True), Column("foreground", background + 100, True)),
        *(Column("fused", background + 950), Column("levels", levels), Column("predicted", levels[::-1])),
    )
    return Sample(columns, spacing)


def masked_sample(shape: tuple[int, ...] = (6, 8, 7)) -> Sample:
    volume = numbered(shape).astype(np.float32)
    target = np.where(np.arange(shape[2]) < 3, np.nan, volume)
    return Sample((Column("volume", volume, True), Column("input", volume), Column("target", target, True)), (1, 1, 1))


def test_panels_show_the_middle_slices_of_the_three_planes_at_true_proportions() -> None:
    shown = sample()
    (part, _) = draw([shown], "a method", "a caption", 4).subfigs
    panels = np.array(part.axes).reshape(3, 5)
    for column, (_, volume, _) in enumerate(shown.columns):
        for row, middle in enumerate((volume[1], volume[:, 2], volume[:, :, 2])):
            (image,) = panels[row, column].images
            assert np.array_equal(image.get_array(), middle)
            assert image.origin == "upper"
    assert [panel.get_aspect() for panel in panels[:, 0]] == [1 / 2, 4 / 2, 4 / 1]  # mm down / mm across
    assert [panel.get_ylabel() for panel in panels[:, 0]] == ["axial", "coronal", "sagittal"]
    assert [panel.get_title() for panel in panels[0]] == ["background", "foreground", "fused", "levels", "predicted"]


def test_every_sample_has_its_heading() -> None:
    *parts, _ = draw([sample(), sample()], "a method", "a caption", 4).subfigs
    assert [part.get_suptitle() for part in parts] == ["a method, sample 1", "a method, sample 2"]


def test_edges_bear_the_ends_of_the_body_as_radiologists_look() -> None:
    (part, _) = draw([sample()], "a method", "a caption", 4).subfigs
    for panel, (left, right, top, bottom) in zip(part.axes[::5], ("RLAP", "RLSI", "APSI"), strict=True):
        at = {text.get_text(): text.get_position() for text in panel.texts}
        assert at[left][0] < 0.5 < at[right][0] and at[bottom][1] < 0.5 < at[top][1]


def test_greys_of_a_sample_share_the_scale_of_its_sources_and_every_level_has_its_colour() -> None:
    shown = sample()
    (part, legend) = draw([shown], "a method", "a caption", 4).subfigs
    scales = {panel.images[0].get_clim() for i, panel in enumerate(part.axes) if i % 5 < 3}
    assert scales == {tuple(np.percentile(np.stack([shown.columns[0].volume, shown.columns[1].volume]), (0.5, 99.5)))}
    image, predicted = part.axes[3].images[0], part.axes[4].images[0]
    assert len({tuple(image.cmap(image.norm(k))) for k in range(5)}) == 5
    assert [image.cmap(image.norm(k)) for k in range(5)] == [predicted.cmap(predicted.norm(k)) for k in range(5)]
    (bar,) = legend.axes
    assert [tick.get_text() for tick in bar.get_xticklabels()] == list("01234")
    assert bar.get_xlabel() == "a caption"


def test_legend_of_many_levels_stays_readable() -> None:
    (_, legend) = draw([sample()], "a method", "a caption", 100).subfigs
    ticks = [int(tick.get_text()) for tick in legend.axes[0].get_xticklabels()]
    assert ticks[0] == 0 and len(ticks) <= 9 and ticks[-1] > 80


def test_a_reconstruction_has_its_caption_in_place_of_a_bar() -> None:
    volume = masked_sample().columns[:2]
    (_, legend) = draw([Sample(volume, (1, 1, 1))], "a method", "a caption", 0).subfigs
    said = legend.axes[0].get_legend()
    assert said.get_title().get_text() == "a caption" and said.get_texts() == []


def test_voxels_not_asked_for_are_hatched_and_no_grey_and_the_legend_says_so(tmp_path: Path) -> None:
    figure = draw([masked_sample()], "a method", "a caption", 0)
    (part, legend) = figure.subfigs
    (label,) = (text.get_text() for text in legend.axes[0].get_legend().get_texts())
    assert label.startswith("hatched: not asked for")
    (patch,) = legend.axes[0].get_legend().get_patches()
    tint = np.array(to_rgb(patch.get_facecolor()))
    assert patch.get_hatch() and np.ptp(tint) > 0.05  # no shade of grey, which could be air
    figure.savefig(tmp_path / "figure.png")
    pixels = imread(tmp_path / "figure.png")[..., :3]
    shares = []
    for panel in part.axes[:3]:
        box = panel.get_window_extent()
        rows = slice(int(len(pixels) - box.y1) + 2, int(len(pixels) - box.y0) - 2)
        inside = pixels[rows, int(box.x0) + 2 : int(box.x1) - 2]
        shares.append((np.ptp(inside, axis=-1) > 0.02).mean())  # tint and hatch, not grey
    assert shares[:2] == [0, 0] and abs(shares[2] - 3 / 7) < 0.02
