"""What in the figures says that a run goes wrong, in words."""

from __future__ import annotations

from ..evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD

SMOOTHING = 0.98
"""Share of the running means that stays at each step."""


class Watch:
    """Says in words that a run collapses or diverges, once each time it begins to.

    Collapse: the spread of features falls under `COLLAPSED_SPREAD`, or their effective rank under
    `COLLAPSED_RANK`. Divergence: after the warm-up the running means of both cosines are at most
    0, no better than chance, or the gradient is a thousand times its running mean.

    Args:
        settled: Step from which on divergence is judged.
    """

    def __init__(self, settled: int) -> None:
        self.settled = settled
        self.means: dict[str, float] = {}
        self.seen = 0
        self.said: set[str] = set()

    def __call__(self, line: dict[str, float]) -> list[str]:
        """The sentences about a step, none of which was said before without a recovery between."""
        found: dict[str, str] = {}
        if line.get("spread", 1) < COLLAPSED_SPREAD:
            found["spread"] = (
                f"the features collapse: their spread is {line['spread']:.3g}, under "
                f"{COLLAPSED_SPREAD} (1 is healthy, 0 means every pixel looks alike). Lower lr, "
                "lengthen the warm-up, or raise target_momentum"
            )
        if line.get("effective_rank", COLLAPSED_RANK) < COLLAPSED_RANK:
            found["effective_rank"] = (
                f"the features collapse: their effective rank is {line['effective_rank']:.3g}, "
                f"under {COLLAPSED_RANK}: they vary in hardly any direction. Lower lr, lengthen "
                "the warm-up, or raise target_momentum"
            )
        usual = self.means.get("grad_norm", line["grad_norm"])
        for name in ("pixel_cosine", "instance_cosine", "grad_norm"):
            kept = SMOOTHING * (1 - SMOOTHING**self.seen) / (1 - SMOOTHING ** (self.seen + 1))
            before = self.means.get(name, line[name])
            self.means[name] = kept * before + (1 - kept) * line[name]
        self.seen += 1
        if line["step"] > self.settled and self.seen > 1 / (1 - SMOOTHING):
            if max(self.means["pixel_cosine"], self.means["instance_cosine"]) <= 0:
                found["cosine"] = (
                    "the run diverges: the network predicts its target no better than chance "
                    "(mean cosines at most 0). Lower lr or lengthen the warm-up"
                )
            if line["grad_norm"] > 1000 * usual > 0:
                found["grad_norm"] = (
                    f"the run diverges: the gradient's norm is {line['grad_norm']:.3g}, a thousand "
                    f"times its usual {usual:.3g}. Lower lr, or set clip_grad to 1"
                )
        new = [sentence for name, sentence in found.items() if name not in self.said]
        self.said = set(found)
        return new
