"""Where tiles lie, at which scale, and which are empty."""

import re
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from PIL import Image
from tifffile import TiffFile, TiffWriter, imwrite

from pixel_level_contrastive_learning.data import tiles
from pixel_level_contrastive_learning.data.image import ImageError
from pixel_level_contrastive_learning.data.raster_files import open_rasters
from pixel_level_contrastive_learning.data.rasters import Window
from pixel_level_contrastive_learning.data.tiles import (
    Grid,
    Tiling,
    background_contrast,
    emptiness,
    find_rasters,
    starts,
)

pytest.importorskip("rasterio")


@pytest.mark.parametrize(
    ("length", "tile", "step", "expected"),
    [
        (40, 64, 64, [0]),
        (64, 64, 64, [0]),
        (65, 64, 64, [0, 1]),
        (128, 64, 64, [0, 64]),
        (150, 64, 48, [0, 48, 86]),
        (160, 64, 48, [0, 48, 96]),
    ],
)
def test_tiles_begin_step_by_step_and_end_with_the_image(length, tile, step, expected) -> None:
    assert list(starts(length, tile, step)) == expected


def test_tiles_cover_an_image_and_hold_its_values_where_they_say(tmp_path) -> None:
    array = np.random.default_rng(0).integers(0, 60000, (150, 100, 3)).astype(np.uint16)
    imwrite(tmp_path / "a.tif", array, photometric="rgb")
    tiling = Tiling([str(tmp_path / "a.tif")], 64, overlap=16)
    counts = np.zeros((150, 100), int)
    for index in range(len(tiling)):
        tile = tiling.cut(*tiling.locate(index))
        x0, y0, x1, y1 = tile.about["box"]
        assert (tile.about["height"], tile.about["width"], tile.empty) == (150, 100, "")
        assert (tile.pixels == array[y0:y1, x0:x1].transpose(2, 0, 1)).all()
        assert tile.pixels.shape == (3, 64, 64)
        assert tile.pixels.dtype == np.uint16
        counts[y0:y1, x0:x1] += 1
    assert len(tiling) == 6
    assert counts.min() == 1


def test_images_are_numbered_one_after_the_other(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    rng = np.random.default_rng(0)
    for name, shape in {"a.npy": (40, 64), "b.npy": (100, 64), "c.npy": (64, 200)}.items():
        np.save(tmp_path / name, rng.normal(size=shape))
    imwrite(tmp_path / "d.tif", rng.normal(size=(2, 70, 64)), metadata={"axes": "ZYX"}, ome=True)
    tiling = Tiling([str(tmp_path / name) for name in ("a.npy", "b.npy", "c.npy", "d.tif")], 64)
    message = "1 file of 2 pages: read as 2 images; `--pages channels` makes one image of each file"
    assert caplog.messages == [message]
    places = [tiling.locate(index) for index in range(len(tiling))]
    assert [(grid.file, grid.page, number) for grid, number in places] == [
        (0, None, 0), (1, None, 0), (1, None, 1), *((2, None, k) for k in range(4)),
        *((3, page, k) for page in range(2) for k in range(2)),
    ]  # fmt: skip
    assert [bool(grid.xs) for grid, _ in places] == [False] + [True] * 10  # a.npy is left whole
    assert tiling.cut(*places[-1]).about == {
        "height": 70, "width": 64, "box": (0, 6, 64, 70), "page": 1,
    }  # fmt: skip


def test_levels_and_resolutions_are_cut_at_their_scale(tmp_path) -> None:
    slope = np.arange(256, dtype=np.uint16)[None].repeat(256, 0) * 100
    path = str(tmp_path / "a.tif")
    with TiffWriter(path) as file:
        for k in range(2):
            file.write(slope[:: 4**k, :: 4**k], tile=(32, 32), metadata=None, subfiletype=k,
                       resolution=(20000, 20000), resolutionunit=3)  # fmt: skip
    for settings, scale, count in (({}, 1, 64), ({"level": 1}, 4, 4), ({"mpp": 1.0}, 2, 16)):
        tiling = Tiling([path], 32, **settings)
        assert len(tiling) == count
        tile = tiling.cut(*tiling.locate(len(tiling) - 1))
        assert tile.about["box"] == (256 - 32 * scale, 256 - 32 * scale, 256, 256)
        assert tile.pixels.shape == (1, 32, 32)
        columns = slope[0, -32 * scale :].reshape(32, scale)
        middle = columns[:, 0] if scale == 4 else columns.mean(axis=1)  # that level was thinned out
        assert np.abs(tile.pixels[0, 9] - middle).max() <= 1
    for setting, message in {
        ("level", 2): r"level is 2, but the last one of .*a\.tif' is 1; give another, or mpp",
        ("mpp", 0.25): r"mpp is 0\.25, but the pixels of .*a\.tif' are 0\.5; give that or a larger",
    }.items():
        with pytest.raises(ValueError, match=message):
            Tiling([path], 32, **dict([setting]))
    np.save(tmp_path / "b.npy", slope)
    with pytest.raises(
        ValueError, match=r"mpp is 1, but .* does not record its pixel size; give a level"
    ):
        Tiling([str(tmp_path / "b.npy")], 32, mpp=1)


def test_wrong_settings_are_told_together() -> None:
    with pytest.raises(ValueError) as error:
        Tiling([], 0, overlap=-1, level=-1, mpp=0)
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        *("tile", "overlap", "level", "mpp", "level")
    ]
    with pytest.raises(ValueError, match="overlap is 64; it must be less than the tile, 64"):
        Tiling([], 64, overlap=64)


def of(values: float | np.ndarray, known: float = 1.0) -> Window:
    """A window of 100 x 100 pixels, of which the first share of rows is known."""
    mask = np.zeros((100, 100), bool)
    mask[: round(100 * known)] = True
    return Window(np.broadcast_to(values, (2, 100, 100)).astype(np.float32), mask)


def test_empty_tiles_are_plain_or_not_measured_at_ninety_nine_hundredths() -> None:
    contrast = np.array([10.0, 10.0])
    ramp = np.arange(100)
    assert emptiness(of(5.0), contrast) == "background"
    assert emptiness(of(ramp / 10), contrast) == "background"
    assert emptiness(of(ramp / 9), contrast) == ""
    assert emptiness(of(np.stack([ramp[None] * 0, ramp[None]])), contrast) == ""
    assert emptiness(of(ramp, known=0.01), contrast) == "nodata"
    assert emptiness(of(ramp, known=0.02), contrast) == ""
    assert emptiness(of(ramp[:, None] * 50, known=0.1), contrast) == ""
    assert emptiness(of(np.where(ramp[:, None] < 10, 3, 999), known=0.1), contrast) == "background"
    speck = np.zeros((100, 100))
    speck[:5, :9] = 999  # dust: 0.45 %
    assert emptiness(of(speck), contrast) == "background"
    speck[:20, :9] = 999
    assert emptiness(of(speck), contrast) == ""
    assert emptiness(of(np.where(ramp < 50, np.nan, 3.0)), contrast) == "background"


@pytest.mark.parametrize("pyramid", [False, True])
def test_background_is_what_hardly_varies_beside_the_whole_image(tmp_path, pyramid) -> None:
    rng = np.random.default_rng(0)
    array = rng.normal(100, 5, (1024, 1024)).astype(np.uint16)
    array[256:700, 256:700] += rng.integers(0, 1600, (444, 444)).astype(np.uint16)
    with TiffWriter(tmp_path / "a.tif") as file:
        for k in range(1 + pyramid):
            part = array[:: 4**k, :: 4**k]
            file.write(part, tile=(64, 64), metadata=None, subfiletype=int(k > 0))
    [raster] = open_rasters(str(tmp_path / "a.tif"))
    [contrast] = background_contrast(raster)
    assert 80 < contrast < 110  # a sixteenth of 1600
    tiling = Tiling([str(tmp_path / "a.tif")], 128)
    kinds = [tiling.cut(*tiling.locate(index)).empty for index in range(64)]
    assert np.array(kinds).reshape(8, 8)[0].tolist() == ["background"] * 8
    assert {kinds[8 * y + x] for y in range(2, 6) for x in range(2, 6)} == {""}
    assert kinds.count("background") == 64 - 16


def test_the_range_is_found_in_a_small_copy_where_there_is_one(tmp_path) -> None:
    array = np.full((1024, 1024), 100, np.uint16)
    for k in range(8):  # between the windows that are looked at
        array[34:64, 66 * k + 34 : 66 * k + 64] = 9000
    for pyramid, contrast in {False: 0, True: 8900 / 16}.items():
        with TiffWriter(tmp_path / "a.tif") as file:
            for k in range(1 + pyramid):
                part = array[:: 2**k, :: 2**k]
                file.write(part, tile=(64, 64), metadata=None, subfiletype=int(k > 0))
        [raster] = open_rasters(str(tmp_path / "a.tif"))
        assert background_contrast(raster).tolist() == [contrast]


def test_a_tile_of_a_strip_thinner_than_its_scale_stays_inside() -> None:
    assert Grid(0, None, (2, 3), (1, 1), (0,), (0,), 4.0).box(0) == (0, 0, 3, 2)


def test_an_image_without_a_measured_value_is_nodata(tmp_path) -> None:
    array = np.full((100, 100), -9999, np.float32)
    imwrite(tmp_path / "a.tif", array, extratags=[(42113, "s", 0, "-9999", True)])
    tiling = Tiling([str(tmp_path / "a.tif")], 64)
    assert [tiling.cut(*tiling.locate(index)).empty for index in range(4)] == ["nodata"] * 4


@pytest.mark.parametrize("tag", [None, -1])
def test_a_named_value_is_nodata_beside_the_tag(tmp_path, tag) -> None:
    array = np.random.default_rng(0).uniform(0, 9, (2, 64, 256)).astype(np.float32)
    array[:, :, :64] = -9999  # the first tile
    array[:, :, 64:90] = -9999
    array[0, :, 128:140] = -1
    tags = [] if tag is None else [(42113, "s", 0, f"{tag}", True)]
    options = {"photometric": "minisblack", "planarconfig": "separate", "extratags": tags}
    imwrite(tmp_path / "a.tif", array, **options)
    tiling = Tiling([str(tmp_path / "a.tif")], 64, nodata=-9999.0)
    cut = [tiling.cut(*tiling.locate(index)) for index in range(4)]
    kept = -9999 if tag is None else tag
    assert [tile.empty for tile in cut] == ["nodata", "", "", ""]
    assert [tile.nodata for tile in cut] == [kept, kept, tag, None]
    assert (cut[1].pixels[:, :, :26] == kept).all()
    assert (cut[1].pixels[:, :, 26:] == array[:, :, 90:128]).all()
    assert (cut[2].pixels == array[:, :, 128:192]).all()
    for scaling in ({"level": 1}, {"mpp": 2.0}):
        with pytest.raises(
            ValueError, match=r"nodata is -9999\.0, .*gdal_edit\.py -a_nodata -9999"
        ):
            Tiling([str(tmp_path / "a.tif")], 64, nodata=-9999.0, **scaling)


def test_pages_of_files_follow_one_rule_for_all_of_them(tmp_path) -> None:
    for name, count in {"a.tif": 4, "b.tif": 3}.items():
        stack = np.random.default_rng(0).integers(0, 9, (count, 70, 64)).astype(np.uint16)
        imwrite(tmp_path / name, stack, photometric="minisblack")
    paths = [str(tmp_path / name) for name in ("a.tif", "b.tif")]

    def grids(paths: list[str], **options: str) -> list[tuple[int, int | None]]:
        return [(grid.file, grid.page) for grid in Tiling(paths, 64, **options).grids]

    assert grids(paths) == [*((0, k) for k in range(4)), *((1, k) for k in range(3))]
    assert grids(paths[:1]) == [(0, None)]
    assert grids(paths[:1], pages="images") == [(0, k) for k in range(4)]
    for pages in ("channels", "first"):
        assert grids(paths, pages=pages) == [(0, None), (1, None)]


def test_a_damaged_tile_is_told_with_its_place(tmp_path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (256, 256, 3)).astype(np.uint8)
    imwrite(tmp_path / "a.tif", array, tile=(64, 64), photometric="rgb", compression="zlib")
    with TiffFile(tmp_path / "a.tif") as file:
        start = file.pages[0].dataoffsets[6]
    content = bytearray((tmp_path / "a.tif").read_bytes())
    content[start : start + 64] = bytes(64)
    (tmp_path / "a.tif").write_bytes(content)
    tiling = Tiling([str(tmp_path / "a.tif")], 64)
    messages = []
    for index in range(16):
        try:
            tiling.cut(*tiling.locate(index))
        except ImageError as error:
            messages.append(str(error))
    assert len(messages) == 1
    assert re.fullmatch(r"damaged: .*IReadBlock failed.* \(tile at x 128, y 64\)", messages[0])


def test_only_two_images_stay_open(tmp_path, monkeypatch) -> None:
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.eye(80))
    tiling = Tiling([str(tmp_path / f"{number}.npy") for number in range(3)], 64)
    opened = []
    real = tiles.open_rasters
    monkeypatch.setattr(tiles, "open_rasters", lambda *given: opened.append(given) or real(*given))
    for index in range(12):
        tiling.cut(*tiling.locate(index))
    assert len(opened) == 3
    assert len(tiling.opened) == 2


def test_two_images_are_opened_at_once(tmp_path, monkeypatch) -> None:
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.eye(80))
    tiling = Tiling([str(tmp_path / f"{number}.npy") for number in range(2)], 64)
    barrier, real = Barrier(2, timeout=10), tiles.background_contrast
    monkeypatch.setattr(tiles, "background_contrast", lambda r: barrier.wait() >= 0 and real(r))
    with ThreadPoolExecutor(8) as threads:
        cut = threads.map(lambda n: tiling.cut(*tiling.locate(n)), range(8))
        assert all(tile.pixels.shape == (1, 64, 64) for tile in cut)  # none waited in vain


def test_slides_and_rasters_of_folders_and_lists_are_found(tmp_path) -> None:
    (tmp_path / "below").mkdir()
    for name in ("a.svs", "below/b.JP2", "c.png", "d.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "d.txt").write_text("c.png\n")
    Image.new("L", (3, 4)).save(tmp_path / "c.png")

    def find(*names: str) -> list[str]:
        paths = find_rasters([tmp_path / name for name in names])
        return [path.removeprefix(f"{tmp_path}/") for path in paths]

    assert find(".") == ["a.svs", "below/b.JP2", "c.png"]
    assert find("d.txt", "a.svs", "c.png") == ["c.png", "a.svs"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*none"):
        find_rasters([tmp_path / "none"])
    with pytest.raises(ValueError, match=r"a\.tar'; tiles are cut from files: name their folder"):
        find_rasters(["a.tar"])
