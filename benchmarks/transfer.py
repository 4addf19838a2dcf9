"""What pretraining is worth: networks fine-tuned on few masks, over domains, starts and seeds.

python benchmarks/transfer.py CAMVID NUCLEI --fractions 0.05 0.2 1 --seeds 3 --save
python benchmarks/transfer.py CAMVID --methods random ours "ours loss=pixcontrast" --steps 500
python benchmarks/transfer.py CAMVID --methods imagenet "imagenet + ours" --imagenet WEIGHTS

Each folder holds ``images/{train,val,test}`` and ``masks/...``, and perhaps ``unlabelled/``, which
is pretrained on, too. Methods:

random            torchvision's ResNet-18 as it is drawn
ours              the same after ``pretrain`` on the unlabelled images, with its defaults
published         the same after as many steps with the published package (``--peer``)
densecl           the same after as many steps of DenseCL, by lightly (``--peer``)
imagenet          torchvision's MobileNetV2 with ImageNet weights
imagenet + ours   the same after ``pretrain`` from these weights

Settings after a method (``"ours pixel_layer=layer3 lr=0.003"``) change it. Every cell (domain,
method, seed) is kept in ``--keep`` as soon as it is there, and a later call goes on where this one
ended: it names what is missing first. ``--show`` prints the tables of what is there.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import yaml
from measure import machine, report
from safetensors.torch import load_file

from pixel_level_contrastive_learning import pretrain
from pixel_level_contrastive_learning.augment import IMAGENET_MEAN, IMAGENET_STD
from pixel_level_contrastive_learning.backbones.checkpoint import BackboneCard, read_backbone
from pixel_level_contrastive_learning.backbones.factory import build_backbone, default_layers
from pixel_level_contrastive_learning.data.segmentation import open_labelled
from pixel_level_contrastive_learning.evaluation.baselines import Contender
from pixel_level_contrastive_learning.evaluation.features import Preparation, native_bfloat16
from pixel_level_contrastive_learning.evaluation.results import CurvePoint, Row, masks_saved, shown
from pixel_level_contrastive_learning.evaluation.segmentation import Contest, Plan, Splits
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo
from pixel_level_contrastive_learning.trainer.auto import learning_rate
from pixel_level_contrastive_learning.trainer.config import PretrainConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
RANDOM, OURS, PUBLISHED, DENSECL = "random", "ours", "published", "densecl"
IMAGENET, CONTINUED = "imagenet", "imagenet + ours"
METHODS = RANDOM, OURS, PUBLISHED, DENSECL, IMAGENET, CONTINUED
FLOORS = {OURS: RANDOM, PUBLISHED: RANDOM, DENSECL: RANDOM, CONTINUED: IMAGENET}
"""What each method is compared with."""

Cell = dict[str, Any]


def split_method(text: str) -> tuple[str, dict[str, Any]]:
    """A method and the settings that change it."""
    name = max((method for method in METHODS if text.startswith(method)), key=len, default="")
    changes = dict(part.split("=", 1) for part in text[len(name) :].split())
    return name, {key: yaml.safe_load(value) for key, value in changes.items()}


def model_of(method: str) -> str:
    """The network that a method starts from."""
    return "torchvision/mobilenet_v2" if method.startswith(IMAGENET) else "torchvision/resnet18"


def card_of_start(model: str, size: int) -> BackboneCard:
    """How weights are used that no run of ours has written."""
    pixel, instance = default_layers(FeatureInfo(build_backbone(model), 3, (size, size)))
    form = {"channels": 3, "image_size": (size, size), "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    return BackboneCard(model=model, pixel_layer=pixel, instance_layer=instance, **form)


def trained(domain: Path, text: str, seed: int, args: argparse.Namespace) -> Contender:
    """The network of a cell."""
    name, changes = split_method(text)
    model = model_of(name)
    torch.manual_seed(seed)
    net = build_backbone(model, pretrained=name == IMAGENET and args.imagenet is None)
    if name == IMAGENET and args.imagenet is not None:
        net.load_state_dict(load_file(args.imagenet), strict=False)
    card = card_of_start(model, args.size)
    if name in (RANDOM, IMAGENET):
        return Contender(text, lambda _: net, card)
    out = args.keep / f"{domain.name}-{text}-{seed}".replace(" ", "_")
    images = [
        folder for folder in (domain / "images/train", domain / "unlabelled") if folder.is_dir()
    ]
    if name in (PUBLISHED, DENSECL):
        script, weights = Path(__file__).with_name("peers.py"), out.with_suffix(".pt")
        _, lr = learning_rate(PretrainConfig(), args.batch, gentle=False)
        command = [args.peer, script, name, *images, "--out", weights, "--steps", args.steps]
        command += ["--seed", seed, "--batch", args.batch, "--size", args.size, "--lr", lr]
        command += ["--bfloat16"] if native_bfloat16(DEVICE.type) else []
        subprocess.run([str(part) for part in command], check=True)
        net.load_state_dict(torch.load(weights, weights_only=True))
        return Contender(text, lambda _: net, card)
    start = {"weights": "pretrained" if args.imagenet is None else str(args.imagenet)}
    settings = {"image_size": args.size, "batch_size": args.batch, "steps": args.steps}
    settings |= (start if name == CONTINUED else {}) | changes
    pretrain(images, out, model=model, seed=seed, overwrite=True, **settings)  # of one cut off
    loaded = read_backbone(out)
    return Contender(text, lambda _: loaded.net, loaded.card)


def measured(domain: Path, text: str, seed: int, args: argparse.Namespace) -> Cell:
    """A cell with its figures: of each protocol the mean IoU by the masks used."""
    start = time.perf_counter()
    contender = trained(domain, text, seed, args)
    minutes = (time.perf_counter() - start) / 60
    train, test = open_labelled(domain, ("train", args.split))
    protocols = tuple(args.protocols)
    plan = Plan(protocols, None, args.fractions, 1, seed, args.finetune_steps, DEVICE)
    prepare = Preparation.of(contender.card, None, contender.build(seed))
    contest = Contest(contender, prepare, Splits(train, test), plan, ())
    contest.row()
    figures: dict[str, dict[str, float]] = {protocol: {} for protocol in protocols}
    for one in contest.figures:
        figures[one.label][str(one.masks)] = round(one.scores.miou, 4)
    cell = {"domain": domain.name, "method": text, "seed": seed, "minutes": round(minutes, 2)}
    return cell | {"figures": figures, "rates": str(contest.rates)}


def rows_of(cells: list[Cell], domain: str) -> dict[str, Row]:
    """A row a method, over the seeds that are there."""
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell["domain"] == domain:
            by_method.setdefault(cell["method"], []).append(cell)
    rows = {}
    for method, runs in by_method.items():
        curves = {
            protocol: [
                CurvePoint.of(int(masks), [cell["figures"][protocol][masks] for cell in runs])
                for masks in runs[0]["figures"][protocol]
            ]
            for protocol in runs[0]["figures"]
        }
        rows[method] = Row(method, {}, curves={key: tuple(sorted(c)) for key, c in curves.items()})
    return rows


def tables(cells: list[Cell]) -> str:
    """Markdown: a table a protocol, a line for each domain and number of masks."""
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    domains = list(dict.fromkeys(cell["domain"] for cell in cells))
    lines: list[str] = []
    for protocol in cells[0]["figures"]:
        saved = []
        lines += ["", f"| {protocol}, mIoU | masks | {' | '.join(methods)} |"]
        lines += ["|---" * (len(methods) + 2) + "|"]
        for domain in domains:
            rows = rows_of(cells, domain)
            for index, point in enumerate(next(iter(rows.values())).curves[protocol]):
                points = [
                    rows[method].curves[protocol][index] if method in rows else None
                    for method in methods
                ]
                texts = [shown(point.miou, point.deviation) if point else "" for point in points]
                lines.append(f"| {domain} | {point.masks} | {' | '.join(texts)} |")
            for method in methods:
                floor = FLOORS.get(split_method(method)[0])
                if floor in rows and method in rows:
                    savings = masks_saved(rows[method], rows[floor], protocol)
                    saved += [f"- {domain}: {savings}"] if savings else []
        lines += ["", *saved]
    return "\n".join(lines)


def main() -> None:
    """Measure the cells that are missing and print the tables."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("data", nargs="+", type=Path, metavar="DIR")
    flags.add_argument("--methods", nargs="+", default=[RANDOM, OURS])
    flags.add_argument("--protocols", nargs="+", default=["finetune", "linear", "linear-all"])
    flags.add_argument("--fractions", nargs="+", type=float, default=[0.05, 0.2, 1.0])
    flags.add_argument("--peer", help="interpreter with version 0.1.1 or lightly installed")
    flags.add_argument("--imagenet", type=Path, help="MobileNetV2's weights, else downloaded")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=1000, help="of pretraining")
    flags.add_argument("--batch", type=int, default=32)
    flags.add_argument("--size", type=int, default=128, help="side of the views")
    flags.add_argument("--finetune-steps", type=int, default=1000)
    flags.add_argument("--split", default="test", help="what is scored")
    flags.add_argument("--keep", type=Path, default=Path("build/transfer"))
    flags.add_argument("--show", action="store_true", help="measure nothing")
    flags.add_argument("--save", action="store_true", help="record the figures")
    args = flags.parse_args()
    for method in args.methods:
        if not split_method(method)[0]:
            sys.exit(f"unknown method {method!r}; there are {', '.join(METHODS)}")
        if method.startswith((PUBLISHED, DENSECL)) and args.peer is None:
            sys.exit(f"--peer is not given; name its interpreter, or leave {method} out")
    args.keep.mkdir(parents=True, exist_ok=True)
    names = "protocols", "fractions", "steps", "batch", "size", "finetune_steps", "split"
    setting = {name: getattr(args, name) for name in names}
    book = args.keep / "cells.jsonl"
    stored = [json.loads(line) for line in book.read_text().splitlines()] if book.exists() else []
    done = {
        (cell["domain"], cell["method"], cell["seed"]): cell
        for cell in stored
        if cell["setting"] == setting
    }
    wanted = [
        (domain, method, seed)
        for seed in range(args.seeds)
        for domain in args.data
        for method in args.methods
    ]
    missing = [key for key in wanted if (key[0].name, *key[1:]) not in done]
    print(f"{len(missing)} of {len(wanted)} cells are missing")
    for domain, method, seed in [] if args.show else missing:
        cell = measured(domain, method, seed, args) | {"setting": setting}
        done[domain.name, method, seed] = cell
        with book.open("a") as file:
            file.write(json.dumps(cell) + "\n")
        print(json.dumps(cell), flush=True)
    cells = [done[d.name, m, s] for d, m, s in wanted if (d.name, m, s) in done]
    if not cells:
        return
    print(tables(cells))
    if args.save:
        first = args.protocols[0]
        means: dict[tuple[str, str], list[float]] = {}
        for cell in cells:
            fewest = min(map(int, cell["figures"][first]))
            mine = cell["figures"][first][str(fewest)]
            means.setdefault((cell["domain"], cell["method"]), []).append(mine)
        ratios = {
            f"{domain}: {method} / {floor}": fmean(values) / fmean(means[domain, floor])
            for (domain, method), values in means.items()
            if (floor := FLOORS.get(split_method(method)[0])) and (domain, floor) in means
        }
        claim = f"{first} on the fewest masks of {args.split}, {args.steps} steps"
        report("transfer", claim, ratios, {"cells": cells}, where=machine(DEVICE.type), save=True)


if __name__ == "__main__":
    main()
