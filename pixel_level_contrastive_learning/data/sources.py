"""Where images come from: folders, lists of paths, Python sequences, shards. No decoding here.

A source is counted and read by index in any order, so that which image stands where in an epoch
is decided by the order alone, and a run can be resumed at any image.
"""

from __future__ import annotations

import logging
import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterable, Sequence, Set, Sized
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .decoding import DEEP_MODES, SUFFIXES, eight_bit, open_image, raw, turned
from .image import UPRIGHT, DecodedImage, ImageError, LazyImage, as_pixels, upright
from .shards import Shards, is_shards

log = logging.getLogger(__name__)

RUN_FILE, RUN_FOLDER = "config.yaml", "checkpoints"
"""By what the folder of a run is known."""
IMAGES, MASKS, PREDICTIONS = "images", "masks", "predictions"
"""Folders of labelled images, and what an evaluation draws beside them."""


class Source(Protocol):
    """Images that are counted and opened by index."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> LazyImage:
        """Look at an image.

        Raises:
            ImageError: It cannot be used.
        """

    def content(self, index: int) -> bytes:
        """The bytes of the image's file.

        Raises:
            ImageError: They cannot be read, or the image is in no file.
        """

    def name(self, index: int) -> str:
        """What the image is called, for people."""


class Files:
    """Images in files.

    Args:
        paths: Where they are.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        # One block of bytes: a list of a million strings would be copied into every worker, since
        # counting references writes to each of them.
        encoded = [os.fsencode(path) for path in paths]
        self.block = b"".join(encoded)
        lengths = torch.tensor([0, *map(len, encoded)], dtype=torch.int64)
        self.ends = lengths.cumsum(0)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def name(self, index: int) -> str:
        start, end = self.ends[index : index + 2].tolist()
        return os.fsdecode(self.block[start:end])

    def content(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb") as file:
                return file.read()
        except OSError as error:
            raise ImageError(error.strerror or type(error).__name__) from error

    def open(self, index: int) -> LazyImage:
        return open_image(self.content(index))


class Items:
    """Images that are in memory or come from a torch ``Dataset``.

    An item is a tensor ``(c, h, w)`` or ``(h, w)``, an array ``(h, w)``, ``(h, w, c)`` or
    ``(c, h, w)``, a Pillow image, or a tuple that begins with one of these.
    """

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return f"item {index}"

    def content(self, index: int) -> bytes:
        raise ImageError(f"{self.name(index)} is an object in memory and not in a file")

    def open(self, index: int) -> LazyImage:
        try:
            item = self.items[index]
            return opened_item(item[0] if isinstance(item, (tuple, list)) else item)
        except ImageError:
            raise
        except Exception as error:  # the user's code may raise anything, and Pillow decodes here
            raise ImageError(f"{type(error).__name__}: {error}") from error


class Joined:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def place(self, index: int) -> tuple[Source, int]:
        """The source that an index falls into, and the index there."""
        for part in self.parts:
            if index < len(part):
                return part, index
            index -= len(part)
        raise IndexError(index)

    def name(self, index: int) -> str:
        part, index = self.place(index)
        return part.name(index)

    def content(self, index: int) -> bytes:
        part, index = self.place(index)
        return part.content(index)

    def open(self, index: int) -> LazyImage:
        part, index = self.place(index)
        return part.open(index)


class Subset:
    """Some images of a source, such as all that are not held out.

    Args:
        source: All images.
        indices: ``(n,)`` int64, which of them.
    """

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def content(self, index: int) -> bytes:
        return self.source.content(int(self.indices[index]))

    def open(self, index: int) -> LazyImage:
        return self.source.open(int(self.indices[index]))


def open_source(
    data: Any, *, cache: Path | None = None, leave_out: str | Path | None = None
) -> Source:
    """The images that the user means.

    Args:
        data: A folder (searched through, links followed), an image, a text file of paths (one a
            line, relative to the file), shards (``name-{0000..0099}.tar``, local or by URL), or a
            sequence of these; or a sequence or torch ``Dataset`` of tensors, arrays or Pillow
            images.
        cache: Where shards that are named by URL are kept.
        leave_out: A folder that is not searched: the run's own.

    Raises:
        ValueError: Nothing usable is there: what was looked for and what was found.
    """
    if isinstance(data, (str, os.PathLike)):
        return open_place(os.fspath(data), cache, leave_out)
    if isinstance(data, Sized) and len(data) == 0:
        raise ValueError("data is empty; name a folder, a list of paths, shards or images")
    if isinstance(data, Sequence) and all(isinstance(part, (str, os.PathLike)) for part in data):
        parts = [open_place(os.fspath(part), cache, leave_out) for part in data]
        return parts[0] if len(parts) == 1 else Joined(parts)
    if hasattr(data, "__getitem__") and isinstance(data, Sized):
        return Items(data)
    hint = "; pass list(...) of it" if isinstance(data, Iterable) else ""
    raise ValueError(
        f"data is a {type(data).__name__}; it must be a folder, a text file of paths, shards, or a "
        f"sequence or Dataset of images with a length{hint}"
    )


def open_place(place: str, cache: Path | None, leave_out: str | Path | None) -> Source:
    """The images of a folder, a file or a pattern of shards."""
    if is_shards(place):
        return Shards.find(place, cache)
    path = Path(place).expanduser()
    if path.is_dir():
        paths, others = search(path, leave_out=leave_out)
        if paths:
            if others:
                log.info("left out of %s: %s", path, by_ending(others))
            return Files(paths)
        if others[".tar"]:
            return Shards(search(path, frozenset({".tar"}), leave_out=leave_out)[0])
        raise ValueError(nothing_in(path, others))
    if not path.exists():
        raise ValueError(
            f"{place!r} does not exist; name a folder of images (a run may be resumed with its "
            "images in another place)"
        )
    if path.suffix.lower() in SUFFIXES:
        return Files([str(path)])
    return Files(listed(path))


def search(
    folder: Path, endings: Set[str] = SUFFIXES, *, leave_out: str | Path | None = None
) -> tuple[list[str], Counter[str]]:
    """All images under a folder in the order of their names, and how many files there are else.

    Links are followed, each folder is entered once, and what begins with a dot is left alone. So
    is a run below the folder: else its pictures would be among the images when it is resumed. Of a
    folder for `evaluate`, the masks and what was predicted are no images.
    """
    found: list[str] = []
    others: Counter[str] = Counter()
    entered: set[tuple[int, int]] = set()
    if leave_out is not None and (own := Path(leave_out).expanduser()).is_dir():
        entered.add((own.stat().st_dev, own.stat().st_ino))

    def complain(error: OSError) -> None:
        log.warning("a folder cannot be read and is left out: %s", error)

    for place, folders, files in os.walk(folder, onerror=complain, followlinks=True):
        here = os.stat(place)
        if (here.st_dev, here.st_ino) in entered:  # a link back to where we were
            folders.clear()
            continue
        entered.add((here.st_dev, here.st_ino))
        if place != os.fspath(folder) and RUN_FILE in files and RUN_FOLDER in folders:
            log.info("%s holds a run and is not searched", place)
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        aside = {MASKS, PREDICTIONS} if {IMAGES, MASKS} <= set(folders) else set()
        for name in aside & set(folders):
            log.info("%s belongs to the images beside it and is not searched", Path(place) / name)
            folders.remove(name)
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix in endings and not name.startswith("."):
                found.append(os.path.join(place, name))
            else:
                others[suffix] += 1
    return sorted(found), others


def nothing_in(folder: Path, others: Counter[str]) -> str:
    """The complaint about a folder without images."""
    found = by_ending(others) if others else "no file at all"
    return (
        f"no image in {str(folder)!r}: looked in it and below for files that end in "
        f"{', '.join(sorted(SUFFIXES))}, and for shards (.tar); found {found}"
    )


def by_ending(others: Counter[str]) -> str:
    """Files that are no images, counted by their endings."""
    kinds = ", ".join(f"{count} {suffix or 'without'}" for suffix, count in others.most_common(5))
    return f"{others.total()} other files, by ending: {kinds}"


def listed(path: Path) -> list[str]:
    """The paths that a text file names, one a line."""
    content = path.read_bytes().removeprefix(BOM_UTF8)
    if b"\0" in content:
        raise ValueError(
            f"data is {str(path)!r}, which is neither an image by its ending nor a text file of "
            "paths; name a folder, a list or shards (.tar)"
        )
    lines = os.fsdecode(content).splitlines()
    paths = [str(path.parent / Path(line.strip()).expanduser()) for line in lines if line.strip()]
    if not paths:
        raise ValueError(f"data is {str(path)!r}, a list without paths; write one path a line")
    if os.path.isdir(paths[0]):
        raise ValueError(
            f"data is {str(path)!r}, a list that begins with the folder {paths[0]!r}; name folders "
            "themselves as data, and list images alone"
        )
    return paths


def opened_item(item: object) -> LazyImage:
    """An image in memory, looked at as a file would be."""
    if isinstance(item, Tensor):
        held = item.detach().cpu()
        known = held.float() if held.dtype == torch.bfloat16 else held  # which NumPy has not
        return opened_pixels(as_pixels(known.numpy(), "CYX"[-item.ndim :]))
    if hasattr(item, "getbands"):
        return opened_pillow(item)
    if hasattr(item, "__array__"):
        import numpy as np

        return opened_pixels(as_pixels(np.asarray(item)))
    raise ImageError(
        f"an item is a {type(item).__name__}; it must be a tensor (c, h, w), an array or a Pillow "
        "image, or a tuple that begins with one"
    )


def opened_pixels(pixels: Tensor) -> LazyImage:
    """Pixels ``(c, h, w)`` that need no decoding."""
    channels, height, width = pixels.shape
    deep = pixels.dtype != torch.uint8
    return LazyImage(
        (height, width), channels, deep, UPRIGHT, False, lambda _: DecodedImage(pixels, 1)
    )


def opened_pillow(image: Any) -> LazyImage:
    """A Pillow image of any mode."""
    pixels = raw(image) if image.mode in DEEP_MODES else eight_bit(image)
    _, orientation = turned(image)
    return opened_pixels(upright(pixels, orientation))
