"""Contenders: the networks that stand side by side, all of one kind, each with other weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..backbones.checkpoint import ZERO_INIT, BackboneCard, read_backbone
from ..backbones.factory import build_backbone, zero_last_norms
from ..backbones.state_dict import load_weights
from ..data.sources import Source
from ..data.statistics import measure

log = logging.getLogger(__name__)

RANDOM = "random weights"
SHUT = f"start ({ZERO_INIT})"
"""Random weights, too: what they are called where training started from such."""


class Contender(NamedTuple):
    """A network that is judged.

    Attributes:
        name: What it is called in the table.
        build: The network for a seed.
        by_seed: Whether the seed changes its weights.
    """

    name: str
    build: Callable[[int], nn.Module]
    by_seed: bool = False


class Field(NamedTuple):
    """All that are judged, the one that was asked for last.

    Attributes:
        contenders: Random weights as the library draws them, those that training started from
            where it did not start from such, and those that were asked for.
        card: How all of them are used.
        notes: What the reader of the table should know.
    """

    contenders: list[Contender]
    card: BackboneCard
    notes: list[str]


def line_up(weights: str | Path, source: Source) -> Field:
    """The weights that were asked for, and what they are to be compared with.

    Args:
        weights: A run directory, a file, ``torchvision/NAME``, ``timm/NAME`` or ``random:MODEL``.
        source: The images. Weights without a run are built for their channels, and scale 16-bit
            and float values by what is found in them.

    Raises:
        ValueError: There are no such weights.
    """
    name = str(weights)
    random = Contender(RANDOM, lambda seed: random_net(card, seed), by_seed=True)
    if not is_file(weights):
        statistics = measure(source)
        loaded = read_backbone(weights, channels=statistics.channels)
        card = replace(loaded.card, low=statistics.low, high=statistics.high)
        asked = [] if name.startswith("random:") else [Contender(name, lambda _: loaded.net)]
        return Field([random, *asked], card, [])
    loaded = read_backbone(weights)
    card = loaded.card
    field = Field([random], card, [])
    if card.start == ZERO_INIT:
        if zero_last_norms(random_net(card, 0)):
            shut = Contender(SHUT, lambda seed: shut_net(card, seed), by_seed=True)
            field.contenders.append(shut)
    elif card.start != "random":
        try:
            start = start_net(card)
        except (ValueError, ConnectionError) as error:
            note = f"The weights it started from ({card.start}) are not at hand: {error}"
            log.warning(note)
            field.notes.append(note)
        else:
            called = Path(card.start).name or card.start
            field.contenders.append(Contender(f"start ({called})", lambda _: start))
    field.contenders.append(Contender(name, lambda _: loaded.net))
    return field


def is_file(weights: str | Path) -> bool:
    """Whether weights are a run or a file, and not a library's or random ones."""
    text = str(weights)
    if text.startswith("random:"):
        return False
    return not text.startswith(("torchvision/", "timm/")) or Path(text).exists()


def random_net(card: BackboneCard, seed: int) -> nn.Module:
    """The network of a card with random weights. No generator outside moves on."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_backbone(card.model, channels=card.channels, image_size=card.image_size)


def shut_net(card: BackboneCard, seed: int) -> nn.Module:
    """The same, its residual blocks as identities."""
    net = random_net(card, seed)
    zero_last_norms(net)
    return net


def start_net(card: BackboneCard) -> nn.Module:
    """The network of a card with the weights that its training started from, not random ones."""
    pretrained = card.start == "pretrained"
    net = build_backbone(
        card.model, channels=card.channels, image_size=card.image_size, pretrained=pretrained
    )
    if not pretrained:
        load_weights(net, card.start)
    return net
