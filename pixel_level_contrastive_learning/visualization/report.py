"""The report of a run: one page that holds everything, to be looked at, played with and sent on."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, cat, nn

from .. import run_layout
from ..backbones.checkpoint import BackboneCard, Loaded, read_backbone
from ..checks import raise_together, whole
from ..data.image import to_rgb
from ..data.shards import is_shards
from ..data.sources import open_source
from ..evaluation.baselines import random_net
from ..evaluation.correspondence import draw_pairs
from ..evaluation.features import Preparation, Reader, chosen_device
from ..evaluation.results import Evaluation
from ..files import check_writable, write_whole
from .curves import read_metrics
from .explorer import Sample, cargo, fed, jpeg, other_view, read_samples, readable, webp
from .matches import fine_map, pairs_picture, picture
from .page import Page, ScoreTable, Tile, Trio, chart_views, in_short, render, score_table
from .pca import pca_colours
from .verdict import judge_run

log = logging.getLogger(__name__)

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
    check_writable("out", out)
    with torch.random.fork_rng(devices=[]):  # building a network draws its weights first
        loaded = read_backbone(run)
    prepare = Preparation.of(loaded.card, net=loaded.net)
    places = training_images(settings) if images is None else images
    source = open_source(places, pages=settings.get("pages"), nodata=settings.get("nodata"))
    wholes = read_samples(source, prepare, count)
    samples = wholes + [other_view(sample, seed + k) for k, sample in enumerate(wholes)]
    tables = evaluations(folder)
    metrics_file = folder / run_layout.METRICS
    metrics = read_metrics(metrics_file) if metrics_file.is_file() else {}
    inputs = [fed(sample, prepare) for sample in samples]
    seen = look(loaded, inputs, place, fixed=isinstance(prepare.size, tuple))

    threshold = float(settings.get("distance_thres", 0.7))
    page = Page(
        name=folder.resolve().name or str(run),
        facts=facts(loaded, metrics),
        verdict=judge_run(metrics, seen.maps[TRAINED]),
        networks=list(seen.maps),
        trios=trios(wholes, seen.maps),
        charts=chart_views(metrics),
        tables=tables,
        pairs=pairs(folder, wholes, loaded, seen.grid, threshold, seed),
        threshold=threshold,
        steps=drawn(folder / run_layout.PICTURES, "What the network saw"),
        settings={name: in_short(value) for name, value in settings.items()},
        version=loaded.card.version,
    )
    write_whole(path, render(page, cargo(samples, seen.maps)))
    return path


# What is read.


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a run; none where there is no ``config.yaml``.

    Raises:
        ValueError: The file holds something else.
    """
    path = folder / run_layout.CONFIG
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
        grid = reader.layouts[reader.layers[0]].grid
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
        image = tile(to_rgb(sample.pixels), sample, f"Image {sample.name}")
        made.append(Trio(sample.name, image, *held))
    return made


def pairs(
    folder: Path,
    samples: Sequence[Sample],
    loaded: Loaded,
    grid: tuple[int, int],
    threshold: float,
    seed: int,
) -> list[Tile]:
    """Pictures of matching cells: those the run drew, or new ones."""
    from PIL import Image

    drawn = []
    for path in sorted((folder / run_layout.PREVIEW).glob("pairs*.png"))[:MOST_PICTURES]:
        with Image.open(path) as held:
            drawn.append(held.convert("RGBA"))
    if not drawn:
        views = draw_pairs([own.pixels for own in samples[:2]], loaded.card.image_size, seed)
        drawn = [
            pairs_picture(to_rgb(one), to_rgb(two), map_one, map_two, grid, threshold)
            for one, two, map_one, map_two in zip(*views, strict=True)
        ]
    words = "Two views of one image, with lines between cells that see the same spot"
    return [Tile(webp(own), own.width, own.height, words) for own in drawn]


def evaluations(folder: Path) -> list[ScoreTable]:
    """The evaluations that stand in the run's folder, with labels and without.

    Raises:
        ValueError: The file of one is broken.
    """
    tables = []
    for name in (run_layout.EVALUATION, run_layout.CORRESPONDENCE):
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
        if path.stat().st_mtime < weights_written(folder):
            found = replace(found, notes=(*found.notes, OUTDATED))
        words = "Image, truth, and what each network made of it"
        predictions = drawn(folder / run_layout.PREDICTIONS, words) if found.labelled else []
        tables.append(score_table(found, predictions))
    return tables


def weights_written(folder: Path) -> float:
    """When the newest weights of a run were written; 0 where there are none."""
    weights = [*folder.glob(run_layout.WEIGHTS), *folder.glob(f"{run_layout.CHECKPOINTS}/*.ckpt")]
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
