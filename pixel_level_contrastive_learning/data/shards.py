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
from collections.abc import Sequence
from pathlib import Path
from typing import Self
from uuid import uuid4

import torch

from .decoding import IMAGE_SUFFIXES, open_image
from .image import CUT, MAX_BYTES, ImageError, LazyImage

log = logging.getLogger(__name__)


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


class ShardSource:
    """The images in some tar files.

    Args:
        paths: The files, not compressed.

    Raises:
        ValueError: A file is no tar file, or there is no image in any.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = list(paths)
        members = [(i, *member) for i, path in enumerate(paths) for member in images_in(path)]
        if not members:
            raise ValueError(
                f"no image in {len(paths)} shards ({paths[0]!r}, ...); looked for members that "
                f"end in {', '.join(sorted(IMAGE_SUFFIXES))}"
            )
        for empty in set(range(len(paths))) - {shard for shard, *_ in members}:
            log.warning("%s holds no image and is left out", paths[empty])
        self.positions = torch.tensor([member[:3] for member in members], dtype=torch.int64)
        self.names = NameList([name for *_, name in members])

    @classmethod
    def find(cls, place: str) -> Self:
        """The shards that a pattern (``a-{00..99}.tar``) or a URL names; ``::`` joins several."""
        places = [place]
        if any(mark in place for mark in ("{", "::")):
            from webdataset.shardlists import expand_urls

            places = expand_urls(place)
        return cls([download(one) if is_url(one) else find_local(one) for one in places])

    def __len__(self) -> int:
        return len(self.positions)

    def name(self, index: int) -> str:
        return f"{self.paths[int(self.positions[index, 0])]}:{self.names[index]}"

    def content(self, index: int) -> bytes:
        shard, offset, length = self.positions[index].tolist()
        content = read_bytes(self.paths[shard], offset, length)
        if len(content) < length:
            raise ImageError(f"the shard ends after {len(content)} of {length} bytes")
        return content

    def open(self, index: int) -> LazyImage:
        return open_image(self.content(index))


def read_bytes(path: str, offset: int = 0, length: int = -1) -> bytes:
    """A file, or a part of it."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if length < 0 and size > MAX_BYTES:
                raise ImageError(f"a file of {size / 2**30:.1f} GiB; {CUT}")
            file.seek(offset)
            return file.read(length)
    except OSError as error:
        raise ImageError(error.strerror or type(error).__name__) from error


def is_url(place: str) -> bool:
    """Whether a shard has to be downloaded."""
    return "://" in place or place.startswith("pipe:")


def is_shards(place: str) -> bool:
    """Whether a place is named as shards are: a tar file, a pattern of them, or a URL."""
    return is_url(place) or place.endswith((".tar", ".tar.gz"))


def images_in(path: str) -> list[tuple[int, int, bytes]]:
    """Offset, length and name of each image in a tar file, of which only headers are read."""
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else every header is kept
                hidden = os.path.basename(member.name).startswith(".")
                suffix = os.path.splitext(member.name)[1].lower()
                if member.isfile() and suffix in IMAGE_SUFFIXES and not hidden:
                    found.append((member.offset_data, member.size, os.fsencode(member.name)))
    except tarfile.ReadError as error:
        if not found:
            raise ValueError(
                f"{path!r} is not a tar file that can be read ({error}); shards must be whole and "
                "not compressed"
            ) from error
    if found and not is_complete(path):
        log.warning("%s is cut off after %d images", path, len(found))
    return found


def is_complete(path: str) -> bool:
    """Whether a tar file has its end: blocks of zeros."""
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - tarfile.BLOCKSIZE, 0))
        return not file.read().strip(b"\0")


def find_local(place: str) -> str:
    """The path of a local shard, if it is there."""
    path = Path(place).expanduser()
    if not path.is_file():
        raise ValueError(
            f"no shard at {str(path)!r}; a pattern looks like name-{{0000..0099}}.tar, and a "
            "folder of shards needs none"
        )
    return str(path)


def download(url: str) -> str:
    """The path of a shard that is downloaded now, or was before."""
    from webdataset import gopen

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
        if not images_in(str(unfinished)) or not is_complete(str(unfinished)):
            raise ValueError("the download is cut off, or holds no image")
        os.replace(unfinished, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot download the shard {url!r}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return str(path)
