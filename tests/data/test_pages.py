"""Files with several images in them: which are images of a source, and what is said of it."""

import io
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import TiffImageFile
from webdataset import TarWriter

from pixel_level_contrastive_learning.data import pages as module
from pixel_level_contrastive_learning.data import tiff
from pixel_level_contrastive_learning.data.arrays import NODATA_TAG
from pixel_level_contrastive_learning.data.decoding import stack_in
from pixel_level_contrastive_learning.data.image import ImageError, Stack
from pixel_level_contrastive_learning.data.pages import header_tells_several
from pixel_level_contrastive_learning.data.shard_writer import write_shards
from pixel_level_contrastive_learning.data.sources import Source, open_source

SIZE = (24, 32)
COLOURS = [(250, 20, 20), (20, 250, 20), (20, 20, 250), (250, 250, 20), (20, 250, 250)]


def gray(path: Path, count: int, first: int = 0, **options: object) -> Path:
    """A TIFF of gray pages of one value each: first, first + 1, ..."""
    values = np.arange(first, first + count, dtype=np.uint8)
    pages = np.broadcast_to(values[:, None, None], (count, *SIZE)).copy()
    tifffile.imwrite(path, pages if count > 1 else pages[0], photometric="minisblack", **options)
    return path


def frames(kind: str, count: int = 3, **options: object) -> bytes:
    """An animation or a file of several pictures, each of one colour."""
    first, *others = (Image.new("RGB", SIZE[::-1], colour) for colour in COLOURS[:count])
    stream = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    first.save(stream, kind, save_all=True, append_images=others, **lossless, **options)
    return stream.getvalue()


def values(source: Source) -> list[list[int]]:
    """For each image the first value of each of its channels, which is true of all its pixels."""
    numbers = []
    for index in range(len(source)):
        pixels = source.open(index).read()
        assert source.open(index).channels == len(pixels)
        assert (pixels == pixels[:, :1, :1]).all()
        numbers.append(pixels[:, 0, 0].int().tolist())
    return numbers


MESSAGES = {
    None: "2 files of 3 gray pages: read as 3 channels; `--pages images` makes 6 images",
    "images": "2 files of 3 gray pages: read as 6 images; `--pages channels` makes one image of",
    "channels": "2 files of 3 gray pages: read as 3 channels; `--pages images` makes 6 images",
    "first": "2 files of 3 gray pages: only the first of each file is read; `--pages images` makes",
}


@pytest.mark.parametrize("mode", MESSAGES)
def test_gray_pages_are_read_as_they_are_asked_for(tmp_path, caplog, mode) -> None:
    caplog.set_level("INFO")
    gray(tmp_path / "a.tif", 3, 10)
    gray(tmp_path / "b.tif", 3, 20)
    expected = {
        None: [[10, 11, 12], [20, 21, 22]],
        "images": [[10], [11], [12], [20], [21], [22]],
        "channels": [[10, 11, 12], [20, 21, 22]],
        "first": [[10], [20]],
    }
    source = open_source(tmp_path, pages=mode)
    assert values(source) == expected[mode]
    [record] = caplog.records
    assert record.message.startswith(MESSAGES[mode])
    names = [source.name(index) for index in range(len(source))]
    numbered = [f"{tmp_path}/{name}.tif[{i}]" for name in "ab" for i in range(3)]
    assert names == (numbered if mode == "images" else [f"{tmp_path}/{n}.tif" for n in "ab"])


@pytest.mark.parametrize(
    ("counts", "images"),
    [((3, 3), 2), ((16, 16), 2), ((17, 17), 34), ((3, 4), 7), ((3, 1), 4), ((1, 1), 2)],
)
def test_gray_pages_are_channels_where_every_file_has_as_many(tmp_path, counts, images) -> None:
    for number, count in enumerate(counts):
        gray(tmp_path / f"{number}.tif", count)
    assert len(open_source(tmp_path)) == images


def test_a_photo_beside_stacks_makes_images_of_them(tmp_path) -> None:
    gray(tmp_path / "a.tif", 3)
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    assert values(open_source(tmp_path)) == [[0], [1], [2], [0, 0, 0]]


def test_folders_decide_together(tmp_path) -> None:
    for name, count in (("one", 3), ("two", 4)):
        (tmp_path / name).mkdir()
        gray(tmp_path / name / "a.tif", count)
    assert len(open_source([tmp_path / "one", tmp_path / "two"])) == 7
    assert len(open_source([tmp_path / "one"])) == 1


def test_named_pages_are_images_beside_unnamed_ones(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    gray(tmp_path / "a.tif", 3, metadata={"axes": "ZYX"})
    gray(tmp_path / "b.tif", 4, 7)
    assert values(open_source(tmp_path)) == [[0], [1], [2], [7, 8, 9, 10]]
    assert [record.message.split(";")[0] for record in caplog.records] == [
        "1 file of 4 gray pages: read as 4 channels",
        "1 file of 3 pages: read as 3 images",
    ]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO"])
def test_frames_and_pages_in_colour_are_images(tmp_path, caplog, kind) -> None:
    caplog.set_level("INFO")
    (tmp_path / f"a.{kind.lower().replace('mpo', 'jpg')}").write_bytes(frames(kind, quality=100))
    source = open_source(tmp_path)
    near = np.array([source.open(i).read().float().mean((1, 2)).tolist() for i in range(3)])
    assert np.abs(near - np.array(COLOURS[:3])).max() < 3
    assert len(source) == 3
    assert "1 file of 3 pages: read as 3 images" in caplog.text
    [joined] = [open_source(tmp_path, pages="channels").open(0)]
    assert joined.channels == 9
    assert np.abs(joined.read().float().mean((1, 2)).view(3, 3).numpy() - near).max() < 0.01
    assert len(open_source(tmp_path, pages="first")) == 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "AVIF", "TIFF", "JPEG"])
def test_a_single_picture_is_no_stack(kind) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, kind)
    assert stack_in(stream.getvalue()) == Stack(1)
    assert header_tells_several(stream) == (kind == "GIF")  # whose frames are not announced


def test_planes_of_a_page_are_looked_for_behind_its_description(tmp_path) -> None:
    """MetaMorph's STK names each plane in the description, and counts them in a tag after it."""
    planes = [(module.UIC_TAG, "2I", 3, (1,) * 6, True)]
    plain = {"photometric": "minisblack", "metadata": None, "description": "a plane"}
    for tags in ([], planes):
        page = np.zeros((8, 8), np.uint8)
        tifffile.imwrite(tmp_path / "a.tif", page, extratags=tags, **plain)
        assert module.may_hold_several(str(tmp_path / "a.tif")) == bool(tags)


def test_smaller_pictures_of_a_photo_are_left_out(tmp_path, caplog) -> None:
    caplog.set_level("INFO")
    stream = io.BytesIO()
    photo, preview = Image.new("RGB", (64, 48), COLOURS[0]), Image.new("RGB", (16, 12))
    photo.save(stream, "MPO", save_all=True, append_images=[preview])
    (tmp_path / "a.jpg").write_bytes(stream.getvalue())
    source = open_source(tmp_path)
    assert [source.open(i).size for i in range(len(source))] == [(48, 64)]
    assert source.name(0) == str(tmp_path / "a.jpg")
    assert "smaller copies or masks in 1 file are left out" in caplog.text


def test_a_broken_list_of_pictures_costs_no_pixels(tmp_path) -> None:
    content = frames("MPO")
    start = content.index(b"MPF\0")
    for cut in (content[: start + 4] + bytes(40) + content[start + 44 :], content[: start + 3000]):
        (tmp_path / "a.jpg").write_bytes(cut)
        source = open_source(tmp_path)
        assert len(source) in (1, 3)
        assert source.open(0).size == SIZE


def test_of_many_photos_some_are_looked_at_and_all_where_one_holds_several(
    tmp_path, monkeypatch
) -> None:
    paths = []
    holds = module.may_hold_several
    monkeypatch.setattr(module, "LOOKED_AT", 3)
    monkeypatch.setattr(
        module, "may_hold_several", lambda path, start: paths.append(path) or holds(path, start)
    )
    for number in range(9):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.jpg")
    assert len(open_source(tmp_path)) == 9
    assert len(paths) == 3
    (tmp_path / "3.jpg").write_bytes(frames("MPO"))
    (tmp_path / "4.jpg").write_bytes(frames("MPO", 2))
    assert len(open_source(tmp_path)) == 12


def test_what_cannot_be_read_is_one_image_that_is_broken(tmp_path) -> None:
    content = frames("GIF")
    for number, broken in enumerate((content[:20], b"GIF8", b"II*\0", b"MM\0*\0\0\0\x08\0\x09")):
        (tmp_path / f"{number}.tif").write_bytes(broken)
    source = open_source(tmp_path)
    assert len(source) == 4
    for index in range(4):
        with pytest.raises(ImageError):
            source.open(index).read()


@pytest.mark.parametrize("mode", ["images", "channels", "first"])
def test_pages_in_shards_are_found_and_written(tmp_path, mode) -> None:
    gray(tmp_path / "a.tif", 3, 10)
    with TarWriter(str(tmp_path / "part-0.tar")) as writer:
        writer.write({"__key__": "a", "tif": (tmp_path / "a.tif").read_bytes()})
    expected = {"images": [[10], [11], [12]], "channels": [[10, 11, 12]], "first": [[10]]}[mode]
    assert values(open_source(str(tmp_path / "part-0.tar"), pages=mode)) == expected
    for max_side in (640, 16):
        out = tmp_path / f"shards-{max_side}"
        report = write_shards(tmp_path / "a.tif", out, pages=mode, max_side=max_side)
        assert report.images == len(expected)
        written = values(open_source(out))
        assert np.abs(np.array(written) - np.array(expected)).max() <= 1  # JPEG
        with pytest.raises(ValueError, match="holds shards of another call"):
            write_shards(tmp_path / "a.tif", out, max_side=max_side)


@pytest.mark.parametrize("max_side", [640, 5])
def test_eight_bit_pages_stay_eight_bit_in_shards_whatever_was_not_measured(
    tmp_path, max_side
) -> None:
    pages = np.arange(3 * 6 * 10, dtype=np.uint8).reshape(3, 6, 10)
    tags = [(NODATA_TAG, "s", 0, "0", True)]
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path, pages, photometric="minisblack", metadata={"axes": "ZYX"}, extratags=tags
    )
    write_shards(path, tmp_path / "out", max_side=max_side)
    for index in range(3):
        opened = open_source(tmp_path / "out").open(index)
        assert not opened.high_depth
        if max_side == 640:
            assert (opened.read()[0].numpy() == pages[index]).all()


def counted(monkeypatch, owner: type, method: str) -> list[None]:
    """A list that grows with each call of a method."""
    calls, real = [], getattr(owner, method)
    monkeypatch.setattr(
        owner, method, lambda *args, **kwargs: calls.append(None) or real(*args, **kwargs)
    )
    return calls


@pytest.mark.parametrize(
    ("dtype", "owner"), [("uint16", tifffile.TiffFile), ("uint8", TiffImageFile)]
)
def test_the_pages_of_a_stack_are_looked_for_once(tmp_path, monkeypatch, dtype, owner) -> None:
    stack = np.arange(100, dtype=dtype)[:, None, None].repeat(9, 1).repeat(9, 2)
    options = {"compression": "zlib", "photometric": "minisblack"}
    tifffile.imwrite(tmp_path / "a.tif", stack, **options)
    source, opened = open_source(tmp_path), counted(monkeypatch, owner, "__init__")
    with ThreadPoolExecutor(4) as threads:
        numbers = [*threads.map(lambda i: int(source.open(i).read()[0, 0, 0]), range(99, -1, -1))]
    assert numbers == [*range(99, -1, -1)]
    assert len(opened) <= 4
    tifffile.imwrite(tmp_path / "a.tif", stack + 7, **options)
    assert source.open(3).read()[0, 0, 0] == 10


def test_frames_are_read_one_after_the_other(tmp_path, monkeypatch) -> None:
    first, *others = [Image.new("L", (9, 9), value) for value in range(100)]
    first.save(tmp_path / "a.gif", save_all=True, append_images=others)
    source, seeks = open_source(tmp_path), counted(monkeypatch, GifImageFile, "_seek")
    images = [source.open(i).read() for i in range(100)]
    assert [int(pixels[0, 0, 0]) for pixels in images] == [*range(100)]
    assert len(seeks) < 300


def test_a_forked_process_opens_files_of_its_own(tmp_path) -> None:
    gray(tmp_path / "a.tif", 3, compression="zlib")
    open_source(tmp_path)
    assert tiff.KEPT.files
    if not (child := os.fork()):
        os._exit(len(tiff.KEPT.files))
    assert os.waitpid(child, 0)[1] == 0
    assert tiff.KEPT.files


def test_pages_of_a_long_file_are_found_in_any_order(tmp_path) -> None:
    gray(tmp_path / "a.tif", 2, 1)
    gray(tmp_path / "b.tif", 200)
    gray(tmp_path / "c.tif", 1, 77)
    gray(tmp_path / "d.tif", 4, 90)
    source = open_source(tmp_path)
    assert len(source) == 207
    expected = [1, 2, *range(200), 77, 90, 91, 92, 93]
    assert [source.open(i).read()[0, 0, 0].item() for i in reversed(range(207))] == expected[::-1]
