"""Search folders for images, by their endings."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Set
from contextlib import suppress
from functools import partial
from pathlib import Path

from ..run_layout import PREDICTIONS, is_ours
from .decoding import ending_of, image_suffixes
from .image import CUT, ImageError
from .readers import DICOM, DICOM_MARK
from .reading import in_time, read_bytes

log = logging.getLogger(__name__)

SLIDES = ".svs .ndpi .mrxs .scn .bif .vms .vmu .svslide .jp2"
SLIDE_SUFFIXES = frozenset(SLIDES.split())
"""Files that are cut into tiles before they can be trained on: slides and JPEG 2000."""
UNLIKE = 16
"""Files of an unknown ending that are no DICOM, after which others with it are not looked at; those
without an ending, or with a number for it, always are."""
IMAGES, MASKS = "images", "masks"
"""Folders of labelled images."""


def find_files(
    folder: Path, suffixes: Set[str] | None = None, *, leave_out: str | Path | None = None
) -> tuple[list[str], Counter[str]]:
    """All images under a folder, sorted by name, and how many other files there are by suffix.

    Images are files of the given endings; by default those that can be read, and DICOM files
    without a known ending.

    Links are followed, each folder is entered once, and names that begin with a dot are skipped. So
    are below the folder those of runs, features and previews, whose pictures are no images of the
    user's, and of a folder for `evaluate` the masks and predictions.

    Raises:
        ValueError: The folder that is left out is the folder itself.
    """
    paths: list[str] = []
    others: Counter[str] = Counter()
    known = image_suffixes() if suffixes is None else suffixes
    sniffed = may_be_dicom if DICOM in known else lambda *_: False
    entered: set[tuple[int, int]] = set()
    if leave_out is not None and (skipped := Path(leave_out).expanduser()).is_dir():
        entered.add(identity(skipped))
        if identity(folder) in entered:
            raise ValueError(
                f"out is {str(leave_out)!r}, the folder of the images; give another folder"
            )
    waiting = [os.fspath(folder)]
    while waiting:
        place = waiting.pop()
        try:
            here = in_time(partial(identity, place), place)
            folders, files = listed(place)
        except (OSError, ImageError) as error:
            log.warning("a folder cannot be read and is left out: %s: %s", place, error)
            continue
        if here in entered:  # a link back to where we were
            continue
        entered.add(here)
        if place != os.fspath(folder) and is_ours(os.path.basename(place), folders, files):
            log.info("%s holds a run, previews or features and is not searched", place)
            continue
        if {IMAGES, MASKS} <= set(folders):
            for name in {MASKS, PREDICTIONS} & set(folders):
                log.info(
                    "%s belongs to the images next to it and is not searched",
                    os.path.join(place, name),
                )
                folders.remove(name)
        for name in reversed(folders):
            if not name.startswith("."):
                is_item = ending_of(name, known, folder=True)
                (paths if is_item else waiting).append(os.path.join(place, name))
        for name in files:
            path, suffix = os.path.join(place, name), os.path.splitext(name)[1].lower()
            hidden = name.startswith(".")
            if not hidden and (
                ending_of(name, known) or (sniffed(name, others) and is_dicom(path))
            ):
                paths.append(path)
            else:
                others[suffix] += 1
    return sorted(paths), others


def may_be_dicom(name: str, others: Mapping[str, int]) -> bool:
    """Whether a file without a known ending is looked at, others like it having been no DICOM."""
    suffix = os.path.splitext(name)[1].lower()
    numbered = not suffix.strip(".0123456789")
    return name.upper() != "DICOMDIR" and (numbered or others[suffix] < UNLIKE)


def is_dicom(path: str) -> bool:
    """Whether a file begins as DICOM does."""
    with suppress(ImageError):
        return read_bytes(path, DICOM_MARK.start, 4) == b"DICM"
    return False


def identity(path: str | Path) -> tuple[int, int]:
    """What a folder is, however it is called."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def listed(folder: str) -> tuple[list[str], list[str]]:
    """The names of the folders and of the files in a folder, links followed, both in order."""

    def kind_of(entry: os.DirEntry[str]) -> str:
        with suppress(OSError):
            if entry.is_dir() or entry.is_file():
                return "folder" if entry.is_dir() else "file"
            entry.stat()
            return "special"
        return "file"  # a link to nowhere is a broken image

    def entries() -> list[tuple[os.DirEntry[str], str]]:
        with os.scandir(folder) as scan:
            return [(e, "link" if e.is_symlink() else kind_of(e)) for e in scan]

    names: dict[str, list[str]] = {"folder": [], "file": []}
    for entry, kind in in_time(entries, folder):
        if kind == "link":
            with suppress(ImageError):  # its target does not answer, as is reported when it is read
                kind = in_time(partial(kind_of, entry), entry.path)
        if kind == "special":  # reading it may never end
            log.warning("%s is a pipe, a socket or a device: left out", entry.path)
        else:
            names["folder" if kind == "folder" else "file"].append(entry.name)
    return sorted(names["folder"]), sorted(names["file"])


def no_image_message(folder: Path, others: Counter[str]) -> str:
    """The message about a folder without images."""
    contents = count_by_ending(others) if others else "no file at all"
    return (
        f"no image in {str(folder)!r}: searched it and its subfolders for files that end in "
        f"{', '.join(sorted(image_suffixes()))}, and for shards (.tar); found {contents}"
    )


def count_by_ending(others: Counter[str]) -> str:
    """Files that are no images, counted by their endings."""
    kinds = ", ".join(f"{count} {suffix or 'without'}" for suffix, count in others.most_common(5))
    slides = "; slides: " + CUT.replace("it", "them", 1) if SLIDE_SUFFIXES & set(others) else ""
    return f"other files: {others.total()}, by ending: {kinds}{slides}"
