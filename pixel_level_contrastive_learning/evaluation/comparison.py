"""What figures of several networks mean: gains over random weights and the start, in words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from .baselines import is_random
from .results import MIOU, Row, masks_saved

FINETUNE = "finetune"
ALL_MAPS = "linear-all"
CLUSTERING = "overclustering"
PROTOCOLS = {
    "linear": "A linear probe",
    ALL_MAPS: "A linear probe on all maps",
    "knn": "A nearest-neighbour vote",
    "hummingbird": "Nearest-neighbour retrieval",
    CLUSTERING: "Clustering",
    FINETUNE: "Fine-tuning",
}
"""The protocols, and how a sentence begins with each."""
CLEAR = 1.05
"""Times another figure from which a gain is called one; less may be chance."""
ONE_DRAW = 1.25
"""Times a single draw of random weights from which a gain is called one: on sixty drawn scenes
another draw reached up to 1.17 times the first."""
LUCK = "better than one draw of random weights, but another may do as well. Repeat with --seeds 3."


def gain(ours: Row, other: Row, key: str) -> int:
    """1 if a figure is clearly more than another row's, -1 if clearly less, else 0."""
    reached, base = ours.scores[key], other.scores[key]
    noise = 2 * max(row.deviations.get(key, 0.0) for row in (ours, other))
    if reached > max(CLEAR * base, base + noise):
        return 1
    return -1 if reached < base - noise and reached * CLEAR < base else 0


def may_be_luck(ours: Row, other: Row, key: str) -> bool:
    """Whether a row is one draw of random weights, and another draw might reach what ours do."""
    drawn_once = is_random(other.name) and sum(key in scores for scores in other.seeds) == 1
    return drawn_once and ours.scores[key] < ONE_DRAW * other.scores[key]


def in_words(rows: Sequence[Row], words: Callable[[list[Row]], str]) -> str:
    """What the figures mean: a sentence for each of the weights that were asked for.

    ``words`` gives that of the last of some rows; its baselines come first. Where all are random,
    each has its own.
    """
    by_name = {row.name: row for row in rows}
    sentences = {
        row.name: words([*(by_name[name] for name in row.baselines), row])
        for row in [row for row in rows if row.baselines] or rows
    }
    if len(sentences) > 1:
        return "\n".join(f"{name}: {sentence}" for name, sentence in sentences.items())
    return next(iter(sentences.values()))


def what_it_means(rows: Sequence[Row], protocol: str, split: str) -> str:
    """The figures of the last row in words: what is gained over random weights, and the start."""
    random, start, ours = rows[0], rows[-2:][0], rows[-1]
    rival = max(start, random, key=lambda row: row.scores[MIOU])
    reached, base = ours.scores[MIOU], random.scores[MIOU]
    figure = f"{PROTOCOLS[protocol]} reaches {reached:.3f} mIoU on {split}"
    if len(rows) == 1:
        return f"{figure} with random weights: the baseline for other weights of this network."
    text = f"{figure}, {times(reached, base, 'random weights')}"
    if len(rows) == 3:
        text += f" and {times(reached, start.scores[MIOU], 'the starting weights')}"
    return f"{text}: {verdict_of(ours, rival, random, start)}{saved_in_words(rows)}"


def times(reached: float, base: float, name: str) -> str:
    """How many times another figure is reached; the other alone where it is shown as 0."""
    shown = f"{base:.3f}"
    return f"{reached / base:.2f} times {name} ({shown})" if float(shown) else f"{name} {shown}"


def verdict_of(ours: Row, rival: Row, random: Row, start: Row) -> str:
    """Whether there is a gain over the better of random weights and the start, in words."""
    if gain(ours, random, MIOU) < 0:
        return (
            "worse than random. Check the loss and the features' health (evaluate with images "
            "instead of data), and try other layers."
        )
    if gain(ours, start, MIOU) < 0:
        return "worse than the start. Keep the starting weights, or train with a lower lr."
    if gain(ours, rival, MIOU) < 1:
        return "no clear gain. Train longer, use more images, or try other layers."
    if may_be_luck(ours, rival, MIOU):
        return LUCK
    return f"clearly better than {'random' if rival is random else 'the starting'} weights."


def curve_shown(protocols: Collection[str]) -> str | None:
    """The protocol whose label curve is drawn and told: fine-tuning, else the first."""
    return FINETUNE if FINETUNE in protocols else next(iter(protocols), None)


def saved_in_words(rows: Sequence[Row]) -> str:
    """How many masks are saved beside each baseline, where there are label curves."""
    ours = rows[-1]
    protocol = curve_shown(ours.curves)
    if protocol is None:
        return ""
    parts = [masks_saved(ours, other, protocol) for other in rows[:-1]]
    known = "; ".join(part for part in parts if part)
    return f" Label curve ({PROTOCOLS[protocol].lower()}): {known}." if known else ""
