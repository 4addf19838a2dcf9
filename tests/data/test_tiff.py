"""Which images a TIFF holds, whoever wrote it, and their pixels."""

import io
import subprocess
import sys

import numpy as np
import pytest
import tifffile
from corpus.encoders import tiff
from PIL import Image

from pixel_level_contrastive_learning.data.arrays import NODATA_TAG
from pixel_level_contrastive_learning.data.decoding import open_image, stack_in
from pixel_level_contrastive_learning.data.image import ALL, ImageError, Stack
from pixel_level_contrastive_learning.data.orientation import ORIENTATION_TAG

RANDOM = np.random.default_rng(0)


def pages(*shape: int, dtype: str = "uint8") -> np.ndarray:
    """Pages of noise."""
    return RANDOM.integers(0, 256, shape).astype(dtype)


def by_pillow(array: np.ndarray, **options: object) -> bytes:
    """Pages as Pillow writes them."""
    first, *others = map(Image.fromarray, array)
    stream = io.BytesIO()
    first.save(stream, "TIFF", save_all=True, append_images=others, **options)
    return stream.getvalue()


def read(content: bytes, image: int | None = None) -> np.ndarray:
    """The pixels ``(c, h, w)`` of an image in a file, its header being true."""
    opened = open_image(content, image)
    pixels = opened.read()
    assert (opened.size, opened.channels) == (tuple(pixels.shape[1:]), len(pixels))
    assert opened.high_depth == pixels.is_floating_point()
    return pixels.numpy()


def each(content: bytes) -> np.ndarray:
    """All images of a file, ``(n, c, h, w)``."""
    return np.stack([read(content, i) for i in range(stack_in(content).images)])


UNNAMED = {
    "tifffile": lambda array: tiff(array, photometric="minisblack"),
    "tifffile without a word": lambda array: tiff(array, photometric="minisblack", metadata=None),
    "Pillow": by_pillow,
}
NAMED = {
    "tifffile": lambda array, axes: tiff(array, photometric="minisblack", metadata={"axes": axes}),
    "ImageJ": lambda array, axes: tiff(array, imagej=True, metadata={"axes": axes}),
    "OME": lambda array, axes: tiff(
        array, ome=True, photometric="minisblack", metadata={"axes": axes}
    ),
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("writer", UNNAMED)
def test_gray_pages_without_a_name_are_channels_or_images(writer, dtype) -> None:
    array = pages(12, 20, 30, dtype=dtype)
    content = UNNAMED[writer](array)
    assert stack_in(content) == Stack(12, joinable=True)
    assert (each(content)[:, 0] == array).all()
    assert (read(content, ALL) == array).all()
    assert (read(content) == array).all()
    more = UNNAMED[writer](pages(17, 20, 30, dtype=dtype))
    assert read(more).shape == (1, 20, 30)


@pytest.mark.parametrize("axis", ["Z", "T"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("writer", NAMED)
def test_pages_in_depth_or_time_are_images(writer, dtype, axis) -> None:
    array = pages(5, 20, 30, dtype=dtype)
    content = NAMED[writer](array, f"{axis}YX")
    assert stack_in(content) == Stack(5)
    assert (each(content)[:, 0] == array).all()
    assert (read(content) == array[:1]).all()
    assert (read(content, ALL) == array).all()


@pytest.mark.parametrize("writer", NAMED)
def test_named_channels_are_channels(writer) -> None:
    array = pages(5, 20, 30, dtype="uint16")
    content = NAMED[writer](array, "CYX")
    assert stack_in(content) == Stack(1)
    assert (read(content) == array).all()


@pytest.mark.parametrize(("writer", "axes"), [("OME", "ZCYX"), ("OME", "CZYX"), ("ImageJ", "ZCYX")])
def test_images_in_depth_have_their_channels(writer, axes) -> None:
    array = pages(3, 2, 20, 30, dtype="uint16")
    content = NAMED[writer](array if axes == "ZCYX" else array.swapaxes(0, 1), axes)
    assert stack_in(content) == Stack(3)
    assert (each(content) == array).all()
    assert read(content, ALL).shape == (6, 20, 30)


def test_more_channels_than_imagej_has_are_a_stack_without_a_name() -> None:
    few, many = pages(7, 20, 30), pages(12, 20, 30)
    assert (read(tiff(few, imagej=True)) == few).all()
    content = tiff(many, imagej=True)
    assert stack_in(content) == Stack(12)
    assert (each(content)[:, 0] == many).all()


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("axes", [None, "ZYXS"])
def test_pages_in_colour_are_images(dtype, axes) -> None:
    array = pages(6, 20, 30, 3, dtype=dtype)
    content = tiff(array, photometric="rgb", metadata={"axes": axes} if axes else {})
    assert stack_in(content) == Stack(6)
    assert (each(content) == array.transpose(0, 3, 1, 2)).all()
    assert (read(content, ALL) == array.transpose(0, 3, 1, 2).reshape(18, 20, 30)).all()


def test_the_rows_of_an_array_are_no_pages() -> None:
    array = pages(20, 30, 7)  # (h, w, c), which a writer took for 20 pages of 30 x 7
    content = tiff(array, photometric="minisblack")
    assert stack_in(content) == Stack(1)
    assert (read(content) == array.transpose(2, 0, 1)).all()
    assert stack_in(tiff(pages(20, 7, 30), photometric="minisblack")).images == 20


@pytest.mark.parametrize(("dtype", "order"), [("uint8", "<"), ("uint16", ">")])
def test_many_planes_may_lie_behind_one_page(dtype, order) -> None:
    array = pages(4, 20, 30, dtype=dtype)
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream, byteorder=order) as to:
        to.write(array, photometric="minisblack", metadata={"axes": "ZYX"}, truncate=True)
    content = stream.getvalue()
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        assert len(file.pages) == 1
    assert stack_in(content) == Stack(4)
    assert (each(content)[:, 0] == array).all()


def test_planes_behind_one_page_have_its_palette() -> None:
    array, palette = pages(3, 20, 30), pages(3, 256, dtype="uint16") * 257
    content = tiff(array, photometric="palette", colormap=palette, truncate=True)
    assert stack_in(content).images == 3
    assert (each(content) == (palette >> 8)[:, array].swapaxes(0, 1)).all()


@pytest.mark.parametrize("content", [b"II*\0", b"II*\0\x08\0", b"II*\0" + bytes(4)])
def test_a_tiff_without_pages_says_so(tmp_path, content) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(content)
    for opening in (open_image, stack_in):
        for place in (content, str(path)):
            with pytest.raises(ImageError, match=r"^damaged: no page in it$"):
                opening(place)


def test_smaller_copies_and_masks_are_no_images() -> None:
    large, small = pages(40, 60, 3), pages(20, 30, 3)
    for flags in ({"subfiletype": 1}, {}):
        stream = io.BytesIO()
        with tifffile.TiffWriter(stream) as to:
            to.write(small, photometric="rgb", metadata=None, **flags)
            to.write(large, photometric="rgb", metadata=None)
            to.write(large[..., 0] > 9, photometric="minisblack", subfiletype=4, metadata=None)
        content = stream.getvalue()
        assert stack_in(content) == Stack(1, reduced=2)
        assert (read(content) == large.transpose(2, 0, 1)).all()


def test_overviews_are_no_images() -> None:
    stream = io.BytesIO()
    large = pages(64, 64, 3)
    with tifffile.TiffWriter(stream) as to:
        to.write(large, photometric="rgb", subifds=2, tile=(16, 16))
        for step in (2, 4):
            to.write(large[::step, ::step], photometric="rgb", subfiletype=1, tile=(16, 16))
    assert stack_in(stream.getvalue()) == Stack(1, reduced=2)
    assert (read(stream.getvalue()) == large.transpose(2, 0, 1)).all()


def test_pages_of_several_sizes_are_images() -> None:
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as to:
        for shape in ((20, 30), (25, 28), (20, 30)):
            to.write(pages(*shape), photometric="minisblack", metadata=None)
    content = stream.getvalue()
    assert stack_in(content) == Stack(3)
    assert sorted(read(content, i).shape[1:] for i in range(3)) == [(20, 30), (20, 30), (25, 28)]
    with pytest.raises(
        ImageError, match=r"^its pages differ in size \(20x30, 25x28\), so they are"
    ):
        read(content, ALL)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_each_page_is_turned(dtype) -> None:
    array = pages(3, 20, 30, dtype=dtype)
    content = tiff(array, photometric="minisblack", extratags=[(ORIENTATION_TAG, "H", 1, 6, False)])
    assert (each(content)[:, 0] == array.swapaxes(1, 2)[:, :, ::-1]).all()


def test_compressed_pages_need_no_further_library() -> None:
    array = pages(3, 20, 30)
    content = by_pillow(array, compression="tiff_lzw")
    assert (each(content)[:, 0] == array).all()


@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite", "rgb"])
@pytest.mark.parametrize("compression", ["jpeg2000", "lerc", "png"])
def test_compressions_that_pillow_lacks_are_read(monkeypatch, compression, photometric) -> None:
    array = pages(20, 30, 3)[..., : 3 if photometric == "rgb" else 1].squeeze()
    content = tiff(array, compression=compression, photometric=photometric)
    expected = 255 - array if photometric == "miniswhite" else array
    assert (read(content) == np.atleast_3d(expected).transpose(2, 0, 1)).all()

    def missing(page: tifffile.TiffPage) -> None:
        raise ValueError("a compression requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", missing)
    with pytest.raises(ImageError, match=r"package: pip install imagecodecs$"):
        read(content)


def test_a_page_of_a_file_is_read_alone(tmp_path, monkeypatch) -> None:
    array = pages(12, 20, 30, dtype="uint16")
    path = tmp_path / "a.tif"
    path.write_bytes(NAMED["ImageJ"](array, "ZYX"))
    read_pages = []
    asarray = tifffile.TiffPage.asarray
    monkeypatch.setattr(
        tifffile.TiffPage, "asarray", lambda page: read_pages.append(page.index) or asarray(page)
    )
    monkeypatch.setattr(tifffile.TiffFrame, "asarray", tifffile.TiffPage.asarray)
    assert (open_image(str(path), 7).read()[0].numpy() == array[7]).all()
    assert read_pages == [7]


def test_the_other_pages_of_a_slide_are_no_images(tmp_path) -> None:
    for start, images in {"Aperio Image Library v1": 1, "pages": 2}.items():
        with tifffile.TiffWriter(tmp_path / "a.tif") as file:
            for size in ((64, 64), (40, 16)):  # the slide and its label
                page = np.zeros((*size, 3), np.uint8)
                file.write(page, photometric="rgb", description=start, metadata=None)
        assert stack_in(str(tmp_path / "a.tif")).images == images


def test_a_nodata_value_that_pixels_cannot_have_is_passed_over_in_silence(tmp_path) -> None:
    path, tags = tmp_path / "a.tif", [(NODATA_TAG, "s", 0, "-9999", True)]
    bands = pages(4, 6, 9)
    tifffile.imwrite(path, bands, photometric="minisblack", planarconfig="separate", extratags=tags)
    assert (read(path.read_bytes()) == bands).all()
    code = f"""
from pathlib import Path
from pixel_level_contrastive_learning.data.decoding import open_image
open_image(Path({str(path)!r}).read_bytes()).read()
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stderr == ""
