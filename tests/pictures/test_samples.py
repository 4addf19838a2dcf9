"""Samples: which images are chosen, how they are called, and where a view of one lies."""

import os

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pixel_level_contrastive_learning.augment import Photometry
from pixel_level_contrastive_learning.data.statistics import Statistics
from pixel_level_contrastive_learning.evaluation.preparation import Preparation
from pixel_level_contrastive_learning.geometry import unit_centres
from pixel_level_contrastive_learning.pictures import samples
from pixel_level_contrastive_learning.pictures.samples import (
    SHOWN_SIDE,
    WHOLE,
    Sample,
    fed,
    middle_part,
    other_view,
    read_samples,
    rgb,
    short_names,
)


@pytest.fixture
def prepare() -> Preparation:
    statistics = Statistics(3, (0.5,) * 3, (0.25,) * 3, None, None, (64, 64), (64, 64), 0)
    return Preparation(statistics, 48)


def test_images_are_read_and_broken_ones_replaced(tmp_path, prepare) -> None:
    for number in range(4):
        size = (40, 30) if number % 2 else (30, 40)
        Image.new("RGB", size, (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"")
    held = read_samples(tmp_path, prepare, 2)
    assert [sample.name for sample in held] == ["2.png", "1.png"]
    assert [sample.source for sample in held] == [0, 1]
    assert held[0].size == (SHOWN_SIDE, SHOWN_SIDE * 3 // 4)
    assert held[0].pixels[0].mean().item() == pytest.approx(120 / 255, abs=1e-3)
    assert held[0].whole
    assert fed(held[0], prepare).shape == (3, 64, 48)  # the shorter side is 48


def test_a_folder_of_nothing_but_broken_images_is_refused(tmp_path, prepare) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        read_samples(tmp_path, prepare, 2)
    assert str(error.value) == (
        f"none of 1 images can be used, the first because of {tmp_path}/a.png: the file is empty "
        "(0 bytes); give a folder of images that open in a viewer and are as the network knows "
        "them: 3 channels, 8-bit"
    )


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (np.zeros((30, 40), np.uint16), "it is 16-bit"),
        (np.zeros((30, 40, 5), np.uint8), "it has 5 channels"),
    ],
)
def test_an_image_that_is_not_for_this_network_is_named_and_left_out(
    tmp_path, prepare, caplog, odd, why
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", odd)
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    assert [sample.name for sample in read_samples(tmp_path, prepare, 2)] == ["b.png"]
    (told,) = caplog.messages
    assert told.startswith(f"left out {tmp_path}/a.tif: {why}")


def test_of_a_strip_the_middle_is_shown() -> None:
    strip = torch.arange(100.0).expand(1, 10, 100)
    assert middle_part(strip)[0, 0].tolist() == list(range(40, 60))
    assert middle_part(strip.mT).shape == (1, 20, 10)


def test_names_do_not_tell_where_the_folder_is() -> None:
    assert short_names(["/home/me/data/a.png", "/home/me/data/b.png"]) == ["a.png", "b.png"]
    assert short_names(["/x/train/a.png", "/x/val/a.png"]) == ["train/a.png", "val/a.png"]
    assert short_names(["item 0", "item 7"]) == ["item 0", "item 7"]
    assert short_names(["only.png"]) == ["only.png"]


def test_names_from_here_and_from_elsewhere_are_cut_alike(tmp_path, monkeypatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    here, elsewhere = "more/b.png", str(tmp_path / "a" / "c.png")
    assert short_names([elsewhere, here]) == ["a/c.png", "work/more/b.png"]
    assert short_names([elsewhere, "b.png"]) == ["a/c.png", "work/b.png"]


def test_of_names_on_several_drives_the_last_part_is_left(monkeypatch) -> None:
    def refuse(_: list[str]) -> str:
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", refuse)
    assert short_names(["/c/home/me/a.png", "/d/b.png"]) == ["a.png", "b.png"]


def test_names_that_are_no_text_can_be_written() -> None:
    name = os.fsdecode(b"/x/caf\xe9.png")
    assert short_names([name])[0].encode() == "caf\N{REPLACEMENT CHARACTER}.png".encode()


def test_another_view_knows_where_it_lies(monkeypatch) -> None:
    still = Photometry(prob_jitter=0, prob_gray=0, prob_blur=0)
    monkeypatch.setattr(samples, "OTHER_COLOUR", still)
    h, w = 60, 80
    x, y = unit_centres(w, torch.zeros(1)), unit_centres(h, torch.zeros(1))
    where = torch.stack((x.expand(h, w), y[:, None].expand(h, w), torch.zeros(h, w)))
    view = other_view(Sample("a", where, 3, WHOLE), seed=5)
    assert view.source == 3
    assert not view.whole
    assert view.to_source[0, 0] < 0  # mirrored
    # What a pixel of the view holds is where it comes from.
    for row, column in ((10, 10), (30, 70), (50, 40)):
        point = torch.tensor([(column + 0.5) / w, (row + 0.5) / h, 1.0])
        torch.testing.assert_close(
            view.pixels[:2, row, column], view.to_source @ point, atol=2e-3, rtol=0
        )


def test_another_view_is_the_same_for_a_seed_and_moves_no_generator() -> None:
    sample = Sample("a", torch.rand(3, 32, 40), 0, WHOLE)
    before = torch.get_rng_state()
    one, two, three = (other_view(sample, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.pixels, two.pixels)
    assert not torch.equal(one.pixels, three.pixels)
    assert one.pixels.shape == sample.pixels.shape


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_three_channels_are_shown(channels, shown) -> None:
    pixels = torch.rand(channels, 4, 4)
    assert torch.equal(rgb(pixels), pixels[shown])
