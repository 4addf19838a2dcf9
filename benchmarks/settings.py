"""Pretraining settings side by side: what each one adds to fine-tuning on a few masks.

python benchmarks/settings.py IDDLITE NEUSEG --starts random mobilenet --keep build/settings \
    --settings base "steps 3000" "levels 3 4" "lr 1e-3, steps 3000"
python benchmarks/settings.py iddlite neuseg salt --show benchmarks/results/settings.json

Each DIR holds ``images/{train,val,test}`` and ``masks/...``; its name is the domain's. A setting is
one change from the base, or several with commas between: ``steps``, ``batch``, ``view`` (its side),
``lr`` (for 256 images), ``levels`` (maps of the pixel loss: 1 to 4 are strides 4 to 32),
``instance`` (weight of the instance loss), ``jitter``, ``loss`` (pixpro or pixcontrast),
``distill`` (weight of staying near the start's features), ``head_steps`` (steps in which only the
heads learn), ``norm`` (data or imagenet), ``momentum`` and ``rates`` (the share of the learning
rate for the weights up to each of the maps 1 to 4; 0 freezes them). ``steps 0`` is the start
itself, which is always measured.

A cell is one start, setting, domain and seed: pretrain on ``train``, fit a linear layer to frozen
features (the deepest map; all four), fine-tune on a share of the masks with each learning rate and
draw of masks. Every finished cell is appended to ``cells.jsonl`` in the folder of ``--keep``, and
what is there is not done again. Tables give gains over the start in points of mIoU: fine-tuned,
with the learning rate that is best on val, and in parentheses linear on all maps; a star where the
start was fine-tuned on other masks. The row of the start itself has its figures.
"""

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from in_memory import DEVICE, pretrain
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision import models

from pixel_level_contrastive_learning import augment
from pixel_level_contrastive_learning.data.segmentation import SegmentationDataset, open_labelled
from pixel_level_contrastive_learning.data.statistics import Statistics
from pixel_level_contrastive_learning.evaluation import finetuning
from pixel_level_contrastive_learning.evaluation.features import Preparation, Reader
from pixel_level_contrastive_learning.evaluation.metrics import Predict, PreparedSplit, score
from pixel_level_contrastive_learning.evaluation.probes import (
    by_cells,
    gather,
    linear_classifier,
)

BASE: dict[str, Any] = {
    "steps": 1000,
    "batch": 48,
    "view": 128,
    "lr": 2e-3,
    "levels": [4],
    "instance": 0.1,
    "jitter": 0.4,
    "loss": "pixpro",
    "distill": 0.0,
    "head_steps": 0,
    "norm": "data",
    "momentum": 0.99,
    "rates": [1.0, 1.0, 1.0, 1.0],
}
CHOICES = {"loss": ["pixpro", "pixcontrast"], "norm": ["data", "imagenet"]}


class Start(NamedTuple):
    """A model, its maps of strides 4 to 32, what differs from `BASE`, its own normalisation."""

    model: str
    layers: list[str]
    base: dict[str, Any]
    norm: str


STARTS = {
    "random": Start("resnet18", [f"layer{i}" for i in (1, 2, 3, 4)], {}, "data"),
    "mobilenet": Start(
        "mobilenet_v2", [f"features.{i}" for i in (3, 6, 13, 18)], {"lr": 3e-4}, "imagenet"
    ),
}
Cell = dict[str, Any]
"""A start, the changes from its base, a domain, a seed, and what was found: one line of JSON."""


def parsed(text: str, start: str) -> dict[str, Any]:
    """The changes from the start's base that words such as ``lr 1e-3, levels 3 4`` name."""
    base, changes = BASE | STARTS[start].base, {}
    for part in [] if text == "base" else text.split(","):
        key, *values = part.split() or [""]
        if key not in base or not values:
            sys.exit(f"{text!r} is no setting; write KEY VALUE, keys being {', '.join(base)}")
        if values[0] not in (named := CHOICES.get(key, values)):
            sys.exit(f"{text!r} is no setting; {key} is one of {', '.join(named)}")
        if isinstance(base[key], list):
            changes[key] = [type(base[key][0])(value) for value in values]
        else:
            changes[key] = type(base[key])(values[0])
    return {key: changes[key] for key in base if changes.get(key, base[key]) != base[key]}


def label(changes: dict[str, Any]) -> str:
    """The changes in words, as `parsed` reads them."""
    texts = (
        f"{key} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for key, value in changes.items()
    )
    return ", ".join(texts) or "base"


def unpretrained(start: str) -> dict[str, Any]:
    """The changes that make a cell the start itself."""
    return parsed(f"steps 0, norm {STARTS[start].norm}", start)


class Domain(NamedTuple):
    """A folder's splits, and its training images ``(n, 3, h, w)`` uint8 on the device."""

    splits: dict[str, SegmentationDataset]
    images: Tensor

    def statistics(self, norm: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation: ImageNet's, or those of some 200 training images."""
        sample = self.images[:: max(1, len(self.images) // 200)].float() / 255
        mean, std = sample.mean(dim=(0, 2, 3)), sample.std(dim=(0, 2, 3)).clamp(min=0.02)
        of_data = tuple(mean.tolist()), tuple(std.tolist())
        return of_data if norm == "data" else (augment.IMAGENET_MEAN, augment.IMAGENET_STD)


def load(folder: Path, args: argparse.Namespace) -> Domain:
    """A domain, all of its images resized to one size: sides of multiples of 16, 128 or more."""
    names = "train", *args.splits
    opened = [
        split.subset(range(len(split))[: args.most]) for split in open_labelled(folder, names)
    ]
    files = opened[0].images
    sides = [median(side) for side in zip(*(Image.open(f).size for f in files), strict=True)]
    scale = min(1, args.longest / max(sides))
    width, height = (max(128, round(scale * side / 16) * 16) for side in sides)

    def read(file: Path) -> np.ndarray[Any, Any]:
        return np.array(Image.open(file).convert("RGB").resize((width, height)))

    with ThreadPoolExecutor() as pool:
        images = torch.from_numpy(np.stack(list(pool.map(read, files)))).to(DEVICE)
    splits = dict(zip(names, opened, strict=True))
    return Domain(splits, images.permute(0, 3, 1, 2).contiguous())


def backbone(start: str, seed: int, weights: Path | None) -> nn.Module:
    """The network of a start."""
    torch.manual_seed(seed)
    wanted = "IMAGENET1K_V1" if start != "random" and weights is None else None
    net = models.get_model(STARTS[start].model, weights=wanted)
    if start != "random" and weights is not None:
        differing = net.load_state_dict(load_file(weights), strict=False)
        lacking = [key for key in differing.missing_keys if not key.startswith("classifier.")]
        if lacking or differing.unexpected_keys:
            sys.exit(f"{weights} is not of {STARTS[start].model}: {lacking[:3]} are missing in it")
    return net


def measured(cell: Cell, domain: Domain, args: argparse.Namespace) -> Cell:
    """The cell with its figures."""
    start, seed = STARTS[cell["start"]], cell["seed"]
    config = BASE | start.base | cell["settings"]
    net = backbone(cell["start"], seed, args.mobilenet).to(DEVICE)
    times = [time.perf_counter()]
    normalise = augment.Normalise(*domain.statistics(config["norm"])).to(DEVICE)
    train, loss = domain.splits["train"], []
    if config["steps"]:
        loss = pretrain(net, start.layers, domain.images, normalise, config, seed)
    times.append(time.perf_counter())
    size = domain.images.shape[2], domain.images.shape[3]
    form = (3, *domain.statistics(config["norm"]), None, None, size)
    prepare = Preparation(Statistics(*form), min(size))

    def scores(predict: Predict) -> list[float]:
        splits = (PreparedSplit(domain.splits[split], prepare) for split in args.splits)
        return [round(score(predict, split)[0].scores.miou, 4) for split in splits]

    def linear(layers: list[str]) -> list[float]:
        reader = Reader(net, layers, 3, size)
        (bank,) = gather(reader, PreparedSplit(train, prepare), [layers])
        classify = linear_classifier(bank.to(torch.device(DEVICE)))
        return scores(by_cells(reader, [(layers, classify)], torch.device(DEVICE)))

    def finetuned(lr: float, draw: int) -> list[float]:
        rates = finetuning.LearningRates(lr, 2e-3)
        masks = PreparedSplit(train.share(args.fraction, draw), prepare, finetuning.CROP_DETAIL)
        steps = args.finetune_steps
        tuned = finetuning.fit_segmenter(net, masks, rates=rates, steps=steps, batch=12, seed=draw)
        return scores(lambda pixels: [finetuning.predict(tuned, pixels)])

    def by_split(found: list[list[float]]) -> dict[str, tuple[float, ...]]:
        return dict(zip(args.splits, zip(*found, strict=True), strict=True))

    probed = by_split([linear(start.layers[-1:]), linear(start.layers)])
    times.append(time.perf_counter())
    draws = [draw + 10 * seed for draw in range(args.draws)]
    tuned = {f"{lr:g}": by_split([finetuned(lr, draw) for draw in draws]) for lr in args.lrs}
    times.append(time.perf_counter())
    seconds = [round(b - a, 1) for a, b in pairwise(times)]
    return cell | {"linear": probed, "finetuned": tuned, "loss": loss, "seconds": seconds}


def key(cell: Cell) -> tuple[Any, ...]:
    """What tells cells apart."""
    return cell["start"], label(cell["settings"]), cell["domain"], cell["seed"]


def tables(cells: list[Cell], domains: list[str], split: str) -> str:
    """A table a start, in Markdown: gains in points of mIoU over the same start and seed."""
    by_key = {key(cell): cell for cell in cells if split in cell["linear"]}

    def figures(cell: Cell) -> tuple[float, float, int]:
        best = max(cell["finetuned"].values(), key=lambda draws: fmean(draws["val"]))[split]
        return 100 * fmean(best), 100 * cell["linear"][split][1], len(best)

    def row(start: str, name: str, seed: int) -> list[str]:
        texts, gains, floor = [], [], label(unpretrained(start))
        for domain in domains:
            cell, base = (by_key.get((start, text, domain, seed)) for text in (name, floor))
            if cell is None or base is None:
                texts.append("" if cell is None else "no start")
                continue
            (tuned, probe, draws), before = figures(cell), figures(base)
            gains.append((tuned - before[0], probe - before[1]))
            mark = "" if draws == before[2] else "*"  # not of the same masks
            gain = f"{gains[-1][0]:+.1f}{mark} ({gains[-1][1]:+.1f})"
            texts.append(f"{tuned:.1f} ({probe:.1f})" if name == floor else gain)
        means = [fmean(column) for column in zip(*gains, strict=True)]
        whole = len(gains) == len(domains) and name != floor
        return [name, str(seed), *texts, f"{means[0]:+.2f} ({means[1]:+.1f})" if whole else ""]

    lines = []
    for start in dict.fromkeys(known[0] for known in by_key):
        lines += ["", f"| {start}, {split} | seed | {' | '.join(domains)} | mean |"]
        lines += ["|---" * (len(domains) + 3) + "|"]
        mine = [known for known in by_key if known[0] == start and known[2] in domains]
        rows = dict.fromkeys((name, seed) for _, name, _, seed in mine)
        lines += [f"| {' | '.join(row(start, *labels))} |" for labels in rows]
    return "\n".join(lines)


def main() -> None:
    """Measure the cells that are missing and print the tables."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("data", nargs="+", type=Path, metavar="DIR")
    flags.add_argument("--starts", nargs="+", default=["random"], choices=list(STARTS))
    flags.add_argument("--settings", nargs="+", default=["base"], metavar="SETTING")
    flags.add_argument("--seeds", type=int, default=1)
    flags.add_argument("--mobilenet", type=Path, help="safetensors; else torchvision's download")
    flags.add_argument("--splits", nargs="+", default=["val"], help="val first, then perhaps test")
    flags.add_argument("--longest", type=int, default=320, help="longest side of images, pixels")
    flags.add_argument("--most", type=int, help="images of a split, at most: to try the script")
    flags.add_argument("--fraction", type=float, default=0.05, help="of the masks, to fine-tune on")
    flags.add_argument("--finetune-steps", type=int, default=300)
    flags.add_argument("--lrs", nargs="+", type=float, default=[3e-4, 1e-3], help="of the backbone")
    flags.add_argument("--draws", type=int, default=2, help="of the masks")
    flags.add_argument("--keep", type=Path, default=Path("build/settings"))
    flags.add_argument("--show", type=Path, help="print tables of a record and measure nothing")
    args = flags.parse_args()
    domains = [folder.resolve().name for folder in args.data]
    if args.show:
        cells = json.loads(args.show.read_text())["cells"]
        print(*(tables(cells, domains, split) for split in args.splits), sep="\n")
        return
    names = "splits", "longest", "most", "fraction", "finetune_steps", "lrs", "draws"
    protocol = {name: getattr(args, name) for name in names}
    args.keep.mkdir(parents=True, exist_ok=True)
    book = args.keep / "cells.jsonl"
    kept = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    done = {key(cell): cell for cell in kept if cell["protocol"] == protocol}
    asked = [
        {"start": start, "settings": changes, "domain": domain, "seed": seed}
        for domain in domains
        for start in args.starts
        for seed in range(args.seeds)
        for changes in [unpretrained(start), *(parsed(text, start) for text in args.settings)]
    ]
    wanted = list({key(cell): cell for cell in asked}.values())
    missing = [cell for cell in wanted if key(cell) not in done]
    print(f"{len(missing)} of {len(wanted)} cells are missing:", *map(key, missing), sep="\n")
    for folder, name in zip(args.data, domains, strict=True):
        mine = [cell for cell in missing if cell["domain"] == name]
        domain = load(folder, args) if mine else None
        for cell in mine:
            done[key(cell)] = measured(cell, domain, args) | {"protocol": protocol}
            with book.open("a") as file:
                file.write(json.dumps(done[key(cell)]) + "\n")
            print(json.dumps(done[key(cell)]), flush=True)
    cells = [done[key(cell)] for cell in wanted]
    print(*(tables(cells, domains, split) for split in args.splits), sep="\n")


if __name__ == "__main__":
    main()
