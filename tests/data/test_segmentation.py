"""Labelled images: what is read, and what is refused with the file's name and a way out."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from pixel_level_contrastive_learning.data.mask_coding import read_classes
from pixel_level_contrastive_learning.data.segmentation import SegmentationDataset, open_labelled
from pixel_level_contrastive_learning.data.sources import FileSource


def write(path, ids, mode=None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(ids), mode).save(path)


def opened(folder) -> list[SegmentationDataset]:
    return open_labelled(folder)


def refusal(folder, *splits) -> str:
    with pytest.raises(ValueError) as error:
        open_labelled(folder, splits or ("train", "val"))
    return str(error.value)


def test_a_folder_is_read_in_the_order_of_names(labelled) -> None:
    train, val = opened(labelled)
    assert (len(train), len(val)) == (10, 4)
    assert train.classes == val.classes == ("red", "green", "blue")
    assert [train.name(i) for i in (0, 9)] == ["0.png", "9.png"]
    example = train.read(3)
    assert example.pixels.shape == (3, 32, 48)
    assert example.mask.shape == (32, 48)
    assert example.mask.dtype == torch.uint8
    assert example.mask.unique().tolist() == [0, 1, 2, 255]
    assert (example.pixels.argmax(0) == example.mask)[2:].all()  # the classes are their colours


def test_images_may_lie_deeper_and_be_of_any_format(labelled) -> None:
    with Image.open(labelled / "images/val/2.png") as image:
        (labelled / "images/val/day").mkdir()
        image.save(labelled / "images/val/day/ü 2.JPEG")
    (labelled / "masks/val/day").mkdir()
    (labelled / "images/val/2.png").unlink()
    (labelled / "masks/val/2.png").rename(labelled / "masks/val/day/ü 2.png")
    _, val = opened(labelled)
    assert val.name(3) == "day/ü 2.JPEG"
    assert val.read(3).pixels.shape == (3, 32, 48)


def test_large_photos_are_decoded_smaller(labelled) -> None:
    folder = labelled / "images/val"
    write(folder / "big.jpg", np.zeros((1200, 2400, 3), np.uint8))
    write(labelled / "masks/val/big.png", np.zeros((1200, 2400), np.uint8))
    _, val = opened(labelled)
    example = val.read(4, shortest=300)
    assert example.pixels.shape == (3, 300, 600)
    assert example.mask.shape == (1200, 2400)


def test_a_share_is_drawn_by_its_seed_and_lies_in_larger_ones(labelled) -> None:
    train, _ = opened(labelled)
    shares = [train.share(part, 3) for part in (0.01, 0.3, 0.5, 1.0)]
    assert [len(share) for share in shares] == [1, 3, 5, 10]
    for small, large in pairwise(shares):
        assert set(small.images) < set(large.images)
    assert train.share(0.3, 3) == shares[1]
    assert list(shares[2].images) == sorted(shares[2].images)
    assert len({train.share(0.3, seed).images for seed in range(5)}) > 1
    masks = [shares[2].mask_name(index).stem for index in range(5)]
    assert masks == [image.stem for image in shares[2].images]


# Classes.


def test_without_names_classes_are_numbered(labelled) -> None:
    (labelled / "classes.txt").unlink()
    assert opened(labelled)[0].classes == ("class 0", "class 1", "class 2")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"sky\nsign post\n", ("sky", "sign post")),
        (b"0 sky\n1 sign post\n", ("sky", "sign post")),
        (b"0\tsky\n 1 sign post\n\n \n", ("sky", "sign post")),
        (b"\xef\xbb\xbf0 sky\r\n1 stra\xc3\x9fe\r\n", ("sky", "straße")),
    ],
)
def test_names_may_follow_their_ids(tmp_path, content, names) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    assert read_classes(path) == names


ORDER = "has id 1 in line 1, where 0 is expected: one class per line in the order of ids, from 0"
NONE = "names 0 classes; it must name 1 to 255, one per line in the order of ids"
BLANK = (
    "is empty in line 2, where the class of id 1 is expected; name it, or remove the line if the "
    "next name is that class"
)
TWICE = (
    "names two classes 'void' (ids 1 and 3); scores are listed by name, so give each class its own"
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"1 sky\n2 road\n", ORDER),
        ("sky\nstraße\n".encode("latin-1"), "is not UTF-8 (line 2); save it as UTF-8"),
        ("sky\nstraße\n".encode("utf-16"), "is not UTF-8 (line 1); save it as UTF-8"),
        (b"sky\n\nroad\n", BLANK),
        (b"0 sky\n \n1 road\n", BLANK),
        (b"sky\nvoid\nroad\nvoid", TWICE),
        (b"0 sky\n1 void\n2 road\n3 void", TWICE),
        (b"\n\n", NONE),
    ],
)
def test_classes_that_cannot_be_read_are_refused(tmp_path, content, reason) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_classes(path)
    assert str(error.value) == f"{path} {reason}"


def recoded(folder, ids) -> None:
    """Write other ids in place of 0, 1 and 2, and take the names away."""
    (folder / "classes.txt").unlink(missing_ok=True)
    for path in (folder / "masks").rglob("*.png"):
        with Image.open(path) as image:
            mask = np.array(image)
        write(path, np.select([mask == i for i in range(3)], ids, 255).astype(np.uint8))


def test_colours_turned_to_gray_are_refused_unless_they_are_named(labelled) -> None:
    recoded(labelled, (0, 76, 150))
    names = labelled / "classes.txt"
    assert refusal(labelled) == (
        f"the masks in {labelled / 'masks'} hold only 3 of the ids up to 150, such as 0, 76, "
        "150, like colours turned to gray; number the classes 0, 1, 2 and so on (--ids "
        f'"0:0,76:1,150:2" does so), or name all 151 in {names} if these are their ids'
    )
    names.write_text("\n".join(f"kind {label}" for label in range(151)))
    assert len(opened(labelled)[0].classes) == 151


def test_classes_that_are_missing_are_not_refused(labelled) -> None:
    recoded(labelled, (0, 15, 63))  # a few classes of a small set
    assert len(opened(labelled)[0].classes) == 64
    # Some photos of a large set: 38 of 150 classes, a little more than a quarter.
    some = np.array([*range(0, 148, 4), 149], np.uint8)
    for path in (labelled / "masks").rglob("*.png"):
        write(path, np.resize(some, (32, 48)))
    assert len(opened(labelled)[0].classes) == 150


@pytest.mark.parametrize("border", [0, 255])
def test_numbers_of_objects_are_no_classes(labelled, border) -> None:
    masks = sorted((labelled / "masks").rglob("*.png"))
    for number, path in enumerate(masks):
        mask = np.resize(np.arange(8 + number % 4, dtype=np.uint8), (32, 48))
        mask[:2] = border
        write(path, mask)
    names = labelled / "classes.txt"
    names.unlink()
    assert refusal(labelled) == (
        f"the masks in {labelled / 'masks'} hold ids without a gap, up to 7 in one and to 10 in "
        "another, like numbers of objects; write 1 for all, or name all 11 classes in "
        f"{names}"
    )
    write(masks[0], np.resize(np.array([0, 10], np.uint8), (32, 48)))
    assert len(opened(labelled)[0].classes) == 11


# Masks.


GREEN = np.zeros((32, 48, 3), np.uint8)
GREEN[:10] = (0, 128, 0)
GRAY = (
    "if its gray values are the ids, write one channel, Image.open(path).getchannel(0); or name "
    "the class of each in a file (--colours FILE, lines such as '255 255 255 1')"
)
ALPHA = "write that alone, Image.open(path).getchannel('A')"


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (
            np.full((32, 48), 3, np.uint8),
            "has id 3, but classes.txt names 3 classes (ids 0 to 2); name the class there, or set "
            "such pixels to 255 to ignore them",
        ),
        (
            np.zeros((48, 32), np.uint8),
            "is 48x32 pixels (height x width), but its image is 32x48; it looks rotated by 90 "
            "degrees; write it at the image's size, with nearest-neighbour resampling, which keeps "
            "ids",
        ),
        (
            GREEN,
            "is coded in colours (RGB, 2 different ones), but masks hold class ids: name the "
            "class of each colour in a file (--colours FILE, lines such as '128 0 0 1'), or write "
            "one channel that holds the number of each pixel's class",
        ),
        (np.ones((32, 48, 2), np.uint8), GRAY),
        (np.ones((32, 48, 3), np.uint8), GRAY),
        (np.insert(GREEN[..., :1] * 0, 1, GREEN[..., 1], axis=2), ALPHA),
        (np.insert(GREEN * 0, 3, GREEN[..., 1], axis=2), ALPHA),
        (
            np.arange(32 * 48, dtype=np.uint16).reshape(32, 48),
            "has 1536 different values, like an image; check whether images/ and masks/ are "
            "swapped",
        ),
        (
            np.full((32, 48), 700, np.uint16),
            "has ids from 700 to 700; write 8-bit PNG with ids from 0 to 254, and 255 for pixels "
            'to ignore, or name the id of each value with --ids "700:0"',
        ),
    ],
)
def test_a_mask_that_is_wrong_is_refused(labelled, mask, reason) -> None:
    path = labelled / "masks/train/4.png"
    write(path, mask)
    message = refusal(labelled)
    of_gray = reason in (GRAY, ALPHA)
    assert message.startswith(f"{path} is coded in colours" if of_gray else f"{path} {reason}")
    assert message.endswith(reason)


def test_a_mask_of_another_size_is_refused_when_it_is_read(labelled) -> None:
    path = labelled / "masks/train/1.png"
    write(path, np.zeros((48, 32), np.uint8))
    image, mask = FileSource([f"{labelled}/images/train/1.png"]), FileSource([str(path)])
    train = SegmentationDataset(image, mask, (0,), ("a", "b"), labelled / "images")
    with pytest.raises(ValueError, match="is 48x32 pixels"):
        train.read(0)


@pytest.mark.parametrize(("name", "stem"), [("4.png", "4"), ("1.2.8", "1.2.8"), ("4.nii.gz", "4")])
def test_a_missing_mask_is_named(labelled, name, stem) -> None:
    image, path = labelled / "images/train/4.png", labelled / "masks/train/4.png"
    image.write_bytes(bytes(128) + b"DICM")
    image.rename(image.with_name(name))
    path.rename(path.with_name(f"{stem}.webp"))
    mask = labelled / "masks/val/2.png"
    mask.rename(mask.with_name("mask_2.png"))
    of_train, of_val = refusal(labelled).splitlines()
    assert of_val.startswith(
        f"{mask} does not exist (found mask_2.png); 1 of 4 images have no mask"
    )
    assert of_train == (
        f"{path.with_name(f'{stem}.png')} does not exist (found {stem}.webp); 1 of 10 images have "
        "no mask: a mask has the name of its image, perhaps followed by _mask, and ends in .png, "
        ".tif, .tiff, .bmp, .gif, .npy, .npz, .nii, .nii.gz; write the masks, or remove these "
        "images"
    )


def test_a_mask_of_several_images_is_told(labelled, caplog) -> None:
    images = labelled / "images/train"
    shutil.copy(images / "4.png", images / "3.webp")
    assert len(opened(labelled)[0]) == 11
    assert [record.getMessage() for record in caplog.records] == [
        f"1 mask of several images in {labelled / 'masks/train'}, such as 3.png: the names "
        "of these images differ only in their endings; keep one of them, unless all are the same"
    ]


def test_masks_without_an_image_are_told(labelled, caplog) -> None:
    masks = labelled / "masks/train"
    for name in ("0_color", ".hidden", "1-instance ids"):  # each of an image, or nobody's
        shutil.copy(masks / "0.png", masks / f"{name}.png")
    opened(labelled)
    assert not caplog.records
    for name in ("7_1.png", "day/3_mask.png", "10.tif"):
        (masks / name).parent.mkdir(exist_ok=True)
        shutil.copy(masks / "0.png", masks / name)
    assert [len(split) for split in opened(labelled)] == [10, 4]
    images = labelled / "images/train"
    message = (
        f"masks without an image in {masks}, not used: 10.tif, 7_1.png, day/3_mask.png; check "
        f"that {images} is complete, and that its images have the names of their masks and endings "
        "that are read"
    )
    assert [record.getMessage() for record in caplog.records] == [f"3 {message}"]
    for path in sorted(images.iterdir()):
        path.rename(path.with_name(f"photo{path.name}"))
    assert refusal(labelled).endswith(
        f"write the masks, or remove these images. And 15 masks without an image in {masks}, more "
        "than with one, not used: 0.png, 0_color.png, 1-instance ids.png, 1.png, 10.tif, ...; "
        + message.partition("; ")[2]
    )


def test_what_cannot_be_read_is_named(labelled) -> None:
    mask, image = labelled / "masks/train/4.png", labelled / "images/val/2.png"
    mask.write_bytes(mask.read_bytes()[:60])
    empty = labelled / "masks/train/5.png"
    empty.write_bytes(b"")
    image.write_text("no image")
    first, of_empty, second = refusal(labelled).splitlines()
    assert (
        of_empty == f"{empty} cannot be read as a mask: the file is empty (0 bytes); write it again"
    )
    assert first.startswith(f"{mask} cannot be read as a mask: ")
    assert second.startswith(f"{image} cannot be read: ")


def test_all_wrong_masks_are_counted_and_the_first_listed(labelled) -> None:
    for number in range(8):
        write(labelled / f"masks/train/{number}.png", np.full((32, 48), 3, np.uint8))
    lines = refusal(labelled).splitlines()
    assert len(lines) == 6
    assert lines[4].startswith(str(labelled / "masks/train/4.png"))
    assert lines[5] == "and 3 more"


def test_masks_of_nothing_and_all_are_explained(labelled) -> None:
    for path in (labelled / "masks/train").iterdir():
        write(path, np.kron([[0, 255]], np.ones((32, 24))).astype(np.uint8))
    assert refusal(labelled) == (
        f"the masks in {labelled / 'masks/train'} hold only 0 and 255, and 255 means ignored, so "
        "only class 0 is left; write 1 in place of 255 if it is your second class, or give --ids "
        '"0:0,255:1"'
    )


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_known_pixel_is_refused(labelled, split) -> None:
    for path in (labelled / "masks" / split).iterdir():
        write(path, np.full((32, 48), 255, np.uint8))
    assert refusal(labelled) == (
        f"all pixels of the masks in {labelled / 'masks' / split} are 255, which means ignored, so "
        "there is nothing to learn or to evaluate; give a split that has labels, or write class ids"
    )


def test_images_without_a_known_pixel_are_left_out(labelled) -> None:
    for number in (0, 7):
        write(labelled / f"masks/train/{number}.png", np.full((32, 48), 255, np.uint8))
    train, val = opened(labelled)
    masks = [train.mask_name(index).stem for index in range(len(train))]
    assert masks == [path.stem for path in train.images]
    assert [train.name(i) for i in range(len(train))] == [
        f"{i}.png" for i in (1, 2, 3, 4, 5, 6, 8, 9)
    ]
    assert len(val) == 4


def test_a_single_class_is_refused(labelled) -> None:
    for path in (labelled / "masks/train").iterdir():
        write(path, np.full((32, 48), 2, np.uint8))
    assert "hold only the ids 2 (255 means ignored); at least two" in refusal(labelled)


# Folders.


def test_a_folder_that_is_none_is_refused(labelled, monkeypatch) -> None:
    monkeypatch.chdir(labelled)
    assert refusal("").startswith("data is '', which is not a folder; it must hold images/train")
    message = refusal(labelled / "nowhere")
    assert "which is not a folder; it must hold images/train, images/val, masks/train" in message


def test_a_split_that_is_not_there_is_refused_with_those_that_are(labelled) -> None:
    message = refusal(labelled, "train", "vla")
    assert message.startswith(
        f"{labelled / 'images/vla'} does not exist (found train, val); perhaps "
    )
    assert "'val' is meant" in message


def test_a_split_without_images_is_refused(labelled) -> None:
    shutil.rmtree(labelled / "images/val")
    (labelled / "images/val").mkdir()
    assert f"no image in '{labelled / 'images/val'}'" in refusal(labelled)
