"""Large images read by windows: the same pixels as the whole image has, whatever the file."""

import io
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tifffile import TiffWriter, imwrite

from pixel_level_contrastive_learning.data import raster_files
from pixel_level_contrastive_learning.data.decoding import open_image
from pixel_level_contrastive_learning.data.image import ImageError
from pixel_level_contrastive_learning.data.raster_files import is_larger, open_rasters
from pixel_level_contrastive_learning.data.sources import open_source

rasterio = pytest.importorskip("rasterio")
RNG = np.random.default_rng(0)
BOX = (30, 20, 70, 52)
PLANES = {"photometric": "minisblack", "planarconfig": "separate"}


def values(shape: tuple[int, ...], dtype: type = np.uint16) -> np.ndarray:
    return RNG.integers(0, 255 if dtype == np.uint8 else 60000, shape).astype(dtype)


def picture(path: Path, mode: str, **options: object) -> None:
    bands = {"L": (), "P": (), "CMYK": (4,), "RGB": (3,), "RGBA": (4,), "LA": (2,)}[mode]
    image = Image.fromarray(values((90, 110, *bands), np.uint8), None if mode == "P" else mode)
    if mode == "P":
        image.putpalette(values((768,), np.uint8).tobytes())
    image.save(path, **options)


def by_gdal(
    path: Path, array: np.ndarray, mask: np.ndarray | None = None, **options: object
) -> None:
    shape = dict(zip(("count", "height", "width"), array.shape, strict=True))
    with (
        warnings.catch_warnings(action="ignore"),
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", dtype=array.dtype.name, **shape, **options
        ) as file,
    ):
        file.write(array)
        if mask is not None:
            file.write_mask(mask)


SLOPE = np.add.outer(np.arange(96), np.arange(112))[..., None] + np.arange(3) * 9
SLOPE = SLOPE.astype(np.uint8)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = orientation
    return exif


TIFFS: dict[str, tuple[np.ndarray, dict[str, object]]] = {
    "strips": (values((90, 110, 3)), {"photometric": "rgb"}),
    "planes": (values((12, 90, 110)), {"compression": "zlib", **PLANES}),
    "big": (values((90, 110, 4)), {"bigtiff": True, "tile": (16, 32), "compression": "lzw"}),
    "float": (values((90, 110), np.float32) / 7, {"compression": "zstd", "predictor": 3}),
    "eight": (values((90, 110, 3), np.uint8), {"photometric": "rgb"}),
    "white": (values((90, 110), np.uint8), {"photometric": "miniswhite"}),
    "deep white": (values((90, 110)), {"photometric": "miniswhite"}),
    "white planes": (
        values((3, 90, 110)),
        PLANES | {"photometric": "miniswhite", "compression": "zlib"},
    ),
    "white float": (values((90, 110), np.float32) / 60000, {"photometric": "miniswhite"}),
    "smooth": (SLOPE, {"photometric": "rgb", "compression": "jpeg", "tile": (32, 32)}),
    "turned": (values((110, 90)), {"extratags": [(274, "H", 1, 6, True)]}),
    "motorola": (values((90, 110)), {"byteorder": ">"}),
    "imagej": (values((4, 90, 110)), {"imagej": True, "metadata": {"axes": "CYX"}}),
    "stack": (values((4, 90, 110)), {"photometric": "minisblack"}),
    "motorola stack": (values((4, 90, 110)), {"photometric": "minisblack", "byteorder": ">"}),
    "turned stack": (
        values((4, 110, 90)),
        {"photometric": "minisblack", "extratags": [(274, "H", 1, 6, True)]},
    ),
    "packed": (values((4, 90, 110)), {"photometric": "minisblack", "compression": "zlib"}),
}
FILES: dict[str, Callable[[Path], object]] = {
    "first.npy": lambda p: np.save(p, values((5, 90, 110), np.int16)),
    "last.npy": lambda p: np.save(p, values((90, 110, 2), np.float32)),
    "smooth.jpg": lambda p: Image.fromarray(SLOPE).save(p, exif=turned(6)),
    "palette.tif": lambda p: picture(p, "P"),
    "fax.tif": lambda p: Image.fromarray(SLOPE[..., 0] > 60).save(p, compression="group4"),
    "white nibbles.tif": lambda p: by_gdal(
        p, values((1, 90, 110), np.uint8) % 16, nbits=4, photometric="MINISWHITE"
    ),
    "nibbles.tif": lambda p: by_gdal(p, values((1, 90, 110), np.uint8) % 16, nbits=4),
    "palette.png": lambda p: picture(p, "P"),
    "clear.png": lambda p: picture(p, "RGBA"),
    "gray.png": lambda p: picture(p, "LA"),
    "deep.png": lambda p: Image.fromarray(values((90, 110))).save(p),
    "lossless.webp": lambda p: picture(p, "RGB", lossless=True),
} | {
    f"{name}.tif": lambda p, array=array, options=options: imwrite(p, array, **options)
    for name, (array, options) in TIFFS.items()
}
GIANTS = [name for name in FILES if Path(name).suffix in (".jpg", ".png")]


@pytest.mark.parametrize(
    ("name", "giant"), [*((name, False) for name in FILES), *((name, True) for name in GIANTS)]
)
def test_a_window_holds_what_the_whole_image_holds(tmp_path, monkeypatch, name, giant) -> None:
    FILES[name](tmp_path / name)
    if giant:
        monkeypatch.setattr(raster_files, "GIANT", 0)
    [raster] = open_rasters(str(tmp_path / name))
    whole = open_image((tmp_path / name).read_bytes())
    assert (raster.size, raster.bands) == (whole.size, whole.channels)
    pixels, known = raster.read(BOX, (32, 40))
    x0, y0, x1, y1 = BOX
    expected = whole.read()[:, y0:y1, x0:x1].numpy()
    assert pixels.shape == expected.shape
    # Another decoder interpolates the chroma of a JPEG and rounds what lies over black otherwise.
    difference = np.abs(pixels.astype(np.float64) - expected).max()
    assert difference <= {"smooth": 3, "clear": 1, "gray": 1}.get(Path(name).stem, 0)
    clear = giant and name in ("clear.png", "gray.png")
    assert known.all() != clear
    assert (pixels.dtype == np.uint8) == (not whole.high_depth)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_raster_is_cut_upright(tmp_path, orientation) -> None:
    path = tmp_path / "a.tif"
    imwrite(path, values((90, 110, 4)), extratags=[(274, "H", 1, orientation, True)])
    [raster] = open_rasters(str(path))
    whole = open_image(path.read_bytes()).read()
    assert raster.size == tuple(whole.shape[1:])
    pixels, _ = raster.read((3, 5, 60, 80), (75, 57))
    assert (pixels == whole[:, 5:80, 3:60].numpy()).all()


@pytest.mark.filterwarnings("ignore:Use `@`")  # of rasterio, to affine
def test_levels_and_the_size_of_a_pixel_are_read(tmp_path) -> None:
    from rasterio.transform import from_origin

    ramp = np.arange(256, dtype=np.uint16).repeat(256).reshape(1, 256, 256) * 16
    profile = {"driver": "GTiff", "height": 256, "width": 256, "count": 1, "dtype": "uint16"}
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 10, 10)}
    with rasterio.open(tmp_path / "map.tif", "w", **profile, **place) as file:
        file.write(ramp)
        file.build_overviews([2, 4])
    [raster] = open_rasters(str(tmp_path / "map.tif"))
    assert (raster.scales, raster.mpp) == ((1.0, 2.0, 4.0), 10.0)
    pixels, _ = raster.read((0, 0, 30, 30), (10, 10))  # no level has it: it is averaged down
    assert np.abs(pixels[0, :, 0] - (np.arange(10) * 48 + 16)).max() <= 16
    imwrite(tmp_path / "cells.tif", ramp[0], resolution=(20000, 20000), resolutionunit=3)
    assert open_rasters(str(tmp_path / "cells.tif"))[0].mpp == 0.5


def test_what_was_not_measured_is_known(tmp_path) -> None:
    bands = values((3, 40, 50), np.float32)
    bands[:, :, :10] = -9999
    bands[0, :, 10:20] = -9999  # in one band only
    bands[:, :, 20:30] = np.nan
    imwrite(tmp_path / "a.tif", bands, extratags=[(42113, "s", 0, "-9999", True)], **PLANES)
    [raster] = open_rasters(str(tmp_path / "a.tif"))
    pixels, known = raster.read((0, 0, 50, 40), (40, 50))
    assert raster.nodata == -9999
    assert known[0].tolist() == [False] * 10 + [True] * 10 + [False] * 10 + [True] * 20
    assert np.array_equal(pixels, bands, equal_nan=True)


def test_nodata_of_values_that_begin_with_white_is_turned_with_them(tmp_path) -> None:
    ramp = np.arange(2000, dtype=np.uint16).reshape(40, 50)
    options = {"photometric": "miniswhite", "compression": "zlib"}
    imwrite(tmp_path / "a.tif", ramp, extratags=[(42113, "s", 0, "7", True)], **options)
    [raster] = open_rasters(str(tmp_path / "a.tif"))
    pixels, known = raster.read((0, 0, 50, 40), (40, 50))
    assert (pixels == 65535 - ramp).all()
    assert (known == (ramp != 7)).all()
    assert raster.nodata == 65535 - 7


def test_the_alpha_of_a_map_keeps_its_values_when_it_is_scaled_down(tmp_path) -> None:
    pixels = values((90, 110, 4), np.uint8)
    pixels[..., 3] = np.where(pixels[..., 0] > 90, 255, 0)
    imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    window = open_rasters(str(tmp_path / "a.tif"))[0].read((0, 0, 110, 90), (45, 55))
    assert set(np.unique(window.pixels[3])) == {0, 255}


def test_a_mask_beside_the_pixels_says_what_was_measured(tmp_path) -> None:
    measured = np.tri(40, 50, dtype=bool)
    by_gdal(tmp_path / "a.tif", values((3, 40, 50), np.uint8), measured)
    [raster] = open_rasters(str(tmp_path / "a.tif"))
    assert (raster.read((5, 3, 45, 33), (30, 40)).known == measured[3:33, 5:45]).all()


def frames(path: Path) -> None:
    first, *others = [Image.fromarray(frame) for frame in values((3, 40, 50), np.uint8)]
    first.save(path, save_all=True, append_images=others)


def two_series(path: Path) -> None:
    imwrite(path, values((2, 40, 50)), photometric="minisblack")
    imwrite(path, values((30, 45)), append=True)


def stack(*shape: int, axes: str = "", **options: object) -> Callable[[Path], None]:
    named = {"metadata": {"axes": axes}} if axes else {}
    return lambda path: imwrite(path, values((*shape, 40, 50)), **named, **options)


GRAY = {"photometric": "minisblack"}
COLOURS = values((3, 256), np.uint8).astype(np.uint16) * 257
STACKS: dict[str, tuple[Callable[[Path], object], int, int]] = {
    "frames.gif": (frames, 3, 3),
    "two_series.tif": (two_series, 3, 1),
    "z.ome.tif": (stack(3, axes="ZYX", **GRAY), 3, 1),
    "zc.ome.tif": (stack(3, 2, axes="ZCYX", **GRAY), 3, 2),
    "cz.ome.tif": (stack(2, 3, axes="CZYX", **GRAY), 3, 2),
    "tzc.ome.tif": (stack(2, 2, 2, axes="TZCYX", **GRAY, compression="zlib"), 4, 2),
    "packed.ome.tif": (stack(2, 3, axes="CZYX", **GRAY, compression="zlib"), 3, 2),
    "tz.tif": (stack(2, 3, axes="TZYX", **GRAY), 6, 1),
    "tz packed.tif": (stack(2, 3, axes="TZYX", **GRAY, compression="zlib"), 6, 1),
    "unnamed.tif": (stack(16, **GRAY), 1, 16),
    "too many.tif": (stack(17, **GRAY), 17, 1),
    "more than imagej has.tif": (stack(12, imagej=True), 12, 1),
    "rows.tif": (lambda path: imwrite(path, values((40, 50, 12)), **GRAY), 1, 12),
    "colour.tif": (lambda path: imwrite(path, values((5, 40, 50, 3)), photometric="rgb"), 5, 3),
    "white.tif": (stack(3, photometric="miniswhite"), 1, 3),
    "palette.tif": (
        lambda path: imwrite(
            path, values((5, 40, 50), np.uint8), photometric="palette", colormap=COLOURS
        ),
        5,
        3,
    ),
}


@pytest.mark.parametrize("pages", [None, "images", "channels", "first"])
@pytest.mark.parametrize("name", STACKS)
def test_stacks_are_read_as_when_they_are_not_cut(tmp_path, name, pages) -> None:
    write, images, bands = STACKS[name]
    write(tmp_path / name)
    if name == "two_series.tif" and pages == "channels":
        with pytest.raises(ImageError, match="differ in size"):
            open_rasters(str(tmp_path / name), pages)
        return
    source = open_source(tmp_path / name, pages=pages)
    rasters = open_rasters(str(tmp_path / name), pages)
    assert len(rasters) == len(source)
    if pages is None:
        assert [raster.bands for raster in rasters] == [bands] * images
    for index, raster in enumerate(rasters):
        (h, w), pixels = raster.size, source.open(index).read().numpy()
        assert (raster.read((0, 0, w, h), (h, w)).pixels == pixels).all()
        assert (raster.read((10, 20, 30, 29), (9, 20)).pixels == pixels[:, 20:29, 10:30]).all()


def test_a_slide_is_read_at_any_scale(tmp_path) -> None:
    pytest.importorskip("openslide")
    slope = np.linspace(0, 250, 1024)[None, :, None].repeat(768, 0).repeat(3, 2).astype(np.uint8)
    with TiffWriter(tmp_path / "a.svs") as file:
        for k in range(2):
            level = slope[:: 4**k, :: 4**k] // (1 + k)
            file.write(level, tile=(128, 128), photometric="rgb", metadata=None,
                       resolution=(40000, 40000), resolutionunit=3, subfiletype=k)  # fmt: skip
    [raster] = open_rasters(str(tmp_path / "a.svs"))
    assert (raster.size, raster.bands, raster.scales) == ((768, 1024), 3, (1.0, 4.0))
    assert raster.mpp == 0.25
    for scale in (1, 2, 4):
        pixels, known = raster.read((400, 64, 400 + 64 * scale, 64 + 32 * scale), (32, 64))
        columns = slope[0, 400 : 400 + 64 * scale, 0].reshape(64, scale)
        columns = columns / (2 if scale == 4 else 1)  # as that level was written
        assert (pixels.shape, known.all()) == ((3, 32, 64), True)
        assert np.abs(pixels[1, 7] - columns.mean(axis=1)).max() <= 4 + scale
    (tmp_path / "b.svs").write_bytes(b"no slide")
    with pytest.raises(ImageError, match="damaged: "):
        open_rasters(str(tmp_path / "b.svs"))


def test_what_cannot_be_read_right_is_refused(tmp_path) -> None:
    Image.new("CMYK", (50, 40)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match="its colours are SEPARATED; save it as RGB"):
        open_rasters(str(tmp_path / "a.tif"))
    colours = values((3, 2**16))
    imwrite(tmp_path / "p.tif", values((50, 40)), photometric="palette", colormap=colours)
    with pytest.raises(ImageError, match="its colours are a palette of 16 bits; save it as RGB"):
        open_rasters(str(tmp_path / "p.tif"))
    np.save(tmp_path / "a.npy", np.zeros((40, 50), np.complex64))
    with pytest.raises(ImageError, match="values of type complex64; they must be whole numbers"):
        open_rasters(str(tmp_path / "a.npy"))
    (tmp_path / "b.tif").write_bytes(b"II*\0damaged")
    with pytest.raises(ImageError, match="damaged: "):
        open_rasters(str(tmp_path / "b.tif"))


@pytest.mark.parametrize(
    ("library", "name", "extra"),
    [("rasterio", "a.tif", "rasters"), ("openslide", "a.svs", "slides")],
)
def test_a_missing_library_is_named_with_its_extra(
    tmp_path, monkeypatch, library, name, extra
) -> None:
    imwrite(tmp_path / name, values((40, 50)), compression="zlib")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError) as error:
        open_rasters(str(tmp_path / name))
    assert error.value.name == library
    assert str(error.value).startswith(f"{library} is not installed; cutting ")
    assert str(error.value).endswith(f"pip install 'pixel-level-contrastive-learning[{extra}]'")


def test_the_size_is_read_from_the_header(tmp_path, monkeypatch) -> None:
    for name in ("strips.tif", "first.npy", "last.npy", "deep.png"):
        FILES[name](tmp_path / name)
        assert [is_larger(str(tmp_path / name), side) for side in (109, 110)] == [True, False]
    with TiffWriter(tmp_path / "thumbnail.tif") as file:
        file.write(values((9, 11)), subfiletype=1, metadata=None)
        file.write(values((90, 110)), metadata=None)
    STACKS["rows.tif"][0](tmp_path / "rows.tif")
    for name, longer in {"thumbnail.tif": 110, "rows.tif": 50}.items():
        path = str(tmp_path / name)
        assert (is_larger(path, longer - 1), is_larger(path, longer)) == (True, False)
    (tmp_path / "broken.png").write_bytes(b"?")
    assert not is_larger(str(tmp_path / "broken.png"), 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # a bomb for Pillow
    assert is_larger(str(tmp_path / "deep.png"), 109)


def test_a_png_with_a_long_text_is_cut(tmp_path) -> None:
    text = PngInfo()
    text.add_text("about", "x" * 3_000_000, zip=True)
    path = str(tmp_path / "a.png")
    Image.fromarray(values((90, 70), np.uint8)).save(path, pnginfo=text)
    assert is_larger(path, 80)
    assert not is_larger(path, 90)
    [raster] = open_rasters(path)
    assert raster.size == (90, 70)


def test_pretraining_on_what_is_too_large_names_the_way_out(tmp_path, monkeypatch) -> None:
    (tmp_path / "a.svs").write_bytes(b"II*\0")
    advice = "`pixelcl prepare IMAGES --tile 512 --out SHARDS`, and pretrain on SHARDS"
    for place, start in {
        tmp_path: "slides: cut them by ",
        tmp_path / "a.svs": "; cut it by ",
    }.items():
        with pytest.raises(ValueError) as error:
            open_source(place)
        assert str(error.value).endswith(start + advice)
    stream = io.BytesIO()
    Image.new("L", (40, 50)).save(stream, "BMP")
    (tmp_path / "a.bmp").write_bytes(stream.getvalue())
    monkeypatch.setattr("pixel_level_contrastive_learning.data.reading.MAX_BYTES", 1000)
    with pytest.raises(ImageError, match=r"^a file of 0\.0 GiB; cut it by `pixelcl prepare "):
        open_source(tmp_path).open(0)
