"""The judgement on a run: what its figures say, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

from einops import rearrange
from torch import Tensor, cat

from ..evaluation.health import Verdict, effective_rank, spread, verdict
from .curves import smoothed, thinned
from .page import verdict_card

LATEST = 20
"""The verdict is on the mean of this share of the steps, the last ones: one in so many."""
SLOW = 0.25
"""Share of the time spent waiting for data that is worth a word."""


def judgement(metrics: Mapping[str, Sequence[float]], maps: Sequence[Tensor]) -> str:
    """The verdict on the run's last steps; on the features of the shown images, if it has none."""
    figures = [latest(metrics, name) for name in ("spread", "effective_rank")]
    if None in figures:
        cells = cat([rearrange(own, "c h w -> (h w) c") for own in maps])
        figures = [float(spread(cells)), float(effective_rank(cells))]
    said: Verdict = verdict(*(figure for figure in figures if figure is not None))
    heading = "Something is wrong with this run"
    if said.healthy:
        heading = "The features look sound"
        if (way := course(metrics)) is not None:
            rose = way[1] > way[0]
            heading = "The run looks healthy" if rose else "Sound features, little learned"
    return verdict_card(said.healthy, heading, said.sentence, findings(metrics))


def course(metrics: Mapping[str, Sequence[float]]) -> tuple[float, float] | None:
    """Where the likeness of pairs began and ended; None where too little is known of it."""
    _, cosines = thinned(metrics.get("step", ()), metrics.get("pixel_cosine", ()))
    line = smoothed(cosines)
    return (line[0], line[-1]) if len(line) > 1 else None


def latest(metrics: Mapping[str, Sequence[float]], name: str) -> float | None:
    """The mean of a figure over the last steps that have it."""
    values = [value for value in metrics.get(name, ()) if isfinite(value)]
    last = values[-max(1, len(values) // LATEST) :]
    return sum(last) / len(last) if last else None


def findings(metrics: Mapping[str, Sequence[float]]) -> list[str]:
    """What else the figures of a run tell, in sentences."""
    told = []
    if (way := course(metrics)) is not None:
        begin, end = way
        told.append(
            f"The likeness of cells that see the same spot {'rose' if end > begin else 'fell'} "
            f"from {begin:.2f} to {end:.2f} (mean cosine; 1 is perfect)."
        )
    matched = latest(metrics, "positive_pairs")
    if matched is not None:
        told.append(f"An image gives {matched:.0f} matching pairs of cells on average.")
    waiting = latest(metrics, "waiting")
    if waiting is not None and waiting > SLOW:
        told.append(
            f"{waiting:.0%} of the time goes by waiting for images: more workers, or the images in "
            "shards, would make it faster."
        )
    return told
