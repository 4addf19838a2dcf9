"""Packing: images written once into WebDataset shards, no larger than training needs them.

Decoding a photograph of twelve megapixels takes most of a loader's time, and a million small files
are slow to list. Both are paid once here, shard by shard: a shard is written beside its place, read
back, compared and moved there, so that work that was cut off goes on where it stopped.
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

from ..checks import raise_together, whole, within
from ..files import write_whole
from .dataset import Broken, refuse_too_many
from .decoding import SUFFIXES, TIFF, open_image
from .image import SCALES, ImageError, LazyImage, channels_last, upright
from .shards import Shards
from .sources import Source, open_source

log = logging.getLogger(__name__)

INDEX = "shards.json"
"""What was packed, how, and the digest of each shard that is done."""
SKIPPED = "skipped.txt"
STARTS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"RIFF": "webp",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"\x93NUMPY": "npy",
} | dict.fromkeys(TIFF, "tif")
"""How files begin, and the suffix of their kind."""


class Packed(NamedTuple):
    """What came of packing.

    Attributes:
        folder: Where the shards are; `pretrain` takes it as it is.
        images: Images in them.
        shards: How many they are.
        kept: How many of them were there from an earlier start.
        skipped: Images that could not be read, listed in ``skipped.txt``.
        bytes_before: What the images took as they were.
        bytes_after: What the shards take.
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


class Sample(NamedTuple):
    """An image as it goes into a shard.

    Attributes:
        suffix: The ending of its file, which tells the format.
        content: Its bytes.
        size: The original's ``(height, width)``, upright.
        length: The original's bytes.
    """

    suffix: str
    content: bytes
    size: tuple[int, int]
    length: int


def pack(
    data: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    max_side: int = 640,
    quality: int = 90,
    images_each: int = 1000,
    max_broken: float = 0.01,
    workers: int | None = None,
) -> Packed:
    """Write images into shards, large ones made smaller; goes on with what an earlier call began.

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

    Raises:
        ValueError: A value out of range, no image, or a folder with something else in it.
        TooManyBrokenError: More images than allowed cannot be read.
        OSError: A shard cannot be written, or reads back otherwise than it was written.
    """
    raise_together(
        whole("max_side", max_side, 1),
        whole("quality", quality, 1) or within("quality", quality, 1, 95),
        whole("images_each", images_each, 1),
        within("max_broken", max_broken, 0, 1),
        None if workers is None else whole("workers", workers, 1),
    )
    source = open_source([data] if isinstance(data, (str, Path)) else list(data))
    folder = Path(out).expanduser()
    names = [source.name(index) for index in range(len(source))]
    listed = os.fsencode("\n".join(map(whole_name, names)))
    plan = {
        "images": len(names),
        "names": hashlib.sha256(listed).hexdigest(),
        "max_side": max_side,
        "quality": quality,
        "images_each": images_each,
    }
    index = Index.begun(folder, plan)
    total, kept, before = -(-len(names) // images_each), 0, 0
    shared = common_folder(names)
    broken: dict[str, Broken] = {}
    with ThreadPoolExecutor(workers) as threads:
        for number in range(total):
            path = folder / f"shards-{number:06d}.tar"
            held = index.done(path)
            if held is None:
                places = range(number * images_each, min((number + 1) * images_each, len(names)))
                found = threads.map(lambda i: packed(source, i, max_side, quality), places)
                held = write_shard(path, dict(zip(places, found, strict=True)), names, shared)
                index.add(path, held)
                log.info("%s: %d images, %s of %d", path.name, held["images"], number + 1, total)
            else:
                kept += 1
            before += held["bytes_before"]
            broken |= {name: Broken(name, reason) for name, reason in held["skipped"]}
            refuse_too_many(broken, len(names), max_broken)
    if broken:
        lines = "".join(image.line for image in broken.values())
        write_whole(folder / SKIPPED, lines.encode("utf-8", "surrogateescape"))
    after = sum(held["bytes"] for held in index.shards.values())
    images = len(names) - len(broken)
    return Packed(folder, images, total, kept, len(broken), before, after)


class Index:
    """The record of what is done, kept beside the shards.

    Args:
        folder: Where they are.
        plan: What is packed and how.
        shards: The record of each shard that is done, by its name.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Any], shards: dict[str, Any]) -> None:
        self.folder, self.plan, self.shards = folder, plan, shards

    @classmethod
    def begun(cls, folder: Path, plan: Mapping[str, Any]) -> Index:
        """The record of a folder: a new one, or that of an earlier call with the same plan.

        Raises:
            ValueError: There is something else in the folder, or other shards.
        """
        path = folder / INDEX
        if not path.is_file():
            if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
                raise ValueError(
                    f"out is {str(folder)!r}, which is not empty and was not packed here; name "
                    "another folder"
                )
            return cls(folder, plan, {})
        held = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name, value in plan.items() if held["plan"].get(name) != value]
        if changed:
            told = ", ".join(
                "other images" if n == "names" else f"{n} {held['plan'].get(n)} and now {plan[n]}"
                for n in changed
            )
            raise ValueError(
                f"out is {str(folder)!r}, which holds shards of another call ({told}); give the "
                "same images and settings to go on with it, or name another folder"
            )
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()
        return cls(folder, plan, held["shards"])

    def done(self, path: Path) -> dict[str, Any] | None:
        """What is known of a shard that is there and as it was written; None where it is not."""
        held: dict[str, Any] | None = self.shards.get(path.name)
        if held is None or (held["bytes"] and not path.is_file()):
            return None
        return held if not held["bytes"] or digest(path) == held["sha256"] else None

    def add(self, path: Path, held: dict[str, Any]) -> None:
        """Note that a shard is done."""
        self.shards[path.name] = held
        text = json.dumps({"plan": self.plan, "shards": self.shards}, indent=1)
        write_whole(self.folder / INDEX, text)


def whole_name(name: str) -> str:
    """An image's name, however its folder was spelled."""
    return name if "://" in name else os.path.abspath(name)


def common_folder(names: Sequence[str]) -> str:
    """The folder that all images lie in, which their names in the shards leave out."""
    with suppress(ValueError):  # on several drives
        return os.path.commonpath([os.path.dirname(name) for name in names])
    return ""


def packed(source: Source, index: int, max_side: int, quality: int) -> Sample | ImageError:
    """An image in the form it has in a shard; or why it cannot be used."""
    try:
        content = source.content(index)
        opened = open_image(content)
        suffix = ending(source.name(index), content)
        if max(opened.size) <= max_side and suffix:
            opened.raster()  # a damaged file is found now, and not in training
            return Sample(suffix, content, opened.size, len(content))
        pixels = made_smaller(opened, max_side)
    except ImageError as error:
        return error
    suffix, written = encoded(pixels, quality)
    return Sample(suffix, written, opened.size, len(content))


def ending(name: str, content: bytes) -> str:
    """The file's suffix, or else what its content begins as; empty where it cannot be told."""
    suffix = Path(name).suffix.lower()
    if suffix in SUFFIXES:
        return suffix.removeprefix(".")
    return next((kind for start, kind in STARTS.items() if content.startswith(start)), "")


def made_smaller(opened: LazyImage, max_side: int) -> Tensor:
    """Upright pixels ``(c, h, w)`` of a longer side of ``max_side`` at most, without aliasing."""
    longer = max(opened.size)
    max_side = min(max_side, longer)
    h, w = (max(1, round(side * max_side / longer)) for side in opened.size)
    scale = max(s for s in SCALES if s == 1 or longer >= max_side * s)
    pixels = upright(opened.raster(scale).pixels, opened.orientation)
    whole_numbers = pixels.dtype != torch.uint8 and bool((pixels == pixels.round()).all())
    smaller = interpolate(pixels[None], (h, w), mode="bilinear", antialias=True)[0]
    return smaller.round() if whole_numbers else smaller


def encoded(pixels: Tensor, quality: int) -> tuple[str, bytes]:
    """Pixels ``(c, h, w)`` as a file: its ending and its bytes."""
    import numpy as np
    from PIL import Image

    held = BytesIO()
    if pixels.dtype == torch.uint8 and len(pixels) in (1, 3):
        shape = "1 h w -> h w" if len(pixels) == 1 else "c h w -> h w c"
        Image.fromarray(rearrange(pixels, shape).contiguous().numpy()).save(
            held, "JPEG", quality=quality
        )
        return "jpg", held.getvalue()
    array = pixels.numpy()
    low, high = array.min(), array.max()
    if array.dtype != np.uint8 and low >= 0 and high < 2**16 and (array == array.round()).all():
        array = array.astype(np.uint16)
    if channels_last(array.shape, ""):  # more bands than columns: an array would be read otherwise
        from tifffile import imwrite

        imwrite(held, array, photometric="minisblack", planarconfig="separate")
        return "tif", held.getvalue()
    np.save(held, np.ascontiguousarray(array))
    return "npy", held.getvalue()


def write_shard(
    path: Path,
    samples: Mapping[int, Sample | ImageError],
    names: Sequence[str],
    shared: str,
) -> dict[str, Any]:
    """Write a shard, read it back, and move it to its place; what is to be known of it.

    Raises:
        OSError: It cannot be written, or reads back otherwise.
    """
    from webdataset import TarWriter

    skipped = [(names[i], str(own)) for i, own in samples.items() if isinstance(own, ImageError)]
    good = {i: own for i, own in samples.items() if isinstance(own, Sample)}
    held: dict[str, Any] = {"images": len(good), "skipped": skipped, "bytes": 0, "sha256": ""}
    held["bytes_before"] = sum(own.length for own in good.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    if not good:
        return held
    beside = path.with_name(f"{path.name}.part")
    with beside.open("wb") as file:
        writer = TarWriter(file, mtime=0)
        for index, own in good.items():
            name = os.path.relpath(names[index], shared) if shared else names[index]
            about: dict[str, Any] = {
                "name": Path(os.fsencode(name).decode(errors="replace")).as_posix()
            }
            about |= {"height": own.size[0], "width": own.size[1]}
            writer.write(
                {"__key__": f"{index:09d}", own.suffix: own.content, "json": json.dumps(about)}
            )
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    for written, own in zip(read_back(beside), good.values(), strict=True):
        if written != own.content:
            raise OSError(
                f"{beside} reads back otherwise than it was written; look at the disk, and call "
                "again to go on"
            )
    held |= {"bytes": beside.stat().st_size, "sha256": digest(beside)}
    beside.replace(path)
    return held


def read_back(path: Path) -> Iterator[bytes]:
    """The bytes of each image in a shard."""
    shards = Shards([str(path)])
    return (shards.content(index) for index in range(len(shards)))


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
