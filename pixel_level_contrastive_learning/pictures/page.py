"""The page: parts of the report as HTML. Whatever comes from data or files is escaped here."""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import isfinite
from typing import Any, NamedTuple

from ..evaluation.outcome import Evaluation, shown
from .curves import chart_svg, drawable, in_words, smoothed, thinned

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{script}'; "
POLICY += "base-uri 'none'; form-action 'none'"
"""What the browser is told to allow: pictures that the page holds, its styles, its one script."""
TICK = '<path d="M5 12.5l4.6 4.6L19 7.6" fill="none" stroke="currentColor" stroke-width="2.6"/>'
CROSS = '<path d="M12 4v11M12 18.4v2.2" fill="none" stroke="currentColor" stroke-width="3"/>'


class Tile(NamedTuple):
    """A picture on the page.

    Attributes:
        uri: Its data URI.
        width: Its pixels across.
        height: Its pixels down.
        words: What it shows, for those who do not see it.
        caption: What stands below it, if anything.
    """

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


def filled(parts: Mapping[str, str], cargo: object) -> str:
    """The whole page.

    Args:
        parts: HTML for each place of the template but those that are filled here.
        cargo: What the page's script needs, of plain lists, numbers and texts.
    """
    text = template()
    script = re.search(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script is not None
    # By its digest: no script that got onto the page by another way runs.
    digest = b64encode(sha256(script[1].encode()).digest()).decode()
    policy = POLICY.format(script=f"sha256-{digest}")
    places = {**parts, "policy": policy, "cargo": as_json(cargo)}
    # In one pass: what is filled in is never looked through for places again.
    return re.sub(r"\{\{(\w+)\}\}", lambda place: places[place[1]], text)


def template() -> str:
    """The page without its parts: styles, script, and the places where parts go."""
    return files(__package__).joinpath("report.html").read_text(encoding="utf-8")


def as_json(value: object) -> str:
    """JSON that may stand in a script element, whatever texts are in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def section(title: str, introduction: str, body: str) -> str:
    """A part of the page under a heading; the introduction is HTML."""
    name = re.sub(r"\W+", "-", title.lower()).strip("-")
    words = f'<p class="soft">{introduction}</p>' if introduction else ""
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}">{escape(title)}</h2>{words}{body}'
        "</section>"
    )


def facts(held: Mapping[str, str]) -> str:
    """Names and values in a row."""
    entries = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in held.items()
    )
    return f'<dl class="facts">{"".join(entries)}</dl>'


def verdict_card(healthy: bool, heading: str, sentence: str, findings: Sequence[str]) -> str:
    """What the figures say, in words."""
    sign = TICK if healthy else CROSS
    items = "".join(f"<li>{escape(finding)}</li>" for finding in findings)
    return (
        f'<section class="card verdict {"healthy" if healthy else "sick"}" aria-label="Verdict">'
        f'<svg viewBox="0 0 24 24" aria-hidden="true">{sign}</svg><h2>{escape(heading)}</h2>'
        f"<p>{escape(sentence)}</p>{f'<ul>{items}</ul>' if items else ''}</section>"
    )


def explorer(networks: Sequence[str]) -> str:
    """The explorer's frame, which the script brings to life."""
    heads = []
    for network, name in enumerate(networks):
        panels = "".join(
            f'<canvas class="panel" tabindex="0" role="application" data-network="{network}" '
            f'data-side="{side}" aria-describedby="explorer-help"></canvas>'
            for side in (0, 1)
        )
        heads.append(
            f'<div><div class="network-head"><h3>{escape(name)}</h3>'
            '<span class="figure"><b>&ndash;</b> of all pixels alike</span></div>'
            f'<div class="duo">{panels}</div></div>'
        )
    dot = '<svg class="mark" viewBox="0 0 16 16" aria-hidden="true">{}</svg>'
    circle = '<circle cx="8" cy="8" r="6" fill="none" stroke="currentColor" stroke-width="2"{}/>'
    signs = (
        (circle.format(""), "the pixel you point at"),
        ('<path d="M8 2l6 6-6 6-6-6z" fill="#e8b400"/>', "most alike in the other picture"),
        (circle.format(' stroke-dasharray="3 2.4"'), "where it truly lies, if it is there"),
    )
    key = "".join(f"<span>{dot.format(sign)}{words}</span>" for sign, words in signs)
    body = f"""
<noscript><p>This part needs JavaScript, which is switched off in this browser.</p></noscript>
<div id="explorer" class="card" hidden>
<div class="controls" style="margin-top:0">
<label class="field wide">Left picture<select id="left"></select></label>
<label class="field wide">Right picture<select id="right"></select></label>
<fieldset><legend>Show likeness as</legend><div class="choice">
<label><input type="radio" name="mode" value="heat" checked><span>Heat</span></label>
<label><input type="radio" name="mode" value="light"><span>Light</span></label></div></fieldset>
<label class="field">Sharpness<input type="range" id="sharpness" min="1" max="8" step="0.5"
value="2"></label>
</div>
<div class="networks">{"".join(heads)}</div>
<div class="key">{key}<span>unlike <span id="scale" class="bar heat"></span> alike</span></div>
<p id="status" class="hidden" role="status"></p>
</div>"""
    introduction = (
        '<span id="explorer-help">Point at a pixel of any picture: what resembles it lights up in '
        "all of them. On a keyboard, move with the arrow keys, in larger steps with Shift.</span> "
        "Good features light up the thing you point at, in both pictures, and little else. "
        "“Alike” is a cosine above 0.5, the mean of both pictures taken from the features first."
    )
    return section("Point at a pixel", introduction, body)


def image(tile: Tile, kind: str = "") -> str:
    """An ``<img>`` of a class."""
    return (
        f'<img class="{kind}" src="{escape(tile.uri)}" width="{tile.width}" height="{tile.height}" '
        f'alt="{escape(tile.words)}">'
    )


def gallery(trios: Sequence[Trio]) -> str:
    """Images beside what networks see of them."""
    figures = []
    for trio in trios:
        pictures = {"image": image(trio.image)}
        for label, tile in trio.shared.items():
            pictures[label] = image(tile, "shared") + image(trio.own[label], "own-only")
        tiles = "".join(
            f'<div>{held}<span class="tag" aria-hidden="true">{escape(label)}</span></div>'
            for label, held in pictures.items()
        )
        caption = f"<figcaption><bdi>{escape(trio.name)}</bdi></figcaption>"
        figures.append(f'<figure><div class="trio">{tiles}</div>{caption}</figure>')
    introduction = (
        "Each image beside the first three principal components of its features, as red, green and "
        "blue. Pixels of one colour look alike to the network; which colour it is means nothing. "
        "With components of all images, one colour is the same thing in all of a column; with each "
        "image&rsquo;s own, finer differences within it show."
    )
    body = f"""
<fieldset class="controls above-gallery"><legend>Principal components of</legend>
<div class="choice">
<label><input type="radio" name="colours" value="shared" checked><span>all images</span></label>
<label><input type="radio" name="colours" value="own"><span>each image</span></label>
</div></fieldset>
<div id="gallery" class="gallery">{"".join(figures)}</div>"""
    return section("What the network sees", introduction, body)


def curves(metrics: Mapping[str, Sequence[float]]) -> str:
    """The charts of a run; nothing where it has no figures."""
    charts = []
    for chart in drawable(metrics):
        name, _ = chart.curves[0]
        values = smoothed(thinned(metrics["step"], metrics[name])[1]) if name in metrics else []
        now = f"<span>ends at {values[-1]:.3g}</span>" if values else ""
        charts.append(
            f'<div class="card chart"><div class="chart-head"><h3>{escape(chart.title)}</h3>{now}'
            f'</div><div role="img" aria-label="{escape(in_words(chart, metrics))}">'
            f"{chart_svg(chart, metrics)}</div><p>{escape(chart.meaning)}</p></div>"
        )
    if not charts:
        return ""
    introduction = "Strong lines are running means, thin ones the figures as they were."
    return section("The run", introduction, f'<div class="charts">{"".join(charts)}</div>')


def score_table(found: Evaluation) -> str:
    """The evaluation: a column for each network, the run's own set off; IoU of classes folded."""
    head = "".join(
        f'<th scope="col"{own_column(row is found.ours)}>{escape(row.name)}</th>'
        for row in found.rows
    )

    def line(name: str, values: Sequence[str]) -> str:
        cells = "".join(
            f"<td{own_column(row is found.ours)}>{escape(value)}</td>"
            for row, value in zip(found.rows, values, strict=True)
        )
        return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'

    def table(lines: Sequence[str]) -> str:
        return (
            '<div class="card scroll" tabindex="0" role="region" aria-label="Scores">'
            f'<table class="numbers"><thead><tr><td></td>{head}</tr></thead>'
            f"<tbody>{''.join(lines)}</tbody></table></div>"
        )

    scores = [
        line(key, [shown(row.scores[key], row.deviations.get(key, 0)) for row in found.rows])
        for key in found.ours.scores
    ]
    classes = [
        line(key, [shown(row.classes[key], 0) for row in found.rows]) for key in found.ours.classes
    ]
    folded = f"<details><summary>IoU of each class</summary>{table(classes)}</details>"
    notes = "".join(
        f'<p class="soft small">{escape(note)}</p>' for note in (found.title, *found.notes)
    )
    body = table(scores) + notes + (folded if classes else "")
    title = "How good the features are" if found.labelled else "Whether spots are found again"
    return section(title, escape(found.sentence), body)


def own_column(ours: bool) -> str:
    """The mark of the run's own column."""
    return ' class="ours"' if ours else ""


def picture_grid(title: str, introduction: str, tiles: Sequence[Tile], kind: str) -> str:
    """Pictures under a heading; nothing where there are none."""
    if not tiles:
        return ""
    figures = "".join(
        f"<figure>{image(tile)}"
        + (f"<figcaption>{escape(tile.caption)}</figcaption>" if tile.caption else "")
        + "</figure>"
        for tile in tiles
    )
    return section(title, escape(introduction), f'<div class="{kind}">{figures}</div>')


def settings_table(groups: Mapping[str, Mapping[str, Any]]) -> str:
    """Settings, folded away; nothing where there are none."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(in_short(value))}</td></tr>'
        for held in groups.values()
        for name, value in held.items()
    )
    if not rows:
        return ""
    body = (
        "<details><summary>Show all</summary>"
        f'<div class="card scroll"><table class="settings"><tbody>{rows}</tbody></table></div>'
        "</details>"
    )
    return section("Configuration", "", body)


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
