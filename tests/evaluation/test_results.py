"""Outcomes: means and deviations by hand, the table's text, the file there and back."""

import json
from math import isnan, nan

import numpy as np
import pytest
import torch
from PIL import Image

from pixel_level_contrastive_learning.data.segmentation import open_labelled
from pixel_level_contrastive_learning.data.statistics import Statistics
from pixel_level_contrastive_learning.evaluation.features import Preparation
from pixel_level_contrastive_learning.evaluation.results import (
    Evaluation,
    Row,
    class_colours,
    write_panels,
)


def outcome(**settings) -> Evaluation:
    rows = (
        Row.of("random weights", [{"mIoU": 0.2}, {"mIoU": 0.3}], [{"sky": 0.5, "[b]": nan}] * 2),
        Row.of("runs/streets", [{"mIoU": 0.5}], [{"sky": 0.75, "[b]": nan}]),
    )
    plain = {
        "weights": "runs/streets",
        "data": "labelled",
        "protocol": "linear",
        "settings": {"split": "val", "layers": ["layer3", "layer4"]},
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


def test_the_table_has_a_column_for_each_network() -> None:
    lines = outcome().table().splitlines()
    assert lines[0].strip() == "linear on labelled: split val, layers layer3 + layer4"
    cells = {line[:22].strip(): line[22:].split("  ") for line in lines}
    words = {key: [cell.strip() for cell in own if cell.strip()] for key, own in cells.items()}
    assert words["mIoU"] == ["0.250 ± 0.071", "0.500"]
    assert words["mIoU, times random"] == ["1.00", "2.00"]
    assert words["IoU sky"] == ["0.500", "0.750"]
    assert words["IoU [b]"] == ["-", "-"]
    assert lines[-1] == "One thing more."


def test_a_table_keeps_to_its_width() -> None:
    long = Row.of("runs/" + "x" * 200, [{"mIoU": 0.5}], [{"sky": 0.75, "[b]": nan}])
    wide = outcome(rows=(outcome().rows[0], long), notes=())
    assert max(map(len, wide.table(width=70).splitlines())) <= 70


def test_an_outcome_is_written_and_read(tmp_path) -> None:
    path = outcome().write(tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "evaluation.json"
    text = path.read_text()
    held = json.loads(text)  # without NaN, which is no JSON
    assert held["rows"][1]["scores"] == {"mIoU": 0.5}
    assert held["rows"][1]["classes"]["[b]"] is None
    again = Evaluation.from_json(text)
    assert isnan(again.ours.classes["[b]"])
    assert again.to_json() == text
    assert again.table() == outcome().table()


def test_whole_figures_are_shown_with_one_digit() -> None:
    row = Row.of("a", [{"effective rank": 22.94}, {"effective rank": 24.0}])
    assert "23.5 ± 0.7" in outcome(rows=(row,)).table()


def test_figures_without_labels_leave_those_with_labels_where_they_are(tmp_path) -> None:
    first = outcome().write(tmp_path)
    second = outcome(protocol="correspondence").write(tmp_path)
    assert (first.name, second.name) == ("evaluation.json", "correspondence.json")
    assert Evaluation.from_json(first.read_text()).labelled
    assert not Evaluation.from_json(second.read_text()).labelled


PREPARE = Preparation(Statistics(3, (0.5,) * 3, (0.5,) * 3, None, None, (1, 1)), 32)


@pytest.mark.parametrize("count", [2, 11, 20, 21, 255])
def test_every_class_has_its_own_colour_and_ignored_pixels_none(count) -> None:
    colours = class_colours(count)
    assert colours.shape == (256, 3)
    assert colours[255].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in colours[: min(count, 100)].tolist()}) == min(count, 100)
    assert colours[: min(count, 100)].sum(1).min() > 0


def test_panels_show_truth_and_predictions(labelled, tmp_path) -> None:
    strange = labelled / "images/val/a $b$ <i> ü.png"
    (labelled / "images/val/0.png").rename(strange)
    (labelled / "masks/val/0.png").rename(labelled / "masks/val" / strange.name)
    (labelled / "classes.txt").write_text("$\\frac$\n<b>\nStraße 猫\n", encoding="utf-8")
    _, val = open_labelled(labelled)
    kept = {3: torch.full((32, 48), 1, dtype=torch.uint8)}
    predictions = {"random weights": kept, "runs/$\\frac$": {3: torch.full((32, 48), 2).byte()}}
    (path,) = write_panels(tmp_path / "out", val, PREPARE, predictions)
    assert path.name == "0003_a_b_i_ü.png"
    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB"))
    height, width, _ = pixels.shape
    assert 2.5 < width / height < 6
    colours = (class_colours(3) * 255).round().numpy()
    middle = pixels[int(height * 0.45)]
    for number, label in ((2, 1), (3, 2)):
        assert middle[int(width * (number + 0.5) / 4)].tolist() == colours[label].tolist()


def test_panels_take_the_place_of_earlier_ones_and_of_nothing_else(labelled, tmp_path) -> None:
    _, val = open_labelled(labelled)
    kept = {index: torch.zeros(32, 48, dtype=torch.uint8) for index in range(4)}
    write_panels(tmp_path / "out", val, PREPARE, {"earlier": kept})
    strangers = {"0001_mine.png", "empty.png", "folder.png"}
    Image.new("RGB", (4, 4)).save(tmp_path / "out" / "0001_mine.png")
    (tmp_path / "out" / "empty.png").touch()
    (tmp_path / "out" / "folder.png").mkdir()
    write_panels(tmp_path / "out", val, PREPARE, {"later": {3: kept[3]}})
    assert {path.name for path in (tmp_path / "out").iterdir()} == strangers | {"0003_3.png"}
