"""Health: whether features still tell cells apart, in two figures and a sentence."""

from __future__ import annotations

from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..blocks import full_precision

COLLAPSED_SPREAD = 0.1
"""Spread under which features count as collapsed. Random weights gave 0.18 to 0.86 on real images
(eight architectures, streets and nuclei), trained ones 0.66 to 0.72, a network made to collapse
0.11 and falling."""

COLLAPSED_RANK = 1.25
"""Effective rank of directions under which features count as collapsed: one line and some noise.
Random weights gave 1.3 (nearly black images) to 57, trained ones 3 to 79, a network trained at
thirty times its learning rate 1.21 to 1.25."""


class Gauge(NamedTuple):
    """The two figures of health, plain numbers."""

    spread: float
    effective_rank: float  # of features scaled to length 1


def gauge(features: Tensor) -> Gauge:
    """Both figures, of directions alone: what the losses compare.

    Lengths are left out, for in trained features a few bright cells are often many times as long as
    all others, and the rank would count these.

    Args:
        features: ``(n, c)`` float, one row a cell or an image.
    """
    directions = normalize(at_least_float32(features), dim=1)
    return Gauge(float(spread(directions)), float(effective_rank(directions)))


@torch.no_grad()
def spread(features: Tensor) -> Tensor:
    """How far features point in different directions: about 1 healthy, 0 collapsed.

    The standard deviation of each channel over features scaled to length 1, averaged over the
    channels, times ``sqrt(c)`` (Chen & He, arXiv:2011.10566, sec. 4.1, where healthy features stay
    at ``1 / sqrt(c)``). Features that are never negative, as behind a ReLU, share a direction and
    stay well under 1 without being collapsed.

    Args:
        features: ``(n, c)`` float, one row a cell or an image.

    Returns:
        0-d float32 (float64 of float64) on the features' device, in [0, 1] up to rounding; NaN
        where a feature is not finite. Nothing waits for the device.
    """
    with full_precision(features):
        directions = normalize(at_least_float32(features), dim=1)
        deviations = directions.std(dim=0, correction=0)
        scaled: Tensor = deviations.mean() * features.shape[1] ** 0.5
        return scaled


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """Along how many directions features vary: 1 (a line) up to ``min(n - 1, c)`` (evenly).

    ``exp`` of the entropy of the eigenvalues of the covariance, scaled to sum 1. Roy & Vetterli
    (2007) take the singular values instead, whose squares these are: this form weighs the strong
    directions more and comes out smaller. Costs ``n c min(n, c)``; some thousand rows are plenty.

    Args:
        features: ``(n, c)`` float, one row a cell or an image.

    Returns:
        0-d float32 (float64 of float64) on the features' device; 1 where all rows are equal; NaN
        where a feature is not finite.
    """
    with full_precision(features):
        centred = at_least_float32(features)
        centred = centred - centred.mean(dim=0)
        # Scaled first, so that squares of large values stay finite.
        centred = centred / centred.abs().amax().clamp(min=torch.finfo(centred.dtype).tiny)
        tall = centred.shape[0] >= centred.shape[1]
        table = centred.mT @ centred if tall else centred @ centred.mT  # the same eigenvalues
        finite = table.isfinite().all()
        values = torch.linalg.eigvalsh(torch.where(finite, table, 0)).clamp(min=0)
        shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
        rank = torch.special.entr(shares).sum().exp()
        return torch.where(finite, rank, torch.nan)


def at_least_float32(features: Tensor) -> Tensor:
    """The same numbers without half precision."""
    return features if features.dtype == torch.float64 else features.float()


class Verdict(NamedTuple):
    """Whether both figures of health are finite and above their bounds, and that in words."""

    healthy: bool
    sentence: str

    def __str__(self) -> str:
        return self.sentence


def verdict(spread: float, rank: float) -> Verdict:
    """Whether features have collapsed, in words, by the figures that `gauge` gives."""
    figures = f"spread {spread:.2f}, effective rank {rank:.1f}"
    healthy = f"healthy: spread at least {COLLAPSED_SPREAD}, rank at least {COLLAPSED_RANK}"
    if not (isfinite(spread) and isfinite(rank)):
        return Verdict(
            False,
            f"The features are not finite ({figures}): the network has diverged. Go back to an "
            "earlier checkpoint and continue with a lower learning rate, or in float32.",
        )
    if spread < COLLAPSED_SPREAD:
        return Verdict(
            False,
            f"The features have collapsed ({figures}; {healthy}): they are nearly the same "
            "in every cell. Lower the learning rate, raise the target's momentum, or use a larger "
            "batch.",
        )
    if rank < COLLAPSED_RANK:
        return Verdict(
            False,
            f"The features have collapsed onto a line ({figures}; {healthy}): cells differ in one "
            "direction only, often brightness. Lower the learning rate, or use stronger colour "
            "augmentation.",
        )
    return Verdict(True, f"The features have not collapsed ({figures}).")
