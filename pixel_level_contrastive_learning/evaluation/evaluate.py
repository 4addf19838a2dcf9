"""`evaluate`: what weights are worth beside random ones, with masks or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..backbones.custom import Model, handing_over
from ..checks import Pages, is_number, one_of, raise_together, share, size_pair, whole
from ..data.segmentation import open_labelled
from ..files import check_writable
from .baselines import reading_of
from .comparison import ALL_MAPS, FINETUNE, PROTOCOLS
from .correspondence import evaluate_unlabelled
from .features import Size, chosen_device
from .finetuning import STEPS
from .results import Evaluation
from .segmentation import Plan, evaluate_labelled

USUAL = ("linear", ALL_MAPS, "knn")
"""Protocols unless some are named; with several fractions fine-tuning beside them."""


def evaluate(
    weights: str | Path | Sequence[str | Path],
    *,
    data: str | Path | None = None,
    images: str | Path | None = None,
    protocol: str | Sequence[str] | None = None,
    layers: Sequence[str] | None = None,
    fraction: float = 1.0,
    fractions: Sequence[float] | None = None,
    seeds: int | None = None,
    seed: int = 0,
    size: int | Size | None = None,
    split: str = "val",
    steps: int = STEPS,
    out: str | Path | None = None,
    device: str | None = None,
    model: Model | None = None,
    pages: Pages | None = None,
    nodata: float | None = None,
    ids: str | None = None,
    colours: str | Path | None = None,
) -> Evaluation:
    """What weights are worth: the same networks with random weights stand beside them.

    Where training did not start from random weights, those it started from stand there too. Mean
    IoU counts the classes that are in the masks or were predicted. Without labels, cells of one
    view of an image look for their spot in another, and the features' health is measured.

    Args:
        weights: One or several: a run directory, a file of `save_backbone` or `export`,
            ``torchvision/NAME``, ``timm/NAME``, ``hf://OWNER/NAME`` or ``random:MODEL``.
        data: Folder with ``images/{train,val}`` and ``masks/{train,val}``, see `open_labelled`.
        images: Images without labels instead, best ones that were not trained on.
        protocol: One or several; the figures of the first are told in words. ``linear`` fits a
            linear layer to frozen features and ``linear-all`` one to a map of each stride, ``knn``
            lets the nearest training cells vote, ``hummingbird`` too, as in arXiv:2306.01667,
            ``overclustering`` groups cells without masks and names the groups, as in
            arXiv:2204.13101, and ``finetune`` trains the whole network with a U-Net-like decoder.
            Default: ``linear``, ``linear-all`` and ``knn``, with ``fractions`` ``finetune`` too,
            without those that read a map of each stride where a network has no coarse one.
        layers: Layers whose features are read, several stacked. Default: the one that was
            trained, else the deepest map. ``linear-all`` and ``finetune`` read a map of each
            stride instead.
        fraction: Share of the training images whose masks are used, above 0, at most 1.
        fractions: Several of them in place of one: they give a label curve for each protocol.
        seeds: How often to repeat, each time with the next seed: other random weights, another
            share of the masks, another start of the decoder. Default: 3 for fine-tuning and for
            several fractions, else 1.
        seed: The first seed.
        size: What images are fed at: the shorter side in pixels, or exactly ``(height, width)``.
            Default: 1.4 times the views of the first run among the weights, the scale it saw.
            Masks keep their size. Without labels the size of the views, by default that of the
            training.
        split: Which images to score.
        steps: Updates of fine-tuning, whose learning rates are chosen for each of the weights on a
            held-out fifth of the masks.
        out: Folder for ``evaluation.json``, without labels ``correspondence.json``, and pictures.
        device: Where to compute; default: a GPU if there is one.
        model: As for `load_backbone`. Of a network, random weights are drawn by the
            ``reset_parameters`` of its layers.
        pages: What several images in a file are read as, see `open_source`. Default: as the runs
            among the weights read theirs.
        nodata: The value of images where nothing was measured, likewise.
        ids: The id of each value in the masks, see `open_labelled`.
        colours: A file with the class of each colour in the masks, likewise.

    Raises:
        ValueError: Values out of range (all at once), weights or layers that are not there, or
            masks that are wrong, with the files' names.
        RuntimeError: All that was asked for has diverged: its features are NaN or infinite.
    """
    several = [weights] if isinstance(weights, (str, Path, nn.Module)) else list(weights)
    layers = [layers] if isinstance(layers, str) else layers
    named = [protocol] if isinstance(protocol, str) else list(protocol or ())
    protocols = tuple(dict.fromkeys(named)) or USUAL + (FINETUNE,) * (fractions is not None)
    shares = [fraction] if fractions is None or is_number(fractions) else [*fractions]
    raise_together(
        None if several else "weights is empty; give a run, a file or a name",
        *(one_of("protocol", own, PROTOCOLS) for own in protocols),
        *(share("fraction" if fractions is None else "fractions", own) for own in shares),
        f"fractions is {fractions}, a single share; give it as fraction={fractions}"
        if is_number(fractions)
        else None,
        None if shares else "fractions is empty; give shares of the masks, such as 0.05 0.2 1",
        "both fraction and fractions are given; give one of them"
        if fraction != 1 and fractions is not None
        else None,
        None if seeds is None else whole("seeds", seeds, 1),
        whole("seed", seed, 0),
        None if size is None else size_pair("size", size),
        whole("steps", steps, 1),
        data_or_images(data, images),
        read_by_none(protocols, layers, steps) if data is not None else None,
        *(
            f"{name} is {value!r}, which is about labels; give data, or leave it out with images"
            for name, value, usual in (
                ("protocol", protocol, None),
                ("fraction", fraction, 1.0),
                ("fractions", fractions, None),
                ("split", split, "val"),
                ("steps", steps, STEPS),
                ("ids", ids, None),
                ("colours", colours, None),
            )
            if data is None and images is not None and value != usual
        ),
    )
    for own in several:
        if isinstance(own, nn.Module):
            raise ValueError(
                f"weights is a {type(own).__name__}; give the folder of its run (result.run_dir), "
                "or a file of its weights with a card, see save_card"
            )
    if out is not None:
        check_writable("out", out)
    place = chosen_device(device)
    reading = reading_of(several, pages=pages, nodata=nodata)
    with handing_over(model):
        if data is None:
            assert images is not None
            repeats = range(seed, seed + (seeds or 1))
            found = evaluate_unlabelled(several, images, layers, size, repeats, place, reading)
            if out is not None:
                found.write(out)
        else:
            plan = Plan(protocols, layers, sorted(shares), seeds, seed, steps, place, bool(named))
            splits = open_labelled(data, ("train", split), ids=ids, colours=colours, **reading)
            found = evaluate_labelled(several, data, split, splits, size, plan, out)
    return found


def data_or_images(data: object, images: object) -> str | None:
    """The complaint about neither or both."""
    if (data is None) != (images is None):
        return None
    given = "neither" if data is None else "both"
    return (
        f"{given} of data and images given; give data (--data, a folder of images and masks) to "
        "evaluate with labels, or images (--images) to evaluate without"
    )


def read_by_none(protocols: Sequence[str], layers: Sequence[str] | None, steps: int) -> str | None:
    """The complaint about layers where only a map of each stride is read, or steps of none."""
    if layers is not None and set(protocols) <= {FINETUNE, ALL_MAPS}:
        return (
            f"layers is {list(layers)}, but {' and '.join(protocols)} reads a map of each stride; "
            "leave it out, or take protocol linear or knn"
        )
    if FINETUNE not in protocols and steps != STEPS:
        return f"steps is {steps}, which is about fine-tuning; take that protocol, or leave it out"
    return None
