"""`evaluate`: what weights are worth compared with random ones, with masks or without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..backbones.custom import Model, handing_over
from ..checks import Pages, check_limits, is_number, one_of, raise_together, share, size_pair, whole
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
"""The default protocols; with several fractions, fine-tuning is added."""


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
    """What weights are worth, compared with random weights of the same networks.

    If training did not start from random weights, the starting weights are compared too. Mean IoU
    is over the classes that are in the masks or were predicted. Without labels, cells of one view
    of an image are matched with those of another, and the features' health is measured.

    Args:
        weights: One or more of: a run directory, a file of `save_backbone` or `export`,
            ``torchvision/NAME[=FILE]``, ``timm/NAME[=FILE]``, ``hf://OWNER/NAME`` or
            ``random:MODEL``, see `read_backbone`.
        data: Folder with ``images/{train,val}`` and ``masks/{train,val}``, see `open_labelled`.
        images: Unlabelled images instead, preferably not used for training.
        protocol: One or more; the results of the first are summed up in words. ``linear`` fits a
            linear layer to frozen features, ``linear-all`` one to a map of each stride; in ``knn``
            the nearest training cells vote, as in ``hummingbird``, which follows arXiv:2306.01667;
            ``overclustering`` groups cells without masks and names the groups, as in
            arXiv:2204.13101; ``finetune`` trains the whole network with a U-Net-like decoder.
            Default: ``linear``, ``linear-all`` and ``knn``, with ``fractions`` also ``finetune``,
            but none that reads a map of each stride if a network has no coarse one.
        layers: Layers whose features are read; several are stacked. Default: the trained one, else
            the deepest map. ``linear-all`` and ``finetune`` read a map of each stride instead.
        fraction: Fraction of the training images whose masks are used, above 0, at most 1.
        fractions: Several fractions instead of one; they give a label curve for each protocol.
        seeds: Number of repetitions, each with the next seed: other random weights, another draw of
            the masks, another initial decoder. Default: 3 for fine-tuning and for several
            fractions, else 1.
        seed: The first seed.
        size: Size at which images are fed: the shorter side in pixels, or exactly
            ``(height, width)``. Default: 1.4 times the views of the first run among the weights,
            the scale it was trained at. Masks keep their size. Without labels, the size of the
            views, by default as in training.
        split: Which images to score.
        steps: Fine-tuning steps; learning rates are chosen for each set of weights on a held-out
            fifth of the masks.
        out: Folder for ``evaluation.json`` (without labels: ``correspondence.json``) and pictures.
        device: Where to compute; default: a GPU if there is one.
        model: As for `load_backbone`. For a network, the ``reset_parameters`` of its layers draw
            the random weights.
        pages: How files with several images are read, see `open_source`. Default: as in the runs
            among the weights.
        nodata: Value that means "not measured", likewise.
        ids: The id of each value in the masks, see `open_labelled`.
        colours: A file with the class of each colour in the masks, likewise.

    Raises:
        ValueError: Values out of range (all at once), weights or layers that do not exist, or wrong
            masks, with the files' names.
        RuntimeError: With labels, if all weights asked for have diverged: their features are NaN or
            infinite. Without labels a sentence says so.
    """
    several = [weights] if isinstance(weights, (str, Path, nn.Module)) else list(weights)
    layers = [layers] if isinstance(layers, str) else layers
    named = [protocol] if isinstance(protocol, str) else list(protocol or ())
    protocols = tuple(dict.fromkeys(named)) or USUAL + (FINETUNE,) * (fractions is not None)
    shares = [fraction] if fractions is None or is_number(fractions) else [*fractions]
    raise_together(
        None if several else "weights is empty; give a run, a file or a name",
        *(one_of("protocol", name, PROTOCOLS) for name in protocols),
        *(share("fraction" if fractions is None else "fractions", value) for value in shares),
        f"fractions is {fractions}, a single number; give it as fraction={fractions}"
        if is_number(fractions)
        else None,
        None if shares else "fractions is empty; give fractions of the masks, such as 0.05 0.2 1",
        "both fraction and fractions are given; give one of them"
        if fraction != 1 and fractions is not None
        else None,
        None if seeds is None else whole("seeds", seeds, 1),
        *check_limits({"seed": seed}),
        None if size is None else size_pair("size", size),
        whole("steps", steps, 1),
        data_or_images(data, images),
        read_by_none(protocols, layers, steps) if data is not None else None,
        *(
            f"{name} is {value!r}, which needs labels; give data instead of images, or leave it out"
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
    for item in several:
        if isinstance(item, nn.Module):
            raise ValueError(
                f"weights is a {type(item).__name__}; give its run's folder (result.run_dir), "
                "or a weights file with a card, see save_card"
            )
    if out is not None:
        check_writable("out", out)
    place = chosen_device(device)
    reading = reading_of(several, pages=pages, nodata=nodata)
    with handing_over(model):
        if data is None:
            assert images is not None
            repeats = range(seed, seed + (seeds or 1))
            evaluation = evaluate_unlabelled(several, images, layers, size, repeats, place, reading)
            if out is not None:
                evaluation.write(out)
        else:
            plan = Plan(protocols, layers, sorted(shares), seeds, seed, steps, place, bool(named))
            splits = open_labelled(data, ("train", split), ids=ids, colours=colours, **reading)
            evaluation = evaluate_labelled(several, data, split, splits, size, plan, out)
    return evaluation


def data_or_images(data: object, images: object) -> str | None:
    """The complaint about neither or both."""
    if (data is None) != (images is None):
        return None
    given = "neither data nor images is" if data is None else "both data and images are"
    return (
        f"{given} given; give data (--data, a folder of images and masks) to "
        "evaluate with labels, or images (--images) to evaluate without"
    )


def read_by_none(protocols: Sequence[str], layers: Sequence[str] | None, steps: int) -> str | None:
    """The complaint about layers where only a map of each stride is read, or steps of none."""
    if layers is not None and set(protocols) <= {FINETUNE, ALL_MAPS}:
        return (
            f"layers is {list(layers)}, but {' and '.join(protocols)} reads a map at every stride; "
            "leave it out, or use protocol linear or knn"
        )
    if FINETUNE not in protocols and steps != STEPS:
        return f"steps is {steps}, which needs protocol {FINETUNE}; add it, or leave steps out"
    return None
