"""What the metrics of a run say about it, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite, sqrt
from typing import NamedTuple

from einops import rearrange
from torch import Tensor, cat

from ..evaluation.evaluate import BY_COLOUR
from ..evaluation.health import gauge, verdict
from ..evaluation.results import CLEAR
from .curves import smoothed, thinned

Metrics = Mapping[str, Sequence[float]]
"""The metrics of a run's steps, by name."""


class RunVerdict(NamedTuple):
    """Whether a run did well, in a few words, a sentence, and what else its metrics tell."""

    healthy: bool
    heading: str
    sentence: str
    findings: list[str]


LATEST = 20
"""The verdict is on the mean of this share of the steps, the last ones: one in so many."""
NARROW_RANK = 2.0
"""Effective rank under which features that were wider are said to be collapsing. On street scenes a
good run kept 11, one made to collapse 1.6; the bound of `health` is for certain."""
SLOW = 0.25
"""Share of the time spent waiting for data that is worth a word."""


def judge_run(metrics: Metrics, maps: Sequence[Tensor]) -> RunVerdict:
    """The verdict on the run's last steps; on the features of the shown images, if it has none."""
    figures = [latest(metrics, name) for name in ("spread", "effective_rank")]
    if None in figures:
        figures = list(gauge(cat([rearrange(own, "c h w -> (h w) c") for own in maps])))
    features = verdict(*(figure for figure in figures if figure is not None))
    healthy, heading = False, "Something is wrong with this run"
    if features.healthy:
        healthy, heading = judge_learning(metrics)
    return RunVerdict(healthy, heading, features.sentence, findings(metrics))


def judge_learning(metrics: Metrics) -> tuple[bool, str]:
    """Whether a run whose features have not collapsed did well, and that in a few words.

    Correspondence decides where it was measured: features may spread, and the likeness of pairs
    rise, while cells are told apart no better than before, or by their colour alone. Differences
    that chance would give so few cells count for nothing.
    """
    way, found, rank = likeness_change(metrics), hits(metrics), latest(metrics, "effective_rank")
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


def hits(metrics: Metrics) -> tuple[float, float] | None:
    """How often cells found their spot before the first step and at the end; None if not known."""
    end = latest(metrics, "hit1")
    return None if end is None else (known(metrics, "hit1")[0], end)


def goes_by_colour(metrics: Metrics) -> bool:
    """Whether cells find their spot by colour alone: once it is changed no better than before."""
    found, kept = hits(metrics), latest(metrics, "hit1_colours_kept")
    if found is None or kept is None:
        return False
    begin, end = found
    return end < CLEAR * begin and end + deviation(metrics) < BY_COLOUR * kept


def deviation(metrics: Metrics) -> float:
    """The standard deviation of how often cells find their spot; 0 if their number is not known."""
    share, cells = latest(metrics, "hit1"), latest(metrics, "hit_cells")
    return sqrt(share * (1 - share) / cells) if share is not None and cells else 0.0


def compares_pixels(metrics: Metrics) -> bool:
    """Whether there was a pair of cells at all: none with ``alpha`` 0."""
    return any(known(metrics, "pixel_cosine"))


def likeness_change(metrics: Metrics) -> tuple[float, float] | None:
    """Where the likeness of pairs began and ended; None where too little is known of it.

    Of pairs of cells; of whole views where cells were not compared.
    """
    name = "pixel_cosine" if compares_pixels(metrics) else "instance_cosine"
    _, cosines = thinned(metrics.get("step", ()), metrics.get(name, ()))
    line = smoothed(cosines)
    return (line[0], line[-1]) if len(line) > 1 else None


def known(metrics: Metrics, name: str) -> list[float]:
    """A figure of the steps that have it."""
    return [value for value in metrics.get(name, ()) if isfinite(value)]


def latest(metrics: Metrics, name: str) -> float | None:
    """The mean of a figure over the last steps that have it."""
    values = known(metrics, name)
    last = values[-max(1, len(values) // LATEST) :]
    return sum(last) / len(last) if last else None


def findings(metrics: Metrics) -> list[str]:
    """What else the figures of a run tell, in sentences."""
    told = []
    has_pairs = compares_pixels(metrics)
    if (way := likeness_change(metrics)) is not None:
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
