"""Files with several images in them: pages, frames, stacks. Which of them are images of a source.

What a file holds is found when its source is opened, since a source is counted by index. Headers
tell whether a file may hold several; only such files are looked through.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from struct import unpack
from threading import Lock
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from ..checks import Pages, counted
from .arrays import NamedArray, Once, to_array_file
from .decoding import TIFF, Content, ending_at, ending_of, open_image, stack_in
from .image import ALL, MOST_JOINED, ImageError, LazyImage, Stack
from .orientation import PNG
from .picture import AVIF, JPEG
from .readers import DICOM, DICOM_MARK, all_readers, call_reader
from .reading import in_time, open_regular, read_bytes, read_part

log = logging.getLogger(__name__)

LOOKED_AT = 10_000
"""Of files whose format seldom holds several images, so many headers are looked at, evenly spread;
all of them where one holds several. Other formats are all looked at."""
NEVER, SELDOM, OFTEN = range(3)
GRAY_PAGES = "gray pages"
FILLING = Lock()
"""Held while `PagedFiles.last` becomes that of another file."""
SELDOM_SEVERAL = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".heic",
    ".heif",
    ".npz",
    DICOM,
    ".dicom",
    ".ima",
    "",
)
NEVER_SEVERAL = (".npy", ".bmp", ".ppm", ".pgm", ".pbm", ".pnm")
SHAPE_FIRST, HEAD = (".nii", ".nii.gz"), 2**16
"""Files whose first bytes, so many, tell a reader the shape of what follows."""
WEBP_ANIMATION = 2
"""The bit of a WebP's flags that announces frames."""
MOST_TAGS, LONGEST_DESCRIPTION = 4096, 2**16
"""What is looked at of the first page of a TIFF, at most."""
DESCRIPTION_TAG, UIC_TAG = 270, 33629
PLANES_DESCRIBED = (b"images=", b"truncated", b"<OME")
"""In the description of a TIFF's page: it may hold several planes."""


def chance_of_several(name: str) -> int:
    """How likely a file of this name holds several images: `NEVER`, `SELDOM` or `OFTEN`."""
    ending = ending_of(name) or ending_of(name, folder=True)
    if ending in NEVER_SEVERAL and ending not in all_readers():
        return NEVER
    return SELDOM if ending in SELDOM_SEVERAL else OFTEN


def may_hold_several(path: str, start: int = 0) -> bool:
    """Whether a file, or the part of it that begins at ``start``, may hold several images."""
    with open_regular(path) as file:
        return header_tells_several(file, start)


def header_tells_several(file: IO[bytes], start: int = 0) -> bool:
    """Whether the header of what begins at ``start`` says that there may be several images."""
    file.seek(start)
    head = file.read(32)
    if head.startswith(PNG):
        return any(kind == b"acTL" for kind in png_chunks(file, start))
    if head.startswith(JPEG):
        return any(segment == b"MPF\0" for segment in jpeg_segments(file, start))
    if head.startswith(TIFF):
        return tiff_may_hold_several(file, start, head)
    if head[8:16] == b"WEBPVP8X":
        return bool(head[20] & WEBP_ANIMATION)
    return head.startswith(b"GIF8") or (AVIF in head[:16] and b"avis" in head)


def png_chunks(file: IO[bytes], start: int) -> Iterator[bytes]:
    """The kinds of a PNG's chunks before its pixels."""
    place = start + len(PNG)
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[4:] == b"IDAT":
            return
        yield head[4:]
        place += 12 + int.from_bytes(head[:4])


def jpeg_segments(file: IO[bytes], start: int) -> Iterator[bytes]:
    """The first four bytes of each segment of a JPEG before its pixels."""
    place = start + 2
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8 or head[0] != 0xFF or head[1] == 0xDA:
            return
        yield head[4:]
        place += 2 + int.from_bytes(head[2:4])


def tiff_may_hold_several(file: IO[bytes], start: int, head: bytes) -> bool:
    """Whether a TIFF has a second page, or a first one that may hold several planes."""
    order = "<" if head[:2] == b"II" else ">"
    large = b"+" in head[2:4]
    number, wide, entry = ("Q", 8, "HHQQ") if large else ("I", 4, "HHII")
    (place,) = unpack(order + number, head[8:16] if large else head[4:8])
    file.seek(start + place)
    (count,) = unpack(order + ("Q" if large else "H"), file.read(8 if large else 2))
    size = 4 + 2 * wide
    block = file.read(min(count, MOST_TAGS) * size + wide)
    if any(block[-wide:]):
        return True
    for place in range(0, len(block) - wide, size):
        tag, _, length, value = unpack(order + entry, block[place : place + size])
        if tag == UIC_TAG:
            return True
        if tag == DESCRIPTION_TAG and length > wide:
            file.seek(start + value)
            description = file.read(min(length, LONGEST_DESCRIPTION))
            if any(word in description for word in PLANES_DESCRIBED):
                return True
    return False


class Place(NamedTuple):
    """Where the bytes of a file lie: in a file of their own, or in a shard."""

    path: str
    offset: int = 0
    length: int = -1


class PagedFiles:
    """Files with one image or several in each, counted and opened by the index of an image.

    Attributes:
        chances: For each file the chance that it holds several, see `chance_of_several`.
        last: What a reader returned last, and of which file; threads that want it wait for it.
        split: How many images of the source a file is, by its number, where it is several.
        merged: Which image of a file stands for all of its, by its number: `ALL`, or the first.
        starts: ``(files,)`` int64, the index of each file's first image; None where each is one.
        more: How many more images than files there are.
    """

    chances: bytes
    last: tuple[int, Once[NamedArray]] | None = None
    split: Mapping[int, int] = MappingProxyType({})
    merged: Mapping[int, int] = MappingProxyType({})
    starts: Tensor | None = None
    more: int = 0

    @property
    def files(self) -> int:
        """How many files there are."""
        return len(self.chances)

    def file_name(self, file: int) -> str:
        """What a file is called."""
        raise NotImplementedError

    def place(self, file: int) -> Place:
        """Where a file lies."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self.files + self.more

    def locate(self, index: int) -> tuple[int, int | None]:
        """The file that an image is in, and which it is there; None for the only one."""
        file = index
        if self.starts is not None:
            file = int(torch.searchsorted(self.starts, index, right=True)) - 1
            if file in self.split:
                return file, index - int(self.starts[file])
        return file, self.merged.get(file)

    def name(self, index: int) -> str:
        """What an image is called: its file, and its number if that has several."""
        file, image = self.locate(index)
        number = f"[{image}]" if file in self.split else ""
        return f"{self.file_name(file)}{number}"

    def index(self, file: int, image: int | None = None) -> int:
        """The index of an image in a file; of the first one by default."""
        return (file if self.starts is None else int(self.starts[file])) + (image or 0)

    def pages_of(self, file: int) -> Pages | None:
        """What the images of a file are read as, where it has several."""
        if file in self.split:
            return "images"
        names: dict[int | None, Pages] = {ALL: "channels", 0: "first"}
        return names.get(self.merged.get(file))

    def content(self, index: int) -> bytes:
        """The bytes of an image's file; where it needs a reader or is one of several, an array."""
        file, image = self.locate(index)
        content = self.file_content(file) if image is None else None
        return content if isinstance(content, bytes) else to_array_file(self.open(index))

    def open(self, index: int) -> LazyImage:
        """Read the header of an image."""
        file, image = self.locate(index)
        content = self.file_content(file, several=image is not None)
        if isinstance(content, bytes):
            return open_image(content, image)
        if isinstance(content, NamedArray):  # of a reader, which may compute only now
            return in_time(partial(open_image, content, image), None)
        path = self.place(file).path
        opened = in_time(partial(open_image, content, image), path)
        return replace(opened, load=lambda scale: in_time(partial(opened.load, scale), path))

    def file_content(self, file: int, several: bool = False) -> Content:
        """A file as `open_image` takes it: a TIFF of several images is not read as a whole."""
        last = self.last  # which another thread may change
        if last is not None and last[0] == file:
            return last[1]()
        ending, place = ending_at(self.file_name(file)), self.place(file)
        path, readers = place.path, all_readers()
        may_be_tiff = several and ending not in readers and not place.offset
        if may_be_tiff and read_bytes(path, 0, 4) in TIFF:
            return path
        read: Callable[[], Any] = partial(read_bytes, *place)
        if ending.endswith("/"):
            read = partial(str, path)
        elif ending not in readers:
            content: bytes = read()
            if ending or content[DICOM_MARK] != b"DICM":
                return content
            ending, read = DICOM, partial(bytes, content)
        if get_worker_info() is not None:  # a loader's worker draws files at random
            return call_reader(ending, read())
        with FILLING:
            last = self.last
            if last is None or last[0] != file:
                self.last = last = file, Once(lambda: call_reader(ending, read()))
        return last[1]()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"last": None}

    def several(self) -> dict[int, Stack]:
        """What files hold, by their number, where it is more than one image."""
        often = [file for file, chance in enumerate(self.chances) if chance == OFTEN]
        seldom = [file for file, chance in enumerate(self.chances) if chance == SELDOM]
        sample = seldom[:: -(-len(seldom) // LOOKED_AT) or 1]
        found = self.looked_through([*often, *sample])
        if len(sample) < len(seldom) and any(file in found for file in sample):
            found |= self.looked_through(sorted({*seldom} - {*sample}))
        return found

    def looked_through(self, files: Iterable[int]) -> dict[int, Stack]:
        """What some files hold, by their number, where it is more than one image."""
        found: dict[int, Stack] = {}
        for file in files:
            # Errors are reported when the file is opened.
            with suppress(ImageError, OSError, struct.error, IndexError):
                stack = self.stack(file)
                if stack.images > 1 or stack.reduced:
                    found[file] = stack
        return found

    def stack(self, file: int) -> Stack:
        """What a file holds."""
        place, ending = self.place(file), ending_at(self.file_name(file))
        check = partial(may_hold_several, *place[:2])
        if ending and ending not in all_readers() and not in_time(check, place.path):
            return Stack(1)
        if ending in SHAPE_FIRST:
            with suppress(ImageError):  # if that is not enough, all of it is read
                head, _ = in_time(partial(read_part, place.path, place.offset, HEAD), place.path)
                return call_reader(ending, head).stack
        content = self.file_content(file, several=True)
        return in_time(partial(stack_in, content), place.path)

    def settle(self, stacks: Mapping[int, Stack], pages: Pages | None) -> None:
        """Decide what files with several images are read as."""
        several = {file: stack for file, stack in stacks.items() if stack.images > 1}
        self.split = {f: stack.images for f, stack in several.items() if is_split(stack, pages)}
        merged = 0 if pages == "first" else ALL
        self.merged = {file: merged for file in several if file not in self.split}
        if self.split:
            counts = torch.ones(self.files, dtype=torch.int64)
            counts[list(self.split)] = torch.tensor(list(self.split.values()))
            self.starts = counts.cumsum(0) - counts
            self.more = int(counts.sum()) - self.files


def is_split(stack: Stack, pages: Pages | None) -> bool:
    """Whether the images of a file are images of the source."""
    return pages == "images" or (pages is None and not stack.joinable)


def settle_pages(parts: Sequence[PagedFiles], pages: Pages | None) -> None:
    """Decide what the files of a source are read as, and say what was found.

    Without a word on it, gray pages without a name are channels where every file has as many, 16 at
    most; files whose pages have a name are not counted. All other images of a file are images.
    """
    found = [part.several() for part in parts]
    stacks = [stack for part in found for stack in part.values() if stack.images > 1]
    gray = [stack.images for stack in stacks if stack.joinable]
    plain = sum(part.files for part in parts) - len(stacks)
    alike = len(set(gray)) == 1 and gray[0] <= MOST_JOINED and not plain
    for part, several in zip(parts, found, strict=True):
        if not alike:
            several = {file: stack._replace(joinable=False) for file, stack in several.items()}
        part.settle(several, pages)
    for joinable, kind in ((True, GRAY_PAGES), (False, "pages")):
        same_kind = [stack for stack in stacks if stack.joinable == joinable]
        if same_kind:
            split = is_split(same_kind[0]._replace(joinable=joinable and alike), pages)
            log.info("%s", pages_message([stack.images for stack in same_kind], kind, split, pages))
    copies = sum(stack.reduced > 0 for part in found for stack in part.values())
    if copies:
        log.info("smaller copies or masks in %s are left out", counted(copies, "file"))


def pages_message(counts: Sequence[int], kind: str, split: bool, pages: Pages | None) -> str:
    """What was found in files of several images, and the flag that reads them otherwise."""
    low, high = min(counts), max(counts)
    number = f"{low}" if low == high else f"{low} to {high}"
    start = f"{counted(len(counts), 'file')} of {number} {kind}: "
    if split:
        return (
            f"{start}read as {sum(counts)} images; `--pages channels` makes one image of each file"
        )
    other = f"`--pages images` makes {sum(counts)} images"
    if pages == "first":
        return f"{start}only the first of each file is read; {other}"
    return f"{start}read as {f'{number} ' * (kind == GRAY_PAGES)}channels; {other}"
