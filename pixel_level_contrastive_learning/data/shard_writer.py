"""Write images once into WebDataset shards, no larger than training needs them.

Large images are scaled down or, with ``tile``, cut. Decoding a photograph of twelve megapixels
takes most of a loader's time, and a million small files are slow to list. Here, both costs are paid
once, shard by shard: a shard is written to a temporary file, read back, compared and moved into
place, so that interrupted work continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..checks import LIMITS, Pages, counted, raise_together, whole, within
from ..files import cannot_write, check_writable, rename, sole_writer, sync, write_whole
from ..run_layout import LOCK, SKIPPED
from .dataset import BrokenImage, TooManyBrokenError, check_broken
from .image import NO_WARNINGS, ImageError
from .loader import cores, in_order
from .shard_entries import Copies, Entry, Tiles
from .sources import file_state, open_source
from .tiles import Tiling, find_rasters

log = logging.getLogger(__name__)

INDEX = "shards.json"
"""The settings, and the digest of each shard that is done."""
NOT_OURS = (
    "out is {!r}, which is not empty and was not written by an earlier call; name another folder"
)
MAX_SIDE = 640
"""Default longer side of the images in shards."""
SHARD_BYTES = 2**28
"""What the tiles of a shard may take uncompressed: what a killed call does again."""


class ShardsReport(NamedTuple):
    """What was written.

    Attributes:
        folder: Where the shards are; pass it to `pretrain`.
        images: Images in them.
        shards: Number of shards.
        kept: Number of these kept from an earlier call.
        skipped: Images that could not be read, listed in ``skipped.txt``.
        bytes_before: Size of the images' files.
        bytes_after: Size of the shards.
        empty: Tiles that were left out, by what they hold: ``nodata`` or ``background``.
    """

    folder: Path
    images: int
    shards: int
    kept: int
    skipped: int
    bytes_before: int
    bytes_after: int
    empty: Mapping[str, int]

    def __str__(self) -> str:
        kept = f" ({self.kept} were there already)" if self.kept else ""
        skipped = f"; {self.skipped} could not be read, see {SKIPPED}" if self.skipped else ""
        if self.empty:
            kinds = ", ".join(f"{count} of {kind}" for kind, count in self.empty.items())
            skipped += f"; left out: {kinds} (--keep-empty keeps them)"
        before, after = (size / 2**20 for size in (self.bytes_before, self.bytes_after))
        return (
            f"{counted(self.images, 'image')} in {counted(self.shards, 'shard')}{kept}, "
            f"{after:.1f} MiB instead of {before:.1f}{skipped}\nshards: {self.folder}"
        )


def write_shards(
    data: Sequence[str | Path] | str | Path,
    out: str | Path,
    *,
    max_side: int | None = None,
    quality: int = 90,
    images_each: int = 1000,
    max_broken: float = 0.01,
    workers: int | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
    tile: int | None = None,
    overlap: int = 0,
    level: int | None = None,
    mpp: float | None = None,
    keep_empty: bool = False,
) -> ShardsReport:
    """Write images into shards, scaling large ones down; continues where an earlier call stopped.

    A shard of which an image has changed since, by size or modification time, is written again.

    An image whose longer side is at most ``max_side`` keeps its bytes. A larger one becomes an
    upright JPEG if it is 8-bit gray or RGB, and otherwise a NumPy array with the same kind of
    values. Next to each is a JSON with its original name and size.

    With ``tile``, images larger than a tile are cut instead of scaled down, window by window and in
    bounded memory; the last tile of a row or column ends where the image ends. A tile is a JPEG if
    it is 8-bit gray or RGB, and otherwise an array with exactly the image's values, or a TIFF if
    some of them are nodata. The JSON then also has its ``box`` (x0, y0, x1, y1) in pixels of the
    full image and, for a stack, the ``page``. Tiles of which 99 % is nodata or plain background
    (values no further apart than a sixteenth of the image's range) are left out.

    Args:
        data: Folders, lists of paths or shards, as `pretrain` takes them; with ``tile``, no shards.
        out: Folder for the shards, new or from an earlier call with the same settings.
        max_side: Longer side of the images in the shards, in pixels; default: 640. Not with
            ``tile``, which cuts images instead.
        quality: Quality of the JPEGs written, 1 to 95.
        images_each: Images per shard; with ``tile``, fewer if they take much memory.
        max_broken: Fraction of images or tiles that may be unreadable, 0 to 1.
        workers: Threads; default: one per core.
        pages: How files with several images are read, see `open_source`.
        nodata: Value that means "not measured"; in 16-bit and float images it becomes NaN.
        tile: Side of the tiles, in pixels; None to cut nothing.
        overlap: How far neighbouring tiles overlap, in pixels.
        level: Which level of a pyramid is cut; default: 0, the full image.
        mpp: Pixel size of the tiles in micrometres, or metres for a map; instead of a level.
        keep_empty: Keep tiles of nodata or plain background.

    Raises:
        ValueError: A value out of range, no image, or a folder that holds something else or that
            another call is writing to.
        TooManyBrokenError: More images than allowed cannot be read, or all of them.
        OSError: A shard cannot be written, or differs from what was written when it is read back.
        ModuleNotFoundError: Large images need the library of an extra that is not installed.
    """
    both = f"max_side is {max_side} and tile is {tile}; images are scaled down or cut: give one"
    raise_together(
        None if max_side is None else whole("max_side", max_side, 1),
        whole("quality", quality, 1) or within("quality", quality, 1, 95),
        whole("images_each", images_each, 1),
        LIMITS["max_broken"]("max_broken", max_broken),
        None if workers is None else whole("workers", workers, 1),
        without_tiles(tile, overlap=overlap, level=level, mpp=mpp, keep_empty=keep_empty),
        both if max_side is not None and tile is not None else None,
    )
    check_writable("out", out)
    places = [data] if isinstance(data, (str, Path)) else list(data)
    folder = Path(out).expanduser()
    samples: Copies | Tiles
    if tile is None:
        source = open_source(places, leave_out=folder, pages=pages, nodata=nodata)
        files = [source.name(index) for index in range(len(source))]
        samples = Copies(source, MAX_SIDE if max_side is None else max_side, quality)
    else:
        files = find_rasters(places)
        tiling = Tiling(files, tile, overlap, level, mpp, pages, nodata)
        samples = Tiles(tiling, quality, keep_empty)
    absolute = [name if "://" in name else os.path.abspath(name) for name in files]
    each = images_each
    if tile is not None:
        each = min(each, max(1, SHARD_BYTES // max(1, tiling.tile_bytes)))
        refused = {files[i]: BrokenImage(files[i], reason) for i, reason in tiling.refused.items()}
        check_broken(refused, len(files), max_broken)
    settings = {
        "images": len(files),
        "names": hashlib.sha256(os.fsencode("\n".join(absolute))).hexdigest(),
        "quality": quality,
        "images_each": images_each,
        "pages": pages,
        "nodata": nodata,
        **samples.settings,
    }
    count = len(samples)
    total, kept = -(-count // each), 0
    shared = common_folder(files)
    broken: dict[str, BrokenImage] = {}
    workers = workers or cores()
    with (
        locked_index(folder, settings) as index,
        ThreadPoolExecutor(workers) as threads,
        NO_WARNINGS,
    ):
        for number in range(total):
            path = folder / f"shards-{number:06d}.tar"
            indices = range(number * each, min((number + 1) * each, count))
            inside = dict.fromkeys(filter(None, map(samples.file, indices)))  # each file once
            state = digest_of(threads.map(file_state, inside))
            record = index.find(path, state)
            make_each = partial(in_order, samples.make, workers=workers, threads=threads)
            if record is None or is_mended(record, indices, samples.name, make_each):
                record = write_shard(path, make_each(indices), samples.name, shared)
                record["state"] = state
                index.add(path, record)
                found = counted(record["images"], "image")
                log.info("%s: %s, %d of %d", path.name, found, number + 1, total)
            else:
                kept += 1
            broken |= {f"{n}: {reason}": BrokenImage(n, reason) for n, reason in record["skipped"]}
            check_broken(broken, count, max_broken)
    (folder / SKIPPED).unlink(missing_ok=True)
    if broken:
        lines = "".join(image.line for image in broken.values())
        write_whole(folder / SKIPPED, lines.encode("utf-8", "surrogateescape"))
    records = list(index.shards.values())
    images, before, after = (
        sum(record[key] for record in records) for key in ("images", "bytes_before", "bytes")
    )
    if broken and not images:
        name, reason = next(iter(broken.values()))
        raise TooManyBrokenError(
            f"none of {count} images can be used, the first ({name}): {reason}; fix them, or give "
            "other data",
            broken.values(),
        )
    if tile is not None:
        before = sum(os.path.getsize(file) for file in files if os.path.isfile(file))
    empty = sum((Counter(record.get("empty", {})) for record in records), Counter[str]())
    return ShardsReport(folder, images, total, kept, len(broken), before, after, empty)


def without_tiles(tile: int | None, **settings: float | None) -> str | None:
    """Refuse settings of tiles where none are cut."""
    given = [f"{name} is {value!r}" for name, value in settings.items() if value not in (None, 0)]
    return (
        f"{', '.join(given)}, but tile is None; give it, such as 512"
        if given and not tile
        else None
    )


@contextmanager
def locked_index(folder: Path, settings: Mapping[str, Any]) -> Iterator[ShardIndex]:
    """The record of the shards in a folder, which is new or of an earlier call; no other writes."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set[str]()
    if (names - {LOCK} and INDEX not in names) or folder.is_file():
        raise ValueError(NOT_OURS.format(str(folder)))
    with sole_writer(folder / LOCK):
        yield ShardIndex(folder, settings)


class ShardIndex:
    """The record of the shards that are done, kept in their folder."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = folder / INDEX, settings
        self.shards: dict[str, dict[str, Any]] = {}
        if not self.path.is_file():
            self.write()
            return
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            plan, self.shards = dict(stored["plan"]), dict(stored["shards"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(NOT_OURS.format(str(folder))) from error
        changed = [n for n in {**plan, **settings} if plan.get(n) != settings.get(n)]
        if changed:
            differences = ", ".join(
                "other images" if n == "names" else f"{n} {plan.get(n)} and now {settings.get(n)}"
                for n in changed
            )
            raise ValueError(
                f"out is {str(folder)!r}, which holds shards of another call ({differences}); give "
                "the same images and settings to continue it, or give another folder"
            )
        for unfinished in folder.glob("*.part"):
            unfinished.unlink()

    def find(self, path: Path, state: str) -> dict[str, Any] | None:
        """The record of a shard that is there as it was written; None where it is not.

        Nor is there one where the images' files have changed since, by a digest of their states.
        """
        record = self.shards.get(path.name)
        if record is None or record.get("state", state) != state:
            return None
        if not record["images"]:
            return record
        return record if path.is_file() and digest(path) == record["sha256"] else None

    def add(self, path: Path, record: dict[str, Any]) -> None:
        """Note that a shard is done."""
        self.shards[path.name] = record
        self.write()

    def write(self) -> None:
        """Write all of it."""
        text = json.dumps({"plan": self.settings, "shards": self.shards}, indent=1)
        write_whole(self.path, text)


def digest_of(states: Iterable[str]) -> str:
    """A SHA-256 of the states of images' files."""
    return hashlib.sha256("\n".join(states).encode()).hexdigest()


def is_mended(
    record: Mapping[str, Any],
    indices: Iterable[int],
    name: Callable[[int], str],
    make_each: Callable[[list[int]], Iterable[tuple[int, Entry]]],
) -> bool:
    """Whether more of a shard's images can be read now than when it was written."""
    skipped = {image for image, _ in record["skipped"]}
    retried = [index for index in indices if skipped and name(index) in skipped]
    broken = sum(isinstance(entry, ImageError) for _, entry in make_each(retried))
    return broken < len(record["skipped"])


def common_folder(names: Sequence[str]) -> str:
    """The folder that all images lie in, which their names in the shards leave out."""
    with suppress(ValueError):  # on several drives
        return os.path.commonpath([os.path.dirname(name) for name in names])
    return ""


class HashedFile:
    """A file that is written, with the SHA-256 of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sha = file, hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Write some bytes; how many."""
        self.sha.update(content)
        return self.file.write(content)


def write_shard(
    path: Path, entries: Iterable[tuple[int, Entry]], name: Callable[[int], str], shared: str
) -> dict[str, Any]:
    """Write a shard, read it back, and move it to its place; returns its record in the index."""
    from webdataset import TarWriter

    record: dict[str, Any] = {"images": 0, "skipped": [], "bytes": 0, "sha256": ""}
    record["bytes_before"] = 0
    empty = Counter[str]()
    unfinished = path.with_name(f"{path.name}.part")
    try:
        with unfinished.open("wb") as file:
            hashed = HashedFile(file)
            with TarWriter(hashed, mtime=0) as writer:
                for index, entry in entries:
                    if isinstance(entry, ImageError):
                        record["skipped"].append((name(index), str(entry)))
                        continue
                    if isinstance(entry, str):
                        empty[entry] += 1
                        continue
                    record["images"] += 1
                    record["bytes_before"] += entry.original_bytes
                    original = os.path.relpath(name(index), shared) if shared else name(index)
                    text = Path(os.fsencode(original).decode(errors="replace")).as_posix()
                    about = json.dumps({"name": text, **entry.about})
                    parts = {entry.suffix: entry.content, "json": about}
                    writer.write({"__key__": f"{index:09d}", **parts})
            sync(file)
    except OSError as error:
        raise cannot_write(path, error) from error
    record |= {"empty": empty} if empty else {}
    if not record["images"]:
        unfinished.unlink()
        path.unlink(missing_ok=True)  # of images that were different
        return record
    record |= {"bytes": unfinished.stat().st_size, "sha256": digest(unfinished)}
    if record["sha256"] != hashed.sha.hexdigest():
        raise OSError(
            f"{unfinished} differs from what was written when it is read back; check the disk, and "
            "repeat the call to continue"
        )
    rename(unfinished, path)
    return record


def digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
