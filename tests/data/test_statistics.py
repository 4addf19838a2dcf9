"""What a sample of the images tells: channels, ranges, mean and deviation, sizes."""

import io
import warnings

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from pixel_level_contrastive_learning.augment import IMAGENET_MEAN, IMAGENET_STD
from pixel_level_contrastive_learning.data.arrays import NODATA_TAG
from pixel_level_contrastive_learning.data.decoding import open_image
from pixel_level_contrastive_learning.data.image import ImageError
from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.data.statistics import Statistics, measure


def gray(value: int) -> torch.Tensor:
    return torch.full((1, 8, 8), value, dtype=torch.uint8)


def test_eight_bit_colour_takes_imagenets_figures() -> None:
    images = [torch.zeros(3, h, w, dtype=torch.uint8) for h, w in ((4, 9), (6, 5), (8, 7))]
    statistics = measure(open_source(images))
    assert statistics == Statistics(3, IMAGENET_MEAN, IMAGENET_STD, None, None, (6, 7))


def test_the_pixels_of_eight_bit_colour_are_not_decoded(tmp_path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:60])  # the header alone
    assert measure(open_source(tmp_path)).channels == 3


def test_gray_images_are_measured() -> None:
    statistics = measure(open_source([gray(51), gray(153)]))
    assert statistics.channels == 1
    assert statistics.mean == pytest.approx((0.4,))
    assert statistics.std == pytest.approx((0.2,))
    assert statistics.low is None
    assert measure(open_source([gray(51)])).std == pytest.approx((1 / 255,))  # never 0


def test_gray_among_colour_becomes_colour() -> None:
    statistics = measure(open_source([gray(255), torch.zeros(3, 8, 8, dtype=torch.uint8)]))
    assert statistics.channels == 3
    assert statistics.mean == pytest.approx((0.5,) * 3)
    assert statistics.std == pytest.approx((0.5,) * 3)


def test_deep_data_is_scaled_by_its_percentiles() -> None:
    values = torch.arange(10_001, dtype=torch.float32).view(1, 73, 137)
    both = torch.cat((values, -3 * values + 7))
    statistics = measure(open_source([both]))
    assert statistics.low == pytest.approx((10, 7 - 3 * 9990), rel=1e-3, abs=4)
    assert statistics.high == pytest.approx((9990, 7 - 30), rel=1e-3, abs=4)
    assert statistics.mean == pytest.approx((0.5, 0.5), abs=1e-3)
    assert statistics.std == pytest.approx((12**-0.5,) * 2, rel=0.01)  # of what is even on [0, 1]
    form = statistics.convert(torch.tensor([[[10.0, 5000, 9990, 0, 20000]]]).repeat(2, 1, 1))
    assert form[0, 0].tolist() == pytest.approx([0, 0.5, 1, 0, 1], abs=1e-3)
    constant = measure(open_source([torch.full((1, 4, 4), 5.0)]))
    assert constant.high[0] - constant.low[0] == 1


@pytest.mark.parametrize("value", [0.0, -7e4, 2.0**25, -3.4028234e38])
def test_a_constant_band_of_any_value_becomes_0(value) -> None:
    pixels = torch.full((1, 25, 40), value)
    assert not measure(open_source([pixels])).convert(pixels).any()
    pixels[0, 0, 0] += 4  # beyond the percentiles: their ends differ by less than float32 tells
    assert not measure(open_source([pixels])).convert(pixels)[:, 1:].any()


def test_what_was_not_measured_does_not_count() -> None:
    ramp = torch.linspace(0, 1, 100 * 99).view(100, 99)
    whole = torch.stack((ramp, 280 + 20 * ramp, 5 * ramp))
    holes = whole.clone()
    holes[:, :, ::8] = torch.nan
    holes[:, :, 1::16] = torch.inf
    holes[2] = torch.nan  # a band without any number
    expected, statistics = measure(open_source([whole])), measure(open_source([holes]))
    for name in ("low", "high", "mean", "std"):
        near = pytest.approx(getattr(expected, name)[:2], rel=0.03, abs=0.003)
        assert getattr(statistics, name)[:2] == near, name
    assert (statistics.low[2], statistics.high[2], statistics.mean[2]) == (0, 1, 0)
    with pytest.raises(ValueError, match="none of its values is a finite number"):
        measure(open_source([torch.full((1, 4, 4), torch.nan)]))


def test_nodata_of_a_geotiff_does_not_count(tmp_path) -> None:
    heights = np.random.default_rng(0).uniform(280, 300, (80, 90)).astype(np.float32)
    heights[:5] = -9999  # 6 % of it
    tag = (NODATA_TAG, 2, 0, "-9999", True)
    tifffile.imwrite(tmp_path / "a.tif", heights, extratags=[tag])
    statistics = measure(open_source(tmp_path))
    assert statistics.low == pytest.approx((280,), abs=0.1)
    assert statistics.mean == pytest.approx((0.5,), abs=0.02)


def test_nodata_that_is_named_stands_beside_that_of_a_geotiff(tmp_path) -> None:
    rows = np.arange(60, dtype=np.uint8)[:, None].repeat(90, 1)
    tifffile.imwrite(tmp_path / "a.tif", rows, extratags=[(NODATA_TAG, 2, 0, "7", True)])
    known = open_source(tmp_path, nodata=3).open(0).decode().known
    assert (~known[0, :, 0]).nonzero().flatten().tolist() == [3, 7]


def filled(values: torch.Tensor, value: float, rows: int = 5) -> torch.Tensor:
    """Values of which some rows are another one."""
    values = values.clone()
    values[:, :rows] = value
    return values


ORDER = torch.randperm(80, generator=torch.Generator().manual_seed(0))
RAMP = torch.linspace(0, 1, 80 * 90).view(1, 80, 90)[:, ORDER]
NODATA = {
    "reflectance": (0.3 * RAMP, -9999),
    "reflectance in whole numbers": (10000 * RAMP, 65535),
    "twelve bits": (4000 * RAMP, 65535),
    "heights": (280 + 20 * RAMP, 0),
    "tissue": (3000 * RAMP - 1000, -32768),
    "float's lowest": (RAMP, torch.finfo(torch.float32).min),
    "a value of one's own": (RAMP, -123),
}


@pytest.mark.parametrize("kind", NODATA)
def test_a_value_far_from_all_others_is_left_out_and_told(kind, caplog) -> None:
    values, value = NODATA[kind]
    expected = measure(open_source([values, values]))
    assert caplog.text == ""
    statistics = measure(open_source([values, filled(values, value)]))
    for name in ("low", "high", "mean", "std"):
        assert getattr(statistics, name) == pytest.approx(
            getattr(expected, name), rel=0.05, abs=0.05
        )
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == (
        f"{value:g} fills 3.1 % of the values and lies far from all others: the range leaves it "
        f"out. Give --nodata {value:g} if it means that nothing was measured"
    )
    caplog.clear()
    named = measure(open_source([values, filled(values, value)], nodata=value))
    assert caplog.text == ""
    assert named.low == pytest.approx(statistics.low, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "value"),
    [
        (3000 * RAMP - 1000, -1024),  # air around a body
        (3000 * RAMP - 1000, -2000),  # padding of a scanner
        (10000 * RAMP, 0),
        (0.1 + 0.1 * RAMP, 0.35),  # something bright
        (500 * RAMP, 4095),  # and saturated
        ((RAMP > 0.5).float(), 1),  # classes
        (torch.zeros(1, 80, 90), 7),
    ],
)
def test_values_that_may_be_measured_stay_in_the_range(values, value, caplog) -> None:
    statistics = measure(open_source([values, filled(values, value)]))
    assert ("check whether they are masks" in caplog.text) is (len(values.unique()) <= 2)
    assert "lies far" not in caplog.text
    low, high = min(values.min().item(), value), max(values.max().item(), value)
    assert statistics.low == pytest.approx((low,), abs=0.01 * (high - low))
    assert statistics.high == pytest.approx((high,), abs=0.01 * (high - low))


def test_both_ends_may_be_no_values(caplog) -> None:
    values = filled(filled(4000 * RAMP, 65535, 10), -9999)
    statistics = measure(open_source([values]))
    assert len(caplog.records) == 2
    assert -1 < statistics.low[0] < statistics.high[0] < 4001


def test_some_pixels_that_move_no_percentile_are_not_told(caplog) -> None:
    values = RAMP.clone()
    values[0, 0, :3] = -9999
    assert measure(open_source([values])).low[0] > -1
    assert caplog.text == ""


def test_what_is_named_as_nodata_becomes_the_lowest() -> None:
    source = open_source(
        [torch.tensor([[[5.0, -1, 7]]]), torch.tensor([[[3, 255]]]).byte()], nodata=-1
    )
    assert source.open(0).read().tolist() == [[[5, 5, 7]]]
    assert source.open(0).decode().known.tolist() == [[[True, False, True]]]
    assert source.open(1).read().tolist() == [[[3, 255]]]
    eight = open_source([torch.tensor([[[51, 153, 0]]]).byte()], nodata=0)
    assert eight.open(0).read().tolist() == [[[51, 153, 0]]]
    assert measure(eight).mean == pytest.approx((0.4,))


@pytest.mark.parametrize("nodata", [None, 0, 7])
def test_a_fourth_band_of_two_values_is_a_mask(nodata) -> None:
    image = torch.randint(0, 256, (4, 8, 8), dtype=torch.uint8)
    assert measure(open_source([image], nodata=nodata)).channels == 4
    image[3] = 255
    image[3, 0] = 0
    for masked in (image, image.float() * 257):
        assert measure(open_source([masked], nodata=nodata)).channels == 3
        assert measure(open_source([masked], nodata=nodata), channels=4).channels == 4


def test_a_fourth_band_that_is_left_out_for_others_is_told(caplog) -> None:
    near = [torch.randint(0, 256, (4, 8, 8), dtype=torch.uint8) for _ in range(5)]
    colour, masked = near[0][:3], near[0].clone()
    masked[3] = 255
    assert measure(open_source([*near, masked])).channels == 4
    assert not caplog.records
    assert measure(open_source([*near, masked, colour])).channels == 3
    assert [record.getMessage() for record in caplog.records] == [
        "5 of 7 images have a fourth channel that is no mask and is left out, since others have 3; "
        "keep images of one kind in a folder, or give --channels 4"
    ]
    measure(open_source([*near, colour]), channels=3)  # as asked for
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("kinds", "channels"),
    [((1, 1), 1), ((3, 1), 3), ((7, 7, 2), 7), ((3, 4, 4), 3), ((2, 2, 5), 2)],
)
def test_convention_which_channels_a_mixture_has(kinds, channels) -> None:
    images = [torch.randint(0, 256, (c, 8, 8), dtype=torch.uint8) for c in kinds]
    statistics = measure(open_source(images))
    assert statistics.channels == channels
    assert len(statistics.mean) == len(statistics.std) == channels


def test_channels_may_be_asked_for() -> None:
    colour = torch.stack([torch.full((8, 8), value, dtype=torch.uint8) for value in (255, 0, 0)])
    statistics = measure(open_source([colour]), channels=1)
    assert statistics.channels == 1
    assert statistics.mean == pytest.approx((0.299,), abs=0.002)
    assert measure(open_source([gray(255)]), channels=3).mean == pytest.approx((1, 1, 1))
    with pytest.raises(ValueError, match=r"^channels is 5, but the images have 3; leave it out"):
        measure(open_source([colour, "no image", colour]), channels=5)


def test_a_sample_is_a_function_of_the_seed() -> None:
    source = open_source([gray(value) for value in range(200)])
    assert measure(source, seed=1, sample=5) == measure(source, seed=1, sample=5)
    assert measure(source, seed=1, sample=5) != measure(source, seed=2, sample=5)


def test_broken_images_are_passed_over_unless_all_are(tmp_path) -> None:
    (tmp_path / "a.png").write_text("text")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        measure(open_source(tmp_path))
    assert str(error.value).startswith(
        "none of the 2 images looked at (of 2) can be used; the first of them:\n  "
    )
    assert "b.png: the file is empty (0 bytes)" in str(error.value)
    Image.new("L", (3, 3)).save(tmp_path / "c.png")
    assert measure(open_source(tmp_path)).median_size == (3, 3)


def test_four_band_tiffs_are_measured(tmp_path) -> None:
    rng = np.random.default_rng(0)
    for i in range(3):
        bands = rng.integers(0, 4000, (20, 30, 4), dtype=np.uint16)
        tifffile.imwrite(tmp_path / f"{i}.tif", bands, photometric="rgb")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statistics = measure(open_source(tmp_path))
    assert statistics.channels == 4
    assert all(low < 20 for low in statistics.low)
    assert all(3980 < high < 4000 for high in statistics.high)
    assert statistics.median_size == (20, 30)


# Bringing images to one form.


def opened(image: Image.Image) -> object:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return open_image(stream.getvalue())


def test_images_of_another_kind_are_not_accepted() -> None:
    plain = Statistics(3, (), (), None, None, (1, 1))
    plain.check(opened(Image.new("L", (4, 4))))
    plain.check(opened(Image.new("RGB", (4, 4))))
    with pytest.raises(
        ImageError, match=r"^it is 16-bit or float, where the images looked at were"
    ):
        plain.check(opened(Image.new("I;16", (4, 4))))
    seven = Statistics(7, (), (), None, None, (1, 1))
    with pytest.raises(ImageError, match=r"^it has 3 channels where the others have 7; keep"):
        seven.check(opened(Image.new("RGB", (4, 4))))


def test_convention_pixels_in_the_form_of_the_run() -> None:
    colour = torch.tensor([255, 0, 0], dtype=torch.uint8).view(3, 1, 1)

    def form(channels: int, pixels: torch.Tensor, deep: bool = False) -> torch.Tensor:
        low, high = ((0.0,) * channels, (1000.0,) * channels) if deep else (None, None)
        plain = Statistics(channels, (), (), low, high, (1, 1))
        return plain.convert(pixels).flatten()

    assert form(3, colour).tolist() == [255, 0, 0]
    each = 255 * torch.eye(3, dtype=torch.uint8).view(3, 1, 3)  # a red, a green, a blue pixel
    assert form(1, each).tolist() == [76, 150, 29]  # of 255: 0.299, 0.587 and 0.114
    assert form(3, colour[:1]).tolist() == [255, 255, 255]
    assert form(3, torch.cat((colour, colour[:1]))).tolist() == [255, 0, 0]
    assert form(3, colour, deep=True).tolist() == [1, 0, 0]  # 8-bit among deep data
    assert form(3, torch.full((1, 1, 1), 250.0), deep=True).tolist() == [0.25] * 3
