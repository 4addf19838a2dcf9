"""Write images once into WebDataset shards, no larger than training needs them.

Decoding a photograph of twelve megapixels takes most of a loader's time, and a million small files
are slow to list. Both are paid once here, shard by shard: a shard is written beside its place, read
back, compared and moved there, so that interrupted work goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from ..checks import LIMITS, Pages, raise_together, whole, within
from ..files import check_writable, rename, sync, write_whole
from ..run_layout import SKIPPED
from .dataset import BrokenImage, check_broken
from .decoding import IMAGE_SUFFIXES, TIFF, open_image
from .image import ImageError, LazyImage, channels_last
from .shards import ShardSource
from .sources import Source, open_source

log = logging.getLogger(__name__)

INDEX = "shards.json"
"""The settings, and the digest of each shard that is done."""
SIGNATURES = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"\x93NUMPY": "npy",
} | dict.fromkeys(TIFF, "tif")
"""How files begin, and the suffix of their format."""


class ShardsReport(NamedTuple):
    """What was written.

    Attributes:
        folder: Where the shards are; `pretrain` takes it as it is.
        images: Images in them.
        shards: How many they are.
        kept: How many of them were there from an earlier call.
        skipped: Images that could not be read, listed in ``skipped.txt``.
        bytes_before: Size of the images' files.
        bytes_after: Size of the shards.
    """

    folder: Path
    images: int
    shards: int
    kept: int
    skipped: int
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        again = f" ({self.kept} were there already)" if self.kept else ""
        lost = f"; {self.skipped} could not be read, see {SKIPPED}" if self.skipped else ""
        before, after = (size / 2**20 for size in (self.bytes_before, self.bytes_after))
        return (
            f"{self.images} images in {self.shards} shards{again}, {after:.1f} MiB where they took "
            f"{before:.1f}{lost}\nshards: {self.folder}"
        )


class ShardEntry(NamedTuple):
    """An image's file as it goes into a shard, and the upright size and the bytes it had before."""

    suffix: str
    content: bytes
    original_size: tuple[int, int]
    original_bytes: int


def write_shards(
    data: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    max_side: int = 640,
    quality: int = 90,
    images_each: int = 1000,
    max_broken: float = 0.01,
    workers: int | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
) -> ShardsReport:
    """Write images into shards, large ones made smaller, going on where an earlier call stopped.

    An image whose longer side is at most ``max_side`` keeps its bytes. A larger one becomes an
    upright JPEG if it is 8-bit, gray or RGB, and otherwise a NumPy array of the same kind of
    values. Beside each stands a JSON of its original name and size.

    Args:
        data: Folders, lists of paths or shards, as `pretrain` takes them.
        out: Folder of the shards, new or of an earlier call with the same settings.
        max_side: Longer side of the images in the shards, in pixels.
        quality: Of the JPEGs written, 1 to 95.
        images_each: Images a shard.
        max_broken: Share of images that may be unreadable, 0 to 1.
        workers: Threads; default: one for each core.
        pages: What several images in a file are read as, see `open_source`.
        nodata: The value where nothing was measured; 16-bit and float images have NaN in its place.

    Raises:
        ValueError: A value out of range, no image, or a folder with something else in it.
        TooManyBrokenError: More images than allowed cannot be read.
        OSError: A shard cannot be written, or differs from what was written when it is read back.
    """
    raise_together(
        whole("max_side", max_side, 1),
        whole("quality", quality, 1) or within("quality", quality, 1, 95),
        whole("images_each", images_each, 1),
        LIMITS["max_broken"]("max_broken", max_broken),
        None if workers is None else whole("workers", workers, 1),
    )
    check_writable("out", out)
    places = [data] if isinstance(data, (str, Path)) else list(data)
    source = open_source(places, pages=pages, nodata=nodata)
    folder = Path(out).expanduser()
    names = [source.name(index) for index in range(len(source))]
    absolute = [name if "://" in name else os.path.abspath(name) for name in names]
    settings = {
        "images": len(names),
        "names": hashlib.sha256(os.fsencode("\n".join(absolute))).hexdigest(),
        "max_side": max_side,
        "quality": quality,
        "images_each": images_each,
        "pages": pages,
        "nodata": nodata,
    }
    index = ShardIndex(folder, settings)
    total, kept, bytes_before = -(-len(names) // images_each), 0, 0
    shared = common_folder(names)
    broken: dict[str, BrokenImage] = {}
    with ThreadPoolExecutor(workers) as threads:
        for number in range(total):
            path = folder / f"shards-{number:06d}.tar"
            record = index.find(path)
            if record is None:
                indices = range(number * images_each, min((number + 1) * images_each, len(names)))
                entries = threads.map(lambda i: make_entry(source, i, max_side, quality), indices)
                record = write_shard(path, dict(zip(indices, entries, strict=True)), names, shared)
                index.add(path, record)
                log.info("%s: %d images, %s of %d", path.name, record["images"], number + 1, total)
            else:
                kept += 1
            bytes_before += record["bytes_before"]
            broken |= {name: BrokenImage(name, reason) for name, reason in record["skipped"]}
            check_broken(broken, len(names), max_broken)
    if broken:
        lines = "".join(image.line for image in broken.values())
        write_whole(folder / SKIPPED, lines.encode("utf-8", "surrogateescape"))
    bytes_after = sum(record["bytes"] for record in index.shards.values())
    images = len(names) - len(broken)
    return ShardsReport(folder, images, total, kept, len(broken), bytes_before, bytes_after)


class ShardIndex:
    """The record of the shards that are done, in a folder that is new or of an earlier call."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = folder / INDEX, settings
        self.shards: dict[str, dict[str, Any]] = {}
        if not self.path.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(
                    f"out is {str(folder)!r}, which is not empty and was not written by an earlier "
                    "call; name another folder"
                )
            return
        stored = json.loads(self.path.read_text(encoding="utf-8"))
        before = stored["plan"]
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            differences = ", ".join(
                "other images" if n == "names" else f"{n} {before.get(n)} and now {settings[n]}"
                for n in changed
            )
            raise ValueError(
                f"out is {str(folder)!r}, which holds shards of another call ({differences}); give "
                "the same images and settings to go on with it, or name another folder"
            )
        self.shards = stored["shards"]
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()

    def find(self, path: Path) -> dict[str, Any] | None:
        """The record of a shard that is there as it was written; None where it is not."""
        record = self.shards.get(path.name)
        if record is None or (record["bytes"] and not path.is_file()):
            return None
        return record if not record["bytes"] or digest(path) == record["sha256"] else None

    def add(self, path: Path, record: dict[str, Any]) -> None:
        """Note that a shard is done."""
        self.shards[path.name] = record
        text = json.dumps({"plan": self.settings, "shards": self.shards}, indent=1)
        write_whole(self.path, text)


def common_folder(names: Sequence[str]) -> str:
    """The folder that all images lie in, which their names in the shards leave out."""
    with suppress(ValueError):  # on several drives
        return os.path.commonpath([os.path.dirname(name) for name in names])
    return ""


def make_entry(source: Source, index: int, max_side: int, quality: int) -> ShardEntry | ImageError:
    """An image in the form it has in a shard; or why it cannot be used."""
    try:
        content = source.content(index)
        image = open_image(content)
        suffix = suffix_of(source.name(index), content)
        if max(image.size) <= max_side and suffix:
            image.decode()  # a damaged file is found now, and not in training
            return ShardEntry(suffix, content, image.size, len(content))
        pixels = read_smaller(image, max_side)
    except ImageError as error:
        return error
    suffix, encoded = encode(pixels, quality)
    return ShardEntry(suffix, encoded, image.size, len(content))


def suffix_of(name: str, content: bytes) -> str:
    """The file's suffix, or else that of the format its content begins with; empty if unknown."""
    suffix = Path(name).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return suffix.removeprefix(".")
    return next((kind for start, kind in SIGNATURES.items() if content.startswith(start)), "")


def read_smaller(image: LazyImage, max_side: int) -> Tensor:
    """Upright pixels ``(c, h, w)`` of a longer side of ``max_side`` at most, without aliasing."""
    longer = max(image.size)
    max_side = min(max_side, longer)
    h, w = (max(1, round(side * max_side / longer)) for side in image.size)
    height, width = (max_side if side == longer else 1 for side in image.size)
    pixels = image.read((height, width))
    whole_numbers = pixels.dtype != torch.uint8 and bool((pixels == pixels.round()).all())
    smaller = interpolate(pixels[None], (h, w), mode="bilinear", antialias=True)[0]
    return smaller.round() if whole_numbers else smaller


def encode(pixels: Tensor, quality: int) -> tuple[str, bytes]:
    """Pixels ``(c, h, w)`` as a file: its ending and its bytes."""
    import numpy as np
    from PIL import Image

    file = BytesIO()
    if pixels.dtype == torch.uint8 and len(pixels) in (1, 3):
        shape = "1 h w -> h w" if len(pixels) == 1 else "c h w -> h w c"
        Image.fromarray(rearrange(pixels, shape).contiguous().numpy()).save(
            file, "JPEG", quality=quality
        )
        return "jpg", file.getvalue()
    array = pixels.numpy()
    low, high = array.min(), array.max()
    if array.dtype != np.uint8 and low >= 0 and high < 2**16 and (array == array.round()).all():
        array = array.astype(np.uint16)
    if channels_last(array.shape):  # more bands than columns: an array would be read otherwise
        from tifffile import imwrite

        imwrite(file, array, photometric="minisblack", planarconfig="separate")
        return "tif", file.getvalue()
    np.save(file, np.ascontiguousarray(array))
    return "npy", file.getvalue()


def write_shard(
    path: Path, entries: Mapping[int, ShardEntry | ImageError], names: Sequence[str], shared: str
) -> dict[str, Any]:
    """Write a shard, read it back, and move it to its place; returns its record in the index."""
    from webdataset import TarWriter

    skipped = [
        (names[i], str(entry)) for i, entry in entries.items() if isinstance(entry, ImageError)
    ]
    good = {i: entry for i, entry in entries.items() if isinstance(entry, ShardEntry)}
    record: dict[str, Any] = {"images": len(good), "skipped": skipped, "bytes": 0, "sha256": ""}
    record["bytes_before"] = sum(entry.original_bytes for entry in good.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if not good:
        return record
    beside = path.with_name(f"{path.name}.part")
    with beside.open("wb") as file:
        writer = TarWriter(file, mtime=0)
        for index, entry in good.items():
            name = os.path.relpath(names[index], shared) if shared else names[index]
            text = Path(os.fsencode(name).decode(errors="replace")).as_posix()
            height, width = entry.original_size
            about = json.dumps({"name": text, "height": height, "width": width})
            writer.write({"__key__": f"{index:09d}", entry.suffix: entry.content, "json": about})
        writer.close()
        sync(file)
    for written, entry in zip(read_back(beside), good.values(), strict=True):
        if written != entry.content:
            raise OSError(
                f"{beside} differs from what was written when it is read back; check the disk, and "
                "call again to go on"
            )
    record |= {"bytes": beside.stat().st_size, "sha256": digest(beside)}
    rename(beside, path)
    return record


def read_back(path: Path) -> Iterator[bytes]:
    """The bytes of each image in a shard."""
    shards = ShardSource([str(path)])
    return (shards.content(index) for index in range(len(shards)))


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
