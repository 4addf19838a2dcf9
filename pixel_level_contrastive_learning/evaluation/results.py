"""What an evaluation found: figures of several networks as a table and a file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import StringIO
from math import exp, isfinite, isnan, log, nan
from operator import attrgetter
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple, Self

from .. import run_layout
from ..checks import counted
from ..files import write_whole

TABLE_WIDTH = 110
"""Columns of text that a table takes, at most."""
LEAST_FACTOR = 1.05
"""Times fewer masks, or more, from which they are told; what is less would be shown as 1.0."""
MIOU = "mIoU"


class CurvePoint(NamedTuple):
    """A point of a label curve.

    Attributes:
        masks: Masks that were trained on.
        miou: Mean IoU reached, the mean over the seeds.
        deviation: Its standard deviation over the seeds; 0 for a single one.
        seeds: The mean IoU for each seed.
    """

    masks: int
    miou: float
    deviation: float
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, masks: int, seeds: Sequence[float]) -> Self:
        """Of the figures for each seed."""
        return cls(masks, fmean(seeds), deviation(seeds), tuple(seeds))


@dataclass(frozen=True)
class Row:
    """What one network reached.

    Attributes:
        name: The network's name.
        scores: Each figure, the mean over the seeds.
        deviations: Their standard deviations over the seeds; 0 for a single one.
        classes: IoU of each class, mean over the seeds; NaN for a class that never occurs.
        seeds: The figures for each seed.
        baselines: Names of the rows it must beat: random weights first, then its starting weights.
        curves: The label curve of each protocol, if several fractions were tried.
    """

    name: str
    scores: dict[str, float]
    deviations: dict[str, float] = field(default_factory=dict)
    classes: dict[str, float] = field(default_factory=dict)
    seeds: tuple[dict[str, float], ...] = ()
    baselines: tuple[str, ...] = ()
    curves: dict[str, tuple[CurvePoint, ...]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        name: str,
        seeds: Sequence[Mapping[str, float]],
        classes: Sequence[Mapping[str, float]] = (),
        baselines: Sequence[str] = (),
        curves: Mapping[str, Sequence[CurvePoint]] | None = None,
    ) -> Self:
        """Of the figures for each seed; one that only some seeds have is averaged over those."""
        keys = dict.fromkeys(key for scores in seeds for key in scores)
        figures = {key: [scores[key] for scores in seeds if key in scores] for key in keys}
        return cls(
            name,
            {key: fmean(values) for key, values in figures.items()},
            {key: deviation(values) for key, values in figures.items()},
            {
                key: known_mean([iou[key] for iou in classes])
                for key in (classes[0] if classes else ())
            },
            tuple(dict(scores) for scores in seeds),
            tuple(baselines),
            {key: tuple(points) for key, points in (curves or {}).items()},
        )


def deviation(values: Sequence[float]) -> float:
    """The standard deviation of some values; 0 of a single one, NaN where one is not finite."""
    if len(values) < 2:
        return 0.0
    return stdev(values) if all(map(isfinite, values)) else nan


def known_mean(values: Sequence[float]) -> float:
    """The mean of the values that are not NaN; NaN where all are."""
    known = [value for value in values if not isnan(value)]
    return fmean(known) if known else nan


def masks_needed(curve: Sequence[CurvePoint], miou: float) -> float:
    """Masks at which a label curve reaches a mean IoU.

    Infinity where it stays below, 0 where it begins above. Between its points it is followed over
    the logarithm of the masks, and it counts as never falling.

    >>> curve = [CurvePoint(10, 0.2, 0, ()), CurvePoint(40, 0.4, 0, ())]
    >>> round(masks_needed(curve, 0.3), 6), masks_needed(curve, 0.5), masks_needed(curve, 0.1)
    (20.0, inf, 0.0)
    """
    before: CurvePoint | None = None
    for point in sorted(curve):
        if point.miou >= miou:
            if before is None:
                return float(point.masks) if point.miou == miou else 0.0
            part = (miou - before.miou) / (point.miou - before.miou)
            return exp(log(before.masks) + part * log(point.masks / before.masks))
        if before is None or point.miou > before.miou:
            before = point
    return float("inf")


def clearly_above(one: CurvePoint, two: CurvePoint) -> bool:
    """Whether a point lies above another by more than the spread, the larger of the two."""
    return one.miou - two.miou > max(one.deviation, two.deviation)


def masks_saved(ours: Row, other: Row, protocol: str) -> str | None:
    """How many masks weights save beside another row, in a sentence; None without curves.

    The point is that of the fewest masks where the other curve can be read. A number is told only
    where the other curve rises and the two lie apart at this point, both by more than the spread
    over the seeds, and where those ahead there are not behind with the most masks. Nothing is said
    to lie above a whole curve that does not lie above its best point by more than the spread. One
    seed has no spread, and the sentence says so.
    """
    curve, other_curve = (sorted(row.curves.get(protocol, ())) for row in (ours, other))
    if len(curve) < 2 or not other_curve:
        return None
    alone = all(len(point.seeds) == 1 for point in (*curve, *other_curve))
    chance = " (one seed: it may be chance)" * alone
    most, best = other_curve[-1].masks, max(other_curve, key=attrgetter("miou"))
    needs = [(point, masks_needed(other_curve, point.miou)) for point in curve]
    read = [need for need in needs if 0 < need[1] < float("inf")] or [
        need for need in needs if need[1]
    ]
    point, needed = (read or needs)[0]
    other_point = next(candidate for candidate in other_curve if candidate.masks == point.masks)
    pairs = (point, other_point), (curve[-1], other_curve[-1])
    (ahead, behind), last = pairs if needed >= point.masks else [pair[::-1] for pair in pairs]
    distinct = clearly_above(ahead, behind) and last[0].miou >= last[1].miou
    passed = needed <= most or clearly_above(point, best)
    far = not 1 / LEAST_FACTOR < needed / point.masks < LEAST_FACTOR
    if not (far and distinct and passed and clearly_above(other_curve[-1], other_curve[0])):
        return f"no clear saving over {other.name}"
    masks = counted(point.masks, "mask")
    if not needed:
        return f"{ours.name} with {masks} falls short of {other.name}{chance}"
    ratio = min(needed, most) / point.masks
    if needed > most:
        text = f"{ours.name} with {masks} beats {other.name} with {most}"
        return text + f": more than {ratio:.1f} times fewer" * (ratio > 1) + chance
    factor = f"{ratio:.1f} times fewer" if ratio >= 1 else f"{1 / ratio:.1f} times more"
    number = f"{needed:.2g}" if needed < 10 else f"{needed:.0f}"
    return f"{ours.name} needs {masks} to match {other.name} with {number}: {factor}{chance}"


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        weights: What was evaluated, separated by commas.
        data: The images it was evaluated on.
        protocol: The protocols, separated by commas, or ``correspondence`` without masks. Figures
            without a protocol's name come from the first.
        settings: Everything else that determined the figures.
        rows: A row for each network: random weights first, those asked for last.
        sentence: What the figures mean.
        notes: What else the reader should know.
    """

    weights: str
    data: str
    protocol: str
    settings: dict[str, Any]
    rows: tuple[Row, ...]
    sentence: str
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """In a line: what was evaluated, on what, and what it means; `table` has the figures."""
        about = f"{self.weights!r}, {self.data!r}, {self.protocol!r}"
        return f"Evaluation({about}: {self.sentence!r}; table() shows the figures)"

    @property
    def ours(self) -> Row:
        """The row of the weights that were asked for; of several, the last."""
        return self.rows[-1]

    @property
    def curves(self) -> list[str]:
        """The protocols that have label curves."""
        return list(self.rows[0].curves)

    def base(self, row: Row) -> Row | None:
        """The row of random weights of the same network; None if no weights of it were asked for.

        Rows of random and of starting weights name no baselines: theirs are those of the weights
        that they stand beside.
        """
        names = {
            asked.baselines[0]
            for asked in self.rows
            if asked.baselines and row.name in (asked.name, *asked.baselines)
        }
        return next((base for base in self.rows if base.name in names), None)

    def table(self, width: int = TABLE_WIDTH) -> str:
        """The figures as text: a column for each network, a line for each figure.

        Args:
            width: Maximum characters per line.
        """
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, title=Text(self.title), title_justify="left")
        table.add_column("")
        for row in self.rows:
            table.add_column(Text(row.name, overflow="fold"), justify="right")
        for key in self.ours.scores:
            figures = ((row.scores.get(key, nan), row.deviations.get(key, 0)) for row in self.rows)
            table.add_row(key, *(shown(*figure) for figure in figures))
        bases = [self.base(row) for row in self.rows]
        if any(bases) and all(base is None or base.scores.get(MIOU) for base in bases):
            ratios = (
                f"{row.scores[MIOU] / base.scores[MIOU]:.2f}" if base else "-"
                for row, base in zip(self.rows, bases, strict=True)
            )
            table.add_row("mIoU, times random", *ratios)
        for protocol in self.curves:
            table.add_section()
            for at, first in enumerate(self.rows[0].curves[protocol]):
                points = (row.curves[protocol][at] for row in self.rows)
                cells = (shown(point.miou, point.deviation) for point in points)
                table.add_row(f"{protocol}, {counted(first.masks, 'mask')}", *cells)
        if self.ours.classes:
            table.add_section()
        for key in self.ours.classes:
            cells = (shown(row.classes[key], 0) for row in self.rows)
            table.add_row(Text(f"IoU {key}"), *cells)
        text = StringIO()  # plain also in a notebook, and where colours are forced
        plain = Console(file=text, width=width, force_terminal=False, force_jupyter=False)
        plain.print(table)
        lines = (line.rstrip() for line in text.getvalue().splitlines())
        return "\n".join([*lines, *self.notes])

    @property
    def title(self) -> str:
        """What the table shows."""
        settings = ", ".join(f"{key} {in_short(value)}" for key, value in self.settings.items())
        return f"{self.protocol} on {self.data}: {settings}"

    def to_json(self) -> str:
        """As JSON text; NaN becomes null."""
        content = asdict(self)
        for entry, row in zip(content["rows"], self.rows, strict=True):
            entry["curves"] = {
                key: [point._asdict() for point in points] for key, points in row.curves.items()
            }
        return json.dumps(without_nan(content), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """What `to_json` wrote, also of older versions.

        Raises:
            ValueError: There is no row; of text that is something else also errors of other kinds.
        """
        content = json.loads(text)
        rows = [
            Row(
                name=row["name"],
                scores=with_nan(row["scores"]),
                deviations=with_nan(row["deviations"]),
                classes=with_nan(row["classes"]),
                seeds=tuple(with_nan(scores) for scores in row["seeds"]),
                baselines=tuple(row.get("baselines", ())),
                curves={
                    key: tuple(
                        CurvePoint(**point | {"seeds": tuple(point["seeds"])}) for point in points
                    )
                    for key, points in row.get("curves", {}).items()
                },
            )
            for row in content["rows"]
        ]
        if not rows:
            raise ValueError("rows is empty; it must hold a row for each network")
        return cls(**content | {"rows": tuple(rows), "notes": tuple(content["notes"])})

    @property
    def labelled(self) -> bool:
        """Whether the figures are about masks."""
        return self.protocol != "correspondence"

    def is_of(self, run: Path) -> bool:
        """Whether one of the weights asked for is of a run: by path, or by name if it was moved."""
        place = run.resolve()
        paths = [Path(row.name).expanduser() for row in self.rows if row.baselines]
        return any(
            path.resolve().is_relative_to(place) or place.name in path.parts for path in paths
        )

    def write(self, out: str | Path) -> Path:
        """Write the file into a folder, created if necessary, and return its path.

        With labels it is ``evaluation.json``, without ``correspondence.json``.
        """
        name = run_layout.EVALUATION if self.labelled else run_layout.CORRESPONDENCE
        path = Path(out).expanduser() / name
        write_whole(path, self.to_json())
        return path


def in_short(value: object) -> str:
    """A setting for people."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def shown(value: float, deviation: float) -> str:
    """A figure for people, with its spread over the seeds; a dash for NaN."""
    if isnan(value):
        return "-"
    digits = 3 if abs(value) < 2 else 1
    return f"{value:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def without_nan(value: Any) -> Any:
    """The same with None for NaN, which JSON does not have."""
    if isinstance(value, float) and isnan(value):
        return None
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, (list, tuple)) else value


def with_nan(scores: Mapping[str, float | None]) -> dict[str, float]:
    """The same with NaN for None."""
    return {key: nan if score is None else score for key, score in scores.items()}
