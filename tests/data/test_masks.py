"""Masks of any format give the ids that were meant, or are refused with the way out."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
from corpus.encoders import npy, picture, png, tiff
from PIL import Image

from pixel_level_contrastive_learning.data import tiff as tiff_module
from pixel_level_contrastive_learning.data.mask_coding import (
    IGNORED,
    PLAIN,
    MaskCoding,
    parse_ids,
    read_coding,
)
from pixel_level_contrastive_learning.data.masks import find_masks, read_coded
from pixel_level_contrastive_learning.data.orientation import ORIENTATION_TAG
from pixel_level_contrastive_learning.data.segmentation import open_labelled
from pixel_level_contrastive_learning.data.sources import FileSource

IDS = np.random.default_rng(0).integers(0, 3, (6, 8)).astype(np.uint8)
COLOURS = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0]], np.uint8)


def read_mask(path, coding=PLAIN):
    """The ids in a mask."""
    return read_coded(FileSource([str(path)]), 0, coding)[0]


def indexed(array: np.ndarray) -> Image.Image:
    """Indices of `COLOURS`."""
    image = Image.fromarray(array, "P")
    image.putpalette(COLOURS.flatten().tolist())
    return image


FILES = {
    "gray.png": picture("PNG", IDS),
    "palette.png": picture("PNG", indexed(IDS)),
    "deep.png": picture("PNG", IDS.astype(np.uint16)),
    "bits2.png": png(IDS, 2, 0),
    "bits4.png": png(IDS, 4, 0),
    "gray.bmp": picture("BMP", IDS),
    "palette.bmp": picture("BMP", indexed(IDS)),
    "palette.gif": picture("GIF", indexed(IDS)),
    "gray.tif": tiff(IDS),
    "deep.tiff": tiff(IDS.astype(np.int32)),
    "float.tif": tiff(IDS.astype(np.float32)),
    "palette.tif": picture("TIFF", indexed(IDS)),
    "pillow.tif": picture("TIFF", IDS),
    "whole.npy": npy(IDS.astype(np.int64)),
    "float.npy": npy(IDS.astype(np.float64)),
    "first.npy": npy(IDS[None]),
}


@pytest.mark.parametrize("name", FILES)
def test_ids_are_read_exactly(tmp_path, name) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert read_mask(tmp_path / name).tolist() == IDS.tolist()


def test_two_values_may_be_bits(tmp_path) -> None:
    files = {
        "a.png": png(IDS % 2, 1, 0),
        "b.npy": npy(IDS % 2 > 0),
        "c.tif": tiff(IDS % 2 > 0, photometric="minisblack"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert read_mask(tmp_path / name).tolist() == (IDS % 2).tolist()


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_masks_are_turned_as_images_are(tmp_path, tag, kind) -> None:
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = tag
    twin = picture("PNG", IDS, exif=exif)
    path = tmp_path / "a.png"
    turned = tiff(IDS, extratags=[(ORIENTATION_TAG, "H", 1, tag, True)])
    path.write_bytes(twin if kind == "PNG" else turned)
    from pixel_level_contrastive_learning.data.decoding import open_image

    assert read_mask(path).tolist() == open_image(twin).read()[0].tolist()


REFUSED = {
    "values that are not whole numbers, such as 0.5": npy(np.full((2, 2), 0.5)),
    "values that are not whole numbers, such as nan": npy(np.full((2, 2), np.nan)),
    'value with --ids "0:0,1000:1,2000:2"': npy(IDS.astype(int) * 1000),
    'value with --ids "VALUE:ID,..."': npy(np.arange(300)[None]),
    "has ids from -1 to 2": npy(IDS.astype(int) - (IDS == 0)),
    "it has 3 pages, but its image has 1": tiff(np.stack([IDS] * 3), photometric="minisblack"),
    "it has several frames": picture(
        "GIF", indexed(IDS), save_all=True, append_images=[Image.fromarray(IDS + 9)]
    ),
    "says that white is 0, so its values, 0 to 2, may be meant the other way": tiff(
        IDS, photometric="miniswhite"
    ),
    "is coded in colours (RGB, 3 different ones)": picture("PNG", COLOURS[IDS]),
    "has the shape (2, 6, 8)": npy(np.stack([IDS, IDS])),
    "not an image": picture("JPEG", IDS),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_no_mask_of_ids_is_refused(tmp_path, reason) -> None:
    (tmp_path / "a.png").write_bytes(REFUSED[reason])
    with pytest.raises(ValueError) as error:
        read_mask(tmp_path / "a.png")
    message = str(error.value)
    assert reason in message or (reason == "not an image" and "cannot be read as a mask" in message)


# Values and colours.


def test_the_id_of_each_value_can_be_named(tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture("PNG", np.array([[0, 128, 255]], np.uint8)))
    assert read_mask(path, MaskCoding(ids=parse_ids("0:0, 128:255, 255:1"))).tolist() == [
        [0, 255, 1]
    ]
    with pytest.raises(ValueError) as error:
        read_mask(path, MaskCoding(ids=parse_ids("0:0,255:1")))
    assert str(error.value) == (
        f"{path} has 128, which --ids does not name; add 128:ID to it, or 128:255 to ignore such "
        "pixels"
    )
    path.write_bytes(tiff(IDS > 0))  # which tifffile marks so that white is 0
    with pytest.raises(ValueError, match="has 1, which --ids does not name; add 1:ID to it"):
        read_mask(path, MaskCoding(ids={0: 0, 255: 1}))
    named = read_mask(path, MaskCoding(ids={0: 0, 1: 1}))
    assert named.tolist() == (IDS > 0).astype(int).tolist()
    path.write_bytes(npy(np.array([[-1, 0, 7]])))
    assert read_mask(path, MaskCoding(ids=parse_ids("-1:255,0:0,7:1"))).tolist() == [[255, 0, 1]]


@pytest.mark.parametrize("text", ["", "0", "0:0,0:1", "0:256", "a:1", "0:-1", "0:0;255:1"])
def test_ids_that_cannot_be_read_are_refused(text) -> None:
    with pytest.raises(ValueError, match=r"^ids is .*; it must be VALUE:ID pairs such as"):
        parse_ids(text)


CODED = {
    "RGB": picture("PNG", COLOURS[IDS]),
    "RGBA": picture("PNG", np.dstack([COLOURS[IDS], np.full(IDS.shape, 9, np.uint8)])),
    "palette": picture("PNG", indexed(IDS)),
    "BMP": picture("BMP", COLOURS[IDS]),
    "TIFF": tiff(COLOURS[IDS], photometric="rgb"),
    "TIFF palette": picture("TIFF", indexed(IDS)),
    "array": npy(COLOURS[IDS]),
}
WRITTEN = {
    "numbers": "0 0 0 0\n128 0 0 1\n0 128 0 2\n",
    "names": "0 0 0 ground\n128 0 0 red roof\n\n0,128,0,green\n",
    "numbers and names": "2 green 0 128 0\n1 red roof 128 0 0\n0 0 0 0 ground\n9 9 9 255\n",
    "ids and names": "0 ground 0 0 0\n1 red roof 128 0 0\n255 void 9 9 9\n2 green 0 128 0\n",
    "names first, a header": "name,r,g,b\nground,0,0,0\nred roof,128,0,0\ngreen,0,128,0\n",
}


@pytest.mark.parametrize("kind", CODED)
@pytest.mark.parametrize("text", WRITTEN)
def test_masks_of_colours_are_read_by_a_file(tmp_path, kind, text) -> None:
    (tmp_path / "a.png").write_bytes(CODED[kind])
    (tmp_path / "colours.txt").write_text(WRITTEN[text])
    for classes in (None, ("ground", "red roof", "green")):
        coding, names = read_coding(None, tmp_path / "colours.txt", classes)
        assert read_mask(tmp_path / "a.png", coding).tolist() == IDS.tolist()
        new = text != "numbers" and classes is None
        assert names == (("ground", "red roof", "green") if new else None)


def test_an_index_past_the_palette_is_refused(tmp_path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture("PNG", indexed(IDS + 1)))
    with pytest.raises(
        ValueError, match=r"a\.png has a pixel of index 3, but its palette ends at 2"
    ):
        read_mask(path, MaskCoding(colours={(0, 0, 0): 0}))


REFUSED_NAMES = {
    "ids with names; they must be ids from 0 to 254": "0 a 1 1 1\n0 b 2 2 2\n",
    "ids with names; they must be ids from 0 to 254, or": "0 a 1 1 1\n1 a 2 2 2\n",
    "ids with names; they must be ids from 0 to 254, or 255": "256 a 1 1 1\n",
    "gives 1 classes by name and 1 by number; give all by name": "1 1 1 road\n2 2 2 0\n",
    "gives 256 classes by name and 0 by number; give all by name, 255 at": "".join(
        f"{i} 0 0 kind{i}\n" for i in range(256)
    ),
}


@pytest.mark.parametrize("reason", REFUSED_NAMES)
def test_names_of_colours_that_cannot_be_ids_are_refused(tmp_path, reason) -> None:
    (tmp_path / "colours.txt").write_text(REFUSED_NAMES[reason])
    with pytest.raises(ValueError, match=reason):
        read_coding(None, tmp_path / "colours.txt", None)


def test_gray_values_are_colours_too(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(picture("PNG", np.array([[0, 255]], np.uint8)))
    (tmp_path / "colours.txt").write_text("0 0 0 0\n255 255 255 255\n")
    coding, _ = read_coding(None, tmp_path / "colours.txt", None)
    assert read_mask(tmp_path / "a.png", coding).tolist() == [[0, IGNORED]]


def test_colours_that_are_not_named_are_refused(tmp_path) -> None:
    path, file = tmp_path / "a.png", tmp_path / "colours.txt"
    path.write_bytes(picture("PNG", COLOURS[np.array([[0, 1, 1, 2]])]))
    file.write_text("0 0 0 0\n")
    coding, _ = read_coding(None, file, None)
    with pytest.raises(ValueError) as error:
        read_mask(path, coding)
    assert str(error.value) == (
        f"{path} has 2 colours that {file} does not name: 128 0 0 (50.0% of it); 0 128 0 (25.0% of "
        "it); add them there, with 255 as the class to ignore them"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "names no colour"),
        ("1 2 3\n", "in line 1, where red, green, blue (0 to 255) and a class are expected"),
        ("1 2 300 road\n", "in line 1, where red, green, blue"),
        ("1 2 3 road\n1 2 3 sky\n", "names 1 2 3 twice, as 'road' and 'sky'"),
        ("1 2 3 moon\n", "names the class 'moon', which is not among road, sky"),
        ("0 sky 1 2 3\n", "gives id 0 the name 'sky', unlike road, sky; make both files agree"),
        ("1 2 3 256\n", "names the class '256', which is not among road, sky"),
    ],
)
def test_files_of_colours_that_cannot_be_read_are_refused(tmp_path, text, reason) -> None:
    (tmp_path / "colours.txt").write_text(text)
    with pytest.raises(ValueError) as error:
        read_coding(None, tmp_path / "colours.txt", ("road", "sky"))
    assert reason in str(error.value)
    with pytest.raises(ValueError, match=r"^colours is .*nowhere.*, which cannot be read"):
        read_coding(None, tmp_path / "nowhere", None)
    with pytest.raises(ValueError, match=r"^ids and colours are both given"):
        read_coding("0:0", tmp_path / "colours.txt", None)


# In a labelled folder.


def repainted(folder, orders) -> None:
    """Write the masks as palettes whose colours stand in the order given for each file."""
    for number, path in enumerate(sorted((folder / "masks").rglob("*.png"))):
        order = np.array(orders[number % len(orders)])
        with Image.open(path) as image:
            ids = np.where(np.array(image) == 255, 0, np.array(image))
        written = Image.fromarray(np.argsort(order)[ids].astype(np.uint8), "P")
        written.putpalette(COLOURS[order].flatten().tolist())
        written.save(path)


def test_palettes_that_differ_are_refused_or_read_by_colour(labelled, tmp_path) -> None:
    repainted(labelled, [[0, 1, 2], [2, 1, 0]])
    with pytest.raises(ValueError) as error:
        open_labelled(labelled)
    first, second = labelled / "masks/train/0.png", labelled / "masks/train/1.png"
    assert str(error.value).splitlines()[0] == (
        f"{second} gives id 0 the colour 0 128 0, but {first} 0 0 0: their palettes differ, so the "
        "same id is not the same class. Name the class of each colour in a file (--colours FILE, "
        "lines such as '128 0 0 1'), or give --ids with all ids (\"0:0,1:1\") if the ids are right "
        "whatever their colours"
    )
    file = tmp_path / "colours.txt"
    file.write_text("0 0 0 red\n128 0 0 green\n0 128 0 blue\n")
    train, _ = open_labelled(labelled, colours=file)
    for index in range(2):
        sample = train.read(index)
        shown = sample.mask != 0  # where nothing was known, 0 was written
        assert (sample.pixels.argmax(0)[shown] == sample.mask[shown]).all()
    assert len(open_labelled(labelled, ids="0:0,1:1,2:2")[0]) == 10


def test_palettes_that_agree_where_they_are_used_are_ids(labelled) -> None:
    repainted(labelled, [[0, 1, 2]])
    assert len(open_labelled(labelled)[0]) == 10


@pytest.mark.parametrize(
    "ending",
    ["_mask.png", ".tif", "_label.TIF", "_Mask.PNG", "_GT.gif", "-mask.bmp", ".npy", "_gt.gif"],
)
def test_masks_are_found_by_other_endings(labelled, ending) -> None:
    expected = [open_labelled(labelled)[0].read(i).mask.tolist() for i in range(10)]
    for path in sorted((labelled / "masks").rglob("*.png")):
        with Image.open(path) as image:
            ids = np.array(image)
        path.unlink()
        to = path.with_name(path.stem + ending)
        np.save(to, ids) if ending == ".npy" else Image.fromarray(ids).save(to)
    train, _ = open_labelled(labelled)
    assert [train.read(i).mask.tolist() for i in range(10)] == expected


@pytest.mark.parametrize(
    ("masks", "images", "expected"),
    [
        ("x_seg.png", "x.png x_seg.png", [None, "x_seg.png"]),
        ("x_seg.png x_seg_mask.png", "x.png x_seg.png", [None, "x_seg.png"]),
        ("x_seg.png", "x.png a/x_seg.png", ["x_seg.png", None]),
        ("1.2.84.png", "1.2.84 1.2.85", ["1.2.84.png", None]),
        ("1.2.84_mask.nii.gz", "1.2.84", ["1.2.84_mask.nii.gz"]),
        ("a.nii.gz", "a.nii.gz", ["a.nii.gz"]),
        ("b.PNG", "b.xyz", ["b.PNG"]),
    ],
)
def test_a_mask_belongs_to_one_image(tmp_path, masks, images, expected) -> None:
    for name in masks.split():
        (tmp_path / name).touch()
    paths = find_masks(tmp_path, list(map(Path, images.split())))
    assert paths == [name and tmp_path / name for name in expected]


def test_names_in_a_file_of_colours_name_the_classes(labelled, tmp_path) -> None:
    repainted(labelled, [[0, 1, 2]])
    (labelled / "classes.txt").unlink()
    file = tmp_path / "colours.txt"
    file.write_text("0 0 0 rot\n128 0 0 grün\n0 128 0 blau\n", encoding="utf-8")
    assert open_labelled(labelled, colours=file)[0].classes == ("rot", "grün", "blau")


@pytest.mark.parametrize("kind", ["tif", "imagej", "npy", "npz"])
def test_a_stack_has_a_stack_of_masks(labelled, kind, monkeypatch) -> None:
    path, masks = labelled / "images/train/0.tif", labelled / "masks/train"
    path.with_suffix(".png").unlink()
    pages, ids = np.zeros((3, 32, 48), np.uint8), np.arange(3)[:, None, None]
    named = {"photometric": "minisblack", "metadata": {"axes": "ZYX"}}
    tifffile.imwrite(path, pages, **named)
    with pytest.raises(
        ValueError, match=r"0.png cannot be read .* has 1 page, but its image has 3"
    ):
        open_labelled(labelled)
    mask = np.broadcast_to(ids, pages.shape).astype(np.uint8)
    if kind == "npy":
        np.save(masks / "0.npy", mask)
    elif kind == "npz":
        np.savez(masks / "0.npz", mask[..., None])
    else:
        tifffile.imwrite(masks / "0.tif", mask, imagej=kind == "imagej", **named)
    (masks / "0.png").rename(masks / "0.webp")
    train, _ = open_labelled(labelled)
    assert len(train) == 12
    with monkeypatch.context() as patched:
        patched.setattr(tiff_module, "find_images", None)  # pages are known by now
        assert [train.read(i).mask.unique().tolist() for i in range(3)] == [[0], [1], [2]]
    assert [train.name(i) for i in (2, 3)] == ["0.tif[2]", "1.png"]
    with pytest.raises(ValueError, match=r"it has 3 pages, but its image has 1|coded in colours"):
        open_labelled(labelled, pages="first")


def test_pages_may_be_the_channels_of_an_image_with_a_mask(labelled) -> None:
    path = labelled / "images/train/0.png"
    path.unlink()
    pages = np.zeros((3, 32, 48), np.uint8)
    tifffile.imwrite(
        path.with_suffix(".tif"), pages, photometric="minisblack", metadata={"axes": "ZYX"}
    )
    train, _ = open_labelled(labelled, pages="channels")
    assert train.read(0).pixels.shape == (3, 32, 48)
    assert open_labelled(labelled, pages="first")[0].read(0).pixels.shape == (1, 32, 48)
