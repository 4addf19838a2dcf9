"""Labelled images: a folder of images and masks, looked through before anything is computed."""

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
from .image import SCALES, ImageError, LazyImage, upright
from .sources import IMAGES, MASKS, nothing_in, search

IGNORED = 255
"""The id of pixels that are neither trained on nor counted."""
SHOWN = 5
"""Wrong masks that a complaint lists; it counts the rest."""
SPARSE_FROM = 64
"""Largest id from which classes without names must be so many as `SPARSE` says."""
SPARSE = 0.25
"""Share of the ids up to the largest that must be in the masks, then: colours turned to gray are
fewer, of VOC 13 %, of CamVid 17 %."""


class Example(NamedTuple):
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
    """One split of a labelled folder.

    Attributes:
        images: Its images, in the order of their names, without those of which nothing is known.
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

    def read(self, index: int, shortest: int | None = None) -> Example:
        """An image and its mask.

        Args:
            index: Which.
            shortest: What the shorter side must measure at least: a large JPEG may be decoded at a
                half, a quarter or an eighth.

        Raises:
            ValueError: The image cannot be read, or its size is not the mask's.
        """
        mask = read_mask(self.masks[index])
        opened = look(self.images[index])
        if opened.size != tuple(mask.shape):
            raise ValueError(size_mismatch(self.masks[index], tuple(mask.shape), opened.size))
        fitting = [s for s in SCALES if shortest and min(opened.size) >= shortest * s]
        try:
            raster = opened.raster(max(fitting, default=1))
        except ImageError as error:
            raise ValueError(f"{self.images[index]} cannot be read: {error}") from error
        return Example(upright(raster.pixels, opened.orientation), mask, self.name(index))

    def chosen(self, indices: Sequence[int]) -> SegmentationDataset:
        """Some of the images, in the order given."""
        images, masks = (tuple(own[i] for i in indices) for own in (self.images, self.masks))
        return replace(self, images=images, masks=masks)

    def share(self, fraction: float, seed: int) -> SegmentationDataset:
        """A share of the images, at least one, drawn by a seed; a larger share holds a smaller."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        count = min(len(self), max(1, round(fraction * len(self))))
        return self.chosen(sorted(order[:count].tolist()))


def open_labelled(
    data: str | Path, splits: Sequence[str] = ("train", "val")
) -> list[SegmentationDataset]:
    """The splits of a labelled folder, every mask looked at.

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
    named = read_classes(folder / "classes.txt")
    opened = [open_split(folder, split, named or ()) for split in splits]
    problems: list[str] = []
    found = [look_through(split, len(named) if named else IGNORED, problems) for split in opened]
    if problems:
        more = len(problems) - SHOWN
        rest = [f"and {more} more"] if more > 0 else []
        raise ValueError("\n".join([*problems[:SHOWN], *rest]))
    ids = [set().union(*masks) for masks in found]
    for split, own in zip(splits, ids, strict=True):
        if own == {IGNORED}:
            raise ValueError(nothing_known(folder / MASKS / split))
    if len(ids[0] - {IGNORED}) < 2:
        raise ValueError(one_class(folder / MASKS / splits[0], ids[0]))
    classes = named or numbered(folder, set().union(*ids) - {IGNORED})
    known = [[i for i, own in enumerate(masks) if own != {IGNORED}] for masks in found]
    return [
        replace(split.chosen(some), classes=classes)
        for split, some in zip(opened, known, strict=True)
    ]


LAYOUT = (
    "it must hold images/train, images/val, masks/train and masks/val, masks being PNG files of "
    "class ids with the names of their images"
)


def open_split(folder: Path, split: str, classes: tuple[str, ...]) -> SegmentationDataset:
    """One split, its masks not yet looked at.

    Raises:
        ValueError: There are no images, or masks are missing.
    """
    images, masks = folder / IMAGES / split, folder / MASKS / split
    for place in (images, masks):
        if not place.is_dir():
            there = sorted(own.name for own in place.parent.glob("*") if own.is_dir())
            near = get_close_matches(split, there, n=1)
            perhaps = f"; perhaps {near[0]!r} is meant" if near else ""
            found = f" (there is {', '.join(there)})" if there else ""
            raise ValueError(f"{place} is not there{found}{perhaps}; {LAYOUT}")
    paths, others = search(images)
    if not paths:
        raise ValueError(nothing_in(images, others))
    files = tuple(Path(path) for path in paths)
    wanted = tuple((masks / file.relative_to(images)).with_suffix(".png") for file in files)
    missing = [mask for mask in wanted if not mask.is_file()]
    if missing:
        raise ValueError(no_mask(missing, len(wanted)))
    return SegmentationDataset(files, wanted, classes, images)


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in ``classes.txt``, or None where there is no such file.

    Raises:
        ValueError: It is empty or no UTF-8, a line between others is blank, its ids are not 0, 1, 2
            and so on, or a name stands there twice.
    """
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


def numbered(folder: Path, ids: set[int]) -> tuple[str, ...]:
    """Names for classes that have none: their ids, up to the largest.

    Raises:
        ValueError: So few ids are there that they may be colours turned to gray.
    """
    largest = max(ids)
    if largest >= SPARSE_FROM and len(ids) < SPARSE * (largest + 1):
        some = ", ".join(map(str, sorted(ids)[:3]))
        raise ValueError(
            f"the masks in {folder / 'masks'} hold only {len(ids)} of the ids up to {largest}, "
            f"such as {some}, like colours turned to gray; number the classes 0, 1, 2 and so on, "
            f"or name all {largest + 1} in {folder / 'classes.txt'} if these are their ids"
        )
    return tuple(f"class {label}" for label in range(largest + 1))


def look(path: Path) -> LazyImage:
    """An image that is looked at, not decoded.

    Raises:
        ValueError: It cannot be read.
    """
    try:
        return open_image(path.read_bytes())
    except (ImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; replace or remove it") from error


def read_mask(path: Path) -> Tensor:
    """The ids ``(height, width)`` uint8 in a mask.

    Raises:
        ValueError: It cannot be read, is coded in colours, or holds what cannot be ids.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.array(image)  # of a palette the indices, which are the ids
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a mask: {error}; write it anew") from error
    if ids.ndim != 2:
        raise ValueError(coloured(path, mode, ids))
    if ids.dtype != np.uint8 and (ids.min() < 0 or ids.max() > IGNORED):
        raise ValueError(
            f"{path} has ids from {ids.min()} to {ids.max()}; write 8-bit PNG with ids from 0 to "
            f"{IGNORED - 1}, and {IGNORED} for pixels to ignore"
        )
    return torch.from_numpy(ids.astype(np.uint8))


def look_through(split: SegmentationDataset, count: int, problems: list[str]) -> list[set[int]]:
    """The ids in each of a split's masks; what is wrong with them is added to ``problems``."""
    found: list[set[int]] = []
    for image, path in zip(split.images, split.masks, strict=True):
        try:
            mask, size = read_mask(path), look(image).size
        except ValueError as error:
            problems.append(str(error))
            continue
        if size != tuple(mask.shape):
            problems.append(size_mismatch(path, tuple(mask.shape), size))
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


def size_mismatch(path: Path, mask: tuple[int, ...], image: tuple[int, int]) -> str:
    """The complaint about a mask of another size than its image."""
    (h, w), (height, width) = mask, image
    turned = "; it looks turned by 90 degrees" if (w, h) == image else ""
    return (
        f"{path} is {h}x{w} pixels (height x width), but its image {height}x{width}{turned}; write "
        "it at the image's size, enlarging to the nearest pixel so that ids stay ids"
    )


def coloured(path: Path, mode: str, colours: np.ndarray[Any, Any]) -> str:
    """The complaint about a mask that holds colours."""
    count = len(np.unique(colours.reshape(-1, colours.shape[-1]), axis=0))
    kind = f"{path} is coded in colours ({mode}, {count} different ones)"
    if colours.shape[-1] == 2 or (colours[..., 0] == colours[..., 1]).all():  # gray, or with alpha
        way = "if its gray values are the ids, write one channel: Image.open(path).getchannel(0)"
    else:
        way = "write one channel that holds the number of each pixel's class in place of its colour"
    return f"{kind}; masks are PNG of class ids: {way}"


def no_mask(missing: Sequence[Path], count: int) -> str:
    """The complaint about images without masks."""
    first = missing[0]
    others = sorted(first.parent.glob(f"{glob.escape(first.stem)}.*"))
    there = f" (there is {others[0].name})" if others else ""
    return (
        f"{first} is not there{there}; {len(missing)} of {count} images have no mask: masks are "
        "PNG files with the names of their images, so write them, or remove those images"
    )


def nothing_known(place: Path) -> str:
    """The complaint about a split without labels."""
    return (
        f"all pixels of the masks in {place} are {IGNORED}, which means ignored, so there is "
        "nothing to learn or to judge by; name a split that has labels, or write class ids"
    )


def one_class(place: Path, ids: set[int]) -> str:
    """The complaint about masks that tell nothing apart."""
    held = ", ".join(map(str, sorted(ids)))
    if ids == {0, IGNORED}:
        return (
            f"the masks in {place} hold 0 and {IGNORED} alone, and {IGNORED} means ignored, so "
            f"only class 0 is left; write 1 in place of {IGNORED} if it is your second class"
        )
    return (
        f"the masks in {place} hold the ids {held} alone ({IGNORED} means ignored); at least two "
        "classes are needed to learn to tell them apart"
    )
