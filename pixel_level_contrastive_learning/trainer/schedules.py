"""What changes while training, as functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, pi

WARMUP_FROM = 1 / 100
"""Share of the peak learning rate at step 0, as in the authors' release."""


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from a hundredth of the peak, then half a cosine (the authors' schedule).

    Attributes:
        peak: The largest learning rate.
        steps: Steps of the run.
        warmup: Steps of the warm-up; step ``warmup`` is the first at the peak.
        final: Where the cosine would arrive at step ``steps``.
    """

    peak: float
    steps: int
    warmup: int
    final: float

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step <= self.warmup:
            done = step / self.warmup if self.warmup else 1.0
            return self.peak * (WARMUP_FROM + (1 - WARMUP_FROM) * done)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final + (self.peak - self.final) * (1 + cos(pi * done)) / 2


@dataclass(frozen=True)
class TargetMomentum:
    """What share of itself the target keeps: from ``start`` to 1 by half a cosine.

    The authors move the target before a step and we after it: the update after step ``s``, counted
    from 0, is theirs of ``k = s + 1``.

    Attributes:
        start: The momentum at ``k = 0``.
        steps: Steps of the run.
    """

    start: float
    steps: int

    def __call__(self, step: int) -> float:
        """The momentum of the update that follows a step, counted from 0."""
        return 1 - (1 - self.start) * (cos(pi * (step + 1) / self.steps) + 1) / 2
