"""What the metrics of a run say about it, in words."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt
from typing import NamedTuple

from einops import rearrange
from torch import Tensor, cat

from ..evaluation.baselines import is_random
from ..evaluation.comparison import CLEAR, gain, may_be_luck
from ..evaluation.correspondence import BY_COLOUR
from ..evaluation.health import gauge, verdict
from ..evaluation.results import MIOU, Evaluation
from .curves import Metrics, curve, running_mean

LATEST = 20
"""The last steps, one in so many of all, whose mean the verdict is on."""
NARROW_RANK = 2.0
"""Effective rank under which features that were wider are said to be collapsing. On street scenes a
good run kept 11, one made to collapse 1.6; the bound of `health` is for certain."""
SLOW = 0.25
"""Share of the time spent waiting for images that is worth a word."""


class RunVerdict(NamedTuple):
    """Whether a run did well, in a few words, a sentence, and what else its metrics tell."""

    healthy: bool
    heading: str
    sentence: str
    findings: list[str]


class Change(NamedTuple):
    """A metric at the start of a run and at its end."""

    start: float
    end: float


def judge_run(
    metrics: Metrics, maps: Sequence[Tensor], evaluation: Evaluation | None = None
) -> RunVerdict:
    """The verdict on the last steps; on maps ``(c, h, w)`` if these are NaN or it is not known.

    What an evaluation of the run with labels found overrules that it did well.
    """
    health = [latest(metrics, name) for name in ("spread", "effective_rank")]
    if None in health or not all(layer_map.isfinite().all() for layer_map in maps):
        health = list(gauge(cat([rearrange(layer_map, "c h w -> (h w) c") for layer_map in maps])))
    features = verdict(*(figure for figure in health if figure is not None))
    healthy, heading = False, "Something is wrong with this run"
    if features.healthy:
        healthy, heading = judge_learning(metrics)
    if healthy and evaluation is not None:
        healthy, heading = judge_gain(evaluation) or (healthy, heading)
    return RunVerdict(healthy, heading, features.sentence, findings(metrics))


def judge_learning(metrics: Metrics) -> tuple[bool, str]:
    """Whether a run whose features have not collapsed did well, and that in a few words."""
    # Correspondence decides where it was measured: features may spread, and the likeness of pairs
    # rise, while cells are told apart no better than before, or by their colour alone. Differences
    # that chance would give so few cells count for nothing.
    cosine, hit = cosine_change(metrics), hit_change(metrics)
    rank = latest(metrics, "effective_rank")
    if rank is not None and rank < NARROW_RANK < max(known(metrics, "effective_rank")):
        return False, "The features are collapsing"
    grew = cosine is None or cosine.end > cosine.start
    if hit is not None:
        if goes_by_colour(metrics):
            return False, "Matching relies on colour"
        chance = hit_deviation(metrics)
        if max(hit.end * CLEAR, hit.end + 2 * chance) < hit.start:
            return False, "Worse than at the start"
        grew = grew and hit.end >= max(hit.start * CLEAR, hit.start + chance)
    if not grew:
        return True, "Healthy features, little learned"
    # Pairs also grow alike where nothing but colours is learned.
    return True, "The features look healthy" if hit is None else "The run looks healthy"


def judge_gain(evaluation: Evaluation) -> tuple[bool, str] | None:
    """The same of figures with labels; None where these show a gain, or are of several weights."""
    rows = [row for row in evaluation.rows if row.baselines and MIOU in row.scores]
    if len(rows) != 1:
        return None
    result, gained = rows[0], True
    for baseline in (row for row in evaluation.rows if row.name in result.baselines):
        difference = gain(result, baseline, MIOU)
        if difference < 0:
            weights = "random weights" if is_random(baseline.name) else "the starting weights"
            return False, f"Worse than {weights}"
        gained = gained and difference > 0 and not may_be_luck(result, baseline, MIOU)
    return None if gained else (True, "Healthy features, no clear gain")


def hit_change(metrics: Metrics) -> Change | None:
    """How often cells found their spot before the first step and at the end, if it was measured."""
    values = known(metrics, "hit1")  # steps without a measurement repeat the one before
    # Older runs note no step.
    distinct = [set(known(metrics, name)) for name in ("hit_step", "hit1")]
    return Change(values[0], values[-1]) if max(map(len, distinct)) > 1 else None


def goes_by_colour(metrics: Metrics) -> bool:
    """Whether cells find their spot by colour alone: once it is changed no better than before."""
    hit, unchanged = hit_change(metrics), known(metrics, "hit1_colours_kept")
    if hit is None or not unchanged:
        return False
    return (
        hit.end < CLEAR * hit.start and hit.end + hit_deviation(metrics) < BY_COLOUR * unchanged[-1]
    )


def hit_deviation(metrics: Metrics) -> float:
    """The standard deviation of how often cells find their spot; 0 if their number is not known."""
    shares, cells = known(metrics, "hit1"), known(metrics, "hit_cells")
    return sqrt(shares[-1] * (1 - shares[-1]) / cells[-1]) if shares and any(cells) else 0.0


def compares_pixels(metrics: Metrics) -> bool:
    """Whether there was a pair of cells at all: none with ``alpha`` 0."""
    return any(known(metrics, "pixel_cosine"))


def cosine_change(metrics: Metrics) -> Change | None:
    """The likeness of pairs of cells, or of whole views where cells were not compared."""
    name = "pixel_cosine" if compares_pixels(metrics) else "instance_cosine"
    line = running_mean(curve(metrics, name)[1])
    return Change(line[0], line[-1]) if len(line) > 1 else None


def known(metrics: Metrics, name: str) -> list[float]:
    """A metric of the steps that have it."""
    return [value for value in metrics.get(name, ()) if isfinite(value)]


def latest(metrics: Metrics, name: str) -> float | None:
    """The mean of a metric over the last steps that have it."""
    values = known(metrics, name)
    recent = values[-max(1, len(values) // LATEST) :]
    return sum(recent) / len(recent) if recent else None


def findings(metrics: Metrics) -> list[str]:
    """What else the metrics of a run tell, in sentences."""
    sentences = []
    has_pairs = compares_pixels(metrics)
    cosine, hit = cosine_change(metrics), hit_change(metrics)
    if cosine is not None:
        subject = "cells that see the same spot" if has_pairs else "two views of an image"
        sentences.append(
            f"The similarity of {subject} {'rose' if cosine.end > cosine.start else 'fell'} from "
            f"{cosine.start:z.2f} to {cosine.end:z.2f} (mean cosine; 1 is perfect)."
        )
    if hit is not None:
        sentences.append(
            f"Cells find the same spot in another view {hit.end:.0%} of the time, "
            f"{hit.start:.0%} before the first step."
        )
    elif cosine is not None:
        sentences.append(
            "Whether cells find the same spot in another view was not measured after training, and "
            "a rising cosine does not show it. Run pixelcl evaluate RUN --images DIR."
        )
    if goes_by_colour(metrics):
        unchanged = known(metrics, "hit1_colours_kept")[-1]
        sentences.append(
            f"With colours unchanged, {unchanged:.0%} of the time: "
            "use stronger colour augmentation in training (--jitter, --prob-gray)."
        )
    sentences += probe_findings(metrics)
    pairs = latest(metrics, "positive_pairs")
    if pairs is not None and not has_pairs:
        sentences.append("No cells were compared: alpha is 0, or no two views see the same spot.")
    elif pairs is not None:
        sentences.append(f"Each image has {pairs:.0f} matching pairs of cells on average.")
    waiting = latest(metrics, "waiting")
    if waiting is not None and waiting > SLOW:
        sentences.append(
            f"{waiting:.0%} of the time is spent waiting for images: use more workers, or put the "
            "images in shards."
        )
    return sentences


def probe_findings(metrics: Metrics) -> list[str]:
    """What the probes of a run tell: their last score, their first, and their best."""
    scores = known(metrics, "probe_miou")  # steps without a probe repeat the one before
    if not scores:
        return []
    text, best = f"A probe reaches {scores[-1]:.3f} mIoU", max(scores)
    if isfinite(metrics["probe_miou"][0]):  # else probes began when the run was resumed
        text += f"; {scores[0]:.3f} before the first step"
        if best == scores[0]:  # which has no checkpoint
            return [f"{text}, and no probe after it was better."]
    return [f"{text}, {best:.3f} at best. best.ckpt has the best weights that were probed."]
