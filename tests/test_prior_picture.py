import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread
from toy import toy_architecture, toy_plans

from nnunetv2_misfm import prior_picture
from nnunetv2_misfm.architectures.context_prior import ContextPriorNetwork
from nnunetv2_misfm.cli_priors import add_priors_command
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.prior_picture import (
    PriorSimilarities,
    Similarities,
    alike_together,
    draw_priors,
    most_alike,
    prior_similarities,
)
from nnunetv2_misfm.universe import PLANS_KEY, Source, Universe


def universe(tasks: Sequence[str], modalities: Sequence[str] = ("CT",)) -> Universe:
    source = Source("Dataset004_Any", (0,), ((1,),), 0)
    return Universe("Dataset950_Universal", tuple(tasks), tuple(modalities), (source,))


def priors(num_tasks: int, num_modalities: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"task_tokens": (num_tasks,), "modality_tokens": (num_modalities, 10)}
    return {
        f"fusions.{site}.{name}": torch.randn(*shape, channels, generator=generator)
        for site, channels in (("encoder_2", 8), ("decoder_2", 4))
        for name, shape in shapes.items()
    }


def write(path: Path, weights: dict[str, torch.Tensor], known: Universe | None, **entries: Any) -> Path:
    plans = toy_plans() | ({PLANS_KEY: known.as_dict()} if known else {})
    content = {"network_weights": weights, "init_args": {"plans": plans}, "trainer_name": "nnUNetTrainerHermes"}
    torch.save(content | entries, path)
    return path


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are drawn from here on."""
    figures, draw = [], prior_picture._draw
    monkeypatch.setattr(prior_picture, "_draw", lambda *given: figures.append(draw(*given)) or figures[-1])
    return figures


# Numbers


def test_each_scale_counts_the_same_whatever_its_width_and_length() -> None:
    weights = {
        "fusions.encoder_2.task_tokens": torch.tensor([[3.0, 4.0], [4.0, 3.0]]),  # cosine 24 / 25
        "fusions.encoder_2.modality_tokens": torch.ones(1, 10, 2),
        "fusions.decoder_2.task_tokens": torch.tensor([[0.0, 0.0, 700.0], [0.0, 0.001, 0.0]]),  # at right angles
        "fusions.decoder_2.modality_tokens": torch.ones(1, 10, 3),
    }
    tasks = prior_similarities(weights, universe(["a", "b"])).tasks
    assert tasks.rows == tasks.columns == ("a", "b")
    assert np.allclose(tasks.cosine, [[1, 0.48], [0.48, 1]], atol=1e-12)


def test_task_meets_modality_in_the_channels_of_each_scale() -> None:
    modality = torch.zeros(2, 10, 2)
    modality[0, :, 0] = 5.0  # CT along (1, 0)
    modality[1, 3, 1] = -0.1  # MR along (0, -1)
    weights = {
        # The modalities' entries in another order of scales: they are paired by name
        "fusions.decoder_2.modality_tokens": torch.cat((modality, torch.zeros(2, 10, 1)), 2),
        "fusions.encoder_2.modality_tokens": modality,
        "fusions.encoder_2.task_tokens": torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]]),
        "fusions.decoder_2.task_tokens": torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.5, 0.0], [8.0, 0.0, 6.0]]),
    }
    between = prior_similarities(weights, universe(["a", "b", "c"], ["CT", "MR"])).between
    assert (between.rows, between.columns) == (("a", "b", "c"), ("CT", "MR"))
    # Means of the two scales' cosines: a (0.6, 0) and (-0.8, 0), b (0, 0) and (-1, -1), c (-1, 0.8) and (0, 0)
    assert np.allclose(between.cosine, [[0.3, -0.4], [0, -1], [-0.1, 0]], atol=1e-7)


def test_modality_is_the_mean_of_its_tokens() -> None:
    tokens = torch.zeros(2, 10, 2)
    tokens[0, :5, 0] = 1.0
    tokens[0, 5:, 1] = 1.0  # mean along (1, 1)
    tokens[1, :, 0] = torch.arange(10.0)  # along (1, 0): 45 degrees between them
    weights = priors(1, 2) | {f"fusions.{site}.modality_tokens": tokens for site in ("encoder_2", "decoder_2")}
    weights |= {f"fusions.{site}.task_tokens": torch.tensor([[0.0, 2.0]]) for site in ("encoder_2", "decoder_2")}
    _, between, modalities = prior_similarities(weights, universe(["a"], ["CT", "MR"]))
    assert modalities.rows == modalities.columns == ("CT", "MR")
    assert np.allclose(between.cosine, [[0.5**0.5, 0]], atol=1e-12)
    assert np.allclose(modalities.cosine, [[1, 0.5**0.5], [0.5**0.5, 1]], atol=1e-12)


def test_half_precision_and_tokens_of_zeros_are_no_error() -> None:
    weights = {name: tensor.half() for name, tensor in priors(2, 1).items()}
    for name in ("fusions.encoder_2.task_tokens", "fusions.decoder_2.task_tokens"):
        weights[name][0] = 0
    tasks, between, _ = prior_similarities(weights, universe(["a", "b"]))
    assert np.allclose(tasks.cosine, [[0, 0], [0, 1]]) and between.cosine[0, 0] == 0 != between.cosine[1, 0]


def test_alike_ones_stand_together() -> None:
    names = ("a0", "b0", "a1", "c0", "b1", "a2")
    groups = np.array([name[0] for name in names])
    cosine = np.where(groups[:, None] == groups, 0.9, -0.2)
    np.fill_diagonal(cosine, 1.0)
    cosine[0, 1] = cosine[1, 0] = 0.3
    modalities = ("CT", "PET", "MR", "CT late")
    of_modalities = np.eye(4)
    of_modalities[0, 3] = of_modalities[3, 0] = 0.8
    between = np.arange(24.0).reshape(6, 4) / 24  # each cell another
    given = PriorSimilarities(
        Similarities(names, names, cosine),
        Similarities(names, modalities, between),
        Similarities(modalities, modalities, of_modalities),
    )
    ordered = alike_together(given)
    letters = "".join(name[0] for name in ordered.tasks.rows)
    assert sorted(ordered.tasks.rows) == sorted(names) and ordered.tasks.rows != names
    assert sum(a != b for a, b in zip(letters, letters[1:], strict=False)) == 2  # three blocks
    late = ordered.modalities.rows.index("CT late")
    assert abs(late - ordered.modalities.rows.index("CT")) == 1
    assert ordered.tasks.columns == ordered.tasks.rows == ordered.between.rows
    assert ordered.modalities.columns == ordered.modalities.rows == ordered.between.columns
    for before, after in zip(given, ordered, strict=True):
        for i, a in enumerate(after.rows):
            for j, b in enumerate(after.columns):
                assert after.cosine[i, j] == before.cosine[before.rows.index(a), before.columns.index(b)]


def test_most_alike_is_the_highest_off_the_diagonal() -> None:
    cosine = np.array([[1.0, -0.9, 0.1], [-0.9, 1.0, 0.4], [0.1, 0.4, 1.0]])
    names = ("a", "b", "c")
    assert most_alike(Similarities(names, names, cosine)) == ("b", "c", 0.4)
    assert most_alike(Similarities(("a",), ("a",), np.ones((1, 1)))) is None


# The picture


def test_maps_show_the_ordered_similarities_under_their_names(tmp_path: Path, drawn: list[Figure]) -> None:
    known, weights = universe(["004:a", "004:b", "103:$c$", "103:d"], ["CT", "MR", "PET"]), priors(4, 3)
    output = tmp_path / "new" / "priors.png"
    said = draw_priors(write(tmp_path / "checkpoint_final.pth", weights, known), output)
    bar, *maps = drawn[0].axes
    assert bar.get_xlim() == (-1, 1)
    titles = ("tasks", "tasks and modalities", "modalities")
    ordered = alike_together(prior_similarities(weights, known))
    for axes, expected, title in zip(maps, ordered, titles, strict=True):
        (image,) = axes.images
        assert np.array_equal(image.get_array(), expected.cosine) and image.get_clim() == (-1, 1)
        assert axes.get_title("left") == title
        assert [label.get_text() for label in axes.get_xticklabels()] == list(expected.columns)
        rows = [] if axes is maps[1] else list(expected.rows)  # those of the task map beside it
        assert [label.get_text() for label in axes.get_yticklabels()] == rows
        assert [text.get_text() for text in axes.texts] == [f"{v:.2f}" for v in expected.cosine.flatten()]
    first, second, cosine = most_alike(prior_similarities(weights, known).tasks)
    assert said == f"wrote {output}: of 4 tasks {first} and {second} are most alike (cosine {cosine:.2f})."
    assert imread(output).ndim == 3 and [file.name for file in output.parent.iterdir()] == ["priors.png"]


@pytest.mark.parametrize(("num_tasks", "num_modalities"), [(1, 1), (3, 5), (12, 2), (30, 4)])
def test_rows_of_tasks_go_on_through_their_modalities_and_nothing_overlaps(
    num_tasks: int, num_modalities: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    known = universe([f"{i:03d}:organ" for i in range(num_tasks)], [f"MR {i}" for i in range(num_modalities)])
    draw_priors(write(tmp_path / "c.pth", priors(num_tasks, num_modalities), known), tmp_path / "p.png")
    maps = drawn[0].axes[1:]
    tasks, between, _ = (axes.get_window_extent() for axes in maps)
    assert (between.y0, between.y1) == pytest.approx((tasks.y0, tasks.y1))
    assert between.width / num_modalities == pytest.approx(tasks.width / num_tasks)  # the same cells
    right_ends = [max(axes.get_window_extent().x1, axes._left_title.get_window_extent().x1) for axes in maps]
    lefts = [axes.get_window_extent().x0 for axes in maps]
    assert right_ends[0] < lefts[1] and right_ends[1] < lefts[2]


@pytest.mark.parametrize(("number", "has_values"), [(12, True), (13, False), (30, False)])
def test_values_are_written_up_to_twelve_tasks_and_names_never_touch(
    number: int, has_values: bool, tmp_path: Path, drawn: list[Figure]
) -> None:
    known = universe([f"{i:03d}:portal_vein_and_splenic_vein_of_the_abdomen" for i in range(number)])
    draw_priors(write(tmp_path / "c.pth", priors(number, 1), known), tmp_path / "p.png")
    _, tasks, between, modalities = drawn[0].axes
    assert len(tasks.texts) == (number**2 if has_values else 0) and len(modalities.texts) == 1
    assert len(between.texts) == (number if has_values else 0)
    boxes = [label.get_window_extent() for label in tasks.get_yticklabels()]
    assert all(upper.y0 > lower.y1 for upper, lower in zip(boxes, boxes[1:], strict=False))
    boxes = [label.get_window_extent() for label in tasks.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:], strict=False))
    per_inch = imread(tmp_path / "p.png").shape[0] / drawn[0].dpi
    assert per_inch > number * 0.19  # the page grows with the number


def test_one_task_of_one_modality_is_drawn(tmp_path: Path) -> None:
    known = universe(["004:a"])
    said = draw_priors(write(tmp_path / "c.pth", priors(1, 1), known), tmp_path / "p.png")
    assert said == f"wrote {tmp_path / 'p.png'}: 004:a is the only task."


def test_priors_of_the_network_itself_are_found(tmp_path: Path) -> None:
    entry = toy_architecture(4)
    description = {
        "class": entry["network_class_name"], "kwargs": entry["arch_kwargs"],
        "kwargs_to_import": entry["_kw_requires_import"],
    }  # fmt: skip
    weights = ContextPriorNetwork(1, 3, num_modalities=2, network=description).state_dict()
    known = universe(["a", "b", "c"], ["CT", "MR"])
    assert "of 3 tasks" in draw_priors(write(tmp_path / "c.pth", weights, known), tmp_path / "p.png")


# Refusals


@pytest.mark.parametrize("ordinary", ["plans", "weights", "both", "no plans", "no init_args"])
def test_other_checkpoints_are_refused(ordinary: str, tmp_path: Path) -> None:
    known = None if ordinary in ("plans", "both") else universe(["a"])
    weights = {"encoder.weight": torch.zeros(1)} if ordinary in ("weights", "both") else priors(1, 1)
    entries = {"no plans": {"init_args": {}}, "no init_args": {"init_args": None}}.get(ordinary, {})
    file = write(tmp_path / "c.pth", weights, known, trainer_name="nnUNetTrainer", **entries)
    sentence = (
        "c.pth: expected a checkpoint of a universal model, which has priors to compare, got one of nnUNetTrainer: "
    )
    with pytest.raises(MisfmError, match=sentence):
        draw_priors(file, tmp_path / "p.png")
    assert [file.name for file in tmp_path.iterdir()] == ["c.pth"]


def test_priors_that_do_not_fit_their_names_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "c.pth", priors(3, 1), universe(["a", "b"]))
    with pytest.raises(
        MisfmError, match="c.pth: expected the learned tokens of 2 tasks at each scale, got 3, 3 of them"
    ):
        draw_priors(file, tmp_path / "p.png")
    partial = priors(2, 1)
    del partial["fusions.decoder_2.modality_tokens"]
    file = write(tmp_path / "c.pth", partial, universe(["a", "b"]))
    with pytest.raises(MisfmError, match="expected the learned tokens of 1 modalities at each scale, got 1 of them"):
        draw_priors(file, tmp_path / "p.png")
    broken = priors(2, 1)
    broken["fusions.decoder_2.modality_tokens"][0, 3, 1] = float("nan")
    file = write(tmp_path / "c.pth", broken, universe(["a", "b"]))
    with pytest.raises(MisfmError, match="c.pth: expected finite tokens of modalities, got NaN or infinity"):
        draw_priors(file, tmp_path / "p.png")


def test_picture_that_cannot_be_written_leaves_the_former_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, output = write(tmp_path / "c.pth", priors(2, 1), universe(["a", "b"])), tmp_path / "p.png"
    output.write_text("former")

    def fail(figure: Figure, target: Path, **options: Any) -> None:
        target.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(MisfmError, match=r"p.png could not be written \(No space left on device\); check folder and"):
        draw_priors(file, output)
    assert output.read_text() == "former" and len(list(tmp_path.iterdir())) == 2


def test_folder_that_cannot_be_made_gets_a_sentence(tmp_path: Path) -> None:
    file = write(tmp_path / "c.pth", priors(2, 1), universe(["a", "b"]))
    for output in (file / "p.png", file / "deeper" / "p.png"):
        with pytest.raises(MisfmError, match=r"p.png could not be written \(.*\); check folder and disk"):
            draw_priors(file, output)


def test_command_prints_the_sentence(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    made = {}

    def add(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        made[name] = commands.add_parser(name, help=text)
        made[name].set_defaults(run=run)
        return made[name]

    add_priors_command(add)
    file, output = write(tmp_path / "c.pth", priors(1, 1), universe(["a"])), tmp_path / "p.png"
    options = made["priors"].parse_args([str(file), "-o", str(output)])
    assert options.run(options) == 0
    assert capsys.readouterr().out == f"wrote {output}: a is the only task.\n" and output.is_file()
