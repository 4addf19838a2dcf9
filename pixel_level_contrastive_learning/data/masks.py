"""Masks: files of class ids or of colours, read exactly or refused with the file's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..checks import counted
from .arrays import NamedArray
from .decoding import NPY, TIFF, Content, ending_of, not_empty
from .folders import find_files
from .image import ImageError, known_errors
from .mask_coding import IGNORED, PLAIN, Colour, MaskCoding
from .orientation import ORIENTATION_TAG, PNG, orientation_of, split_png, turn_array
from .picture import open_by_pillow
from .reading import in_time
from .shards import MASK_WORDS
from .sources import FileSource
from .tiff import opened_tiff, photometric_of, plane_array, tiff_images

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif", ".npy", ".npz", ".nii", ".nii.gz")
"""Of several files with the name of an image, the first of these is its mask."""
MASK_ENDINGS = (
    "",
    "-mask",
    *(f"_{form}" for w in MASK_WORDS for form in (w, w.title(), w.upper())),
)
"""What may stand after the name of the image."""
SHOWN_COLOURS = 3
"""Colours or ids that an error lists."""
SHOWN_IDS = 20
"""Values for which a message writes out ``--ids``, at most."""
MOST_IDS = 1000
"""Different values of a mask from which on it is taken for an image."""

Palette = Mapping[int, Colour]
"""The colours of the indices that a mask uses."""


class Page(NamedTuple):
    """Which of the images in its file a mask belongs to, and how many they are."""

    number: int
    count: int  # type: ignore[assignment]  # hides a method of tuples that nobody wants


ONLY = Page(0, 1)


class Stored(NamedTuple):
    """A mask as it is stored, upright.

    Attributes:
        values: ``(h, w)`` whole numbers, or ``(h, w, 3)`` uint8 colours.
        palette: ``(n, 3)`` uint8 colours of the values, where it has such.
        mode: What kind of pixels they are, for people.
    """

    values: np.ndarray[Any, Any]
    palette: np.ndarray[Any, Any] | None
    mode: str


def find_masks(folder: Path, images: Sequence[Path]) -> list[Path | None]:
    """The mask of each image, whose paths are relative: the same name, with another ending.

    What has the name of another image is the mask of that one alone.
    """
    stems = {image.with_name(stem_of(image.name)) for image in images}
    listings: dict[Path, dict[str, str]] = {}
    masks: list[Path | None] = []
    for image in images:
        place = folder / image.parent
        if place not in listings:
            files = sorted(place.iterdir(), reverse=True) if place.is_dir() else []
            listings[place] = {
                stem_of(file.name) + ending_of(file.name): file.name for file in files
            }
        stem = stem_of(image.name)
        ends = [end for end in MASK_ENDINGS if not end or image.with_name(stem + end) not in stems]
        names = [stem + end + suffix for end in ends for suffix in MASK_SUFFIXES]
        name = next((listings[place][name] for name in names if name in listings[place]), None)
        masks.append(None if name is None else place / name)
    return masks


def masks_without_image(folder: Path, images: Sequence[Path]) -> list[str]:
    """The masks in a folder whose names begin with that of no image, which are relative paths.

    What is called as an image with a word after it (``a_color.png``) is of that image.
    """
    stems = {image.with_name(stem_of(image.name)) for image in images}
    lost = []
    for path in find_files(folder, frozenset(MASK_SUFFIXES))[0]:
        mask = Path(path).relative_to(folder)
        stem = stem_of(mask.name)
        ends = (len(stem), *(cut.start() for cut in re.finditer(r"[-_. ](?=.*[A-Za-z])", stem)))
        if not any(stem[:end] and mask.with_name(stem[:end]) in stems for end in ends):
            lost.append(mask.as_posix())
    return lost


def stem_of(name: str) -> str:
    """The name of a file without its ending; the last number of a DICOM's name is none."""
    ending = ending_of(name) or Path(name).suffix
    return name[: -len(ending)] if ending.strip(".0123456789") else name


def read_coded(
    files: FileSource, file: int, coding: MaskCoding = PLAIN, page: Page = ONLY
) -> tuple[Tensor, Palette]:
    """The ids ``(height, width)`` uint8 in a mask, upright, and their colours if it has a palette.

    Args:
        files: The masks.
        file: Which of them.
        coding: How its values become ids.
        page: Which of the images in it.

    Raises:
        ValueError: It cannot be read exactly: why, and what to do.
    """
    path = Path(files.file_name(file))
    try:
        content = not_empty(files.file_content(file, several=page.count > 1))
        with known_errors(content=content):
            stored = read_stored(content, page)
    except Exception as error:  # damaged bytes make decoders raise all kinds of errors
        raise ValueError(f"{path} cannot be read as a mask: {error}; write it again") from error
    values = stored.values
    if coding.colours is not None:
        return torch.from_numpy(ids_of_colours(path, stored, coding)), {}
    if values.ndim != 2:
        raise ValueError(colours_message(path, stored.mode, values))
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    if values.dtype.kind == "f":
        if not (values == np.round(values)).all():
            raise ValueError(
                f"{path} has values that are not whole numbers, such as "
                f"{values[values != np.round(values)][0]:g}; write class ids"
            )
        values = values.astype(np.int64)
    used = np.unique(values).tolist()
    if stored.mode == "MINISWHITE" and coding.ids is None:
        raise ValueError(
            f"{path} says that white is 0, so its values, {used[0]} to {used[-1]}, may be meant "
            'the other way round; name the id of each, such as --ids "0:0,1:1"'
        )
    if coding.ids is not None:
        unknown = [value for value in used if value not in coding.ids]
        if unknown:
            raise ValueError(
                f"{path} has {', '.join(map(str, unknown[:SHOWN_COLOURS]))}, which --ids does not "
                f"name; add {unknown[0]}:ID to it, or {unknown[0]}:{IGNORED} to ignore such pixels"
            )
        values = np.array([coding.ids[v] for v in used])[np.searchsorted(used, values)]
        return torch.from_numpy(values.astype(np.uint8)), {}
    if used[0] < 0 or used[-1] > IGNORED:
        few = len(used) <= SHOWN_IDS
        pairs = ",".join(f"{v}:{i}" for i, v in enumerate(used)) if few else "VALUE:ID,..."
        if len(used) >= MOST_IDS:
            raise ValueError(
                f"{path} has {len(used)} different values, like an image; check whether images/ "
                "and masks/ are swapped"
            )
        raise ValueError(
            f"{path} has ids from {used[0]} to {used[-1]}; write 8-bit PNG with ids from 0 to "
            f"{IGNORED - 1}, and {IGNORED} for pixels to ignore, or name the id of each value "
            f'with --ids "{pairs}"'
        )
    colours = {} if stored.palette is None else dict(enumerate(map(tuple, stored.palette.tolist())))
    kept = {index: colours[index] for index in used if index in colours}
    return torch.from_numpy(values.astype(np.uint8)), kept


def read_stored(content: Content, page: Page) -> Stored:
    """What a mask's file holds."""
    if isinstance(content, str):  # of a TIFF, of which one page is read
        return in_time(partial(read_tiff_mask, content, page), content)
    if isinstance(content, bytes) and content.startswith(NPY):
        array = np.load(BytesIO(content), allow_pickle=False)
        content = NamedArray.of((array, "ZYX" if page.count > 1 and array.ndim == 3 else ""))
    if isinstance(content, NamedArray):
        check_pages(content.stack.images, page)
        values = content.plane(page.number)
        if len(values) in (3, 4):  # colours
            values = np.moveaxis(values, 0, -1)
        values = values[0] if len(values) == 1 else values
        return Stored(values, None, f"{values.dtype} array")
    read = read_tiff_mask if content.startswith(TIFF) else read_picture_mask
    return read(content, page)


def check_pages(pages: int, page: Page) -> None:
    """Refuse a mask that has not as many pages as its image."""
    if pages != page.count:
        raise ImageError(f"it has {counted(pages, 'page')}, but its image has {page.count}")


def read_tiff_mask(content: bytes | str, wanted: Page) -> Stored:
    """A mask in a TIFF."""
    with opened_tiff(content) as file:
        images = tiff_images(file).images
        check_pages(sum(map(len, images)), wanted)
        [plane] = images[wanted.number]
        page = file.series[plane.series].keyframe
        photometric, tag = photometric_of(page), page.tags.get(ORIENTATION_TAG)
        if photometric in ("YCBCR", "SEPARATED", "CIELAB"):
            raise ImageError(f"its pixels are {photometric}; they must be ids or RGB")
        values = plane_array(file, plane)
        palette = page.colormap
    if "S" in page.axes and page.axes[0] == "S":
        values = np.moveaxis(values, 0, -1)
    orientation = int(tag.value) if tag else 1
    colours = None if palette is None else (palette.T >> 8).astype(np.uint8)
    return Stored(values_upright(values, orientation), colours, photometric)


def read_picture_mask(content: bytes, page: Page) -> Stored:
    """A mask in a PNG, BMP or GIF."""
    bits, orientation = 8, 1
    if png := content.startswith(PNG):
        content, orientation = split_png(content)
        bits = content[24]
    image = open_by_pillow(content)
    if getattr(image, "n_frames", 1) > 1:
        raise ImageError("it has several frames; a mask must have one")
    check_pages(1, page)
    orientation = orientation if png else orientation_of(image)
    if bits == 16 and image.mode in ("RGB", "RGBA", "LA"):
        raise ImageError("it has 16-bit colours, of which only 8 bits would be read")
    values = np.array(image)
    if bits in (2, 4) and image.mode == "L":
        values //= 255 // (2**bits - 1)  # Pillow spreads them over 8 bits
    palette = None
    if image.mode == "P":
        palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        if image.format == "GIF" and (palette == palette[:, :1]).all():
            values, palette = palette[values, 0], None  # writers renumber its grays
    return Stored(values_upright(values, orientation), palette, image.mode)


def values_upright(values: np.ndarray[Any, Any], orientation: int) -> np.ndarray[Any, Any]:
    """Stored values ``(h, w, ...)`` turned upright."""
    last = np.moveaxis(values, (0, 1), (-2, -1))
    return np.ascontiguousarray(np.moveaxis(turn_array(last, orientation), (-2, -1), (0, 1)))


def ids_of_colours(path: Path, stored: Stored, coding: MaskCoding) -> np.ndarray[Any, Any]:
    """The ids of a mask's colours; gray values are colours, too."""
    assert coding.colours is not None
    values = stored.values
    if stored.palette is not None:
        if (largest := int(values.max())) >= len(stored.palette):
            raise ValueError(
                f"{path} has a pixel of index {largest}, but its palette ends at "
                f"{len(stored.palette) - 1}; write it again with a colour for each index"
            )
        values = stored.palette[values]
    if values.dtype == np.bool_:
        values = values * np.uint8(255)
    if values.dtype != np.uint8:
        raise ValueError(f"{path} has values of type {values.dtype}, which are not 8-bit colours")
    if values.ndim == 2 or values.shape[-1] < 3:
        values = np.repeat(values.reshape(*values.shape[:2], -1)[..., :1], 3, axis=-1)
    packed = values[..., :3].astype(np.int64) @ (65536, 256, 1)
    used, counts = np.unique(packed, return_counts=True)
    colours = [(code >> 16, code >> 8 & 255, code & 255) for code in used.tolist()]
    unknown = [
        (-n, c) for c, n in zip(colours, counts.tolist(), strict=True) if c not in coding.colours
    ]
    if unknown:
        shown = "; ".join(
            f"{' '.join(map(str, colour))} ({-count / packed.size:.1%} of it)"
            for count, colour in sorted(unknown)[:SHOWN_COLOURS]
        )
        raise ValueError(
            f"{path} has {len(unknown)} colours that {coding.file} does not name: {shown}; add "
            f"them there, with {IGNORED} as the class to ignore them"
        )
    ids = np.array([coding.colours[colour] for colour in colours], np.uint8)
    result: np.ndarray[Any, Any] = ids[np.searchsorted(used, packed)]
    return result


def colours_message(path: Path, mode: str, colours: np.ndarray[Any, Any]) -> str:
    """The message about a mask that holds colours."""
    if colours.ndim != 3 or colours.shape[-1] > 4:
        return f"{path} has the shape {colours.shape}; a mask is (height, width)"
    count = len(np.unique(colours.reshape(-1, colours.shape[-1]), axis=0))
    last = colours.shape[-1] - 1
    varies = [bool((colours[..., band] != colours[0, 0, band]).any()) for band in range(last + 1)]
    if last in (1, 3) and varies == [False] * last + [True]:
        advice = "only its alpha channel varies: write that alone, Image.open(path).getchannel('A')"
    elif (colours[..., 0] == colours[..., min(1, last - 1)]).all():  # gray
        advice = (
            "if its gray values are the ids, write one channel, Image.open(path).getchannel(0); or "
            "name the class of each in a file (--colours FILE, lines such as '255 255 255 1')"
        )
    else:
        advice = (
            "name the class of each colour in a file (--colours FILE, lines such as '128 0 0 1'), "
            "or write one channel that holds the number of each pixel's class"
        )
    return (
        f"{path} is coded in colours ({mode}, {count} different ones), but masks hold class ids: "
        f"{advice}"
    )


class Palettes:
    """The colours that ids have in all masks looked at, which must not differ."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[Colour, Path]] = {}

    def differ(self, path: Path, palette: Palette) -> str | None:
        """The message where an id has another colour here than in an earlier mask."""
        for label, colour in palette.items():
            before, other = self.seen.setdefault(label, (colour, path))
            if before != colour:
                return (
                    f"{path} gives id {label} the colour {' '.join(map(str, colour))}, but {other} "
                    f"{' '.join(map(str, before))}: their palettes differ, so the same id is not "
                    "the same class. Name the class of each colour in a file (--colours FILE, "
                    "lines such as '128 0 0 1'), or give --ids with all ids (\"0:0,1:1\") if the "
                    "ids are right whatever their colours"
                )
        return None
