"""The table: what weights are worth beside random ones, with labels or without."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checks import one_of, raise_together, share, size_pair, whole
from ..data.sources import PREDICTIONS, Files
from ..weights import BackboneCard
from .contenders import RANDOM, SHUT, Contender, Field, line_up
from .features import Reader, chosen_device
from .finetuning import STEPS, finetuned
from .labelled import Labelled, open_labelled
from .outcome import LUCK, Evaluation, Row, gain, may_be_luck
from .panels import write_panels
from .preparation import Preparation, Size
from .scoring import Scored, Scores
from .segmentation import probed
from .unlabelled import without_labels

log = logging.getLogger(__name__)

PROTOCOLS = ("linear", "knn", "finetune")
FINETUNE_SEEDS = 3
"""Seeds of fine-tuning unless a number is given; the other protocols take one."""
PICTURES = 8
"""Images of which predictions are drawn, spread evenly over the split."""


def evaluate(
    weights: str | Path,
    *,
    data: str | Path | None = None,
    images: str | Path | None = None,
    protocol: str = "linear",
    layers: Sequence[str] | None = None,
    fraction: float = 1.0,
    seeds: int | None = None,
    seed: int = 0,
    size: int | Size | None = None,
    split: str = "val",
    steps: int = STEPS,
    out: str | Path | None = None,
    device: str | None = None,
) -> Evaluation:
    """What weights are worth: the same network with random weights stands beside them.

    Where training did not start from random weights, those it started from stand there too.

    With labels, ``linear`` fits one linear layer to frozen features, ``knn`` lets the nearest
    training cells vote, and ``finetune`` trains the whole network with a U-Net-like decoder. Mean
    IoU counts the classes that are in the masks or were predicted. Without labels, cells of one
    view of an image look for their spot in another, and the features' health is measured.

    Args:
        weights: A run directory, a file of `save_backbone` or `export`, ``torchvision/NAME``,
            ``timm/NAME``, or ``random:MODEL``.
        data: Folder with ``images/{train,val}`` and ``masks/{train,val}``, see `open_labelled`.
        images: Images without labels instead, best ones that were not trained on.
        protocol: ``linear``, ``knn`` or ``finetune``.
        layers: Layers whose features are judged, several stacked. Default: the one that was
            trained, else the deepest map. Fine-tuning reads a map of each stride instead.
        fraction: Share of the training images whose masks are used, above 0, at most 1.
        seeds: How often to repeat, each time with the next seed: other random weights, another
            share of the masks, another start of the decoder. Default: 3 for fine-tuning, else 1.
        seed: The first seed.
        size: What images are fed at: the shorter side in pixels, or exactly ``(height, width)``.
            Default: 1.4 times the views of the training, the scale it saw. Masks keep their size.
            Without labels the size of the views, by default that of the training.
        split: Which images to judge by.
        steps: Updates of fine-tuning.
        out: Folder for ``evaluation.json``, without labels ``correspondence.json``, and pictures.
        device: Where to compute; default: a GPU if there is one.

    Raises:
        ValueError: Values out of range (all at once), weights or layers that are not there, or
            masks that are wrong, with the files' names.
    """
    raise_together(
        one_of("protocol", protocol, PROTOCOLS),
        share("fraction", fraction),
        None if seeds is None else whole("seeds", seeds, 1),
        whole("seed", seed, 0),
        None if size is None else size_pair("size", size),
        whole("steps", steps, 1),
        data_or_images(data, images),
        finetuning_alone(protocol, layers, steps) if data is not None else None,
        *(
            needs_labels(name, value, usual)
            for name, value, usual in (
                ("protocol", protocol, "linear"),
                ("fraction", fraction, 1.0),
                ("split", split, "val"),
                ("steps", steps, STEPS),
            )
            if data is None and images is not None
        ),
    )
    if isinstance(weights, nn.Module):
        raise ValueError(
            f"weights is a {type(weights).__name__}; give the folder of its run (result.run_dir), "
            "or a file of its weights with a card, see save_card"
        )
    place = chosen_device(device)
    if data is None:
        assert images is not None
        repeats = range(seed, seed + (seeds or 1))
        found = without_labels(weights, images, layers, size, repeats, place)
    else:
        train, judged = open_labelled(data, ("train", split))
        field = line_up(weights, Files([str(path) for path in train.images]))
        count = seeds or (FINETUNE_SEEDS if protocol == "finetune" else 1)
        prepare = Preparation.of(field.card, size, field.contenders[-1].build(seed))
        repeats = range(seed, seed + count)
        plan = Plan(train, judged, prepare, protocol, layers, fraction, repeats, steps)
        if split == "train":
            field.notes.append("Judged by the very images it learned from, and so too kindly.")
        found = with_labels(str(weights), str(data), split, field, plan, out, place)
    if out is not None:
        found.write(out)
    return found


def data_or_images(data: object, images: object) -> str | None:
    """The complaint about neither or both."""
    if (data is None) != (images is None):
        return None
    given = "neither" if data is None else "both"
    return (
        f"{given} of data and images given; give data (a folder of images and masks) to evaluate "
        "with labels, or images to evaluate without"
    )


def needs_labels(name: str, value: object, usual: object) -> str | None:
    """The complaint about a setting that means nothing where there are no labels."""
    if value == usual:
        return None
    return f"{name} is {value!r}, which is about labels; give data, or leave it out with images"


def finetuning_alone(protocol: str, layers: Sequence[str] | None, steps: int) -> str | None:
    """The complaint about layers where a map of each stride is read, or steps where none are."""
    if protocol == "finetune" and layers is not None:
        return (
            f"layers is {list(layers)}, but fine-tuning reads a map of each stride; leave it out, "
            "or take protocol linear or knn"
        )
    if protocol in ("linear", "knn") and steps != STEPS:
        return f"steps is {steps}, which is about fine-tuning; take that protocol, or leave it out"
    return None


class Plan(NamedTuple):
    """How networks are judged by labels."""

    train: Labelled
    judged: Labelled
    prepare: Preparation
    protocol: str
    layers: Sequence[str] | None
    fraction: float
    seeds: range
    steps: int

    def chance(self, contender: Contender) -> bool:
        """Whether a seed changes what a contender reaches."""
        return contender.by_seed or self.fraction < 1 or self.protocol == "finetune"

    def run(self, net: nn.Module, card: BackboneCard, seed: int, keep: Sequence[int]) -> Scored:
        """What a network reaches with a seed."""
        train = self.train.share(self.fraction, seed) if self.fraction < 1 else self.train
        if self.protocol == "finetune":
            return finetuned(
                net, train, self.judged, self.prepare, steps=self.steps, seed=seed, keep=keep
            )
        size = first_size(self.judged, self.prepare)
        reader = Reader(net, self.layers or [card.pixel_layer], card.channels, size)
        return probed(
            reader, train, self.judged, self.prepare, protocol=self.protocol, seed=seed, keep=keep
        )


def first_size(split: Labelled, prepare: Preparation) -> Size:
    """The ``(height, width)`` at which a split's first image is fed."""
    mask = split.read(0, prepare.shortest).mask
    return prepare.fitted((mask.shape[0], mask.shape[1]))


def with_labels(
    weights: str,
    data: str,
    split: str,
    field: Field,
    plan: Plan,
    out: str | Path | None,
    device: torch.device,
) -> Evaluation:
    """Judge all networks by labels, and draw what they predict."""
    keep = [len(plan.judged) * i // PICTURES for i in range(PICTURES)] if out is not None else []
    rows: list[Row] = []
    predictions: dict[str, dict[int, Tensor]] = {}
    for contender in field.contenders:
        scored: list[Scored] = []
        for seed in plan.seeds if plan.chance(contender) else plan.seeds[:1]:
            net = contender.build(seed).to(device)
            scored.append(plan.run(net, field.card, seed, () if scored else keep))
            log.info("%s, seed %d: mIoU %.3f", contender.name, seed, scored[-1].scores.miou)
        predictions[contender.name] = scored[0].kept
        rows.append(
            labelled_row(contender.name, [own.scores for own in scored], plan.judged.classes)
        )
    if out is not None:
        folder = Path(out).expanduser() / PREDICTIONS
        write_panels(folder, plan.judged, plan.prepare, predictions)
    settings: dict[str, Any] = {
        "split": split,
        "layers": list(plan.layers or [field.card.pixel_layer]),
        "fraction": plan.fraction,
        "seeds": len(plan.seeds),
        "fed at": fed_at(plan.prepare),
    }
    if plan.protocol == "finetune":
        settings |= {"layers": "one of each stride", "steps": plan.steps}
    return Evaluation(
        weights=weights,
        data=data,
        protocol=plan.protocol,
        settings=settings,
        rows=tuple(rows),
        sentence=what_it_means(rows, plan.protocol, split),
        notes=tuple(field.notes),
    )


def labelled_row(name: str, scores: Sequence[Scores], classes: Sequence[str]) -> Row:
    """The row of a network that was judged by labels, for each seed."""
    figures = [{"mIoU": own.miou, "pixel accuracy": own.accuracy} for own in scores]
    return Row.of(name, figures, [dict(zip(classes, own.iou, strict=True)) for own in scores])


def fed_at(prepare: Preparation) -> str:
    """At what size images are fed, in words."""
    if isinstance(prepare.size, tuple):
        return "{}x{}".format(*prepare.size)
    return f"shorter side {prepare.size}"


def what_it_means(rows: Sequence[Row], protocol: str, split: str) -> str:
    """The figures in words: how much is gained over random weights, and whether it is a gain."""
    random, start, ours = rows[0], rows[-2:][0], rows[-1]
    rival = max(start, random, key=lambda row: row.scores["mIoU"])
    reached, base = ours.scores["mIoU"], random.scores["mIoU"]
    figure = f"{NAMES[protocol]} reaches {reached:.3f} mIoU on {split}"
    if len(rows) == 1:
        return f"{figure} with random weights: what other weights of this network have to beat."
    beside = f"{figure}, {reached / max(base, 1e-9):.2f} times random weights ({base:.3f})"
    if len(rows) == 3:
        begun = start.scores["mIoU"]
        beside += f" and {reached / max(begun, 1e-9):.2f} times what it started from ({begun:.3f})"
    if gain(ours, random, "mIoU") < 0:
        return (
            f"{beside}: worse than random. Look at the loss and at the features' health (evaluate "
            "with images in place of data), and at whether other layers do better."
        )
    if gain(ours, start, "mIoU") < 0:
        return f"{beside}: training made them worse. Keep the others, or train with a lower lr."
    if gain(ours, rival, "mIoU") < 1:
        return f"{beside}: no clear gain. Train for longer, on more images, or try other layers."
    if rival.name in (RANDOM, SHUT) and may_be_luck(ours, rival, "mIoU"):
        return f"{beside}: {LUCK}"
    compared = "random ones" if rival is random else "those it started from"
    return f"{beside}: the weights know more of these classes than {compared} do."


NAMES = {"linear": "A linear probe", "knn": "A vote of neighbours", "finetune": "Fine-tuning"}
