"""Segmentation datasets: folders of images and masks, all checked before anything is computed."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .decoding import open_image
from .image import ImageError, LazyImage
from .sources import IMAGES, MASKS, find_files, no_image_message

IGNORED = 255
"""The id of pixels that are neither trained on nor counted."""
SHOWN_PROBLEMS = 5
"""Wrong masks that an error lists; it counts the rest."""
SPARSE_FROM, MIN_SHARE_OF_IDS = 64, 0.25
"""From this largest id on, the share of ids up to it that masks without class names must hold:
colours turned to gray are fewer, of VOC 13 %, of CamVid 17 %."""
LAYOUT = (
    "it must hold images/train, images/val, masks/train and masks/val, masks being PNG files of "
    "class ids with the names of their images"
)


class SegmentationSample(NamedTuple):
    """An image and its mask.

    Attributes:
        pixels: ``(c, h, w)`` uint8, or float32 raw values; of a large image perhaps fewer pixels
            than the mask has.
        mask: ``(height, width)`` uint8 class ids, `IGNORED` where nothing is known.
        name: The image's path below its split, for people.
    """

    pixels: Tensor
    mask: Tensor
    name: str


@dataclass(frozen=True)
class SegmentationDataset:
    """One split of a folder of images and masks.

    Attributes:
        images: Its images, sorted by name, without those of which nothing is known.
        masks: Their masks.
        classes: The names of the classes, by id.
        folder: What names are relative to.
    """

    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    classes: tuple[str, ...]
    folder: Path

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """The image's path below the split's folder."""
        return self.images[index].relative_to(self.folder).as_posix()

    def read(self, index: int, shortest: int | None = None) -> SegmentationSample:
        """An image and its mask.

        Args:
            index: Which.
            shortest: What the shorter side must measure at least: a large JPEG may be decoded at a
                half, a quarter or an eighth of its size; None for the full size.

        Raises:
            ValueError: The image cannot be read, or its size is not the mask's.
        """
        mask = read_mask(self.masks[index])
        image = open_file(self.images[index])
        check_size(self.masks[index], mask, image)
        try:
            pixels = image.read(shortest)
        except ImageError as error:
            raise ValueError(f"{self.images[index]} cannot be read: {error}") from error
        return SegmentationSample(pixels, mask, self.name(index))

    def subset(self, indices: Sequence[int]) -> SegmentationDataset:
        """Some of the images, in the order given."""
        images, masks = (tuple(paths[i] for i in indices) for paths in (self.images, self.masks))
        return replace(self, images=images, masks=masks)

    def share(self, fraction: float, seed: int) -> SegmentationDataset:
        """A share of the images, at least one, drawn by a seed; a larger share holds a smaller."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        count = min(len(self), max(1, round(fraction * len(self))))
        return self.subset(sorted(order[:count].tolist()))


def open_labelled(
    data: str | Path, splits: Sequence[str] = ("train", "val")
) -> list[SegmentationDataset]:
    """The splits of a folder of images and masks, every mask checked.

    The folder holds ``images/SPLIT`` and ``masks/SPLIT``, any nesting below: for each image a PNG
    of the same name whose pixels are class ids, `IGNORED` where nothing is known. ``classes.txt``
    has a name a line in the order of ids, which may stand before it; without it the classes are the
    ids up to the largest in the masks. Images whose pixels are all `IGNORED` are left out.

    Args:
        data: The folder.
        splits: Which splits are wanted; the first is the one that is trained on.

    Raises:
        ValueError: Something is missing, or masks are wrong: the first files, and what to do.
    """
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise ValueError(f"data is {str(data)!r}, which is no folder; {LAYOUT}")
    names = read_classes(folder / "classes.txt")
    opened = [open_split(folder, split, names or ()) for split in splits]
    problems: list[str] = []
    ids = [check_masks(split, len(names) if names else IGNORED, problems) for split in opened]
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise ValueError("\n".join([*problems[:SHOWN_PROBLEMS], *rest]))
    for split, masks in zip(splits, ids, strict=True):
        if set().union(*masks) == {IGNORED}:
            raise ValueError(
                f"all pixels of the masks in {folder / MASKS / split} are {IGNORED}, which means "
                "ignored, so there is nothing to learn or to judge by; name a split that has "
                "labels, or write class ids"
            )
    trained_on = set().union(*ids[0])
    if len(trained_on - {IGNORED}) < 2:
        raise ValueError(one_class_message(folder / MASKS / splits[0], trained_on))
    classes = names or number_classes(folder, {i for masks in ids for mask in masks for i in mask})
    return [
        replace(
            split.subset([i for i, mask in enumerate(masks) if mask != {IGNORED}]), classes=classes
        )
        for split, masks in zip(opened, ids, strict=True)
    ]


def open_split(folder: Path, split: str, classes: tuple[str, ...]) -> SegmentationDataset:
    """One split, its masks not yet checked."""
    images, masks = folder / IMAGES / split, folder / MASKS / split
    for place in (images, masks):
        if not place.is_dir():
            there = sorted(path.name for path in place.parent.glob("*") if path.is_dir())
            near = get_close_matches(split, there, n=1)
            perhaps = f"; perhaps {near[0]!r} is meant" if near else ""
            found = f" (there is {', '.join(there)})" if there else ""
            raise ValueError(f"{place} is not there{found}{perhaps}; {LAYOUT}")
    paths, others = find_files(images)
    if not paths:
        raise ValueError(no_image_message(images, others))
    files = tuple(Path(path) for path in paths)
    wanted = tuple((masks / file.relative_to(images)).with_suffix(".png") for file in files)
    missing = [mask for mask in wanted if not mask.is_file()]
    if missing:
        first = missing[0]
        near = sorted(path.name for path in first.parent.glob(f"{glob.escape(first.stem)}.*"))
        raise ValueError(
            f"{first} is not there{f' (there is {near[0]})' if near else ''}; {len(missing)} of "
            f"{len(wanted)} images have no mask: masks are PNG files with the names of their "
            "images, so write them, or remove those images"
        )
    return SegmentationDataset(files, wanted, classes, images)


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in ``classes.txt``, or None where there is no such file."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8 (line {line}); save it as UTF-8") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not 1 <= len(lines) <= IGNORED:
        raise ValueError(
            f"{path} names {len(lines)} classes; it must name 1 to {IGNORED}, one a line in the "
            "order of ids"
        )
    if "" in lines:
        blank = lines.index("")
        raise ValueError(
            f"{path} has nothing in line {blank + 1}, where the class of id {blank} must stand; "
            "name it, or remove the line if the next name is that class"
        )
    parts = [line.split(maxsplit=1) for line in lines]
    if all(len(part) == 2 and part[0].isdecimal() for part in parts):
        for label, (number, _) in enumerate(parts):
            if int(number) != label:
                raise ValueError(
                    f"{path} has id {number} in line {label + 1}, where {label} must stand: one "
                    "class a line in the order of ids, from 0"
                )
        lines = [name for _, name in parts]
    for label, name in enumerate(lines):
        if name in lines[:label]:
            raise ValueError(
                f"{path} names two classes {name!r} (ids {lines.index(name)} and {label}); scores "
                "are listed by name, so give each class its own"
            )
    return tuple(lines)


def number_classes(folder: Path, ids: set[int]) -> tuple[str, ...]:
    """Names for classes that have none, refusing ids that look like colours turned to gray."""
    ids = ids - {IGNORED}
    largest = max(ids)
    if largest >= SPARSE_FROM and len(ids) < MIN_SHARE_OF_IDS * (largest + 1):
        some = ", ".join(map(str, sorted(ids)[:3]))
        raise ValueError(
            f"the masks in {folder / 'masks'} hold only {len(ids)} of the ids up to {largest}, "
            f"such as {some}, like colours turned to gray; number the classes 0, 1, 2 and so on, "
            f"or name all {largest + 1} in {folder / 'classes.txt'} if these are their ids"
        )
    return tuple(f"class {label}" for label in range(largest + 1))


def open_file(path: Path) -> LazyImage:
    """The image of a file, not yet decoded."""
    try:
        return open_image(path.read_bytes())
    except (ImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; replace or remove it") from error


def read_mask(path: Path) -> Tensor:
    """The ids ``(height, width)`` uint8 in a mask."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)  # of a palette the indices, which are the ids
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a mask: {error}; write it anew") from error
    if ids.ndim != 2:
        raise ValueError(colours_message(path, mode, ids))
    if ids.dtype != np.uint8 and (ids.min() < 0 or ids.max() > IGNORED):
        raise ValueError(
            f"{path} has ids from {ids.min()} to {ids.max()}; write 8-bit PNG with ids from 0 to "
            f"{IGNORED - 1}, and {IGNORED} for pixels to ignore"
        )
    return torch.from_numpy(ids.astype(np.uint8))


def check_masks(split: SegmentationDataset, count: int, problems: list[str]) -> list[set[int]]:
    """The ids in each of a split's masks; what is wrong with them is added to ``problems``."""
    found: list[set[int]] = []
    for image, path in zip(split.images, split.masks, strict=True):
        try:
            mask = read_mask(path)
            opened = open_file(image)
        except ValueError as error:
            problems.append(str(error))
            continue
        try:
            check_size(path, mask, opened)
        except ValueError as error:
            problems.append(str(error))
        ids = set(torch.bincount(mask.flatten(), minlength=256).nonzero().flatten().tolist())
        beyond = sorted(label for label in ids if count <= label < IGNORED)
        if beyond:
            problems.append(
                f"{path} has id {', '.join(map(str, beyond[:3]))}, but classes.txt names {count} "
                f"classes (ids 0 to {count - 1}); name the class there, or set such pixels to "
                f"{IGNORED} to ignore them"
            )
        found.append(ids)
    return found


def check_size(path: Path, mask: Tensor, image: LazyImage) -> None:
    """Refuse a mask of another size than its image."""
    (h, w), (height, width) = mask.shape, image.size
    if (h, w) == (height, width):
        return
    turned = "; it looks turned by 90 degrees" if (w, h) == (height, width) else ""
    raise ValueError(
        f"{path} is {h}x{w} pixels (height x width), but its image {height}x{width}{turned}; write "
        "it at the image's size, enlarging to the nearest pixel so that ids stay ids"
    )


def colours_message(path: Path, mode: str, colours: np.ndarray[Any, Any]) -> str:
    """The message about a mask that holds colours."""
    count = len(np.unique(colours.reshape(-1, colours.shape[-1]), axis=0))
    if colours.shape[-1] == 2 or (colours[..., 0] == colours[..., 1]).all():  # gray, or with alpha
        way = "if its gray values are the ids, write one channel: Image.open(path).getchannel(0)"
    else:
        way = "write one channel that holds the number of each pixel's class in place of its colour"
    return (
        f"{path} is coded in colours ({mode}, {count} different ones); masks are PNG of class ids: "
        f"{way}"
    )


def one_class_message(place: Path, ids: set[int]) -> str:
    """The message about masks with a single class."""
    if ids == {0, IGNORED}:
        return (
            f"the masks in {place} hold 0 and {IGNORED} alone, and {IGNORED} means ignored, so "
            f"only class 0 is left; write 1 in place of {IGNORED} if it is your second class"
        )
    return (
        f"the masks in {place} hold the ids {', '.join(map(str, sorted(ids)))} alone ({IGNORED} "
        "means ignored); at least two classes are needed to learn to tell them apart"
    )
