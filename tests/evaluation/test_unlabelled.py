"""Images without labels: which are looked at, and what becomes of the others."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.data.statistics import Statistics
from pixel_level_contrastive_learning.evaluation import unlabelled
from pixel_level_contrastive_learning.evaluation.preparation import Preparation
from pixel_level_contrastive_learning.evaluation.table import evaluate
from pixel_level_contrastive_learning.evaluation.unlabelled import evenly, left_out, some_images

PREPARE = Preparation(Statistics(3, (0.5,) * 3, (0.5,) * 3, None, None, (1, 1), (1, 1), 0), 24)


def plain(path: Path) -> None:
    Image.effect_noise((40, 32), 90).convert("RGB").save(path)


def deep(path: Path) -> None:
    Image.fromarray(np.full((32, 40), 999, np.uint16)).save(path)


def test_images_are_spread_evenly_and_the_others_wait() -> None:
    assert evenly(12, 3)[:3] == [0, 4, 8]
    assert sorted(evenly(12, 3)) == list(range(12))
    assert evenly(2, 5) == [0, 1]


def test_others_stand_in_for_images_that_are_not_for_this_network(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(unlabelled, "MOST_IMAGES", 2)
    for number in range(4):  # the evenly spread ones are deep
        (plain if number % 2 else deep)(tmp_path / f"{number}.png")
    seen, refused = some_images(open_source(tmp_path), PREPARE)
    assert len(seen) == 2
    words = "it is 16-bit or float, where the images looked at were 8-bit"
    assert refused == [f"{tmp_path}/{number}.png: {words}" for number in (0, 2)]


def test_only_where_no_image_is_left_nothing_is_judged(tmp_path) -> None:
    deep(tmp_path / "a.png")
    with pytest.raises(ValueError) as error:
        some_images(open_source(tmp_path), PREPARE)
    assert str(error.value) == (
        f"none of 1 images can be used, the first because of {tmp_path}/a.png: it is 16-bit or "
        "float, where the images looked at were 8-bit; give a folder of images that open in a "
        "viewer and are as the network knows them: 3 channels, 8-bit"
    )


def test_an_odd_image_is_named_and_the_others_are_judged(model, tmp_path, caplog) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        plain(tmp_path / "images" / f"{number}.png")
    tifffile.imwrite(tmp_path / "images" / "odd.tif", np.zeros((32, 40, 5), np.uint8))
    found = evaluate(f"random:{model}", images=tmp_path / "images")
    assert found.settings["images"] == 3
    (note,) = found.notes
    assert note.startswith(f"left out {tmp_path}/images/odd.tif: it has 5 channels where ")
    assert note in caplog.messages


def test_of_many_images_left_out_some_are_named() -> None:
    notes = left_out([f"{number}.png: broken" for number in range(9)])
    assert notes == [*(f"left out {n}.png: broken" for n in range(5)), "left out 4 more images"]
    assert left_out([]) == []
