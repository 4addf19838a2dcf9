"""The report of a run: one page that holds everything, to be looked at, played with and sent on."""

from __future__ import annotations

import json
import logging
import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from html import escape
from importlib.resources import files
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, cat, nn
from torch.nn.functional import interpolate

from ..augment import Colour, Photometry
from ..backbones.checkpoint import BackboneCard, Loaded, read_backbone
from ..checks import raise_together, whole
from ..data.image import ImageError
from ..data.shards import is_shards
from ..data.sources import Source, open_source
from ..data.statistics import read_image
from ..evaluation.baselines import random_net
from ..evaluation.correspondence import draw_pairs
from ..evaluation.evaluate import BY_COLOUR, evenly, left_out, none_left
from ..evaluation.features import Preparation, Reader, chosen_device
from ..evaluation.health import Verdict, gauge, verdict
from ..evaluation.results import CLEAR, LABELLED_FILE, UNLABELLED_FILE, Evaluation, shown
from ..files import write_whole
from ..run_layout import PREDICTIONS
from ..views import Placement, cut_views, draw_maps
from .curves import chart_svg, drawable, in_words, read_metrics, smoothed, thinned
from .explorer import WHOLE, Sample, cargo, jpeg, rgb, webp
from .matches import fine_map, pairs_picture, picture
from .pca import pca_colours

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


def facts_list(held: Mapping[str, str]) -> str:
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


LATEST = 20
"""The verdict is on the mean of this share of the steps, the last ones: one in so many."""
NARROW_RANK = 2.0
"""Effective rank under which features that were wider are said to be collapsing. On street scenes a
good run kept 11, one made to collapse 1.6; the bound of `health` is for certain."""
SLOW = 0.25
"""Share of the time spent waiting for data that is worth a word."""


def judgement(metrics: Mapping[str, Sequence[float]], maps: Sequence[Tensor]) -> str:
    """The verdict on the run's last steps; on the features of the shown images, if it has none."""
    figures = [latest(metrics, name) for name in ("spread", "effective_rank")]
    if None in figures:
        figures = list(gauge(cat([rearrange(own, "c h w -> (h w) c") for own in maps])))
    said: Verdict = verdict(*(figure for figure in figures if figure is not None))
    well, heading = ruling(metrics) if said.healthy else (False, "Something is wrong with this run")
    return verdict_card(well, heading, said.sentence, findings(metrics))


def ruling(metrics: Mapping[str, Sequence[float]]) -> tuple[bool, str]:
    """Whether a run whose features have not collapsed did well, and that in a few words.

    Correspondence decides where it was measured: features may spread, and the likeness of pairs
    rise, while cells are told apart no better than before, or by their colour alone. Differences
    that chance would give so few cells count for nothing.
    """
    way, found, rank = course(metrics), hits(metrics), latest(metrics, "effective_rank")
    if rank is not None and rank < NARROW_RANK < max(known(metrics, "effective_rank")):
        return False, "The features are collapsing"
    grew = way is None or way[1] > way[0]
    if found is not None:
        if goes_by_colour(metrics):
            return False, "It goes by colour"
        begin, end = found
        chance = deviation(metrics)
        if max(end * CLEAR, end + 2 * chance) < begin:
            return False, "Worse than at the start"
        grew = grew and end >= max(begin * CLEAR, begin + chance)
    if not grew:
        return True, "Sound features, little learned"
    # Pairs also grow alike where nothing but colours is learned.
    return True, "The features look sound" if found is None else "The run looks healthy"


def hits(metrics: Mapping[str, Sequence[float]]) -> tuple[float, float] | None:
    """How often cells found their spot before the first step and at the end; None if not known."""
    end = latest(metrics, "hit1")
    return None if end is None else (known(metrics, "hit1")[0], end)


def goes_by_colour(metrics: Mapping[str, Sequence[float]]) -> bool:
    """Whether cells find their spot by colour alone: once it is changed no better than before."""
    found, kept = hits(metrics), latest(metrics, "hit1_colours_kept")
    if found is None or kept is None:
        return False
    begin, end = found
    return end < CLEAR * begin and end + deviation(metrics) < BY_COLOUR * kept


def deviation(metrics: Mapping[str, Sequence[float]]) -> float:
    """The standard deviation of how often cells find their spot; 0 if their number is not known."""
    share, cells = latest(metrics, "hit1"), latest(metrics, "hit_cells")
    return sqrt(share * (1 - share) / cells) if share is not None and cells else 0.0


def compares_pixels(metrics: Mapping[str, Sequence[float]]) -> bool:
    """Whether there was a pair of cells at all: none with ``alpha`` 0."""
    return any(known(metrics, "pixel_cosine"))


def course(metrics: Mapping[str, Sequence[float]]) -> tuple[float, float] | None:
    """Where the likeness of pairs began and ended; None where too little is known of it.

    Of pairs of cells; of whole views where cells were not compared.
    """
    name = "pixel_cosine" if compares_pixels(metrics) else "instance_cosine"
    _, cosines = thinned(metrics.get("step", ()), metrics.get(name, ()))
    line = smoothed(cosines)
    return (line[0], line[-1]) if len(line) > 1 else None


def known(metrics: Mapping[str, Sequence[float]], name: str) -> list[float]:
    """A figure of the steps that have it."""
    return [value for value in metrics.get(name, ()) if isfinite(value)]


def latest(metrics: Mapping[str, Sequence[float]], name: str) -> float | None:
    """The mean of a figure over the last steps that have it."""
    values = known(metrics, name)
    last = values[-max(1, len(values) // LATEST) :]
    return sum(last) / len(last) if last else None


def findings(metrics: Mapping[str, Sequence[float]]) -> list[str]:
    """What else the figures of a run tell, in sentences."""
    told = []
    has_pairs = compares_pixels(metrics)
    if (way := course(metrics)) is not None:
        begin, end = way
        alike = "cells that see the same spot" if has_pairs else "two views of an image"
        told.append(
            f"The likeness of {alike} {'rose' if end > begin else 'fell'} from {begin:.2f} to "
            f"{end:.2f} (mean cosine; 1 is perfect)."
        )
    if (found := hits(metrics)) is not None:
        told.append(
            f"A cell finds its own spot in another view in {found[1]:.0%} of cases, {found[0]:.0%} "
            "before the first step."
        )
    elif way is not None:
        told.append(
            "Whether cells find their spot in another view was not measured during the run; that "
            "they grow alike is no sign of it. pixelcl evaluate RUN --images DIR tells."
        )
    if goes_by_colour(metrics):
        told.append(
            f"With colours left as they are it finds {latest(metrics, 'hit1_colours_kept'):.0%}: "
            "change colour more in training (--jitter, --prob-gray)."
        )
    if scores := known(metrics, "probe_miou"):
        told.append(
            f"A probe reaches {scores[-1]:.3f} mIoU; {scores[0]:.3f} before the first step, "
            f"{max(scores):.3f} at best. best.ckpt has the best weights that training came to."
        )
    matched = latest(metrics, "positive_pairs")
    if matched is not None and not has_pairs:
        told.append("No cells were compared: alpha is 0, or no two views see the same spot.")
    elif matched is not None:
        told.append(f"An image gives {matched:.0f} matching pairs of cells on average.")
    waiting = latest(metrics, "waiting")
    if waiting is not None and waiting > SLOW:
        told.append(
            f"{waiting:.0%} of the time goes by waiting for images: more workers, or the images in "
            "shards, would make it faster."
        )
    return told


log = logging.getLogger(__name__)

SHOWN_SIDE = 480
"""Pixels of the longer side of an image on the page."""
LONGEST = 2
"""Longer side over shorter side, at most; what lies beyond is cut off at both ends."""
OTHER_VIEW = Placement((0.5, 0.75), prob_hflip=1.0)
"""The other view of an image: mirrored, a quarter to a half of it."""
OTHER_COLOUR = Photometry(prob_jitter=1.0, prob_gray=0.0, prob_blur=0.0)
"""Its colours: changed as in training, but for what makes pictures hard to look at."""


def read_samples(images: Any, prepare: Preparation, count: int) -> list[Sample]:
    """Some images, evenly spread over all of them.

    Args:
        images: A folder, a list of paths, a sequence of images and so on, see `open_source`.
        prepare: How the network is fed, which says how values become [0, 1].
        count: How many, at most.

    Raises:
        ValueError: There is no image that can be read and is for this network.
    """
    source = open_source(images)
    chosen: list[tuple[int, Tensor]] = []
    refused: list[str] = []
    for index in evenly(len(source), count):
        try:
            pixels = read(source, index, prepare)
        except ImageError as error:
            refused.append(f"{source.name(index)}: {error}")
            continue
        chosen.append((index, prepare.in_range(pixels, source.name(index))))
        if len(chosen) == count:
            break
    if not chosen:
        raise ValueError(none_left(refused, prepare))
    for note in left_out(refused):
        log.warning(note)
    names = short_names([source.name(index) for index, _ in chosen])
    return [
        Sample(name, fitted(pixels), number, WHOLE)
        for number, (name, (_, pixels)) in enumerate(zip(names, chosen, strict=True))
    ]


def read(source: Source, index: int, prepare: Preparation) -> Tensor:
    """The upright pixels ``(c, h, w)`` of an image, decoded no larger than is needed.

    Raises:
        ImageError: It is no image, or none for this network.
    """
    return middle_part(read_image(source, index, prepare.statistics, SHOWN_SIDE))


def middle_part(pixels: Tensor) -> Tensor:
    """The middle of a strip that is longer than `LONGEST` times its width."""
    h, w = pixels.shape[-2:]
    height, width = min(h, LONGEST * w), min(w, LONGEST * h)
    top, left = (h - height) // 2, (w - width) // 2
    return pixels[:, top : top + height, left : left + width]


def fitted(pixels: Tensor) -> Tensor:
    """Pixels at the size of the page, larger or smaller than they were."""
    scale = SHOWN_SIDE / max(pixels.shape[-2:])
    h, w = (max(1, round(side * scale)) for side in pixels.shape[-2:])
    return interpolate(pixels[None], (h, w), mode="bilinear", antialias=True)[0].clamp(0, 1)


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the folder that they share, so that a page tells nothing of the machine."""
    if not any(os.path.isabs(name) or os.sep in name for name in names):
        return [readable(name) for name in names]
    paths = [os.path.abspath(name) for name in names]
    try:
        folder = os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # on drives of their own
        return [readable(Path(path).name) for path in paths]
    return [readable(Path(os.path.relpath(path, folder)).as_posix()) for path in paths]


def readable(name: str) -> str:
    """The name as text that can be written: bytes that are none are marked."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def other_view(sample: Sample, seed: int) -> Sample:
    """Another view of an image: cut out, mirrored, changed in colour, as in training.

    Args:
        sample: The whole image.
        seed: Decides the view. No generator outside moves on.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        drawn = draw_maps(1, sample.size, OTHER_VIEW)
        cut = cut_views(sample.pixels[None], drawn, sample.size)
        changed = Colour(OTHER_COLOUR, len(sample.pixels))(cut)[0]
    height, width = sample.size
    to_source = drawn[0] / torch.tensor([[width], [height]])
    return Sample(f"another view of {sample.name}", changed, sample.source, to_source)


def fed(sample: Sample, prepare: Preparation) -> Tensor:
    """What the network is fed: ``(c, h, w)`` normalised, at its size."""
    return prepare.normalised(prepare.resized(sample.pixels))


RANDOM, TRAINED = "Random weights", "Trained weights"
MOST_PICTURES = 6
"""Pictures of one kind on the page."""
BICUBIC = 3
"""Pillow's name for it, which needs no import of Pillow."""
OUTDATED = "These figures are older than the run's weights: evaluate again."
WIDEST = 1440
"""Pixels of the longer side of a picture that is taken from the run's folder."""


class Seen(NamedTuple):
    """What two networks see of the samples.

    Attributes:
        maps: For each network's name, the maps ``(c, h, w)`` of all samples.
        grid: Cells ``(h, w)`` of the layer at the size of the views.
    """

    maps: dict[str, list[Tensor]]
    grid: tuple[int, int]


def visualize(
    run: str | Path,
    *,
    images: Any = None,
    out: str | Path = "report.html",
    count: int = 12,
    seed: int = 0,
    device: str | None = None,
) -> Path:
    """Write the report of a run: one HTML file that needs nothing else, not even a network.

    Args:
        run: A run directory, or whatever else `read_backbone` reads; what a run has and this has
            not, such as curves, is left out.
        images: Images to look at, best ones that were not trained on: a folder, a list of paths, a
            sequence of images. None takes those that the run was trained on, if they are still
            where they were.
        out: Where to write the page.
        count: How many images, at most; they are spread evenly over all.
        seed: Decides the other views of the images.
        device: Where to compute; default: a GPU if there is one.

    Returns:
        Where the page is.

    Raises:
        ValueError: There is no such run or device, no image that can be used, or a folder as out.
    """
    place = chosen_device(device)
    raise_together(whole("count", count, 1), whole("seed", seed, 0))
    path = Path(out).expanduser()
    if path.is_dir():
        raise ValueError(f"out is {str(out)!r}, a folder; name a file, such as report.html")
    folder = Path(run).expanduser()
    settings = read_settings(folder)
    with torch.random.fork_rng(devices=[]):  # building a network draws its weights first
        loaded = read_backbone(run)
    prepare = Preparation.of(loaded.card, net=loaded.net)
    wholes = read_samples(training_images(settings) if images is None else images, prepare, count)
    samples = wholes + [other_view(sample, seed + k) for k, sample in enumerate(wholes)]
    scores = evaluations(folder)
    metrics_file = folder / "metrics.jsonl"
    metrics = read_metrics(metrics_file) if metrics_file.is_file() else {}
    inputs = [fed(sample, prepare) for sample in samples]
    seen = look(loaded, inputs, place, fixed=isinstance(prepare.size, tuple))

    name = folder.resolve().name or str(run)
    parts = {
        "title": escape(f"{name}: pretraining report"),
        "name": escape(name),
        "facts": facts_list(facts(loaded, metrics)),
        "verdict": judgement(metrics, seen.maps[TRAINED]),
        "explorer": explorer(list(seen.maps)),
        "gallery": gallery(trios(wholes, seen.maps)),
        "curves": curves(metrics),
        "evaluation": scores,
        "pairs": pairs(folder, wholes, loaded, seen.grid, settings, seed),
        "steps": steps(folder),
        "settings": settings_table({"run": settings}),
        "colophon": escape(
            f"Written by pixel-level-contrastive-learning. Weights by version "
            f"{loaded.card.version}. This page holds everything it shows and loads nothing."
        ),
    }
    write_whole(path, filled(parts, cargo(samples, seen.maps)))
    return path


# What is read.


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run; none where there is no ``config.yaml``.

    Raises:
        ValueError: The file holds something else.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    import yaml

    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings; take the file that the run wrote")
    return settings


def training_images(settings: Mapping[str, Any]) -> list[str]:
    """The places that the run's images came from.

    Raises:
        ValueError: They are not known, or no longer there.
    """
    places = settings.get("data") or []
    places = [places] if isinstance(places, str) else [str(place) for place in places]
    gone = [own for own in places if not is_shards(own) and not Path(own).expanduser().exists()]
    if gone or not places:
        why = f"saw {gone[0]!r}, which is not there" if gone else "does not say what it saw"
        raise ValueError(
            f"images is None and the run {why}; give images, such as a folder of some that were "
            "not trained on"
        )
    return places


def look(loaded: Loaded, inputs: Sequence[Tensor], device: torch.device, *, fixed: bool) -> Seen:
    """The maps of the pixel layer, by random weights and by the run's.

    Args:
        loaded: The run's backbone and its card.
        inputs: ``(c, h, w)`` each, normalised.
        device: Where to compute.
        fixed: Whether the network takes images of no other size.
    """
    card = loaded.card
    networks: dict[str, nn.Module] = {RANDOM: random_net(card, card.seed), TRAINED: loaded.net}
    maps, grid = {}, (1, 1)
    for name, net in networks.items():
        reader = Reader(net.to(device), [card.pixel_layer], card.channels, card.image_size)
        grid = reader.readings[reader.layers[0]].grid
        stride = None if fixed else stride_of(reader, card)
        maps[name] = [fine_map(reader, pixels, stride) for pixels in inputs]
    return Seen(maps, grid)


def stride_of(reader: Reader, card: BackboneCard) -> int | None:
    """Pixels from one row of cells to the next; None where every image has as many as a view.

    The view's height over its rows is only near it where the last row sticks out or leaves a rest.
    The view is made so much higher here that a row more or less does not matter.

    Args:
        reader: Reads the layer.
        card: Says how large a view is.
    """
    height, width = card.image_size

    def rows(side: int) -> int:
        return reader(torch.zeros(1, card.channels, side, width)).shape[-2]

    seen = rows(height)
    near = round(height / seen)
    more = 4 * near**2
    gained = rows(height + more) - seen
    if gained == 0:
        return None
    stride = round(more / gained)
    # Where nothing is padded, rows are missing, and a border of larger cells makes up for them.
    return stride if rows(stride * (seen + 1)) == seen + 1 else near


# The parts of the page.


def facts(loaded: Loaded, metrics: Mapping[str, Sequence[float]]) -> dict[str, str]:
    """The run in a line."""
    card = loaded.card
    h, w = card.image_size
    file, _, function = card.model.rpartition(":")  # of one's own: no need to tell where it lies
    model = f"{Path(file).name}:{function}" if file else card.model
    held = {"backbone": model, "layer shown": card.pixel_layer, "start": card.start}
    if metrics.get("step"):
        held["steps"] = f"{max(metrics['step']):,.0f}"
    return {
        **held,
        "views": f"{w} x {h} px",
        "channels": str(card.channels),
        "seed": f"{card.seed}",
    }


def trios(samples: Sequence[Sample], maps: Mapping[str, Sequence[Tensor]]) -> list[Trio]:
    """Each image beside its colours, by each network: in colours of all images, and in its own."""
    bases = {}
    for name, own in maps.items():
        cells = [rearrange(one, "c h w -> c (h w)") for one in own[: len(samples)]]
        _, bases[name] = pca_colours(rearrange(cat(cells, dim=1), "c n -> 1 c 1 n"))

    def tile(pixels: Tensor, sample: Sample, words: str) -> Tile:
        h, w = sample.size
        smooth = picture(pixels).resize((w // 2, h // 2), BICUBIC)
        return Tile(jpeg(smooth), smooth.width, smooth.height, words)

    made = []
    for number, sample in enumerate(samples):
        held: list[dict[str, Tile]] = [{}, {}]
        for name, own in maps.items():
            for tiles, basis, scope in zip(
                held, (bases[name], None), ("all", "its own"), strict=True
            ):
                colours, _ = pca_colours(own[number][None], basis)
                words = f"{sample.name} as {scope} principal components, {name.lower()}"
                tiles[name.split()[0].lower()] = tile(colours[0], sample, words)
        image = tile(rgb(sample.pixels), sample, f"Image {sample.name}")
        made.append(Trio(sample.name, image, *held))
    return made


def pairs(
    folder: Path,
    samples: Sequence[Sample],
    loaded: Loaded,
    grid: tuple[int, int],
    settings: Mapping[str, Any],
    seed: int,
) -> str:
    """Pictures of matching cells: those the run drew, or new ones."""
    from PIL import Image

    threshold = float(settings.get("distance_thres", 0.7))
    drawn = []
    for path in sorted((folder / "preview").glob("pairs*.png"))[:MOST_PICTURES]:
        with Image.open(path) as held:
            drawn.append(held.convert("RGBA"))
    if not drawn:
        views = draw_pairs([own.pixels for own in samples[:2]], loaded.card.image_size, seed)
        drawn = [
            pairs_picture(rgb(one), rgb(two), map_one, map_two, grid, threshold)
            for one, two, map_one, map_two in zip(*views, strict=True)
        ]
    words = "Two views of one image, with lines between cells that see the same spot"
    tiles = [Tile(webp(own), own.width, own.height, words) for own in drawn]
    introduction = (
        "What the loss compares. Two views are cut from an image, and cells whose centres lie "
        f"closer than {threshold:g} cell diagonals in it are a pair: they should get the same "
        "features. Cells without a partner are dimmed; lines join some of the pairs."
    )
    return picture_grid("Matching cells", introduction, tiles, "pairs")


def steps(folder: Path) -> str:
    """Pictures that were drawn during the run, some of them."""
    introduction = "The same images as colours, step after step, from the first to the last."
    tiles = drawn(folder / "pictures", "What the network saw")
    return picture_grid("While it learned", introduction, tiles, "steps")


def evaluations(folder: Path) -> str:
    """The tables of scores and what the networks predicted; nothing without an evaluation.

    Raises:
        ValueError: The file of an evaluation is broken.
    """
    introduction = (
        "Images that the figures are about, their masks, and what each network predicted."
    )
    parts = []
    for name in (LABELLED_FILE, UNLABELLED_FILE):
        path = folder / name
        if not path.is_file():
            continue
        try:
            found = Evaluation.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} is not what an evaluation writes ({error!r}); evaluate again with this "
                "folder as out, or take the file away"
            ) from error
        if path.stat().st_mtime < written(folder):
            found = replace(found, notes=(*found.notes, OUTDATED))
        parts.append(score_table(found))
        if found.labelled:
            tiles = drawn(folder / PREDICTIONS, "Image, truth, and what each network made of it")
            shown = picture_grid("What they predict", introduction, tiles, "predictions")
            parts.append(shown)
    return "".join(parts)


def written(folder: Path) -> float:
    """When the newest weights of a run were written; 0 where there are none."""
    weights = [*folder.glob("backbone.safetensors"), *folder.glob("checkpoints/*.ckpt")]
    return max((path.stat().st_mtime for path in weights), default=0.0)


def drawn(folder: Path, words: str) -> list[Tile]:
    """Some of the PNG files of a folder, evenly spread, the first and the last included."""
    from PIL import Image

    paths = sorted(folder.glob("*.png"))
    if len(paths) > MOST_PICTURES:
        last = len(paths) - 1
        paths = [paths[last * k // (MOST_PICTURES - 1)] for k in range(MOST_PICTURES)]
    tiles = []
    for path in paths:
        with Image.open(path) as held:
            shown = held.convert("RGB")
        shown.thumbnail((WIDEST, WIDEST))
        name = re.sub(r"-0*(?=\d)", " ", readable(path.stem))  # step-00000100 is step 100
        tiles.append(Tile(jpeg(shown), *shown.size, f"{words}: {name}", name))
    return tiles
