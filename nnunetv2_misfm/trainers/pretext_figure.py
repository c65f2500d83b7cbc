"""The figure of a pretext task: three planes of volumes side by side, as a radiologist looks at them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch

# The ends of the three axes of the body, in ITK's order x, y, z, the far end (L, P, S) last
_ENDS = ("RL", "AP", "IS")
# Array axes towards which a radiologist looks: down, backwards, and to the patient's left, which is right in a picture
_VIEW = "IPL"
# Planes of an array in that orientation, by the axis across them, and the ends at left, right, top and bottom
_PLANES = (("axial", "RLAP"), ("coronal", "RLSI"), ("sagittal", "APSI"))
# Voxels that are not asked for: tinted and hatched, so that they pass for no grey value (ours)
_NOT_ASKED: dict[str, Any] = {"facecolor": "#dce6f2", "edgecolor": "#8fb0d8", "hatch": "////"}
_COLUMN_INCHES = 2.9
_LEAST_ROW_INCHES = 0.9
_TITLE_INCHES = 1.1
_BAR_INCHES = 0.9
_CAPTION_INCHES = 0.6
_DOTS_PER_INCH = 110
_MOST_TICKS = 9


class Column(NamedTuple):
    """A volume of a sample.

    Attributes:
        title: What it is, in one or two lines.
        volume: [D, H, W] with axes to I, P and L: levels 0..K where whole numbers, else intensities, NaN where nothing
            is asked.
        sets_scale: Whether its intensities span the sample's scale of greys.
    """

    title: str
    volume: np.ndarray
    sets_scale: bool = False

    @property
    def has_levels(self) -> bool:
        """Whether the voxels are levels, not intensities."""
        return np.issubdtype(self.volume.dtype, np.integer)


class Sample(NamedTuple):
    """What the picture shows of one sample.

    Attributes:
        columns: From left to right, all of one shape.
        spacing: Edges of a voxel, mm, in the order of the volumes' axes.
    """

    columns: Sequence[Column]
    spacing: tuple[float, ...]


def axis_directions(properties: dict[str, Any], transpose_forward: list[int]) -> str:
    """Returns the end of the body to which each axis of a preprocessed array runs, such as SAR.

    Args:
        properties: nnU-Net's of a case, with the geometry of its SimpleITK or nibabel reader; without one, or with one
            of which two axes run to the same end, the array is taken for ITK's default (SPL).
        transpose_forward: nnU-Net's order of the image's array axes in preprocessed ones.
    """
    columns = np.eye(3)  # directions of the image's axes x, y, z in ITK's world, which runs to L, P and S
    if "sitk_stuff" in properties:
        columns = np.reshape(properties["sitk_stuff"]["direction"], (3, 3))
    elif "nibabel_stuff" in properties:
        stuff = properties["nibabel_stuff"]
        affine = stuff.get("reoriented_affine", stuff["original_affine"])
        columns = np.diag([-1, -1, 1]) @ np.asarray(affine)[:3, :3]  # nibabel's world runs to R, A and S
    world = np.abs(columns).argmax(0)
    if len(set(world)) < 3:
        columns, world = np.eye(3), np.arange(3)
    ends = [_ENDS[w][int(columns[w, i] > 0)] for i, w in enumerate(world)][::-1]  # array axes are z, y, x
    return "".join(ends[i] for i in transpose_forward)


def as_viewed(volume: np.ndarray, axes: str) -> np.ndarray:
    """Returns a volume [D, H, W] whose axes run to the ends `axes`, turned so that they run to I, P and L."""
    turned = volume.transpose([_axis_along(end, axes) for end in _VIEW])
    return turned[tuple(slice(None, None, 1 if end in axes else -1) for end in _VIEW)]


def spacing_as_viewed(spacing: Sequence[float], axes: str) -> tuple[float, ...]:
    """Returns the edges of a voxel (mm) of an array whose axes run to the ends `axes`, in the order of `as_viewed`."""
    return tuple(float(spacing[_axis_along(end, axes)]) for end in _VIEW)


def _axis_along(end: str, axes: str) -> int:
    """Returns the index of the axis that runs to an end of the body or to the opposite one."""
    (pair,) = (pair for pair in _ENDS if end in pair)
    return next(i for i, other in enumerate(axes) if other in pair)


def draw(samples: Sequence[Sample], method: str, caption: str, num_levels: int) -> Figure:
    """Returns the figure of samples.

    Within a sample all grey values share one scale, so that an input can be compared with its sources.

    Args:
        samples: At least one, with as many columns each.
        method: Name of the method, for the headings.
        caption: What the network is to answer, for the legend.
        num_levels: K, the highest level of the columns that hold levels.
    """
    columns = samples[0].columns
    extents = np.multiply(columns[0].volume.shape, samples[0].spacing)  # mm down, backwards, to the left
    inches = _COLUMN_INCHES / max(extents[1:])
    rows = [max(_LEAST_ROW_INCHES, inches * extents[i]) for i in (1, 0, 0)]
    has_levels = any(column.has_levels for column in columns)
    heights = [sum(rows) + _TITLE_INCHES] * len(samples) + [_BAR_INCHES if has_levels else _CAPTION_INCHES]
    figure = Figure((len(columns) * _COLUMN_INCHES + 0.6, sum(heights)), _DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    *parts, legend = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    norm = BoundaryNorm(np.arange(-0.5, num_levels + 1), num_levels + 1)
    colours = {"cmap": colormaps["viridis"].resampled(num_levels + 1), "norm": norm}
    for number, (part, sample) in enumerate(zip(parts, samples, strict=True), start=1):
        part.suptitle(f"{method}, sample {number}", weight="bold")
        _draw_sample(part, sample, rows, colours)
    if has_levels:
        _draw_bar(legend, caption, num_levels, colours)
    else:
        _write_caption(legend, caption, any(np.isnan(c.volume).any() for s in samples for c in s.columns))
    return figure


def _draw_sample(part: SubFigure, sample: Sample, rows: list[float], colours: dict[str, Any]) -> None:
    """Fills the part of a figure that belongs to a sample."""
    axes = part.subplots(len(_PLANES), len(sample.columns), squeeze=False, height_ratios=rows)
    low, high = np.nanpercentile(np.stack([c.volume for c in sample.columns if c.sets_scale]), (0.5, 99.5))
    for axis, column in zip(axes[0], sample.columns, strict=True):
        axis.set_title(column.title, fontsize="medium")
    for plane, ((name, ends), row) in enumerate(zip(_PLANES, axes, strict=True)):
        down, across = (sample.spacing[i] for i in range(3) if i != plane)
        for axis, column in zip(row, sample.columns, strict=True):
            style = colours if column.has_levels else {"cmap": "gray", "vmin": low, "vmax": high}
            middle = np.take(column.volume, column.volume.shape[plane] // 2, plane)
            axis.imshow(middle, aspect=down / across, interpolation="nearest", **style)
            axis.patch.set(**_NOT_ASKED)  # seen through NaN alone
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name)
        _mark_ends(row[0], ends)


def _mark_ends(axis: Axes, ends: str) -> None:
    """Writes the ends of the body at the left, right, top and bottom edge of a panel."""
    for end, (x, y) in zip(ends, ((0.05, 0.5), (0.95, 0.5), (0.5, 0.94), (0.5, 0.06)), strict=True):
        text = axis.text(x, y, end, transform=axis.transAxes, ha="center", va="center", color="white", fontsize="small")
        text.set_path_effects([patheffects.withStroke(linewidth=2, foreground="black")])


def _draw_bar(legend: SubFigure, caption: str, num_levels: int, colours: dict[str, Any]) -> None:
    """Fills the legend with the colours of the levels."""
    axis = legend.add_subplot()
    ticks = range(0, num_levels + 1, max(1, -(-num_levels // (_MOST_TICKS - 1))))
    bar = legend.figure.colorbar(ScalarMappable(**colours), cax=axis, orientation="horizontal", ticks=ticks)
    bar.minorticks_off()
    bar.set_label(caption)
    axis.set_box_aspect(0.03)


def _write_caption(legend: SubFigure, caption: str, has_unasked: bool) -> None:
    """Fills the legend with a sentence, and with what hatching means where there is any."""
    axis = legend.add_subplot()
    axis.axis("off")
    unasked = [Patch(**_NOT_ASKED, label="hatched: not asked for, so no error counts there")] if has_unasked else []
    axis.legend(handles=unasked, title=caption, loc="center", frameon=False)
