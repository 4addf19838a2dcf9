"""Shards written once: what stands in them, going on after a cut, and what is refused."""

import gc
import io
import json
import os
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tifffile import imread, imwrite

from pixel_level_contrastive_learning.data import shard_writer
from pixel_level_contrastive_learning.data.arrays import NODATA_TAG
from pixel_level_contrastive_learning.data.dataset import TooManyBrokenError
from pixel_level_contrastive_learning.data.decoding import open_image
from pixel_level_contrastive_learning.data.loader import in_order
from pixel_level_contrastive_learning.data.shard_entries import encode
from pixel_level_contrastive_learning.data.shard_writer import write_shards
from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.data.statistics import measure
from pixel_level_contrastive_learning.files import CannotWriteError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Five photographs, one of them small and one turned; their colours are a slope."""
    folder = tmp_path / "images"
    (folder / "süb").mkdir(parents=True)
    slope = np.linspace(0, 255, 300)[None, :, None].repeat(200, 0).repeat(3, 2).astype(np.uint8)
    for number in range(3):
        Image.fromarray(slope).save(folder / f"{number}.jpg", quality=95)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(slope).save(folder / "süb" / "turned.jpg", quality=95, exif=exif)
    Image.fromarray(slope[:40, :50]).save(folder / "süb" / "small.png")
    return folder


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


def test_large_images_are_made_smaller_and_small_ones_keep_their_bytes(images, tmp_path) -> None:
    packed = write_shards(images, tmp_path / "out", max_side=150, images_each=3)
    assert (packed.images, packed.shards, packed.kept, packed.skipped) == (5, 2, 0, 0)
    assert packed.bytes_before == sum(p.stat().st_size for p in images.rglob("*.*"))
    assert packed.bytes_after == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.tar"))
    source = open_source(tmp_path / "out")
    assert [source.open(i).size for i in range(5)] == [(100, 150)] * 3 + [(40, 50), (150, 100)]
    contents = members(tmp_path / "out" / "shards-000001.tar")
    assert contents["000000003.png"] == (images / "süb" / "small.png").read_bytes()
    assert json.loads(contents["000000004.json"]) == {
        "name": "süb/turned.jpg",
        "height": 300,
        "width": 200,
    }
    slope = source.open(0).read()[:, 50].float()
    exact = torch.linspace(0, 255, 300).view(150, 2).mean(dim=1)
    assert (slope - exact).abs().max() < 6  # JPEG, and nothing moved


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_deep_images_keep_their_kind_of_values(tmp_path, dtype) -> None:
    (tmp_path / "images").mkdir()
    bands = np.arange(4, dtype=dtype)[:, None, None] * 9000 + np.full((4, 60, 80), 7, dtype)
    bands = bands if dtype == np.uint16 else bands + np.float32(0.25)
    imwrite(tmp_path / "images" / "a.tif", bands, planarconfig="separate", photometric="minisblack")
    write_shards(tmp_path / "images", tmp_path / "out", max_side=40)
    stored = np.load(io.BytesIO(members(tmp_path / "out" / "shards-000000.tar")["000000000.npy"]))
    assert (stored.dtype, stored.shape) == (dtype, (4, 30, 40))
    assert np.allclose(stored, bands[:, ::2, ::2])


@pytest.mark.parametrize("shard", [0, 1])
def test_work_that_was_cut_off_goes_on_and_ends_the_same(
    images, tmp_path, monkeypatch, shard
) -> None:
    write_shards(images, tmp_path / "whole", max_side=150, images_each=2)
    real, calls = shard_writer.write_shard, []

    def failing(path, *args):
        calls.append(path.name)
        if len(calls) == shard + 1:
            path.with_name(f"{path.name}.part").write_bytes(b"half")
            raise OSError("No space left on device")
        return real(path, *args)

    monkeypatch.setattr(shard_writer, "write_shard", failing)
    with pytest.raises(OSError, match="No space left"):
        write_shards(images, tmp_path / "out", max_side=150, images_each=2)
    assert len(list((tmp_path / "out").glob("*.tar"))) == shard
    packed = write_shards(images, tmp_path / "out", max_side=150, images_each=2)
    assert packed.kept == shard
    assert calls == [*(f"shards-00000{k}.tar" for k in sorted([0, 1, 2, shard]))]
    for name in ("shards-000000.tar", "shards-000001.tar", "shards-000002.tar", "shards.json"):
        whole, resumed = (tmp_path / folder / name for folder in ("whole", "out"))
        assert whole.read_bytes() == resumed.read_bytes()
    assert not list((tmp_path / "out").glob("*.part"))


def test_a_write_that_fails_names_the_file_and_leaves_nothing_behind_that_ends_badly(
    images, tmp_path, monkeypatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with monkeypatch.context() as patched:
        patched.setattr(shard_writer.HashedFile, "write", fail)
        with pytest.raises(CannotWriteError, match=r"shards-000000\.tar could not .* disk is full"):
            write_shards(images, tmp_path / "out")
    gc.collect()
    assert unraisable == []
    assert write_shards(images, tmp_path / "out").images == 5


def test_two_calls_do_not_write_into_one_folder(images, tmp_path, monkeypatch) -> None:
    real = shard_writer.write_shard

    def call_another(*args):
        monkeypatch.setattr(shard_writer, "write_shard", real)
        with ThreadPoolExecutor(1) as other, pytest.raises(ValueError, match="another call is wri"):
            other.submit(write_shards, images, tmp_path / "out").result()
        return real(*args)

    monkeypatch.setattr(shard_writer, "write_shard", call_another)
    assert write_shards(images, tmp_path / "out").images == 5
    assert write_shards(images, tmp_path / "out").kept == 1


def test_a_shard_that_rotted_is_written_again(images, tmp_path) -> None:
    write_shards(images, tmp_path / "out", images_each=5)
    shard = tmp_path / "out" / "shards-000000.tar"
    before = shard.read_bytes()
    shard.write_bytes(before[:2000] + b"?" + before[2001:])
    assert write_shards(images, tmp_path / "out", images_each=5).kept == 0
    assert shard.read_bytes() == before
    assert write_shards(images, tmp_path / "out", images_each=5).kept == 1


def test_a_disk_that_gives_back_something_else_is_told(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shard_writer, "digest", lambda _: "?")
    with pytest.raises(OSError, match=r"differs from what was written .*; check the disk"):
        write_shards(images, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_broken_images_are_left_out_and_listed(images, tmp_path) -> None:
    whole = (images / "1.jpg").read_bytes()
    (images / "1.jpg").write_bytes(whole[:300])
    with pytest.raises(TooManyBrokenError, match=r"1 of 5 images .* max_broken"):
        write_shards(images, tmp_path / "out", max_broken=0)
    packed = write_shards(images, tmp_path / "out")
    assert (packed.images, packed.skipped) == (4, 1)
    [line] = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert line.startswith(f"{images / '1.jpg'}\tdamaged: ")
    assert "000000001.jpg" not in members(tmp_path / "out" / "shards-000000.tar")
    assert "1 could not be read, see skipped.txt" in str(packed)
    assert write_shards(images, tmp_path / "out").kept == 1
    (images / "1.jpg").write_bytes(whole)  # mended
    packed = write_shards(images, tmp_path / "out")
    assert (packed.images, packed.kept, packed.skipped) == (5, 0, 0)
    assert "000000001.jpg" in members(tmp_path / "out" / "shards-000000.tar")
    assert not (tmp_path / "out" / "skipped.txt").exists()


@pytest.mark.parametrize("tile", [None, 256])  # the fifth image begins a shard with either
def test_shards_of_images_that_changed_are_written_again(images, tmp_path, tile) -> None:
    each, out = 4 if tile is None else 7, tmp_path / "out"
    written = write_shards(images, out, images_each=each, tile=tile)
    before = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    record = json.loads((out / "shards.json").read_text())
    turned = images / "süb" / "turned.jpg"
    with Image.open(turned) as image:
        image.point(lambda value: 255 - value).save(turned, exif=image.getexif())
    again = write_shards(images, out, images_each=each, tile=tile)
    assert (again.images, again.shards, again.kept) == (written.images, 2, 1)
    changed = {path.name for path in out.glob("*.tar") if path.read_bytes() != before[path.name]}
    assert changed == {"shards-000001.tar"}
    assert write_shards(images, out, images_each=each, tile=tile).kept == 2

    for shard in record["shards"].values():  # as an earlier version wrote it
        del shard["state"]
    (out / "shards.json").write_text(json.dumps(record))
    for name, content in before.items():
        (out / name).write_bytes(content)
    assert write_shards(images, out, images_each=each, tile=tile).kept == 2


def test_shards_written_into_the_folder_of_those_they_are_of_are_gone_on_with(
    images, tmp_path
) -> None:
    write_shards(images, tmp_path / "large", images_each=4)
    out = tmp_path / "large" / "small"
    assert write_shards(tmp_path / "large", out, max_side=100).images == 5
    assert write_shards(tmp_path / "large", out, max_side=100).kept == 1


@pytest.mark.parametrize("tile", [None, 64])
def test_where_nothing_can_be_read_it_fails_until_it_is_mended(images, tmp_path, tile) -> None:
    (images / "0.jpg").write_bytes(b"no image")
    for _ in range(2):
        with pytest.raises(TooManyBrokenError, match=r"none of 1 images can .*0\.jpg\): not an im"):
            write_shards(images / "0.jpg", tmp_path / "out", tile=tile)
    (images / "0.jpg").write_bytes((images / "süb" / "small.png").read_bytes())
    assert write_shards(images / "0.jpg", tmp_path / "out", tile=tile).images == 1


def test_no_shard_stays_of_images_that_have_become_unreadable(images, tmp_path) -> None:
    write_shards(images, tmp_path / "out", images_each=4)
    (images / "süb" / "turned.jpg").write_bytes(b"no image")
    packed = write_shards(images, tmp_path / "out", images_each=4)
    assert (packed.images, packed.kept, packed.skipped) == (4, 1, 1)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["shards-000000.tar"]


def test_other_settings_and_other_folders_are_refused(images, tmp_path) -> None:
    write_shards(images, tmp_path / "out", max_side=150)
    with pytest.raises(ValueError, match=r"shards of another call \(max_side 150 and now 100\)"):
        write_shards(images, tmp_path / "out", max_side=100)
    (images / "new.png").write_bytes((images / "süb" / "small.png").read_bytes())
    with pytest.raises(ValueError, match=r"\(images 5 and now 6, other images\)"):
        write_shards(images, tmp_path / "out", max_side=150)
    with pytest.raises(ValueError, match="the folder of the images; give another folder"):
        write_shards(images, images)
    for text in ("{}", "no json", "[]", '{"plan": 3, "shards": {}}'):
        (tmp_path / "out" / "shards.json").write_text(text)
        with pytest.raises(ValueError, match="which is not empty and was not written by an earli"):
            write_shards(images, tmp_path / "out", max_side=150)
    with pytest.raises(ValueError) as error:
        write_shards(images, tmp_path / "new", max_side=0, quality=96, images_each=0, workers=0)
    assert [line.split()[0] for line in str(error.value).splitlines()] == [
        *("max_side", "quality", "images_each", "workers")
    ]
    assert not (tmp_path / "new").exists()


def test_shards_may_be_packed_again(images, tmp_path) -> None:
    write_shards(images, tmp_path / "large")
    write_shards([tmp_path / "large"], tmp_path / "small", max_side=100)
    assert [open_source(tmp_path / "small").open(i).size for i in range(2)] == [(67, 100)] * 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "NPY"])
@pytest.mark.parametrize("name", ["bare", "image.bin"])
def test_a_file_without_a_known_suffix_takes_it_from_its_content(tmp_path, kind, name) -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    stream = io.BytesIO()
    if kind == "NPY":
        np.save(stream, pixels)
    else:
        Image.fromarray(pixels).save(stream, kind)
    (tmp_path / name).write_bytes(stream.getvalue())
    (tmp_path / "list.txt").write_text(name)
    assert write_shards(tmp_path / "list.txt", tmp_path / "out").images == 1
    suffix = {"JPEG": "jpg", "TIFF": "tif", "PPM": "jpg"}.get(kind, kind.lower())
    content = members(tmp_path / "out" / "shards-000000.tar")[f"000000000.{suffix}"]
    assert (content == stream.getvalue()) == (kind != "PPM")  # not told apart, and written anew
    assert open_source(tmp_path / "out").open(0).size == (3, 4)


@pytest.mark.parametrize(("side", "nodata"), [(20, None), (40, None), (40, -1.0)])
def test_images_of_more_bands_than_columns_keep_their_bands(tmp_path, side, nodata) -> None:
    (tmp_path / "bands").mkdir()
    bands = np.arange(24, dtype=np.uint16)[:, None, None].repeat(40, 1).repeat(20, 2) * 1000
    imwrite(tmp_path / "bands/a.tif", bands, photometric="minisblack", planarconfig="separate")
    write_shards(tmp_path / "bands", tmp_path / "out", max_side=side, nodata=nodata)
    opened = open_source(tmp_path / "out").open(0)
    assert (opened.channels, opened.size) == (24, (side, side // 2))
    assert opened.read()[:, 0, 0].tolist() == [1000 * band for band in range(24)]


def test_a_folder_may_be_spelled_otherwise_when_it_goes_on(images, tmp_path, monkeypatch) -> None:
    write_shards(images, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    assert "5 images" in str(write_shards("images/../images", tmp_path / "out"))


def test_what_was_not_measured_is_not_blended_with_what_was(tmp_path) -> None:
    bands = np.full((3, 40, 60), 7.5, np.float32)
    bands[:, :10] = 1.5
    bands[:, :, 30:] = -9999
    np.save(tmp_path / "a.npy", bands)
    for max_side in (640, 30):  # kept, and made smaller
        out = tmp_path / f"out-{max_side}"
        write_shards(tmp_path / "a.npy", out, max_side=max_side, nodata=-9999)
        pixels, *_, known = open_source(out).open(0).decode()
        measured = round(pixels.shape[-1] / 2)
        assert known[..., :measured].all() != known[..., measured:].any()
        assert torch.allclose(pixels[:, -10:, :measured], torch.tensor(7.5))
        with pytest.raises(ValueError, match=r"holds shards of another call .nodata -9999 and now"):
            write_shards(tmp_path / "a.npy", out, max_side=max_side)


def test_eight_bit_images_keep_their_nodata_when_they_are_made_smaller(tmp_path) -> None:
    pixels = np.full((40, 60), 200, np.uint8)
    pixels[:, 30:] = 7
    imwrite(tmp_path / "a.tif", pixels, extratags=[(NODATA_TAG, "s", 0, "7", True)])
    write_shards(tmp_path / "a.tif", tmp_path / "out", max_side=30)
    left, right = open_source(tmp_path / "out").open(0).read()[0, 10, [2, -3]].tolist()
    assert (left, right) == pytest.approx((200, 7), abs=3)


@pytest.mark.parametrize("nodata", [None, 0])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_mask_in_a_fourth_band_stays_one_when_images_are_made_smaller(
    tmp_path, dtype, nodata
) -> None:
    pixels = np.random.default_rng(0).integers(1, 200, (40, 60, 4)).astype(dtype)
    pixels[..., 3] = np.where(pixels[..., 0] > 90, np.iinfo(dtype).max, 0)
    imwrite(tmp_path / "a.tif", pixels, photometric="rgb", extrasamples=["unassalpha"])
    write_shards(tmp_path / "a.tif", tmp_path / "out", max_side=30, nodata=nodata)
    source = open_source(tmp_path / "out", nodata=nodata)
    assert (source.open(0).size, source.open(0).channels) == ((20, 30), 4)
    assert measure(source).channels == 3


def test_what_was_rarely_measured_is_kept_where_it_was_most(tmp_path) -> None:
    sparse = np.full((40, 40), np.nan, np.float32)
    sparse[::2, ::4] = 3.5
    np.save(tmp_path / "a.npy", sparse)
    write_shards(tmp_path / "a.npy", tmp_path / "out", max_side=10)
    assert torch.allclose(open_source(tmp_path / "out").open(0).read(), torch.tensor(3.5))


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    """A map of two bands with a nodata border and a plain corner, a photograph, and a small image.

    The map is 256 x 320: of its 4 x 5 tiles of 64 pixels, one column is nodata, and two are plain.
    """
    pytest.importorskip("rasterio")
    folder = tmp_path / "scenes"
    folder.mkdir()
    rng = np.random.default_rng(0)
    bands = rng.integers(1, 60000, (2, 256, 320)).astype(np.uint16)
    bands[:, :, :70] = 0
    bands[:, 192:, 192:] = 777
    nodata = [(42113, "s", 0, "0", True)]
    options = {"photometric": "minisblack", "planarconfig": "separate", "extratags": nodata}
    imwrite(folder / "a map.tif", bands, **options)
    Image.fromarray(rng.integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(folder / "photo.jpg")
    Image.fromarray(rng.integers(0, 255, (40, 64), dtype=np.uint8)).save(folder / "small.png")
    return folder


def test_large_images_are_cut_and_small_ones_stay_whole(scenes, tmp_path) -> None:
    packed = write_shards(scenes, tmp_path / "out", tile=64)
    assert (packed.images, packed.shards, packed.skipped) == (20 - 4 - 2 + 4 + 1, 1, 0)
    assert packed.empty == {"nodata": 4, "background": 2}
    assert packed.bytes_before == sum(path.stat().st_size for path in scenes.iterdir())
    message = "; left out: 4 of nodata, 2 of background (--keep-empty keeps them)\nshards: "
    assert message in str(packed)
    contents = members(tmp_path / "out" / "shards-000000.tar")
    assert contents["000000024.png"] == (scenes / "small.png").read_bytes()
    assert json.loads(contents["000000023.json"]) == {
        "name": "photo.jpg", "height": 70, "width": 90, "box": [26, 6, 90, 70],
    }  # fmt: skip
    assert json.loads(contents["000000007.json"]) == {
        "name": "a map.tif", "height": 256, "width": 320, "box": [128, 64, 192, 128],
    }  # fmt: skip
    array = imread(scenes / "a map.tif")
    stored = np.load(io.BytesIO(contents["000000007.npy"]))
    assert stored.dtype == np.uint16
    assert (stored == array[:, 64:128, 128:192]).all()
    # With nodata it is a TIFF that says so, and what was not measured is known to be so.
    stored = imread(io.BytesIO(contents["000000006.tif"]))
    assert stored.dtype == np.uint16
    assert (stored == array[:, 64:128, 64:128]).all()
    image = open_image(contents["000000006.tif"])
    assert image.decode().known[:, 0, :8].tolist() == [[False] * 6 + [True] * 2] * 2
    kept = write_shards(scenes, tmp_path / "all", tile=64, keep_empty=True)
    assert (kept.images, kept.empty) == (25, {})


@pytest.mark.parametrize(
    ("shape", "dtype", "nodata", "suffix"),
    [
        ((1, 9, 8), np.uint8, None, "jpg"),
        ((3, 9, 8), np.uint8, 0, "jpg"),
        ((4, 9, 8), np.uint8, None, "npy"),
        ((1, 9, 8), np.float64, None, "npy"),
        ((1, 9, 8), np.float32, -9999, "tif"),
        ((5, 9, 8), np.int16, -32768, "tif"),
        ((12, 9, 8), np.uint16, None, "tif"),
    ],
)
def test_a_tile_is_read_back_as_it_was_cut(shape, dtype, nodata, suffix) -> None:
    tile = (np.arange(np.prod(shape)).reshape(shape) % 250).astype(dtype)
    if suffix == "tif" and nodata is not None:
        tile[:, :, 0] = nodata
    kind, content = encode(tile, 90, nodata)
    decoded = open_image(content).decode()
    assert kind == suffix
    assert decoded.known is None or not decoded.known[:, :, 0].any()
    if suffix == "jpg":
        return
    stored = np.load(io.BytesIO(content)) if kind == "npy" else imread(io.BytesIO(content))
    assert stored.dtype == dtype
    assert (stored.reshape(shape) == tile).all()
    assert (decoded.pixels[:, :, 1:].numpy() == tile[:, :, 1:]).all()
    assert (decoded.known is None) == (nodata is None)


def test_cutting_that_was_killed_goes_on_and_ends_the_same(scenes, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shard_writer, "SHARD_BYTES", 5 * 64 * 64 * 2 * 2)
    whole = write_shards(scenes, tmp_path / "whole", tile=64)
    assert whole.shards == 5
    real = shard_writer.write_shard

    def killed(path, *args):
        if path.name.endswith("2.tar"):
            path.with_name(f"{path.name}.part").write_bytes(b"half")
            raise KeyboardInterrupt
        return real(path, *args)

    monkeypatch.setattr(shard_writer, "write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        write_shards(scenes, tmp_path / "out", tile=64)
    monkeypatch.setattr(shard_writer, "write_shard", real)
    report = write_shards(scenes, tmp_path / "out", tile=64)
    assert report == whole._replace(folder=tmp_path / "out", kept=2)
    files = {path.name for path in (tmp_path / "whole").iterdir()}
    assert files == {path.name for path in (tmp_path / "out").iterdir()}
    for name in files:
        expected, resumed = (tmp_path / folder / name for folder in ("whole", "out"))
        assert expected.read_bytes() == resumed.read_bytes()
    for changed in ({"tile": 32}, {"tile": 64, "overlap": 8}, {"tile": 64, "keep_empty": True}, {}):
        with pytest.raises(ValueError, match="which holds shards of another call"):
            write_shards(scenes, tmp_path / "out", **changed)


def test_a_link_that_leads_nowhere_is_skipped(scenes, tmp_path) -> None:
    (scenes / "gone.tif").symlink_to(tmp_path / "nothing.tif")
    assert write_shards(scenes, tmp_path / "out", tile=64).skipped == 1


def test_shards_of_tiles_are_not_gone_on_with_by_copies(images, tmp_path) -> None:
    write_shards(images, tmp_path / "out", tile=640)
    with pytest.raises(ValueError, match=r"another call \(tile 640 and now None, overlap 0 and"):
        write_shards(images, tmp_path / "out", max_side=640)


def test_what_cannot_be_cut_is_told_before_work_begins(scenes, tmp_path) -> None:
    for name in ("b.tif", "c.tif"):
        Image.new("CMYK", (70, 70)).save(scenes / name)
    with pytest.raises(TooManyBrokenError, match=r"2 of 5 images .*\n.*b\.tif: its colours are"):
        write_shards(scenes, tmp_path / "out", tile=64)
    assert not (tmp_path / "out").exists()
    packed = write_shards(scenes, tmp_path / "out", tile=64, max_broken=0.5)
    assert packed.skipped == 2
    assert len((tmp_path / "out" / "skipped.txt").read_text().splitlines()) == 2


@pytest.mark.parametrize("tile", [None, 64])
def test_no_place_at_all_is_refused(tmp_path, tile) -> None:
    with pytest.raises(ValueError, match="data is empty; name a folder"):
        write_shards([], tmp_path / "out", tile=tile)


def test_settings_of_tiles_need_tiles(scenes, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"overlap is 8, keep_empty is True, but tile is None; "):
        write_shards(scenes, tmp_path / "out", overlap=8, keep_empty=True)


def test_images_are_scaled_down_or_cut_but_not_both(images, tmp_path) -> None:
    with pytest.raises(ValueError, match="max_side is 640 and tile is 64; images are scaled down"):
        write_shards(images, tmp_path / "out", max_side=640, tile=64)
    assert not (tmp_path / "out").exists()


def test_tiles_can_be_trained_on(scenes, tmp_path) -> None:
    (scenes / "photo.jpg").unlink()
    (scenes / "small.png").unlink()
    write_shards(scenes, tmp_path / "out", tile=64)
    statistics = measure(open_source(tmp_path / "out"))
    assert (statistics.channels, statistics.median_size) == (2, (64, 64))
    assert min(statistics.low) > 20  # the nodata of zeros does not count
    assert 59000 < max(statistics.high) < 60000


def test_there_is_a_thread_for_each_core_that_may_be_used(images, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {7}, raising=False)
    asked, real = [], shard_writer.ThreadPoolExecutor
    monkeypatch.setattr(shard_writer, "ThreadPoolExecutor", lambda n: asked.append(n) or real(n))
    write_shards(images, tmp_path / "out")
    assert asked == [1]


def test_threads_are_never_far_ahead_of_what_is_written() -> None:
    made = []
    with ThreadPoolExecutor(2) as threads:
        entries = in_order(lambda k: made.append(k) or str(k), range(50), 2, threads)
        for written, entry in enumerate(entries):
            assert entry == (written, str(written))
            assert len(made) <= written + 5
    assert sorted(made) == list(range(50))


def test_small_stacks_beside_tiles_are_read_as_asked(tmp_path) -> None:
    from tifffile import imwrite

    (tmp_path / "in").mkdir()
    values = np.random.default_rng(0).uniform(0, 9, (2, 40, 50)).astype(np.float32)
    values[:, :, :9] = -9999
    imwrite(tmp_path / "in" / "a.tif", values, metadata={"axes": "ZYX"}, photometric="minisblack")
    for pages, images in {"images": 2, "first": 1, "channels": 1}.items():
        out = tmp_path / pages
        write_shards(tmp_path / "in", out, tile=64, pages=pages, nodata=-9999.0)
        source = open_source(out)
        assert len(source) == images
        pixels, *_, known = source.open(0).decode()
        expected = values if pages == "channels" else values[:1]
        assert (known.numpy() == (expected != -9999)).all()
        assert (pixels.numpy()[:, :, 9:] == expected[:, :, 9:]).all()
