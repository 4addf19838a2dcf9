"""The report's page: what stands on it, put into its template."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.resources import files
from math import isfinite
from typing import NamedTuple

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..evaluation.results import Evaluation, shown
from .curves import chart_svg, drawable, in_words, smoothed, thinned
from .verdict import Metrics, RunVerdict

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{script}'; "
POLICY += "base-uri 'none'; form-action 'none'"
"""What the browser is told to allow: pictures that the page holds, its styles, its one script."""


class Tile(NamedTuple):
    """A picture: its data URI, its size in pixels, what it shows, and what stands below it."""

    uri: str
    width: int
    height: int
    words: str
    caption: str = ""


class Trio(NamedTuple):
    """An image beside what networks see of it.

    Attributes:
        name: The image's name.
        image: The image.
        shared: For each network's label, its colours by components of all images.
        own: The same by components of this image alone.
    """

    name: str
    image: Tile
    shared: Mapping[str, Tile]
    own: Mapping[str, Tile]


class ChartView(NamedTuple):
    """A chart of the run: its title, its last value if any, what it shows in words, its SVG."""

    title: str
    meaning: str
    words: str
    svg: str
    ends_at: float | None


class ScoreTable(NamedTuple):
    """An evaluation: a column for each network, a row for each figure, and for each class."""

    title: str
    sentence: str
    columns: list[str]
    ours: int
    scores: dict[str, list[str]]
    classes: dict[str, list[str]]
    notes: list[str]
    predictions: list[Tile]


@dataclass(frozen=True)
class Page:
    """What stands on the page, in its order."""

    name: str
    facts: Mapping[str, str]
    verdict: RunVerdict
    networks: Sequence[str]
    trios: Sequence[Trio]
    charts: Sequence[ChartView]
    tables: Sequence[ScoreTable]
    pairs: Sequence[Tile]
    threshold: float
    steps: Sequence[Tile]
    settings: Mapping[str, str]
    version: str


def render(page: Page, cargo: object) -> str:
    """The page as HTML.

    Args:
        page: What stands on it; every text is escaped.
        cargo: What the page's script needs, of plain lists, numbers and texts.
    """
    source = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)
    assert script is not None
    # By its digest: no script that got onto the page by another way runs.
    digest = b64encode(sha256(script[1].encode()).digest()).decode()
    policy = Markup(POLICY.format(script=f"sha256-{digest}"))
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    return template.render(page=page, policy=policy, cargo=Markup(as_json(cargo)))


def as_json(value: object) -> str:
    """JSON that may stand in a script element, whatever texts are in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def chart_views(metrics: Metrics) -> list[ChartView]:
    """The charts of a run; none where it has no metrics."""
    views = []
    for chart in drawable(metrics):
        name, _ = chart.curves[0]
        values = smoothed(thinned(metrics["step"], metrics[name])[1]) if name in metrics else []
        ends_at = values[-1] if values else None
        words, svg = in_words(chart, metrics), chart_svg(chart, metrics)
        views.append(ChartView(chart.title, chart.meaning, words, svg, ends_at))
    return views


def score_table(found: Evaluation, predictions: list[Tile]) -> ScoreTable:
    """An evaluation as the page shows it."""
    return ScoreTable(
        title="How good the features are" if found.labelled else "Whether spots are found again",
        sentence=found.sentence,
        columns=[row.name for row in found.rows],
        ours=next(k for k, row in enumerate(found.rows) if row is found.ours),
        scores={
            key: [shown(row.scores[key], row.deviations.get(key, 0)) for row in found.rows]
            for key in found.ours.scores
        },
        classes={
            key: [shown(row.classes[key], 0) for row in found.rows] for key in found.ours.classes
        },
        notes=[found.title, *found.notes],
        predictions=predictions,
    )


def in_short(value: object) -> str:
    """A setting or a figure for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}" if isfinite(value) else "not finite"
    if isinstance(value, (list, tuple)):
        return ", ".join(in_short(part) for part in value)
    return str(value)
