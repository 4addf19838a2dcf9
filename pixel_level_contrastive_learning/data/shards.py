"""WebDataset shards, read in any order: tar files with an index of where each image lies.

WebDataset itself streams: what a batch holds then follows from which worker has read how far, and a
run can be resumed only by reading again. Here a sample is a function of seed, epoch and index, so
images are read where they lie. Shards named by URL are downloaded whole, once, and kept.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit
from uuid import uuid4

import torch

from ..checks import ALLOW_COMMANDS, counted
from .decoding import ending_of, image_suffixes
from .image import ImageError
from .pages import PagedFiles, Place, chance_of_several
from .readers import DICOM_MARK
from .reading import PART, in_time

log = logging.getLogger(__name__)

HEADERS = 1000
"""Headers of a tar file that are read at once."""
MASK_WORDS = ("mask", "masks", "label", "labels", "seg", "segmentation", "gt")
"""What the name of a mask says after that of its image."""


class NameList:
    """Many names in one block of bytes.

    A list of a million strings would be copied into every worker, since counting references writes
    to each of them.
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self.block = b"".join(names)
        self.ends = torch.tensor([0, *map(len, names)], dtype=torch.int64).cumsum(0)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        start, end = self.ends[index : index + 2].tolist()
        return os.fsdecode(self.block[start:end])


class ShardSource(PagedFiles):
    """The images in some tar files.

    Args:
        paths: The files, not compressed.

    Raises:
        ValueError: A file is no tar file, or there is no image in any.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        found = [images_in(path) for path in paths]
        kept = [without_masks(images) for images in found]
        if masks := sum(map(len, found)) - sum(map(len, kept)):
            log.info(
                "left out: %s next to images of the same key in shards", counted(masks, "mask")
            )
        members = [(i, *member) for i, images in enumerate(kept) for member in images]
        if not members:
            raise ValueError(
                f"no image in {counted(len(paths), 'shard')} ({paths[0]!r}"
                f"{', ...' * (len(paths) > 1)}); looked for members that end in "
                f"{', '.join(sorted(image_suffixes()))}"
            )
        for empty in set(range(len(paths))) - {shard for shard, *_ in members}:
            log.warning("%s holds no image and is left out", paths[empty])
        self.positions = torch.tensor([member[:3] for member in members], dtype=torch.int64)
        self.names = NameList([name for *_, name in members])
        self.chances = bytes(chance_of_several(os.fsdecode(name)) for *_, name in members)

    @classmethod
    def find(cls, place: str) -> Self:
        """The shards that a pattern (``a-{00..99}.tar``) or a URL names; ``::`` joins several."""
        places = [place]
        if any(mark in place for mark in ("{", "::")):
            from webdataset.shardlists import expand_urls

            places = expand_urls(place)
        return cls([download(one) if is_url(one) else find_local(one) for one in places])

    def file_name(self, file: int) -> str:
        return f"{self.paths[int(self.positions[file, 0])]}:{self.names[file]}"

    def place(self, file: int) -> Place:
        shard, offset, length = self.positions[file].tolist()
        return Place(self.paths[shard], offset, length)


def is_url(place: str) -> bool:
    """Whether a shard has to be downloaded."""
    return "://" in place or is_command(place)


def is_command(place: str) -> bool:
    """Whether a shard is what a command prints, which webdataset hands to a shell."""
    with suppress(ValueError):
        return urlsplit(place).scheme == "pipe"  # which finds it as webdataset does
    return False


def is_shards(place: str) -> bool:
    """Whether a place is named as shards are: a tar file, a pattern of them, or a URL."""
    return is_url(place) or place.endswith((".tar", ".tar.gz"))


def images_in(path: str, whole: bool = False) -> list[tuple[int, int, bytes]]:
    """Offset, length and name of each image in a tar file, of which only headers are read.

    Args:
        path: The file.
        whole: Refuse a file that is damaged or cut off, instead of a warning.
    """
    images: list[tuple[int, int, bytes]] = []
    links: list[tuple[bytes, bytes]] = []
    try:
        with in_time(partial(tarfile.open, path, "r:"), path) as tar:
            members = headers(tar)

            def batch() -> list[tuple[tarfile.TarInfo, bool]]:
                entries = []
                for member in islice(members, HEADERS):
                    tar.members = []  # type: ignore[attr-defined]  # else every header is kept
                    taken = member.isfile() or member.islnk()
                    entries.append((member, taken and is_image(tar, member)))
                return entries

            with suppress(tarfile.ReadError):  # reported below
                for member, taken in chain.from_iterable(iter(lambda: in_time(batch, path), [])):
                    name = os.fsencode(member.name)
                    if taken and member.islnk():
                        links.append((os.fsencode(member.linkname), name))
                    elif taken:
                        images.append((member.offset_data, member.size, name))
            problem = in_time(partial(damage, tar), path)
    except ImageError as error:
        raise ValueError(f"{path!r} cannot be read: {error}") from error
    except tarfile.ReadError as error:
        raise ValueError(
            f"{path!r} is not a tar file that can be read ({error}); shards must be whole and not "
            "compressed"
        ) from error
    places = {name: (offset, size) for offset, size, name in images} if links else {}
    images += [(*places[target], name) for target, name in links if target in places]
    if missing := sum(target not in places for target, _ in links):
        log.warning("%s: left out: %s to no earlier image", path, counted(missing, "hard link"))
    if problem:
        before = counted(len(images), "image")
        message = f"{problem} after {before}; what follows is not read: write it again"
        if whole:
            raise ValueError(message)
        log.warning("%s %s", path, message)
    return images


def without_masks(images: Sequence[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
    """Images without those called ``KEY.seg.png`` or the like beside another one of that key."""
    masks, others = [], set()
    for number, (_, _, name) in enumerate(images):
        folder, base = os.path.split(name)
        key, *kinds = base.lower().split(b".")
        if len(kinds) > 1 and os.fsdecode(kinds[-2]) in MASK_WORDS:
            masks.append((number, (folder, key)))
        else:
            others.add((folder, key))
    left_out = {number for number, key in masks if key in others}
    return [image for number, image in enumerate(images) if number not in left_out]


def headers(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The headers of a tar file, and of those that were joined to it, behind zeros."""
    while True:
        yield from iter(tar.next, None)
        following = first_byte(tar) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
        if following <= tar.offset:
            return
        tar.offset = following


def first_byte(tar: tarfile.TarFile) -> int:
    """Where the first byte lies that is not zero, from where the headers ended; -1 for nowhere."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    while block := tar.fileobj.read(PART):
        if rest := block.lstrip(b"\0"):
            return tar.fileobj.tell() - len(rest)
    return -1


def damage(tar: tarfile.TarFile) -> str:
    """What is wrong where the headers of a tar file ended; an empty text for nothing."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "is cut off"
    return f"has a damaged header at byte {tar.offset}," if block.strip(b"\0") else ""


def is_image(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    """Whether a file in a tar file is an image: by its ending, or as DICOM without any."""
    name = os.path.basename(member.name)
    if name.startswith(".") or os.path.splitext(name)[1].strip(".0123456789"):
        return not name.startswith(".") and bool(ending_of(name))
    assert tar.fileobj is not None
    tar.fileobj.seek(member.offset_data + DICOM_MARK.start)
    return member.size > DICOM_MARK.stop and tar.fileobj.read(4) == b"DICM"


def find_local(place: str) -> str:
    """The path of a local shard, if it is there."""
    path = Path(place).expanduser()
    if not path.is_file():
        raise ValueError(
            f"no shard at {str(path)!r}; a pattern looks like shards-{{000000..000099}}.tar, and a "
            "folder of shards needs none"
        )
    return str(path)


def download(url: str) -> str:
    """The path of a shard that is downloaded now, or was before."""
    from webdataset import gopen

    if is_command(url) and not os.environ.get(ALLOW_COMMANDS):
        raise ValueError(
            f"the shard {url!r} is a command that a shell would run, and it was not run; if "
            "it is yours, give --allow-commands on the command line, or from Python set the "
            f"environment variable {ALLOW_COMMANDS}=1"
        )
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base, "pixelcl", "shards").expanduser()
    tail = "".join(c if c.isalnum() or c in "-_." else "_" for c in url.rsplit("/", 1)[-1])[-80:]
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}"
    if path.exists():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{uuid4().hex}"  # of this process alone: others may download it as well
    log.info("downloading %s to %s", url, path)
    try:
        with gopen(url, "rb") as stream, open(unfinished, "wb") as file:
            shutil.copyfileobj(stream, file, 2**20)
        if not images_in(str(unfinished), whole=True):
            raise ValueError("it holds no image")
        os.replace(unfinished, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot download the shard {url!r}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return str(path)
