"""Segmentation datasets: folders of images and masks, all checked before anything is computed."""

from __future__ import annotations

import glob
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import Pages, counted, raise_together
from .folders import IMAGES, MASKS, find_files, no_image_message
from .image import ImageError, LazyImage
from .mask_coding import IGNORED as IGNORED
from .mask_coding import PLAIN, MaskCoding, read_classes, read_coding
from .masks import (
    MASK_SUFFIXES,
    ONLY,
    Page,
    Palette,
    Palettes,
    find_masks,
    masks_without_image,
    read_coded,
    stem_of,
)
from .pages import settle_pages
from .sources import FileSource, NodataSource, Source

log = logging.getLogger(__name__)

OBJECTS_FROM = 10
"""Largest id from which on ids without a gap in every mask are taken for numbers of objects."""
SHOWN_PROBLEMS = 5
"""Wrong masks that an error lists; it counts the rest."""
SPARSE_FROM, MIN_SHARE_OF_IDS = 64, 0.25
"""From this largest id on, the share of ids up to it that masks without class names must hold:
colours turned to gray are fewer, of VOC 13 %, of CamVid 17 %."""
LAYOUT = (
    "it must hold images/train, images/val, masks/train and masks/val, where masks are files of "
    f"class ids that are named like their images and end in {', '.join(MASK_SUFFIXES)}"
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
        files: The files of its images, sorted by name.
        masks: For each of them the file of its mask.
        indices: The images in them that are meant, without those of which nothing is known.
        classes: The names of the classes, by id.
        folder: What names are relative to.
        coding: How the values of the masks become ids.
        nodata: The value that stands in images where nothing was measured, beside NaN.
    """

    files: FileSource
    masks: FileSource
    indices: tuple[int, ...]
    classes: tuple[str, ...]
    folder: Path
    coding: MaskCoding = PLAIN
    nodata: float | None = None

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def source(self) -> Source:
        """All images in the files, as a source."""
        return self.files if self.nodata is None else NodataSource(self.files, self.nodata)

    @cached_property
    def images(self) -> tuple[Path, ...]:
        """Where the images lie."""
        return tuple(Path(self.source.name(index)) for index in self.indices)

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
        mask, _ = self.mask(index)
        image = self.open(index)
        check_size(self.mask_name(index), mask, image)
        try:
            pixels = image.read(shortest)
        except ImageError as error:
            raise ValueError(f"{self.images[index]} cannot be read: {error}") from error
        return SegmentationSample(pixels, mask, self.name(index))

    def open(self, index: int) -> LazyImage:
        """An image, not yet decoded; a `ValueError` names it where that cannot be."""
        try:
            return self.source.open(self.indices[index])
        except ImageError as error:
            path = self.images[index]
            raise ValueError(f"{path} cannot be read: {error}; replace or remove it") from error

    def mask(self, index: int) -> tuple[Tensor, Palette]:
        """The ids in a mask, and their colours if it has a palette, see `read_coded`."""
        file, number = self.files.locate(self.indices[index])
        count = self.files.split.get(file)
        page = ONLY if count is None else Page(number or 0, count)
        return read_coded(self.masks, file, self.coding, page)

    def mask_name(self, index: int) -> Path:
        """Where a mask lies."""
        file, _ = self.files.locate(self.indices[index])
        return Path(self.masks.file_name(file))

    def subset(self, indices: Sequence[int]) -> SegmentationDataset:
        """Some of the images, in the order given."""
        return replace(self, indices=tuple(self.indices[i] for i in indices))

    def share(self, fraction: float, seed: int) -> SegmentationDataset:
        """A share of the images, at least one, drawn by a seed; a larger share holds a smaller."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        count = min(len(self), max(1, round(fraction * len(self))))
        return self.subset(sorted(order[:count].tolist()))


def open_labelled(
    data: str | Path,
    splits: Sequence[str] = ("train", "val"),
    *,
    ids: str | None = None,
    colours: str | Path | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
) -> list[SegmentationDataset]:
    """The splits of a folder of images and masks, every mask checked.

    The folder holds ``images/SPLIT`` and ``masks/SPLIT``, any nesting below: for each image a file
    of the same name, perhaps with ``_mask`` or the like after it, whose pixels are class ids,
    `IGNORED` where nothing is known. ``classes.txt``
    has a name a line in the order of ids, which may stand before it; without it the classes are the
    ids up to the largest in the masks. Images whose pixels are all `IGNORED` are left out.

    Args:
        data: The folder.
        splits: Which splits are wanted; the first is the one that is trained on.
        ids: The id of each value in the masks, such as ``0:0,255:1``; by default values are ids.
        colours: A file with the class of each colour: for masks of colours, or of other palettes.
        pages: What several images in a file are read as, see `open_source`.
        nodata: The value of images where nothing was measured, likewise.

    Raises:
        ValueError: Something is missing, or masks are wrong: the first files, and what to do.
    """
    folder = Path(data).expanduser()
    if not str(data) or not folder.is_dir():
        raise ValueError(f"data is {str(data)!r}, which is not a folder; {LAYOUT}")
    names = read_classes(folder / "classes.txt")
    coding, named = read_coding(ids, colours, names)
    names = names or named
    paired = [find_split(folder, split) for split in splits]
    raise_together(*(missing_masks(folder, *split) for split in zip(splits, paired, strict=True)))
    for split, (paths, _) in zip(splits, paired, strict=True):
        if message := missing_images(folder, split, paths):
            log.warning("%s", message)
    found_files = [
        (FileSource(paths), FileSource(list(map(str, masks)))) for paths, masks in paired
    ]
    settle_pages([files for files, _ in found_files], pages)
    opened = [
        SegmentationDataset(
            files,
            masks,
            tuple(range(len(files))),
            names or (),
            folder / IMAGES / split,
            coding,
            nodata,
        )
        for split, (files, masks) in zip(splits, found_files, strict=True)
    ]
    problems: list[str] = []
    palettes, count = Palettes(), len(names) if names else IGNORED
    found = [check_masks(split, count, palettes, problems) for split in opened]
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise ValueError("\n".join([*problems[:SHOWN_PROBLEMS], *rest]))
    for split, masks in zip(splits, found, strict=True):
        if set().union(*masks) == {IGNORED}:
            raise ValueError(
                f"all pixels of the masks in {folder / MASKS / split} are {IGNORED}, which means "
                "ignored, so there is nothing to learn or to evaluate; give a split that has "
                "labels, or write class ids"
            )
    trained_on = set().union(*found[0])
    if len(trained_on - {IGNORED}) < 2:
        raise ValueError(one_class_message(folder / MASKS / splits[0], trained_on))
    classes = names or number_classes(folder, [mask for masks in found for mask in masks])
    return [
        replace(
            split.subset([i for i, mask in enumerate(masks) if mask != {IGNORED}]), classes=classes
        )
        for split, masks in zip(opened, found, strict=True)
    ]


def find_split(folder: Path, split: str) -> tuple[list[str], list[Path | None]]:
    """The images of one split and the mask of each, none of them looked at yet."""
    images, masks = folder / IMAGES / split, folder / MASKS / split
    for place in (images, masks):
        if not place.is_dir():
            splits = sorted(path.name for path in place.parent.glob("*") if path.is_dir())
            near = get_close_matches(split, splits, n=1)
            hint = f"; perhaps {near[0]!r} is meant" if near else ""
            existing = f" (found {', '.join(splits)})" if splits else ""
            raise ValueError(f"{place} does not exist{existing}{hint}; {LAYOUT}")
    paths, others = find_files(images)
    if not paths:
        raise ValueError(no_image_message(images, others))
    mask_paths = find_masks(masks, [Path(path).relative_to(images) for path in paths])
    if shared := [
        mask.name for mask, count in Counter(filter(None, mask_paths)).items() if count > 1
    ]:
        log.warning(
            "%s of several images in %s, such as %s: the names of these images differ only in "
            "their endings; keep one of them, unless all are the same",
            counted(len(shared), "mask"),
            masks,
            shared[0],
        )
    return paths, mask_paths


def missing_masks(
    folder: Path, split: str, paired: tuple[list[str], list[Path | None]]
) -> str | None:
    """The message about the images of a split that have no mask, if there are such."""
    missing = [Path(path) for path, mask in zip(*paired, strict=True) if mask is None]
    if not missing:
        return None
    stem = stem_of(missing[0].name)
    place = missing[0].relative_to(folder / IMAGES / split).with_name(f"{stem}.png")
    first = folder / MASKS / split / place
    near = sorted(path.name for path in first.parent.glob(f"*{glob.escape(stem)}*"))
    others = missing_images(folder, split, paired[0])
    return (
        f"{first} does not exist{f' (found {near[0]})' if near else ''}; {len(missing)} of "
        f"{len(paired[0])} images have no mask: a mask has the name of its image, perhaps followed "
        f"by _mask, and ends in {', '.join(MASK_SUFFIXES)}; write the masks, or remove these "
        f"images{f'. And {others}' if others else ''}"
    )


def missing_images(folder: Path, split: str, paths: Sequence[str]) -> str:
    """What is said of the masks of a split that belong to no image; an empty text for none."""
    images, masks = folder / IMAGES / split, folder / MASKS / split
    lost = masks_without_image(masks, [Path(path).relative_to(images) for path in paths])
    if not lost:
        return ""
    shown = ", ".join(lost[:SHOWN_PROBLEMS]) + ", ..." * (len(lost) > SHOWN_PROBLEMS)
    most = ", more than with one" if len(lost) > len(paths) else ""
    return (
        f"{counted(len(lost), 'mask')} without an image in {masks}{most}, not used: {shown}; check "
        f"that {images} is complete, and that its images have the names of their masks and endings "
        "that are read"
    )


def number_classes(folder: Path, masks: Sequence[set[int]]) -> tuple[str, ...]:
    """Names for the classes of masks, refusing ids like grays of colours or numbers of objects."""
    known = [mask - {IGNORED} for mask in masks if mask != {IGNORED}]
    ids = set().union(*known)
    largest = max(ids)
    ends = set(map(max, known))
    if largest >= OBJECTS_FROM and len(ends) > 2 and all(len(m | {0}) == max(m) + 1 for m in known):
        raise ValueError(
            f"the masks in {folder / MASKS} hold ids without a gap, up to {min(ends)} in "
            f"one and to {largest} in another, like numbers of objects; write 1 for all, or "
            f"name all {largest + 1} classes in {folder / 'classes.txt'}"
        )
    if largest >= SPARSE_FROM and len(ids) < MIN_SHARE_OF_IDS * (largest + 1):
        some = sorted(ids)[:3]
        pairs = ",".join(f"{value}:{label}" for label, value in enumerate(some))
        raise ValueError(
            f"the masks in {folder / MASKS} hold only {len(ids)} of the ids up to {largest}, "
            f"such as {', '.join(map(str, some))}, like colours turned to gray; number the classes "
            f'0, 1, 2 and so on (--ids "{pairs}" does so), or name all {largest + 1} in '
            f"{folder / 'classes.txt'} if these are their ids"
        )
    return tuple(f"class {label}" for label in range(largest + 1))


def check_masks(
    split: SegmentationDataset, count: int, palettes: Palettes, problems: list[str]
) -> list[set[int]]:
    """The ids in each of a split's masks; what is wrong with them is added to ``problems``."""
    found: list[set[int]] = []
    for index in range(len(split)):
        path = split.mask_name(index)
        try:
            mask, palette = split.mask(index)
            opened = split.open(index)
        except ValueError as error:
            problems.append(str(error))
            continue
        if differ := palettes.differ(path, palette):
            problems.append(differ)
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
    turned = "; it looks rotated by 90 degrees" if (w, h) == (height, width) else ""
    raise ValueError(
        f"{path} is {h}x{w} pixels (height x width), but its image is {height}x{width}{turned}; "
        "write it at the image's size, with nearest-neighbour resampling, which keeps ids"
    )


def one_class_message(place: Path, ids: set[int]) -> str:
    """The message about masks with a single class."""
    if ids == {0, IGNORED}:
        return (
            f"the masks in {place} hold only 0 and {IGNORED}, and {IGNORED} means ignored, so "
            f"only class 0 is left; write 1 in place of {IGNORED} if it is your second class, or "
            f'give --ids "0:0,{IGNORED}:1"'
        )
    return (
        f"the masks in {place} hold only the ids {', '.join(map(str, sorted(ids)))} ({IGNORED} "
        "means ignored); at least two classes are needed to learn to tell them apart"
    )
