"""The charts of a run: which figures stand together, and what to look for in them."""

from __future__ import annotations

from typing import NamedTuple

from ..evaluation.health import COLLAPSED_RANK, COLLAPSED_SPREAD


class Chart(NamedTuple):
    """What stands in one chart.

    Attributes:
        title: What is shown.
        unit: What the vertical axis counts.
        curves: Name in the metrics and name for people, for each curve.
        meaning: What to look for, a sentence.
        limits: Ends of the vertical axis, as far as they are fixed.
        bound: A value that should not be fallen under, and its name.
        logarithmic: Whether the axis is.
    """

    title: str
    unit: str
    curves: tuple[tuple[str, str], ...]
    meaning: str
    limits: tuple[float | None, float | None] = (None, None)
    bound: tuple[float, str] | None = None
    logarithmic: bool = False


CHARTS = (
    Chart(
        "Likeness of pairs",
        "mean cosine, -1 to 1",
        (("pixel_cosine", "pixel"), ("instance_cosine", "instance")),
        "The figure to watch: it should rise towards 1. A dip after a quick start is normal, since "
        "the target stops being trivially alike.",
        limits=(None, 1.02),
    ),
    Chart(
        "Cells that find their spot",
        "share of cells, 0 to 1",
        (("hit1", "colours changed"), ("hit1_colours_kept", "colours kept")),
        "In two views of images that were kept from training: how often a cell's most similar "
        "cell in the other view sees the same spot. Far apart, the network goes by colour.",
        limits=(0, None),
    ),
    Chart(
        "Probe",
        "mean IoU, 0 to 1",
        (("probe_miou", "probe"),),
        "How well masks are told by a probe on the features. It should rise; where it falls again, "
        "best.ckpt has the better weights.",
    ),
    Chart(
        "Loss",
        "weighted sum of both terms",
        (("loss", "loss"),),
        "Falls as the cosines rise. On its own it does not tell a healthy run from a collapsed "
        "one, whose loss is very low.",
    ),
    Chart(
        "Spread",
        "0 collapsed, 1 even",
        (("spread", "spread"),),
        "How far the cells' features point in different directions.",
        limits=(0, None),
        bound=(COLLAPSED_SPREAD, "collapsed below"),
    ),
    Chart(
        "Effective rank",
        "directions in use",
        (("effective_rank", "effective rank"),),
        "Along how many directions features vary. It may fall at first, and should then hold or "
        "rise.",
        limits=(0, None),
        bound=(COLLAPSED_RANK, "collapsed below"),
    ),
    Chart(
        "Matching cells",
        "pairs per image",
        (("positive_pairs", "pairs"),),
        "How many cells of two views see the same spot. It depends on the crops and the size of "
        "the map, not on learning.",
        limits=(0, None),
    ),
    Chart(
        "Gradient",
        "norm",
        (("grad_norm", "gradient norm"),),
        "Sudden peaks say that the learning rate is at its limit.",
        logarithmic=True,
    ),
    Chart(
        "Learning rate",
        "learning rate",
        (("lr", "learning rate"),),
        "Warm-up, then a cosine down.",
        limits=(0, None),
    ),
    Chart(
        "Speed",
        "images per second",
        (("images_per_second", "images/s"),),
        "The first step is slow, since everything starts then.",
        limits=(0, None),
    ),
)
