"""Where images come from: folders, lists of paths, Python sequences, shards. No decoding here.

A source is counted and read by index in any order, so that which image stands where in an epoch
is decided by the sampler alone, and a run can be resumed at any image.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_right
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Sequence, Sized
from contextlib import suppress
from functools import partial
from itertools import accumulate, chain, groupby
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..checks import Pages, counted
from .arrays import array_to_pixels, lazy_pixels, to_array_file
from .decoding import ending_of, image_suffixes
from .folders import SLIDE_SUFFIXES, count_by_ending, find_files, is_dicom, no_image_message
from .image import CUT, ImageError, LazyImage, to_tensor, without_value
from .pages import PagedFiles, Place, chance_of_several, settle_pages
from .picture import HIGH_DEPTH_MODES, to_eight_bit, to_float
from .reading import in_time, read_bytes
from .shards import NameList, ShardSource, is_shards

log = logging.getLogger(__name__)

MIN_IMAGES_TO_HOLD_OUT, HELD_OUT_SHARE, MAX_HELD_OUT = 200, 0.02, 256
"""From how many images on some are held out of training, which share, and at most how many."""

EMPTY = "data is empty; name a folder, a list of paths, shards or images"


@runtime_checkable
class Source(Protocol):
    """Images that can be counted and opened by index."""

    def __len__(self) -> int: ...

    def open(self, index: int) -> LazyImage:
        """Read an image's header.

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


class FileSource(PagedFiles):
    """Images in files."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.names = NameList([os.fsencode(path) for path in paths])
        self.chances = bytes(map(chance_of_several, paths))

    @property
    def paths(self) -> list[str]:
        """The files."""
        return [self.names[file] for file in range(self.files)]

    def file_name(self, file: int) -> str:
        return self.names[file]

    def place(self, file: int) -> Place:
        return Place(self.names[file])


class ItemSource:
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
            return lazy_pixels(item_pixels(item[0] if isinstance(item, (tuple, list)) else item))
        except ImageError:
            raise
        except Exception as error:  # the user's code may raise anything, and Pillow decodes here
            raise ImageError(f"{type(error).__name__}: {error}") from error


def item_pixels(item: object) -> Tensor:
    """The pixels ``(c, h, w)`` of an item: uint8, or float32 raw values."""
    if isinstance(item, Tensor):
        if item.ndim == 3 and item.shape[-1] in (1, 3, 4) and min(item.shape[:2]) >= 16:
            raise ImageError(
                f"an item is a tensor of shape {tuple(item.shape)}; it must be (c, h, w), so give "
                "item.permute(2, 0, 1) if it is (h, w, c)"
            )
        pixels = item.detach().cpu()
        pixels = pixels.float() if pixels.dtype == torch.bfloat16 else pixels  # NumPy has none
        return array_to_pixels(pixels.numpy(), "CYX"[-item.ndim :])
    if hasattr(item, "getbands"):
        picture: Any = item
        deep = picture.mode in HIGH_DEPTH_MODES
        return to_float(picture) if deep else to_tensor(to_eight_bit(picture))
    if hasattr(item, "__array__"):
        import numpy as np

        return array_to_pixels(np.asarray(item))
    raise ImageError(
        f"an item is a {type(item).__name__}; it must be a tensor (c, h, w), an array or a Pillow "
        "image, or a tuple that begins with one"
    )


class IndexedSource:
    """Images of other sources under indices of their own."""

    def __len__(self) -> int:
        raise NotImplementedError

    def locate(self, index: int) -> tuple[Source, int]:
        """The source that an image is in, and its index there."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        source, index = self.locate(index)
        return source.name(index)

    def content(self, index: int) -> bytes:
        source, index = self.locate(index)
        return source.content(index)

    def open(self, index: int) -> LazyImage:
        source, index = self.locate(index)
        return source.open(index)


class ConcatSource(IndexedSource):
    """Several sources, at least one, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = parts
        self.starts = [0, *accumulate(map(len, parts))]

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, index: int) -> tuple[Source, int]:
        part = bisect_right(self.starts, index) - 1
        return self.parts[part], index - self.starts[part]


class Subset(IndexedSource):
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

    def locate(self, index: int) -> tuple[Source, int]:
        return self.source, int(self.indices[index])


class NodataSource(IndexedSource):
    """A source in whose images a value means that nothing was measured."""

    def __init__(self, source: Source, value: float) -> None:
        self.source, self.value = source, value

    def __len__(self) -> int:
        return len(self.source)

    def locate(self, index: int) -> tuple[Source, int]:
        return self.source, index

    def content(self, index: int) -> bytes:
        image = self.open(index)
        return to_array_file(image) if image.high_depth else self.source.content(index)

    def open(self, index: int) -> LazyImage:
        return without_value(self.source.open(index), self.value)


def file_of(source: Source, index: int) -> str | None:
    """The path of the file that an image is in, alone or with others; None if it is in none."""
    while isinstance(source, IndexedSource):
        source, index = source.locate(index)
    if not isinstance(source, PagedFiles):
        return None
    return source.place(source.locate(index)[0]).path


def file_state(path: str) -> str:
    """Size and modification time of a file; empty if they cannot be read."""
    with suppress(OSError, ImageError):  # which is reported where the image is read
        status = in_time(partial(os.stat, path), path)
        return f"{status.st_size} bytes, {status.st_mtime_ns} ns"
    return ""


def split_held_out(source: Source) -> tuple[Subset, Subset]:
    """Images to train on, and a few held out that are never trained on.

    Args:
        source: All images.

    Returns:
        Two disjoint parts, in the source's order. The second is empty below 200 images; otherwise
        it has 2 % of them, at most 256. The same images are held out for every seed.

    Example:
        >>> train, held_out = split_held_out(open_source([torch.zeros(3, 8, 8)] * 300))
        >>> len(train), len(held_out)
        (294, 6)
    """
    count = len(source)
    enough = count >= MIN_IMAGES_TO_HOLD_OUT
    few = min(int(HELD_OUT_SHARE * count), MAX_HELD_OUT) if enough else 0
    drawn = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return Subset(source, drawn[few:].sort().values), Subset(source, drawn[:few].sort().values)


def open_source(
    data: Any,
    *,
    leave_out: str | Path | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
) -> Source:
    """The images that the user means.

    Args:
        data: A folder (searched recursively, following links), an image, a text file of paths (one
            per line, relative to the file), shards (``shards-{000000..000099}.tar``, local or by
            URL), or a sequence of these; or a sequence or torch ``Dataset`` of tensors, arrays or
            Pillow images; or any source, which is returned unchanged. A file is read once, however
            often it is named.
        leave_out: A folder that is not searched: the run's own.
        pages: How files with several images are read: as separate images, as the channels of one,
            or only the first; None: see `settle_pages`. Does not apply to a source.
        nodata: Value that means "not measured", in addition to NaN and GDAL's tag.

    Raises:
        ValueError: There is nothing usable: says what was looked for and what was found.

    Example:
        >>> source = open_source([torch.zeros(3, 32, 48), torch.zeros(3, 20, 20)])
        >>> len(source), source.name(1), source.open(0).size
        (2, 'item 1', (32, 48))
    """
    if nodata is not None:
        return NodataSource(open_source(data, leave_out=leave_out, pages=pages), nodata)
    if isinstance(data, Source):
        return data
    if isinstance(data, (str, os.PathLike)):
        data = [data]
    if isinstance(data, Sized) and len(data) == 0:
        raise ValueError(EMPTY)
    if isinstance(data, Sequence) and all(isinstance(part, (str, os.PathLike)) for part in data):
        parts = joined([open_path(os.fspath(part), leave_out) for part in data])
        settle_pages(parts, pages)
        return parts[0] if len(parts) == 1 else ConcatSource(parts)
    if hasattr(data, "__getitem__") and isinstance(data, Sized):
        return ItemSource(data)
    hint = "; pass list(...) of it" if isinstance(data, Iterable) else ""
    raise ValueError(
        f"data is a {type(data).__name__}; it must be a folder, a text file of paths, shards, or a "
        f"sequence or Dataset of images with a length{hint}"
    )


def joined(parts: Iterable[FileSource | ShardSource]) -> list[PagedFiles]:
    """Sources of which neighbours that are files of their own have become one, each file once."""
    sources: list[PagedFiles] = []
    seen: set[str] = set()
    for kind, group in groupby(parts, type):
        neighbours = [*group]
        for same in [neighbours] if kind is FileSource else [[shards] for shards in neighbours]:
            paths = [*chain(*(part.paths for part in same))]
            if new := not_seen(paths, seen):
                whole = len(same) == 1 and len(new) == len(paths)
                sources.append(same[0] if whole else kind(new))
    return sources


def not_seen(paths: Sequence[str], seen: set[str]) -> list[str]:
    """Those paths that name other files than any before, however their folders are linked."""
    folders: dict[str, str] = {}
    new = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in folders:
            folders[folder] = folder
            with suppress(ImageError):  # reported when it is opened
                folders[folder] = in_time(partial(os.path.realpath, folder), path)
        if (real := os.path.join(folders[folder], name)) not in seen:
            seen.add(real)
            new.append(path)
    if duplicates := len(paths) - len(new):
        log.info("named again, but read once: %s", counted(duplicates, "file"))
    return new


def open_path(
    place: str, leave_out: str | Path | None = None, *, slides: bool = False
) -> FileSource | ShardSource:
    """The images of a folder, a file or a pattern of shards, slides among them or refused."""
    if not place:
        raise ValueError(
            "data is '', perhaps a variable that is not set; name a folder (this one is '.'), a "
            "list of paths, shards or images"
        )
    known = image_suffixes() | (SLIDE_SUFFIXES if slides else set())
    if is_shards(place):
        return ShardSource.find(place)
    path = Path(place).expanduser()
    try:
        in_time(path.exists, str(path))
    except ImageError as error:
        raise ValueError(f"data is {place!r}, which cannot be read: {error}") from error
    if path.is_dir() and not ending_of(path.name, folder=True):
        paths, others = find_files(path, known, leave_out=leave_out)
        if paths:
            if others:
                log.info("left out of %s: %s", path, count_by_ending(others))
            return FileSource(paths)
        if others[".tar"]:
            return ShardSource(find_files(path, frozenset({".tar"}), leave_out=leave_out)[0])
        raise ValueError(no_image_message(path, others))
    if not path.exists():
        raise ValueError(
            f"{place!r} does not exist; name a folder of images (those of a run may have been "
            "moved since)"
        )
    if path.is_dir() or ending_of(path.name, known) or is_dicom(str(path)):
        return FileSource([str(path)])
    if path.suffix.lower() in SLIDE_SUFFIXES:
        raise ValueError(f"{place!r} is a slide or another such large file; {CUT}")
    return FileSource(read_list(path))


def read_list(path: Path) -> list[str]:
    """The paths that a text file names, one a line."""
    try:
        content = read_bytes(str(path)).removeprefix(BOM_UTF8)
    except ImageError as error:
        raise ValueError(f"data is {str(path)!r}, which cannot be read: {error}") from error
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):  # as PowerShell writes it
        with suppress(UnicodeDecodeError):
            content = content.decode("utf-16").encode()
    if b"\0" in content:
        raise ValueError(
            f"data is {str(path)!r}, which is neither an image by its ending nor a text file of "
            "paths; name a folder, a list or shards (.tar)"
        )
    # As bytes, since text has further line ends, which names may contain; without blanks around.
    names = filter(None, (os.fsdecode(line.strip(b" \t")) for line in content.splitlines()))
    paths = [str(path.parent / Path(name).expanduser()) for name in names]
    if not paths:
        raise ValueError(f"data is {str(path)!r}, a list without paths; write one path per line")
    if os.path.isdir(paths[0]) and not ending_of(paths[0], folder=True):
        raise ValueError(
            f"data is {str(path)!r}, a list that begins with the folder {paths[0]!r}; name folders "
            "themselves as data, and list only images"
        )
    return paths
