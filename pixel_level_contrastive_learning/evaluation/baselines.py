"""Contenders: the networks that stand side by side, those asked for and what they must beat."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import isnan
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from ..backbones.checkpoint import (
    AS_HANDED,
    ZERO_INIT,
    BackboneCard,
    Loaded,
    is_file,
    read_backbone,
)
from ..backbones.custom import draw_anew, is_module_handed
from ..backbones.factory import zero_last_norms
from ..backbones.state_dict import load_weights
from ..checks import Pages, counted
from ..data.sources import Source
from ..data.statistics import measure
from ..files import absolute_model, read_settings_if_any
from ..run_layout import CONFIG, run_folder
from .features import Preparation, Size

log = logging.getLogger(__name__)

RANDOM = "random weights"
Kind: TypeAlias = tuple[str, str, str, str]
"""What decides a network's figures beside its weights, in words: its model and channels, the layers
that are read, and what images are fed with: range, mean and deviation, and a size that is fixed."""


@dataclass(frozen=True)
class Contender:
    """A network that is evaluated.

    Attributes:
        name: What it is called in the table.
        build: The network for a seed.
        card: How it is used.
        by_seed: Whether the seed changes its weights.
        baselines: Names of those it must beat: random weights of the same network, and the weights
            that its training started from where these were others.
    """

    name: str
    build: Callable[[int], nn.Module]
    card: BackboneCard
    by_seed: bool = False
    baselines: tuple[str, ...] = ()


def line_up(
    weights: Sequence[str | Path], source: Source, layers: Sequence[str] | None = None
) -> tuple[list[Contender], list[str]]:
    """The weights that were asked for, what they are to be compared with, and notes for the reader.

    Random weights come first, as the library draws them, one row for all networks that are alike:
    of one model, with the same layers read, fed the same way. Then come those that trainings
    started from where they did not start from such; last those that were asked for.

    Args:
        weights: Each a run directory, a file, and so on, as for `read_backbone`.
        source: The images. Weights without a run are built for their channels, and scale 16-bit
            and float values by what is found in them.
        layers: The layers that are read of each; default: the trained or deepest one.

    Raises:
        ValueError: There are no such weights, the same ones twice, or some that are called as a row
            of others is.
    """
    names = [str(path) for path in weights]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"weights names {twice} twice; name each once")
    networks = read_all(weights, source)
    kinds = kinds_of(names, [network.card for network in networks], layers)
    origins = {
        (network.card.start, kind)
        for name, network, kind in zip(names, networks, kinds, strict=True)
        if is_file(name)
    }
    randoms: dict[Kind, Contender] = {}
    starts: dict[tuple[str, Kind], Contender | None] = {}  # None where there is nothing to compare
    asked: list[Contender] = []
    notes: list[str] = []
    for name, (net, card, _), kind in zip(names, networks, kinds, strict=True):
        if kind not in randoms:
            about = ", ".join(distinctions(kind, kinds))
            called = f"{RANDOM} ({about})" if about else RANDOM
            randoms[kind] = Contender(called, random_builder(card), card, by_seed=True)
        baselines: tuple[str, ...] = (randoms[kind].name,)
        origin = card.start, kind
        if is_file(name) and origin not in starts:
            alike = [other for start, other in origins if start == card.start]
            about = ", ".join(
                [shortest(card.start, [start for start, _ in origins]), *distinctions(kind, alike)]
            )
            starts[origin] = None
            try:
                starts[origin] = start_of(card, f"start ({about})")
            except (ValueError, ConnectionError) as error:
                notes.append(f"The starting weights ({card.start}) are not available: {error}")
                log.warning(notes[-1])
        start = starts.get(origin) if is_file(name) else None
        if start is not None:
            baselines += (start.name,)
        if not name.startswith("random:"):
            asked.append(Contender(name, fixed_builder(net), card, baselines=baselines))
    compared = [*randoms.values(), *filter(None, starts.values())]
    taken = next((name for name in names if name in {row.name for row in compared}), None)
    if taken is not None:
        raise ValueError(
            f"weights names {taken}, which is what a row to compare with is called; rename it, or "
            f"give it as {Path(taken).absolute()}"
        )
    return [*compared, *asked], notes


def kinds_of(
    names: Sequence[str], cards: Sequence[BackboneCard], layers: Sequence[str] | None
) -> list[Kind]:
    """What decides the figures of some networks beside their weights."""
    fed: dict[object, str] = {}
    return [
        (
            absolute_model(card.model),
            counted(card.channels, "channel"),
            read_of(card, layers),
            fed.setdefault(
                (card.low, card.high, card.mean, card.std, card.fixed_size),
                f"preprocessing of {shortest(name, names)}",
            ),
        )
        for name, card in zip(names, cards, strict=True)
    ]


def distinctions(kind: Kind, kinds: Iterable[Kind]) -> list[str]:
    """The fewest words that tell one of some kinds from all others."""
    kept, words = set(kinds), []
    for at, word in enumerate(kind):
        if len(kept) > 1 and len({other[at] for other in kept}) > 1:
            words.append(word)
            kept = {other for other in kept if other[at] == word}
    return words


def shortest(path: str, paths: Iterable[str]) -> str:
    """The last part of a path; all of it where another path ends in the same."""
    last = Path(path).name or path
    return path if any(Path(other).name == last for other in {*paths} - {path}) else last


def read_all(weights: Sequence[str | Path], source: Source) -> list[Loaded]:
    """The networks of weights; those without a run are as the images are."""
    networks = []
    statistics = None
    for name in weights:
        if is_file(name):
            networks.append(read_backbone(name))
            continue
        statistics = statistics or measure(source)
        loaded = read_backbone(name, channels=statistics.channels)
        card = replace(loaded.card, low=statistics.low, high=statistics.high)
        networks.append(loaded._replace(card=card))
    return networks


def reading_of(
    weights: Sequence[str | Path], *, pages: Pages | None = None, nodata: float | None = None
) -> dict[str, Any]:
    """The ``pages`` and ``nodata`` that images are opened with: those given, else of the runs.

    NaN as ``nodata`` is no value beside it, and so None: it means "not measured" in any case.

    Raises:
        ValueError: The runs among the weights have different ones.
    """
    settings = {str(path): run_settings(path) for path in weights}
    reading: dict[str, Any] = {"pages": pages, "nodata": nodata}
    for key in [key for key, value in reading.items() if value is None]:
        by_value = {run[key]: name for name, run in settings.items() if is_set(run.get(key))}
        if len(by_value) > 1:
            text = ", ".join(f"{value} in {name}" for value, name in by_value.items())
            raise ValueError(
                f"{key} is None, and the runs were trained with different values ({text}); give "
                f"{key} (--{key}), or evaluate them one by one"
            )
        reading[key] = next(iter(by_value), None)
    return {key: value if is_set(value) else None for key, value in reading.items()}


def is_set(value: object) -> bool:
    """Whether a setting says anything: NaN, which differs from itself, does not."""
    return value is not None and not (isinstance(value, float) and isnan(value))


def run_settings(weights: str | Path) -> dict[str, Any]:
    """The settings of the run that weights are of; none where they are of none."""
    path = Path(weights).expanduser()
    folder = path if path.is_dir() else run_folder(path)
    return read_settings_if_any(folder / CONFIG) if path.exists() else {}


def is_random(name: str) -> bool:
    """Whether a row of this name holds a draw of random weights."""
    return name.startswith((RANDOM, f"start ({ZERO_INIT}"))


def sizing_contender(contenders: Sequence[Contender]) -> Contender:
    """The one that decides the size of images for all: the first run or file, else the last."""
    files = (
        contender for contender in contenders if contender.baselines and is_file(contender.name)
    )
    return next(files, contenders[-1])


def prepare_all(
    contenders: Sequence[Contender], size: int | Size | None, seed: int, *, views: bool = False
) -> dict[str, Preparation]:
    """How each network is fed: all at one size, but those that take only their own.

    Unless a ``size`` is given it is that of whole images, or of ``views``.
    """

    def usual(card: BackboneCard) -> Size | None:
        return card.image_size if views else None

    sizing = sizing_contender(contenders)
    common = Preparation.of(sizing.card, size or usual(sizing.card), sizing.build(seed)).size
    prepared = {}
    for contender in contenders:
        card, net = contender.card, contender.build(seed)
        try:
            prepared[contender.name] = Preparation.of(card, common, net)
        except ValueError:
            if size is not None:
                raise
            prepared[contender.name] = Preparation.of(card, usual(card), net)
    return prepared


def input_sizes(prepared: Iterable[Preparation]) -> str:
    """The sizes of images as networks take them, in words."""
    sizes = dict.fromkeys(prepare.size for prepare in prepared)
    return ", ".join(
        "{}x{}".format(*size) if isinstance(size, tuple) else f"shorter side {size}"
        for size in sizes
    )


def layers_read(contenders: Sequence[Contender], layers: Sequence[str] | None) -> list[str]:
    """The layers that are read: those named, stacked, else those of the networks."""
    return list(dict.fromkeys(read_of(contender.card, layers) for contender in contenders))


def read_of(card: BackboneCard, layers: Sequence[str] | None) -> str:
    """What is read of a network: the layers named, stacked, else the trained or deepest one."""
    return " + ".join(layers or [card.shown_layer])


def start_of(card: BackboneCard, name: str) -> Contender | None:
    """The weights that a training started from, unless they were plain random ones.

    Args:
        card: Of the trained weights.
        name: Of the row.

    Raises:
        ValueError: They are not there.
        ConnectionError: They could not be downloaded.
    """
    zero_init = card.start == ZERO_INIT
    if card.start == "random" or (zero_init and not zero_last_norms(random_net(card, 0))):
        return None
    build = zero_init_builder(card) if zero_init else fixed_builder(start_net(card))
    return Contender(name, build, card, by_seed=zero_init)


def fixed_builder(net: nn.Module) -> Callable[[int], nn.Module]:
    """A function of the seed that gives this network."""
    return lambda _: net


def random_builder(card: BackboneCard) -> Callable[[int], nn.Module]:
    """A function of the seed that gives random weights."""
    return lambda seed: random_net(card, seed)


def random_net(card: BackboneCard, seed: int) -> nn.Module:
    """The network of a card with random weights. No generator outside moves on."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = card.build()
        return draw_anew(net) if is_module_handed() else net


def zero_init_builder(card: BackboneCard) -> Callable[[int], nn.Module]:
    """A function of the seed that gives random weights with residual blocks as identities."""

    def build(seed: int) -> nn.Module:
        net = random_net(card, seed)
        zero_last_norms(net)
        return net

    return build


def start_net(card: BackboneCard) -> nn.Module:
    """The network of a card with the weights that its training started from, not random ones."""
    net = card.build(pretrained=card.start == "pretrained")
    if card.start not in ("pretrained", AS_HANDED):
        load_weights(net, card.start)
    return net
