"""The explorer's data: which images it shows, where things lie, and maps that stay small."""

import os
from base64 import b64decode
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange
from evil_run import make_images
from PIL import Image
from small_cards import preparation, small_card
from small_nets import chain
from torch import Tensor, nn

from pixel_level_contrastive_learning.augment import Photometry
from pixel_level_contrastive_learning.backbones.checkpoint import (
    Loaded,
    save_backbone,
)
from pixel_level_contrastive_learning.backbones.factory import build_backbone
from pixel_level_contrastive_learning.evaluation.features import Reader
from pixel_level_contrastive_learning.geometry import unit_centres
from pixel_level_contrastive_learning.visualization import explorer
from pixel_level_contrastive_learning.visualization.explorer import (
    MAX_CELLS,
    SHOWN_SIDE,
    TRAINED,
    WHOLE,
    Sample,
    crop_to_aspect,
    explorer_data,
    extract_maps,
    fine_map,
    mirrored,
    other_view,
    quantized,
    read_samples,
    relative_names,
    stride_of,
)
from pixel_level_contrastive_learning.visualization.pca import centred, likeness
from pixel_level_contrastive_learning.visualization.report import visualize


def features(height: int, width: int, channels: int = 64) -> Tensor:
    """Features as behind a ReLU, of few kinds of things, with noise."""
    kinds = torch.rand(7, channels, generator=torch.Generator().manual_seed(1))
    shares = torch.rand(height, width, 7).pow(4)
    return rearrange(shares @ kinds + 0.02 * torch.rand(height, width, channels), "h w c -> c h w")


def dequantized(entry: dict) -> Tensor:
    """What the page makes of a quantized map: ``(d, h, w)``."""
    numbers = np.frombuffer(b64decode(entry["data"]), np.int8).reshape(entry["h"], entry["w"], -1)
    return rearrange(
        torch.from_numpy(numbers.copy()) * torch.tensor(entry["units"]), "h w d -> d h w"
    )


@pytest.mark.parametrize(("height", "width"), [(6, 8), (12, 5)])
def test_likeness_comes_out_as_of_all_channels(height, width) -> None:
    maps = [features(6, 8), features(height, width), 3 * features(9, 9)]
    one, two = (dequantized(entry) for entry in quantized(maps)[:2])
    # As the page does: the mean over the cells of the two is taken from both.
    count = one[0].numel() + two[0].numel()
    mean = ((one.sum((1, 2)) + two.sum((1, 2))) / count)[:, None, None]
    for cell in ((0, 0), (5, 7), (2, 4)):
        expected = likeness(centred(*maps[:2])[0], cell, centred(*maps[:2])[1])
        actual = likeness(one - mean, cell, two - mean)
        assert (actual - expected).abs().max() < 0.05


def test_numbers_fill_eight_bits_and_units_their_digits() -> None:
    entry = quantized([features(6, 8)], dimensions=16)[0]
    numbers = np.frombuffer(b64decode(entry["data"]), np.int8).reshape(48, 16)
    assert (np.abs(numbers).max(axis=0) == 127).all()
    assert len(entry["units"]) == 16
    assert all(len(f"{unit:.4g}") >= len(str(unit)) - 2 for unit in entry["units"])


def test_features_of_few_channels_are_quantized_as_they_are() -> None:
    assert len(quantized([torch.rand(2, 4, 4)])[0]["units"]) == 2


def test_a_collapsed_map_is_quantized_without_harm() -> None:
    entry = quantized([torch.ones(8, 4, 4)])[0]
    assert torch.isfinite(dequantized(entry)).all()


def test_the_data_holds_each_picture_and_its_maps() -> None:
    view = torch.tensor([[-0.5, 0, 0.75], [0, 0.5, 0.25]])
    samples = [
        Sample("a", torch.rand(3, 20, 30), 0, WHOLE),
        Sample("other", torch.rand(3, 20, 30), 0, view),
    ]
    maps = [features(4, 6), features(4, 6)]
    data = explorer_data(samples, ["data:a", "data:b"], {"Random": maps, "Trained": maps})
    assert data["networks"] == ["Random", "Trained"]
    first, second = data["images"]
    assert (first["whole"], second["whole"]) == (True, False)
    assert second["map"] == [-0.5, 0, 0.75, 0, 0.5, 0.25]
    assert (first["width"], first["height"]) == (30, 20)
    assert len(first["maps"]) == 2
    assert first["src"] == "data:a"


AVERAGES = """
from torch import nn

def averages(channels=3):
    net = nn.Sequential(nn.Conv2d(channels, channels, 8, 8, bias=False, groups=channels))
    nn.init.constant_(net[0].weight, 1 / 64)
    return net.append(nn.AdaptiveAvgPool2d(1))

def padded(channels=3):
    halves = (nn.Conv2d(channels if k == 0 else 4, 4, 3, 2, 1) for k in range(3))
    return nn.Sequential(nn.Sequential(*halves), nn.AdaptiveAvgPool2d(1))

def unpadded(channels=3):
    halves = (nn.Conv2d(channels if k == 0 else 4, 4, 3, 2) for k in range(3))
    return nn.Sequential(nn.Sequential(*halves), nn.AdaptiveAvgPool2d(1))

def pooled(channels=3):
    net = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.AdaptiveAvgPool2d(5))
    return nn.Sequential(net, nn.AdaptiveAvgPool2d(1))

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 8, 8)
        self.norm = nn.LayerNorm([4, 4, 4])

    def forward(self, x):
        return self.norm(self.patches(x)).mean((2, 3))
"""


def loaded(folder: Path, function: str, side: int) -> Loaded:
    """One of these networks."""
    (folder / "averages.py").write_text(AVERAGES)
    layer = "patches" if function == "Fixed" else "0"
    settings = {"image_size": (side, side), "pixel_layer": layer, "instance_layer": "1"}
    card = small_card(f"{folder / 'averages.py'}:{function}", **settings)
    return Loaded(build_backbone(card.model, channels=3, image_size=(side, side)), card, None)


@pytest.mark.parametrize("side", [28, 32, 35])
def test_a_spot_of_the_map_lies_where_it_is_in_the_image(tmp_path, side) -> None:
    ramp = torch.linspace(0, 1, 104).expand(3, 80, 104)
    backbone = loaded(tmp_path, "averages", side)
    maps, _ = extract_maps(backbone, [ramp], torch.device("cpu"), fixed=False)
    (features,) = maps[TRAINED]
    width = features.shape[-1]
    expected = (torch.arange(width) + 0.5) / width
    # But for the outermost ones, which see some of the mirror image.
    torch.testing.assert_close(features[0, 0, 2:-2], expected[2:-2], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("function", "side", "stride"),
    [
        ("averages", 28, 8),  # three cells and a rest
        ("padded", 36, 8),  # five cells, of which the last sticks out
        ("padded", 32, 8),
        ("unpadded", 32, 11),  # three cells: as before, since true ones would leave the rim out
        ("pooled", 32, None),
    ],
)
def test_a_stride_is_that_of_the_network_and_not_of_the_view(
    tmp_path, function, side, stride
) -> None:
    backbone = loaded(tmp_path, function, side)
    reader = Reader(backbone.net, [backbone.card.pixel_layer], 3, backbone.card.image_size)
    assert stride_of(reader, backbone.card) == stride


def test_a_network_of_ones_own_that_takes_one_size_only_is_shown(tmp_path) -> None:
    backbone = loaded(tmp_path, "Fixed", 32)
    save_backbone(tmp_path / "run" / "backbone.safetensors", backbone.net, backbone.card)
    page = visualize(
        tmp_path / "run", images=make_images(tmp_path / "images", 1), out=tmp_path / "page.html"
    )
    assert page.exists()


def test_images_are_read_and_broken_ones_replaced(tmp_path) -> None:
    for number in range(4):
        size = (40, 30) if number % 2 else (30, 40)
        Image.new("RGB", size, (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"")
    samples = read_samples(tmp_path, preparation(48), 2)
    assert [sample.name for sample in samples] == ["2.png", "1.png"]
    assert [sample.source for sample in samples] == [0, 1]
    assert samples[0].size == (SHOWN_SIDE, SHOWN_SIDE * 3 // 4)
    assert samples[0].pixels[0].mean().item() == pytest.approx(120 / 255, abs=1e-3)
    assert torch.equal(samples[0].to_source, WHOLE)


def test_a_folder_of_nothing_but_broken_images_is_refused(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        read_samples(tmp_path, preparation(48), 2)
    assert str(error.value) == (
        f"none of 1 images can be used; the first: {tmp_path}/a.png: the file is empty "
        "(0 bytes); give a folder of images that open in a viewer and match the network's input: "
        "3 channels, 8-bit"
    )


def test_of_a_strip_the_middle_is_shown() -> None:
    strip = torch.arange(100.0).expand(1, 10, 100)
    assert crop_to_aspect(strip)[0, 0].tolist() == list(range(40, 60))
    assert crop_to_aspect(strip.mT).shape == (1, 20, 10)


def test_names_do_not_tell_where_the_folder_is() -> None:
    assert relative_names(["/home/me/data/a.png", "/home/me/data/b.png"]) == ["a.png", "b.png"]
    assert relative_names(["/x/train/a.png", "/x/val/a.png"]) == ["train/a.png", "val/a.png"]
    assert relative_names(["item 0", "item 7"]) == ["item 0", "item 7"]
    assert relative_names(["only.png"]) == ["only.png"]


def test_names_from_here_and_from_elsewhere_are_cut_alike(tmp_path, monkeypatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    here, elsewhere = "more/b.png", str(tmp_path / "a" / "c.png")
    assert relative_names([elsewhere, here]) == ["a/c.png", "work/more/b.png"]
    assert relative_names([elsewhere, "b.png"]) == ["a/c.png", "work/b.png"]


def test_of_names_on_several_drives_the_last_part_is_left(monkeypatch) -> None:
    def refuse(_: list[str]) -> str:
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", refuse)
    assert relative_names(["/c/home/me/a.png", "/d/b.png"]) == ["a.png", "b.png"]


def test_names_that_are_no_text_can_be_written() -> None:
    name = os.fsdecode(b"/x/caf\xe9.png")
    assert relative_names([name])[0].encode() == "caf\N{REPLACEMENT CHARACTER}.png".encode()


def test_another_view_knows_where_it_lies(monkeypatch) -> None:
    still = Photometry(prob_jitter=0, prob_gray=0, prob_blur=0)
    monkeypatch.setattr(explorer, "OTHER_COLOUR", still)
    h, w = 60, 80
    x, y = unit_centres(w, torch.zeros(1)), unit_centres(h, torch.zeros(1))
    where = torch.stack((x.expand(h, w), y[:, None].expand(h, w), torch.zeros(h, w)))
    view = other_view(Sample("a", where, 3, WHOLE), seed=5)
    assert view.source == 3
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


def reader_of(cells: nn.Conv2d) -> Reader:
    """Reads a layer whose cells are the means of what they see."""
    nn.init.constant_(cells.weight, 1 / cells.weight[0].numel())
    net = chain(cells=cells, head=nn.AdaptiveAvgPool2d(1))
    return Reader(net, ["cells"], cells.in_channels, (32, 32))


@pytest.fixture
def averages() -> Reader:
    return reader_of(nn.Conv2d(2, 2, 8, 8, bias=False, groups=2))


@pytest.mark.parametrize("stride", [8, None])
def test_a_finer_map_is_the_mean_around_each_finer_cell(averages, stride) -> None:
    pixels = torch.rand(2, 24, 32)
    fine = fine_map(averages, pixels, stride, cells=16)  # 4 cells across: 4 times finer
    assert fine.shape == (2, 12, 16)
    padded = mirrored(pixels, 8, 8)
    for row, column in ((0, 0), (5, 6), (11, 15)):
        # The finer cell is 2 pixels wide, its middle at 2 i + 1; the window reaches 4 either way.
        top, left = 2 * row + 1 - 4 + 8, 2 * column + 1 - 4 + 8
        window = padded[:, top : top + 8, left : left + 8]
        torch.testing.assert_close(fine[:, row, column], window.mean(dim=(1, 2)))


def test_a_map_that_is_fine_enough_is_left_as_it_is(averages) -> None:
    pixels = torch.rand(2, 24, 32)
    expected = averages(pixels[None])[0]
    torch.testing.assert_close(fine_map(averages, pixels, None, cells=4), expected)
    torch.testing.assert_close(fine_map(averages, pixels, 8, cells=4), expected)


def test_an_image_that_is_not_whole_cells_is_resized(averages) -> None:
    assert fine_map(averages, torch.rand(2, 21, 35), 8, cells=4).shape == (2, 3, 4)


def test_the_zeros_that_a_network_pads_with_are_kept_away() -> None:
    reader = reader_of(nn.Conv2d(1, 1, 9, 4, padding=4, bias=False))
    flat = torch.ones(1, 32, 32)
    assert reader(flat[None]).std() > 0.05
    assert fine_map(reader, flat, 4, cells=16).std() < 1e-6


def test_a_mirror_goes_on_beyond_the_image() -> None:
    row = torch.arange(3.0).expand(1, 1, 3)
    assert mirrored(row, 0, 4)[0, 0].tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]


def test_a_map_too_fine_to_see_is_averaged() -> None:
    large = torch.rand(2, MAX_CELLS, 2 * MAX_CELLS)
    small = fine_map(lambda pixels: pixels, large, None)
    assert small.shape == (2, MAX_CELLS // 2, MAX_CELLS)
    torch.testing.assert_close(small[:, 0, 0], large[:, :2, :2].mean(dim=(1, 2)))
