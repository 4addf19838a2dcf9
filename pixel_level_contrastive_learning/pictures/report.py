"""The report of a run: one page that holds everything, to be looked at, played with and sent on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, cat, nn

from ..checks import raise_together, whole
from ..data.shards import is_shards
from ..data.sources import PREDICTIONS
from ..evaluation.contenders import random_net
from ..evaluation.correspondence import draw_pairs
from ..evaluation.features import Reader, chosen_device
from ..evaluation.outcome import LABELLED_FILE, UNLABELLED_FILE, Evaluation
from ..evaluation.preparation import Preparation
from ..files import write_whole
from ..weights import BackboneCard, Loaded, read_backbone
from . import page
from .curves import read_metrics
from .detail import fine_map
from .explorer import cargo, jpeg, webp
from .judgement import judgement
from .maps import pca_colours
from .page import Tile, Trio
from .pairs import pairs_picture, picture
from .samples import Sample, fed, other_view, read_samples, readable, rgb

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
        "facts": page.facts(facts(loaded, metrics)),
        "verdict": judgement(metrics, seen.maps[TRAINED]),
        "explorer": page.explorer(list(seen.maps)),
        "gallery": page.gallery(trios(wholes, seen.maps)),
        "curves": page.curves(metrics),
        "evaluation": scores,
        "pairs": pairs(folder, wholes, loaded, seen.grid, settings, seed),
        "steps": steps(folder),
        "settings": page.settings_table({"run": settings}),
        "colophon": escape(
            f"Written by pixel-level-contrastive-learning. Weights by version "
            f"{loaded.card.version}. This page holds everything it shows and loads nothing."
        ),
    }
    write_whole(path, page.filled(parts, cargo(samples, seen.maps)))
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
    return page.picture_grid("Matching cells", introduction, tiles, "pairs")


def steps(folder: Path) -> str:
    """Pictures that were drawn during the run, some of them."""
    introduction = "The same images as colours, step after step, from the first to the last."
    tiles = drawn(folder / "pictures", "What the network saw")
    return page.picture_grid("While it learned", introduction, tiles, "steps")


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
        parts.append(page.score_table(found))
        if found.labelled:
            tiles = drawn(folder / PREDICTIONS, "Image, truth, and what each network made of it")
            shown = page.picture_grid("What they predict", introduction, tiles, "predictions")
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
