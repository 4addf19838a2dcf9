"""The report of a run: one self-contained page to look at, explore and share."""

from __future__ import annotations

import logging
import os
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import files
from io import BytesIO
from math import isfinite
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from PIL import Image as Pillow
from PIL.Image import Image
from torch import Tensor, cat

from .. import run_layout
from ..backbones.checkpoint import BackboneCard, is_file, read_backbone
from ..backbones.custom import Model, handing_over
from ..backbones.hub import on_hub
from ..checks import Pages, check_limits, raise_together, whole
from ..data.image import to_rgb
from ..data.shards import is_shards
from ..data.sources import open_source
from ..evaluation.baselines import reading_of, run_settings
from ..evaluation.correspondence import draw_pairs
from ..evaluation.features import Preparation, chosen_device
from ..evaluation.results import Evaluation, shown
from ..files import check_writable, write_whole
from .curves import (
    Chart,
    Metrics,
    chart_svg,
    chart_words,
    charts_of,
    read_metrics,
)
from .explorer import (
    TRAINED,
    Sample,
    explorer_data,
    extract_maps,
    other_view,
    printable,
    read_samples,
)
from .matches import pairs_picture, to_pil
from .pca import pca_colours
from .verdict import RunVerdict, judge_run

log = logging.getLogger(__name__)

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src '{script}'; "
POLICY += "base-uri 'none'; form-action 'none'"
"""What the browser is told to allow: pictures that the page holds, its styles, its one script."""
MAX_PICTURES = 6
"""Pictures of one kind on the page."""
MAX_SIDE = 1440
"""Pixels of the longer side of a picture from the run's folder."""
OUTDATED = "These figures are older than the run's weights: evaluate again."
OF_OTHERS = "These figures are not of this run's weights."

Maps = Mapping[str, Sequence[Tensor]]
"""For each network's name, its maps ``(c, h, w)`` of all images."""


class Picture(NamedTuple):
    """An image on the page: its data URI, size in pixels, what it shows, and words below it."""

    uri: str
    width: int
    height: int
    alt: str
    caption: str = ""


class GalleryRow(NamedTuple):
    """An image, and by each network its colours by components of all images and by its own."""

    name: str
    image: Picture
    colours: dict[str, tuple[Picture, Picture]]


class DrawnChart(NamedTuple):
    """A chart, itself in words and as SVG, and where its curves end."""

    chart: Chart
    words: str
    svg: str
    ends: str


@dataclass(frozen=True)
class Report:
    """What stands on the page, in its order; `report.html` puts it into HTML."""

    name: str
    facts: Mapping[str, str]
    verdict: RunVerdict
    networks: Sequence[str]
    gallery: Sequence[GalleryRow]
    charts: Sequence[DrawnChart]
    evaluations: Sequence[Evaluation]
    label_curve: Sequence[Picture]
    predictions: Sequence[Picture]
    pairs: Sequence[Picture]
    threshold: float
    steps: Sequence[Picture]
    settings: Mapping[str, Any]
    version: str


def visualize(
    run: str | Path,
    *,
    images: Any = None,
    out: str | Path | None = None,
    count: int = 12,
    seed: int = 0,
    device: str | None = None,
    model: Model | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
) -> Path:
    """Write the report of a run: one self-contained HTML file that works offline.

    Args:
        run: A run's folder, or anything else that `read_backbone` reads; parts that only a run has,
            such as curves, are then left out.
        images: Images to show, preferably not used for training: a folder, a list of paths, a
            sequence of images. None takes those the run was trained on, if they are still where
            they were.
        out: Where to write the page. Default: ``report.html`` in the run's folder (for a
            checkpoint, that of its run); for a weights file, ``report-NAME.html`` next to it.
        count: Maximum number of images; they are spread evenly over all.
        seed: Decides the other views of the images.
        device: Where to compute; default: a GPU if there is one.
        model: As for `load_backbone`.
        pages: How files with several images are read. Default: as in the run.
        nodata: Value that means "not measured", likewise.

    Returns:
        Where the page is.

    Raises:
        ValueError: No such run or device, no usable image, an ``out`` that is a folder, or no
            ``out`` for weights that are in no folder.
    """
    place = chosen_device(device)
    raise_together(whole("count", count, 1), *check_limits({"seed": seed}))
    path = default_page(run) if out is None else Path(out).expanduser()
    if path.is_dir():
        raise ValueError(f"out is {str(out)!r}, a folder; name a file, such as report.html")
    folder = Path(run).expanduser()
    settings = run_settings(run)
    check_writable("the folder of out", path.parent)
    with torch.random.fork_rng(devices=[]), handing_over(model):
        loaded = read_backbone(run)  # which draws the weights of the network first
    prepare = Preparation.of(loaded.card, net=loaded.net)
    places = training_images(settings) if images is None else images
    source = open_source(places, **reading_of([run], pages=pages, nodata=nodata))
    wholes = read_samples(source, prepare, count)
    samples = wholes + [other_view(sample, seed + k) for k, sample in enumerate(wholes)]
    evaluations = read_evaluations(folder)
    metrics_file = folder / run_layout.METRICS
    metrics = read_metrics(metrics_file) if metrics_file.is_file() else {}
    inputs = [prepare.normalised(prepare.resized(sample.pixels)) for sample in samples]
    with handing_over(model):
        maps, grid = extract_maps(loaded, inputs, place, fixed=isinstance(prepare.size, tuple))

    ours = (result for result in evaluations if not {OUTDATED, OF_OTHERS} & {*result.notes})
    verdict = judge_run(metrics, maps[TRAINED], next(filter(attrgetter("labelled"), ours), None))
    log.info("%s. %s", verdict.heading, verdict.sentence)
    # Of a network that diverged there is nothing to see, but the page shows all else.
    maps = {
        name: [layer_map.nan_to_num(0, 0, 0) for layer_map in network_maps]
        for name, network_maps in maps.items()
    }
    threshold = float(settings.get("distance_thres", 0.7))
    report = Report(
        name=folder.resolve().name or str(run),
        facts=run_facts(loaded.card, metrics),
        verdict=verdict,
        networks=list(maps),
        gallery=draw_gallery(wholes, maps),
        charts=draw_charts(metrics),
        evaluations=evaluations,
        label_curve=saved_pictures(
            folder, "Mean IoU over the number of masks, as in the table", run_layout.LABEL_CURVE
        ),
        predictions=saved_pictures(
            folder / run_layout.PREDICTIONS, "Image, ground truth, and each network's prediction"
        ),
        pairs=pairs_pictures(folder, wholes, loaded.card, grid, threshold, seed),
        threshold=threshold,
        steps=saved_pictures(folder / run_layout.PICTURES, "Features as colours"),
        settings=without_places(settings),
        version=loaded.card.version,
    )
    pictures = [embed(to_pil(to_rgb(sample.pixels)), sample.name).uri for sample in samples]
    write_whole(path, render(report, explorer_data(samples, pictures, maps)))
    return path


def default_page(run: str | Path) -> Path:
    """Where the report of a run or of a file of weights goes."""
    if on_hub(run) or not is_file(run):
        raise ValueError(f"out is None, and {run} is not a run's folder; name a file for the page")
    path = Path(run).expanduser()
    name = Path(run_layout.REPORT)
    if path.is_dir():
        return path / name
    return run_layout.run_folder(path) / f"{name.stem}-{path.stem}{name.suffix}"


def render(report: Report, explorer: object) -> str:
    """The page as HTML, every text escaped; ``explorer`` is what its script reads."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    script = re.search(r"<script>(.*?)</script>", source, re.DOTALL)
    assert script is not None
    # By its digest: no script that got onto the page by another way runs.
    digest = b64encode(sha256(script[1].encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.globals.update(score=shown, setting=setting_text)
    return environment.from_string(source).render(
        report=report, explorer=explorer, policy=Markup(POLICY.format(script=f"sha256-{digest}"))
    )


def setting_text(value: object) -> str:
    """A setting's value for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}" if isfinite(value) else "not finite"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(setting_text, value))
    return str(value)


def training_images(settings: Mapping[str, Any]) -> list[str]:
    """The places that the run's images came from; an error where one is unknown or gone."""
    places = settings.get("data") or []
    places = [places] if isinstance(places, str) else [str(place) for place in places]
    missing = [
        place for place in places if not is_shards(place) and not Path(place).expanduser().exists()
    ]
    if missing or not places:
        why = f"used {missing[0]!r}, which is missing" if missing else "does not record its images"
        raise ValueError(
            f"images is None and the run {why}; give images, such as a folder of images that were "
            "not trained on"
        )
    return places


def read_evaluations(folder: Path) -> list[Evaluation]:
    """The evaluations in the run's folder, with labels and without."""
    weights = [*folder.glob(run_layout.WEIGHTS), *folder.glob(f"{run_layout.CHECKPOINTS}/*.ckpt")]
    trained_at = max((path.stat().st_mtime for path in weights), default=0.0)
    evaluations = []
    for path in (folder / run_layout.EVALUATION, folder / run_layout.CORRESPONDENCE):
        if not path.is_file():
            continue
        try:
            evaluation = Evaluation.from_json(path.read_text(encoding="utf-8"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is not a file of pixelcl evaluate ({error!r}); evaluate again with this "
                "folder as out, or delete the file"
            ) from error
        if path.stat().st_mtime < trained_at:
            evaluation = replace(evaluation, notes=(*evaluation.notes, OUTDATED))
        if any(row.baselines for row in evaluation.rows) and not evaluation.is_of(folder):
            evaluation = replace(evaluation, notes=(*evaluation.notes, OF_OTHERS))
        evaluations.append(evaluation)
    return evaluations


def run_facts(card: BackboneCard, metrics: Metrics) -> dict[str, str]:
    """The run in a line."""
    h, w = card.image_size
    file, _, function = card.model.rpartition(":")  # of one's own: no need to tell where it lies
    steps = {"steps": f"{max(metrics['step']):,.0f}"} if metrics.get("step") else {}
    return {
        "backbone": f"{Path(file).name}:{function}" if file else card.model,
        "layer shown": card.shown_layer,
        "start": card.start,
        **steps,
        "views": f"{h} x {w} px",
        "channels": str(card.channels),
        "seed": f"{card.seed}",
    }


def draw_gallery(samples: Sequence[Sample], maps: Maps) -> list[GalleryRow]:
    """Each image beside its colours by each network, by components of all images and its own."""
    bases = {}
    for name, network_maps in maps.items():
        cells = [rearrange(one, "c h w -> c (h w)") for one in network_maps[: len(samples)]]
        _, bases[name] = pca_colours(rearrange(cat(cells, dim=1), "c n -> 1 c 1 n"))

    def half_size(pixels: Tensor, sample: Sample, alt: str) -> Picture:
        h, w = sample.size
        return embed(to_pil(pixels).resize((w // 2, h // 2), Pillow.Resampling.BICUBIC), alt)

    rows = []
    for number, sample in enumerate(samples):
        colours = {}
        for name, network_maps in maps.items():
            shared, alone = (
                half_size(
                    pca_colours(network_maps[number][None], basis)[0][0],
                    sample,
                    f"{sample.name} as {scope} principal components, {name.lower()}",
                )
                for basis, scope in ((bases[name], "all"), (None, "its own"))
            )
            colours[name.split()[0].lower()] = shared, alone
        image = half_size(to_rgb(sample.pixels), sample, f"Image {sample.name}")
        rows.append(GalleryRow(sample.name, image, colours))
    return rows


def draw_charts(metrics: Metrics) -> list[DrawnChart]:
    """The charts of a run; none where it has no metrics."""
    charts = []
    for chart, lines in charts_of(metrics):
        ends = " and ".join(f"{line.mean[-1]:.3g}" for line in lines)
        words, svg = chart_words(chart, lines), chart_svg(chart, lines)
        charts.append(DrawnChart(chart, words, svg, ends))
    return charts


def pairs_pictures(
    folder: Path,
    samples: Sequence[Sample],
    card: BackboneCard,
    grid: tuple[int, int],
    threshold: float,
    seed: int,
) -> list[Picture]:
    """Pictures of matching cells: those the run drew, or new ones."""
    pictures = []
    for path in sorted((folder / run_layout.PREVIEW).glob("pairs*.png"))[:MAX_PICTURES]:
        pictures += opened(path, "RGBA")
    if not pictures:
        views = draw_pairs([sample.pixels for sample in samples[:2]], card.image_size, seed)
        pictures = [
            pairs_picture(to_rgb(one), to_rgb(two), map_one, map_two, grid, threshold)
            for one, two, map_one, map_two in zip(*views, strict=True)
        ]
    alt = "Two views of one image, with lines between cells that see the same spot"
    return [embed(picture, alt) for picture in pictures]


def saved_pictures(folder: Path, alt: str, pattern: str = "*.png") -> list[Picture]:
    """Some of the PNG files of a folder, evenly spread, the first and the last included."""
    paths = sorted(folder.glob(pattern))
    if len(paths) > MAX_PICTURES:
        last = len(paths) - 1
        paths = [paths[last * k // (MAX_PICTURES - 1)] for k in range(MAX_PICTURES)]
    pictures = []
    for path in paths:
        for image in opened(path, "RGB"):
            image.thumbnail((MAX_SIDE, MAX_SIDE))
            step = re.fullmatch(f"{run_layout.STEP}0*(\\d+)", path.stem)
            name = f"step {step[1]}" if step else printable(path.stem)
            pictures.append(embed(image, f"{alt}: {name}", name))
    return pictures


def opened(path: Path, mode: str) -> list[Image]:
    """The image in a file; none where it is damaged, of which a warning tells."""
    try:
        with Pillow.open(path) as file:
            return [file.convert(mode)]
    except (OSError, SyntaxError) as error:  # what Pillow raises for a broken PNG
        log.warning("%s cannot be read (%s) and is left out", path, error)
        return []


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings whose paths are names, so that a page tells nothing of the machine."""

    def named(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [named(item) for item in value]
        local = isinstance(value, str) and "://" not in value
        return Path(value).name if local and os.path.isabs(os.path.expanduser(value)) else value

    return {name: named(value) for name, value in settings.items()}


def embed(image: Image, alt: str, caption: str = "") -> Picture:
    """An image as it stands on the page: WebP where it may be transparent, JPEG otherwise."""
    file = BytesIO()
    if image.mode == "RGBA":
        image.save(file, "WEBP", quality=85)
    else:
        image.save(file, "JPEG", quality=82, optimize=True)
    kind = "webp" if image.mode == "RGBA" else "jpeg"
    data = b64encode(file.getvalue()).decode("ascii")
    return Picture(f"data:image/{kind};base64,{data}", *image.size, alt, caption)
