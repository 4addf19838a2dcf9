"""What the user says of the values or colours of masks: which class each is, and the classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

IGNORED = 255
"""The id of pixels that are neither trained on nor counted."""

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class MaskCoding:
    """How the values of masks become ids; without both, values are ids.

    Attributes:
        ids: The id of each value.
        colours: The id of each colour.
        file: The file that the colours stand in.
    """

    ids: Mapping[int, int] | None = None
    colours: Mapping[Colour, int] | None = None
    file: str = ""


PLAIN = MaskCoding()


def read_classes(path: Path) -> tuple[str, ...] | None:
    """The names in ``classes.txt``, or None where there is no such file."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} is not UTF-8 (line {line}); save it as UTF-8") from error
    lines = [line.strip() for line in text.rstrip().splitlines()]
    if not 1 <= len(lines) <= IGNORED:
        raise ValueError(
            f"{path} names {len(lines)} classes; it must name 1 to {IGNORED}, one per line in the "
            "order of ids"
        )
    if "" in lines:
        blank = lines.index("")
        raise ValueError(
            f"{path} is empty in line {blank + 1}, where the class of id {blank} is expected; "
            "name it, or remove the line if the next name is that class"
        )
    parts = [line.split(maxsplit=1) for line in lines]
    if all(len(part) == 2 and part[0].isdecimal() for part in parts):
        for label, (number, _) in enumerate(parts):
            if int(number) != label:
                raise ValueError(
                    f"{path} has id {number} in line {label + 1}, where {label} is expected: one "
                    "class per line in the order of ids, from 0"
                )
        lines = [name for _, name in parts]
    for label, name in enumerate(lines):
        if name in lines[:label]:
            raise ValueError(
                f"{path} names two classes {name!r} (ids {lines.index(name)} and {label}); scores "
                "are listed by name, so give each class its own"
            )
    return tuple(lines)


def read_coding(
    ids: str | None, colours: str | Path | None, classes: Sequence[str] | None
) -> tuple[MaskCoding, tuple[str, ...] | None]:
    """The coding that is asked for, and the names of the classes that its file brings.

    Args:
        ids: Values and their ids, such as ``0:0,255:1``.
        colours: A file with a line for each colour, ``red green blue class``.
        classes: The names of the classes, where they are known.

    Raises:
        ValueError: Both are given, or one cannot be read.
    """
    if ids is not None and colours is not None:
        raise ValueError("ids and colours are both given; masks hold either values or colours")
    if ids is not None:
        return MaskCoding(ids=parse_ids(ids)), None
    if colours is None:
        return PLAIN, None
    return read_colours(Path(colours).expanduser(), classes)


def parse_ids(text: str) -> dict[int, int]:
    """Values and their ids, from a text such as ``0:0,255:1``."""
    parts = [part.strip() for part in text.split(",")]
    pairs = [re.fullmatch(r"(-?\d+)\s*:\s*(\d+)", part) for part in parts]
    mapping = {int(pair[1]): int(pair[2]) for pair in pairs if pair}
    if len(mapping) != len(parts) or max(mapping.values()) > IGNORED:
        raise ValueError(
            f"ids is {text!r}; it must be VALUE:ID pairs such as 0:0,255:1, each value once, ids "
            f"from 0 to {IGNORED - 1}, or {IGNORED} for pixels to ignore"
        )
    return mapping


def read_colours(
    path: Path, classes: Sequence[str] | None
) -> tuple[MaskCoding, tuple[str, ...] | None]:
    """The coding in a file of colours, and its classes where they are names not known yet."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"colours is {str(path)!r}, which cannot be read ({error}); give a text file of lines "
            "such as '128 0 0 1' or '128 0 0 road'"
        ) from error
    labels: dict[Colour, str] = {}
    for number, line in enumerate(lines, 1):
        fields = [field for field in re.split(r"[\s,;]+", line.strip()) if field]
        if not fields or (number == 1 and not re.search(r"\d", line)):  # a header
            continue
        colour, label = colour_and_label(fields)
        if colour is None or not label:
            raise ValueError(
                f"{path} has {line!r} in line {number}, where red, green, blue (0 to 255) and a "
                "class are expected, such as '128 0 0 1' or '128 0 0 road'"
            )
        if labels.setdefault(colour, label) != label:
            raise ValueError(
                f"{path} names {' '.join(map(str, colour))} twice, as {labels[colour]!r} and "
                f"{label!r}; give each colour one class"
            )
    if not labels:
        raise ValueError(f"{path} names no colour; write lines such as '128 0 0 1'")
    ids, names = ids_of_labels(path, [*dict.fromkeys(labels.values())], classes)
    coded = {colour: ids[label] for colour, label in labels.items()}
    return MaskCoding(colours=coded, file=str(path)), None if classes else names


def ids_of_labels(
    path: Path, labels: Sequence[str], classes: Sequence[str] | None
) -> tuple[dict[str, int], tuple[str, ...] | None]:
    """The ids of classes that a file of colours names, numbers or both, and the names by id."""
    ignored, limit = str(IGNORED), f"ids from 0 to {IGNORED - 1}, or {IGNORED} to ignore a colour"
    parts = {label: label.partition(" ") for label in labels if label != ignored}
    if all(number.isdecimal() and name for number, _, name in parts.values()):
        by_id = {int(number): name for number, _, name in parts.values()}
        if max(by_id, default=0) > IGNORED or len({*by_id.values()}) < len(parts):
            raise ValueError(
                f"{path} gives ids with names; they must be {limit}, each with a name of its own"
            )
        by_id.pop(IGNORED, None)
        names = tuple(by_id.get(i, f"class {i}") for i in range(max(by_id, default=-1) + 1))
        for label, name in by_id.items():
            if classes and [*classes[label : label + 1]] != [name]:
                raise ValueError(
                    f"{path} gives id {label} the name {name!r}, unlike {', '.join(classes)}; make "
                    "both files agree"
                )
        return {label: int(label.partition(" ")[0]) for label in labels}, names or None
    known = [label for label in labels if not label.isdecimal()]
    if not classes and known and (len(known) < len(parts) or len(known) > IGNORED):
        raise ValueError(
            f"{path} gives {len(known)} classes by name and {len(parts) - len(known)} by number; "
            f"give all by name, {IGNORED} at most, or all by number, with {limit}"
        )
    listed = tuple(classes or known)
    return {label: class_id(path, label, listed) for label in labels}, listed if known else None


def colour_and_label(fields: Sequence[str]) -> tuple[Colour | None, str]:
    """The colour and the class in a line: ``red green blue class``, or the class first."""
    for start in (0, len(fields) - 3):
        rgb = [int(f) if f.isdecimal() else -1 for f in fields[start : start + 3]]
        if len(rgb) == 3 and all(0 <= value <= 255 for value in rgb):
            red, green, blue = rgb
            return (red, green, blue), " ".join((*fields[:start], *fields[start + 3 :]))
    return None, ""


def class_id(path: Path, label: str, names: Sequence[str]) -> int:
    """The id of a class that a file of colours names or numbers."""
    if label.isdecimal() and int(label) <= IGNORED:
        return int(label)
    if label in names:
        return list(names).index(label)
    raise ValueError(
        f"{path} names the class {label!r}, which is not among {', '.join(names) or 'the ids'}; "
        f"use one of these, or an id from 0 to {IGNORED - 1}, or {IGNORED} to ignore the colour"
    )
