"""Outcomes: means and deviations by hand, the table's text, the file there and back."""

import json
from math import isnan, nan

import pytest

from pixel_level_contrastive_learning.evaluation.outcome import Evaluation, Row


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
