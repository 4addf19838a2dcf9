"""Panels: PNGs with the colours they should have, whatever the names."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixel_level_contrastive_learning.data.statistics import Statistics
from pixel_level_contrastive_learning.evaluation.labelled import open_labelled
from pixel_level_contrastive_learning.evaluation.panels import as_rgb, class_colours, write_panels
from pixel_level_contrastive_learning.evaluation.preparation import Preparation

PREPARE = Preparation(Statistics(3, (0.5,) * 3, (0.5,) * 3, None, None, (1, 1), (1, 1), 0), 32)


@pytest.mark.parametrize("count", [2, 11, 20, 21, 255])
def test_every_class_has_its_own_colour_and_ignored_pixels_none(count) -> None:
    colours = class_colours(count)
    assert colours.shape == (256, 3)
    assert colours[255].tolist() == [0, 0, 0]
    assert len({tuple(colour) for colour in colours[: min(count, 100)].tolist()}) == min(count, 100)
    assert colours[: min(count, 100)].sum(1).min() > 0


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_any_channels_are_shown(channels, shown) -> None:
    pixels = torch.rand(channels, 4, 6)
    for colour, channel in enumerate(shown):
        assert torch.equal(as_rgb(pixels)[..., colour], pixels[channel])


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
