"""Outcomes: means and deviations by hand, the table's text, the file there and back."""

import json
from dataclasses import replace
from math import isnan, nan

import numpy as np
import pytest
import torch
from PIL import Image
from small_cards import preparation

from pixel_level_contrastive_learning.data.segmentation import open_labelled
from pixel_level_contrastive_learning.evaluation import pictures
from pixel_level_contrastive_learning.evaluation.comparison import in_words
from pixel_level_contrastive_learning.evaluation.metrics import PreparedSplit
from pixel_level_contrastive_learning.evaluation.pictures import (
    class_colours,
    draw_label_curve,
    write_panels,
)
from pixel_level_contrastive_learning.evaluation.results import (
    CurvePoint,
    Evaluation,
    Row,
    masks_needed,
    masks_saved,
)


def outcome(**settings) -> Evaluation:
    rows = (
        Row.of("random weights", [{"mIoU": 0.2}, {"mIoU": 0.3}], [{"sky": 0.5, "[b]": nan}] * 2),
        Row.of("runs/streets", [{"mIoU": 0.5}], [{"sky": 0.75, "[b]": nan}], ("random weights",)),
    )
    plain = {
        "weights": "runs/streets",
        "data": "labelled",
        "protocol": "linear",
        "settings": {"split": "val", "layers": ["a + b", "stem"]},
        "rows": rows,
        "sentence": "It paid.",
        "notes": ("One thing more.",),
    }
    return Evaluation(**plain | settings)


def test_seeds_are_averaged() -> None:
    seeds = [{"sky": 0.2, "road": nan}, {"sky": 0.4, "road": 0.6}]
    row = Row.of("a", [{"mIoU": 0.2}, {"mIoU": 0.3}], seeds)
    assert row.scores["mIoU"] == pytest.approx(0.25)
    assert row.deviations["mIoU"] == pytest.approx(0.1 / 2**0.5)
    assert row.classes == pytest.approx({"sky": 0.3, "road": 0.6})
    assert row.seeds == ({"mIoU": 0.2}, {"mIoU": 0.3})


def test_the_table_is_plain_text_wherever_it_is_made(monkeypatch) -> None:
    """In a notebook rich would show it instead, and some build servers force colours."""
    expected = outcome().table()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert outcome().table() == expected


def test_the_table_has_a_column_for_each_network() -> None:
    lines = outcome().table().splitlines()
    assert lines[0].strip() == "linear on labelled: split val, layers a + b, stem"
    cells = {line[:22].strip(): line[22:].split("  ") for line in lines}
    words = {key: [cell.strip() for cell in row if cell.strip()] for key, row in cells.items()}
    assert words["mIoU"] == ["0.250 ± 0.071", "0.500"]
    assert words["mIoU, times random"] == ["1.00", "2.00"]
    assert words["IoU sky"] == ["0.500", "0.750"]
    assert words["IoU [b]"] == ["-", "-"]
    assert lines[-1] == "One thing more."


def test_networks_are_compared_with_random_weights_of_their_own() -> None:
    given = {"r (a)": (), "r (b)": (), "r (c)": (), "start": (), "a": ("r (a)",)}
    given["b"] = ("r (b)", "start")
    figures = zip(given.items(), (0.2, 0.4, 0.9, 0.6, 0.3, 0.8), strict=True)
    rows = [
        Row.of(name, [{"mIoU": miou}], baselines=baselines) for (name, baselines), miou in figures
    ]
    (line,) = (s for s in outcome(rows=tuple(rows)).table().splitlines() if "times random" in s)
    assert line.split()[3:] == ["1.00", "1.00", "-", "1.50", "1.50", "2.00"]
    assert "times random" not in outcome(rows=tuple(rows[:3])).table()


def test_a_table_keeps_to_its_width() -> None:
    long = Row.of("runs/" + "x" * 200, [{"mIoU": 0.5}], [{"sky": 0.75, "[b]": nan}])
    wide = outcome(rows=(outcome().rows[0], long), notes=())
    assert max(map(len, wide.table(width=70).splitlines())) <= 70


def test_an_outcome_is_written_and_read(tmp_path) -> None:
    path = outcome().write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "evaluation.json"
    text = path.read_text()
    content = json.loads(text)  # without NaN, which is no JSON
    assert content["rows"][1]["scores"] == {"mIoU": 0.5}
    assert content["rows"][1]["classes"]["[b]"] is None
    again = Evaluation.from_json(text)
    assert isnan(again.ours.classes["[b]"])
    assert again.to_json() == text
    assert repr(again).startswith("Evaluation(")
    assert len(repr(again)) < 400
    assert again.table() == outcome().table()


def test_whole_figures_are_shown_with_one_digit() -> None:
    row = Row.of("a", [{"effective rank": 22.94}, {"effective rank": 24.0}])
    assert "23.5 ± 0.7" in outcome(rows=(row,)).table()


def test_figures_of_a_diverged_network_have_no_spread_over_the_seeds() -> None:
    row = Row.of("a", [{"hit@1": 0.2, "spread": nan}, {"hit@1": 0.4, "spread": 0.5}])
    assert isnan(row.deviations["spread"])
    assert row.deviations["hit@1"] == pytest.approx(0.2 / 2**0.5)
    cells = [line.split() for line in outcome(rows=(row,)).table().splitlines()]
    assert ["spread", "-"] in cells


def test_figures_without_labels_leave_those_with_labels_where_they_are(tmp_path) -> None:
    first = outcome().write(tmp_path)
    second = outcome(protocol="correspondence").write(tmp_path)
    assert (first.name, second.name) == ("evaluation.json", "correspondence.json")
    assert Evaluation.from_json(first.read_text()).labelled
    assert not Evaluation.from_json(second.read_text()).labelled


def curve(*points: tuple[int, float]) -> tuple[CurvePoint, ...]:
    return tuple(CurvePoint.of(masks, [miou - 0.01, miou + 0.01]) for masks, miou in points)


def with_curves() -> Evaluation:
    """Trained weights that are with 10 masks where random ones are with 20."""
    curves = curve((10, 0.2), (40, 0.4), (160, 0.5)), curve((10, 0.3), (40, 0.5), (160, 0.55))
    names = "random weights", "runs/streets"
    rows = [
        Row.of(name, [{"mIoU": points[-1].miou}], baselines=names[:k], curves={"finetune": points})
        for k, (name, points) in enumerate(zip(names, curves, strict=True))
    ]
    return outcome(rows=tuple(rows), notes=())


def test_masks_needed_are_read_off_a_curve() -> None:
    points = curve((10, 0.2), (40, 0.4), (160, 0.3), (640, 0.5))
    assert masks_needed(points, 0.2) == 10
    assert masks_needed(points, 0.3) == pytest.approx(20)  # the middle, in the logarithm
    assert masks_needed(points, 0.45) == pytest.approx(160)  # as if it never fell: from 40 to 640
    assert masks_needed(points, 0.1) == 0
    assert masks_needed(points, 0.6) == float("inf")


def test_masks_saved_are_told_at_the_fewest_masks() -> None:
    random, ours = with_curves().rows
    sentence = "runs/streets needs 10 masks to match random weights with 20: 2.0 times fewer"
    assert masks_saved(ours, random, "finetune") == sentence
    sentence = masks_saved(random, ours, "finetune")
    assert sentence == "random weights needs 40 masks to match runs/streets with 20: 2.0 times more"
    high, low = (replace(ours, curves={"finetune": curve((10, y), (40, y))}) for y in (0.6, 0.1))
    sentence = masks_saved(high, random, "finetune")
    beaten = "random weights with 160"
    assert sentence == f"runs/streets with 10 masks beats {beaten}: more than 16.0 times fewer"
    sentence = masks_saved(low, random, "finetune")
    assert sentence == "runs/streets with 10 masks falls short of random weights"
    assert masks_saved(ours, random, "linear") is None
    single, few = (
        replace(row, curves={"finetune": curve((1, y), (10, 2 * y))})
        for row, y in ((ours, 0.5), (random, 0.2))
    )
    assert masks_saved(single, few, "finetune").startswith("runs/streets with 1 mask beats random")
    crossing = replace(ours, curves={"finetune": curve((10, 0.1), (40, 0.6), (160, 0.7))})
    sentence = masks_saved(crossing, random, "finetune")
    assert sentence == f"runs/streets with 40 masks beats {beaten}: more than 4.0 times fewer"
    late = replace(ours, curves={"finetune": curve((10, 0.1), (160, 0.6))})
    sentence = masks_saved(late, random, "finetune")  # of which nothing is saved for certain
    assert sentence == f"runs/streets with 160 masks beats {beaten}"


@pytest.mark.parametrize(
    ("random", "ours"),
    [
        # The other curve does not rise, whether ours falls or rises.
        ([(4, 0.173, 0.030), (20, 0.170, 0.017)], [(4, 0.184, 0.020), (20, 0.152, 0.005)]),
        ([(4, 0.173, 0.003), (20, 0.175, 0.003)], [(4, 0.184, 0.002), (20, 0.252, 0.005)]),
        # Not apart by more than the spread where they are compared, ahead or behind.
        ([(4, 0.2, 0.05), (20, 0.4, 0.01)], [(4, 0.24, 0.01), (20, 0.5, 0.01)]),
        ([(4, 0.2, 0.01), (20, 0.4, 0.01)], [(4, 0.24, 0.05), (20, 0.5, 0.01)]),
        ([(4, 0.24, 0.05), (20, 0.4, 0.01)], [(4, 0.23, 0.05), (20, 0.39, 0.05)]),
        # Ahead of as many masks, but no higher for certain than the other curve comes.
        ([(1, 0.407, 0.022), (3, 0.435, 0.003), (16, 0.432, 0)], [(1, 0.445, 0.018), (16, 0.5, 0)]),
        # Ahead with few masks, behind with all, and the other way round.
        ([(4, 0.2, 0.01), (20, 0.4, 0.01)], [(4, 0.3, 0.01), (20, 0.39, 0.01)]),
        ([(4, 0.2, 0.01), (9, 0.4, 0.01), (20, 0.5, 0.01)], [(4, 0.1, 0), (9, 0.3, 0), (20, 1, 0)]),
    ],
)
def test_no_saving_is_told_out_of_noise(random, ours) -> None:
    rows = (
        Row.of(
            name, [{"mIoU": 0.2}], curves={"linear": [CurvePoint(*point, ()) for point in points]}
        )
        for name, points in (("random weights", random), ("runs/slides", ours))
    )
    floor, row = rows
    assert masks_saved(row, floor, "linear") == "no clear saving over random weights"


@pytest.mark.parametrize(
    ("masks", "miou", "told"),
    [
        (2, 0.25, "needs 2 masks to match random weights with 2.8: 1.4 times fewer"),
        (20, 0.225, "needs 20 masks to match random weights with 24: 1.2 times fewer"),
        (200, 0.205, "no clear saving over random weights"),  # with 207
        (200, 0.195, "no clear saving over random weights"),
    ],
)
def test_masks_saved_are_told_as_a_number_that_differs(masks, miou, told) -> None:
    random, ours = (
        Row(name, {}, curves={"linear": tuple(CurvePoint(*point, 0.001, ()) for point in points)})
        for name, points in (
            ("random weights", [(masks // 2, 0.1), (masks, 0.2), (4 * masks, 0.4)]),
            ("ours", [(masks, miou), (4 * masks, 2 * miou)]),
        )
    )
    assert masks_saved(ours, random, "linear").removeprefix("ours ") == told


def test_a_saving_of_one_seed_is_told_as_one_that_may_be_chance() -> None:
    points = [(4, 0.2), (20, 0.4)], [(4, 0.3), (20, 0.5)]
    random, ours = (
        replace(row, curves={"finetune": tuple(CurvePoint.of(n, [miou]) for n, miou in line)})
        for row, line in zip(with_curves().rows, points, strict=True)
    )
    chance = " (one seed: it may be chance)"
    sentence = masks_saved(ours, random, "finetune")
    assert sentence.startswith("runs/streets needs 4 masks to match random weights with 8.9: 2.2")
    assert sentence.endswith(f"times fewer{chance}")
    high = tuple(CurvePoint.of(n, [miou]) for n, miou in ((4, 0.8), (20, 0.9)))
    best = replace(ours, curves={"finetune": high})
    assert masks_saved(best, random, "finetune").endswith(f"more than 5.0 times fewer{chance}")
    assert masks_saved(random, best, "finetune").endswith(f"short of runs/streets{chance}")
    several = (CurvePoint.of(n, [miou] * 3) for n, miou in points[0])
    assert chance not in masks_saved(
        ours, replace(random, curves={"finetune": tuple(several)}), "finetune"
    )


def test_curves_are_in_the_table_and_the_file() -> None:
    evaluation = with_curves()
    (line,) = (row for row in evaluation.table().splitlines() if "finetune, 40 masks" in row)
    assert line.split("masks")[1].split() == ["0.400", "±", "0.014", "0.500", "±", "0.014"]
    assert Evaluation.from_json(evaluation.to_json()) == evaluation
    old = json.loads(evaluation.to_json())
    for row in old["rows"]:  # as written before there were curves
        del row["curves"], row["baselines"]
    assert Evaluation.from_json(json.dumps(old)).rows[0].scores == evaluation.rows[0].scores


def test_each_of_several_weights_has_its_sentence() -> None:
    random, ours = with_curves().rows
    other = replace(ours, name="runs/b")
    words = in_words([random, ours, other], lambda rows: f"{rows[-1].name} over {rows[0].name}")
    assert (
        words
        == "runs/streets: runs/streets over random weights\nruns/b: runs/b over random weights"
    )
    assert in_words([random], lambda rows: rows[0].name) == "random weights"
    drawn = [random, replace(random, name="random weights (b)")]  # and none trained
    words = in_words(drawn, lambda rows: f"{len(rows)} row")
    assert words == "random weights: 1 row\nrandom weights (b): 1 row"


def test_a_label_curve_is_drawn(tmp_path) -> None:
    draw_label_curve(tmp_path / "curve.png", with_curves(), "finetune")
    with Image.open(tmp_path / "curve.png") as image:
        pixels = np.array(image.convert("RGB")).reshape(-1, 3)
    assert image.size == (1280, 840)
    blue = (pixels == (0, 114, 178)).all(axis=1).sum()  # the trained weights' line
    gray = (pixels == (140, 140, 140)).all(axis=1).sum()
    assert min(blue, gray) > 300


def test_no_two_lines_of_a_label_curve_look_alike(tmp_path, monkeypatch) -> None:
    from matplotlib.axes import Axes

    lines, plot = [], Axes.plot

    def noted(self, *args, **kwargs):
        (line,) = plot(self, *args, **kwargs)
        lines.append((line.get_color(), line.get_marker()))
        return [line]

    monkeypatch.setattr(Axes, "plot", noted)
    random, ours = with_curves().rows
    many = (random, *(replace(ours, name=f"runs/{number}") for number in range(12)))
    draw_label_curve(tmp_path / "curve.png", outcome(rows=many), "finetune")
    assert len(set(lines)) == 13


@pytest.mark.parametrize("count", [2, 11, 20, 21, 255])
def test_every_class_has_its_own_colour_and_ignored_pixels_none(count) -> None:
    colours = class_colours(count)
    assert colours.shape == (256, 3)
    assert colours[255].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in colours[: min(count, 100)].tolist()}) == min(count, 100)
    assert colours[: min(count, 100)].sum(1).min() > 0


def test_panels_show_truth_and_predictions(labelled, tmp_path) -> None:
    strange = labelled / f"images/val/a $b$ <i> ü{239 * 'x'}.png"  # the longest name
    (labelled / "images/val/0.png").rename(strange)
    (labelled / "masks/val/0.png").rename(labelled / "masks/val" / strange.name)
    (labelled / "classes.txt").write_text("$\\frac$\n<b>\nStraße 猫\n", encoding="utf-8")
    val = PreparedSplit(open_labelled(labelled)[1], preparation(32))
    kept = {3: torch.full((32, 48), 1, dtype=torch.uint8)}
    predictions = {"random weights": kept, "runs/$\\frac$": {3: torch.full((32, 48), 2).byte()}}
    (path,) = write_panels(tmp_path / "out", val, predictions)
    assert path.name == f"0003_a_b_i_ü{53 * 'x'}.png"
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert 2.5 < width / height < 6
    colours = (class_colours(3) * 255).round().numpy()
    middle = pixels[int(height * 0.45)]
    for number, label in ((2, 1), (3, 2)):
        assert middle[int(width * (number + 0.5) / 4)].tolist() == colours[label].tolist()


@pytest.mark.parametrize("size", [(48, 48), (160, 32)], ids=str)
@pytest.mark.parametrize("length", [3, 50])
def test_the_classes_of_a_panel_are_named_inside_it(size, length, tmp_path, monkeypatch) -> None:
    from matplotlib.figure import Figure

    figures: list[Figure] = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    names = [f"{number} {'defect ' * length}"[:length] for number in range(8)]
    shown = dict.fromkeys(("image", "truth", "runs/a"), torch.rand(*size, 3))
    pictures.draw(tmp_path / "panel.png", shown, dict.fromkeys(names, torch.ones(3)), size)
    (figure,) = figures
    figure.draw_without_rendering()
    (legend,) = figure.legends
    named = [" ".join(text.get_text().split()) for text in legend.get_texts()]
    assert named == [name.strip() for name in names]
    low, high = legend.get_window_extent().get_points()
    assert (low >= 0).all()
    assert high[0] <= figure.bbox.width
    assert high[1] <= min(axes.get_window_extent().y0 for axes in figure.axes)


def test_panels_take_the_place_of_earlier_ones_and_of_nothing_else(val, tmp_path) -> None:
    val = PreparedSplit(val, preparation(32))
    kept = {index: torch.zeros(32, 48, dtype=torch.uint8) for index in range(4)}
    write_panels(tmp_path / "out", val, {"earlier": kept})
    strangers = {"0001_mine.png", "empty.png", "folder.png"}
    Image.new("RGB", (4, 4)).save(tmp_path / "out" / "0001_mine.png")
    (tmp_path / "out" / "empty.png").touch()
    (tmp_path / "out" / "folder.png").mkdir()
    write_panels(tmp_path / "out", val, {"later": {3: kept[3]}})
    assert {path.name for path in (tmp_path / "out").iterdir()} == strangers | {"0003_3.png"}
