"""WebDataset shards, read in any order: tar files with an index of where each image lies.

WebDataset itself streams: what a batch holds then follows from which worker has read how far, and a
run can be resumed only by reading again. Here a sample is a function of seed, epoch and index, so
images are read where they lie. Shards named by URL are therefore fetched whole, once, and kept.
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

from .decoding import SUFFIXES, open_image
from .image import ImageError, LazyImage

log = logging.getLogger(__name__)


def is_shards(place: str) -> bool:
    """Whether a place is named as shards are: a tar file, a pattern of them, or a URL."""
    return "://" in place or place.startswith("pipe:") or place.endswith((".tar", ".tar.gz"))


class Shards:
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
                f"end in {', '.join(sorted(SUFFIXES))}"
            )
        for empty in set(range(len(paths))) - {shard for shard, *_ in members}:
            log.warning("%s holds no image and is left out", paths[empty])
        # Tensors and one block of bytes: lists would be copied into every worker.
        self.where = torch.tensor([member[:3] for member in members], dtype=torch.int64)
        names = [name for *_, name in members]
        self.block = b"".join(names)
        self.ends = torch.tensor([0, *map(len, names)], dtype=torch.int64).cumsum(0)

    @classmethod
    def find(cls, place: str, cache: Path | None = None) -> Self:
        """The shards that a pattern or a URL names.

        Args:
            place: Such as ``shards-{0000..0099}.tar``, local or by URL; ``::`` joins several.
            cache: Where those named by URL are kept; below ``~/.cache`` if not given.

        Raises:
            ValueError: A shard is not there, or cannot be fetched.
        """
        places = [place]
        if any(mark in place for mark in ("{", "::")):
            from webdataset.shardlists import expand_urls

            places = expand_urls(place)
        return cls([fetched(one, cache) if is_remote(one) else local(one) for one in places])

    def __len__(self) -> int:
        return len(self.where)

    def name(self, index: int) -> str:
        start, end = self.ends[index : index + 2].tolist()
        return f"{self.paths[int(self.where[index, 0])]}:{os.fsdecode(self.block[start:end])}"

    def content(self, index: int) -> bytes:
        """The bytes of an image.

        Raises:
            ImageError: Its shard is damaged.
        """
        shard, offset, length = self.where[index].tolist()
        try:
            with open(self.paths[shard], "rb") as file:
                file.seek(offset)
                content = file.read(length)
        except OSError as error:
            raise ImageError(error.strerror or type(error).__name__) from error
        if len(content) < length:
            raise ImageError(f"the shard ends after {len(content)} of {length} bytes")
        return content

    def open(self, index: int) -> LazyImage:
        """Look at an image.

        Raises:
            ImageError: It, or its shard, is damaged.
        """
        return open_image(self.content(index))


def images_in(path: str) -> list[tuple[int, int, bytes]]:
    """Offset, length and name of each image in a tar file. Only headers are read.

    Raises:
        ValueError: It is no tar file, or compressed.
    """
    found = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # else every header is kept
                hidden = os.path.basename(member.name).startswith(".")
                suffix = os.path.splitext(member.name)[1].lower()
                if member.isfile() and suffix in SUFFIXES and not hidden:
                    found.append((member.offset_data, member.size, os.fsencode(member.name)))
    except tarfile.ReadError as error:
        if not found:
            raise ValueError(
                f"{path!r} is not a tar file that can be read ({error}); shards must be whole and "
                "not compressed"
            ) from error
    if found and not is_whole(path):
        log.warning("%s is cut off after %d images", path, len(found))
    return found


def is_whole(path: str) -> bool:
    """Whether a tar file has its end: blocks of zeros."""
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - tarfile.BLOCKSIZE, 0))
        return not file.read().strip(b"\0")


def is_remote(place: str) -> bool:
    """Whether a shard has to be fetched."""
    return "://" in place or place.startswith("pipe:")


def local(place: str) -> str:
    """The path of a local shard, once it has been found."""
    path = Path(place).expanduser()
    if not path.is_file():
        raise ValueError(
            f"no shard at {str(path)!r}; a pattern looks like name-{{0000..0099}}.tar, and a "
            "folder of shards needs none"
        )
    return str(path)


def fetched(url: str, cache: Path | None) -> str:
    """The path of a shard that was fetched now or before.

    Raises:
        ValueError: It cannot be fetched.
    """
    from webdataset import gopen

    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = (cache or Path(base, "pixelcl", "shards")).expanduser()
    tail = "".join(c if c.isalnum() or c in "-_." else "_" for c in url.rsplit("/", 1)[-1])[-80:]
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{tail}"
    if path.exists():
        return str(path)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / f".{uuid4().hex}"  # of this process alone: others may fetch it as well
    log.info("fetching %s to %s", url, path)
    try:
        with gopen(url, "rb") as stream, open(unfinished, "wb") as file:
            shutil.copyfileobj(stream, file, 2**20)
        if not images_in(str(unfinished)) or not is_whole(str(unfinished)):
            raise ValueError("what came is cut off, or holds no image")
        os.replace(unfinished, path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot fetch the shard {url!r}: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return str(path)
