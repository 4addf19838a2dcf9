"""What pretraining is worth on labelled images, against random weights and the published package.

python benchmarks/transfer.py DATA --peer PEER/bin/python --seeds 3 --steps 500 --save
python benchmarks/transfer.py DATA --methods "PixPro + instance" --keep build/transfer

With ``--keep`` weights and figures stay in a folder, and the next call with the same settings takes
from it what is there: more seeds, methods or protocols, bit by bit. After a change of the code name
another folder.

DATA holds ``images/{train,val,test}`` and ``masks/...``. Each method trains the same ResNet-18 for
as many steps of as many views of the unlabelled images of ``train``, with the same optimiser and
learning rate; its features are then judged by `evaluate`: linearly, and fine-tuned on a tenth of
the masks. All start from torchvision's own random weights.

Other settings of ours and "trained on all masks" are left out unless they are named. The latter
shows how far there is to go: the network trained for as many steps of 8 crops on every mask of
``train`` by `evaluate`'s fine-tuning.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from measure import machine, report
from torchvision import models

from pixel_level_contrastive_learning import pretrain
from pixel_level_contrastive_learning.augment import IMAGENET_MEAN, IMAGENET_STD
from pixel_level_contrastive_learning.backbones.checkpoint import (
    BackboneCard,
    read_backbone,
    save_backbone,
)
from pixel_level_contrastive_learning.data.segmentation import open_labelled
from pixel_level_contrastive_learning.evaluation import finetuning
from pixel_level_contrastive_learning.evaluation.evaluate import Plan
from pixel_level_contrastive_learning.evaluation.features import Preparation
from pixel_level_contrastive_learning.files import write_whole
from pixel_level_contrastive_learning.trainer.auto import learning_rate
from pixel_level_contrastive_learning.trainer.config import PretrainConfig
from pixel_level_contrastive_learning.trainer.system import native_bfloat16

OURS: dict[str, dict[str, Any]] = {
    "instance only": {"alpha": 0.0},
    "PixPro only": {"instance_weight": 0.0},
    "PixContrast only": {"loss": "pixcontrast", "instance_weight": 0.0},
    "PixPro + instance": {},
}
COMPARED = list(OURS)
OURS |= {
    f"{name}, {key} {value}": {**OURS[name], key: value}
    for key, value in (("pixel_layer", "layer3"), ("lr", 9e-3))
    for name in ("PixPro only", "PixContrast only")
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANDOM, PUBLISHED, SUPERVISED = "random weights", "published package", "trained on all masks"
PEERS = RANDOM, PUBLISHED
USUAL = ["linear", "finetune 10 %"]
PROTOCOLS: dict[str, dict[str, Any]] = {
    "linear": {"protocol": "linear"},
    "linear, layer3": {"protocol": "linear", "layer": "layer3"},
    "finetune 10 %": {"protocol": "finetune", "fraction": 0.1},
}


def trained(method: str, seed: int, args: argparse.Namespace, folder: Path) -> tuple[Path, float]:
    """The weights that a method comes to, and the seconds it took."""
    out, start = folder / f"{method}-{seed}", time.perf_counter()
    images = args.data / "images/train"
    if method == RANDOM:
        torch.manual_seed(seed)
        out = out.with_suffix(".safetensors")
        save_backbone(out, models.resnet18(weights=None), card(args))
    elif method == SUPERVISED:
        torch.manual_seed(seed)
        out = out.with_suffix(".safetensors")
        net, own = models.resnet18(weights=None).to(DEVICE), card(args)
        [train] = open_labelled(args.data, ("train",))
        prepare = Preparation.of(own, tuple(args.input))
        done = finetuning.trained(net, train, prepare, steps=args.steps, seed=seed)
        save_backbone(out, done.net.cpu(), own)
    elif method == PUBLISHED:
        script = Path(__file__).with_name("published.py")
        _, lr = learning_rate(PretrainConfig(), args.batch, batch_norm=True)
        weights, out = out.with_suffix(".pt"), out.with_suffix(".safetensors")
        command = [args.peer, script, images, "--out", weights, "--steps", args.steps]
        command += ["--seed", seed, "--batch", args.batch, "--size", args.size, "--lr", lr]
        command += ["--bfloat16"] if native_bfloat16(DEVICE) else []
        subprocess.run([str(word) for word in command], check=True)
        net = models.resnet18(weights=None)
        net.load_state_dict(torch.load(weights, weights_only=True))
        save_backbone(out, net, card(args))
    else:
        pretrain(
            images,
            out,
            model="torchvision/resnet18",
            image_size=args.size,
            batch_size=args.batch,
            steps=args.steps,
            seed=seed,
            checkpoint_every=args.steps,  # on a GPU more would take their time
            overwrite=True,  # of a run that was cut off
            **OURS[method],
        )
    return out, time.perf_counter() - start


def figures(method: str, seed: int, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Minutes of training and the figure of each protocol; what the folder holds is not redone."""
    sizes = [args.steps, args.batch, args.size, *args.input]
    asked = [str(args.data.resolve()), args.split, *sizes, OURS.get(method)]
    book = folder / f"figures of {method}-{seed}.json"
    known = json.loads(book.read_text()) if book.exists() else {"asked": asked}
    if known["asked"] != asked:
        sys.exit(f"{book} is of {known['asked']}, not of {asked}; name another folder with --keep")
    if "minutes" not in known:
        weights, seconds = trained(method, seed, args, folder)
        known |= {"weights": str(weights), "minutes": seconds / 60}
        write_whole(book, json.dumps(known).encode())
    for name in args.protocols:
        if name not in known:
            known[name] = judged(Path(known["weights"]), PROTOCOLS[name], seed, args)
            write_whole(book, json.dumps(known).encode())
    return {name: value for name, value in known.items() if isinstance(value, float)}


def card(args: argparse.Namespace) -> BackboneCard:
    """How the weights are used that no run of ours has written."""
    return BackboneCard(
        model="torchvision/resnet18",
        channels=3,
        image_size=(args.size, args.size),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        pixel_layer="layer4",
        instance_layer="avgpool",
    )


def judged(weights: Path, protocol: dict[str, Any], seed: int, args: argparse.Namespace) -> float:
    """Mean IoU on the split that is reported, as `evaluate` finds it."""
    train, split = open_labelled(args.data, ("train", args.split))
    loaded = read_backbone(weights)
    prepare = Preparation.of(loaded.card, tuple(args.input))
    share = protocol.get("fraction", 1.0)
    seeds, steps = range(seed, seed + 1), finetuning.STEPS
    layers = [protocol.get("layer", "layer4")]
    plan = Plan(train, split, prepare, protocol["protocol"], layers, share, seeds, steps)
    return plan.run(loaded.net.to(DEVICE), loaded.card, seed, ()).scores.miou


def main() -> None:
    """Train and judge every method with every seed, and print the table."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("data", type=Path)
    flags.add_argument("--methods", nargs="+", default=[*PEERS, *COMPARED])
    flags.add_argument("--protocols", nargs="+", default=USUAL, choices=list(PROTOCOLS))
    flags.add_argument("--peer", help="interpreter with the published package, version 0.1.1")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=500)
    flags.add_argument("--batch", type=int, default=24)
    flags.add_argument("--size", type=int, default=128, help="side of the views")
    flags.add_argument("--input", type=int, nargs=2, default=(180, 240), metavar=("H", "W"))
    flags.add_argument("--split", default="test", help="what is reported")
    flags.add_argument("--keep", type=Path, help="folder where weights and figures stay")
    flags.add_argument("--save", action="store_true", help="record the figures")
    args = flags.parse_args()
    known = [*PEERS, *OURS, SUPERVISED]
    unknown = set(args.methods) - set(known)
    if unknown:
        sys.exit(f"unknown methods {sorted(unknown)}; there are {known}")
    if PUBLISHED in args.methods and args.peer is None:
        sys.exit(
            f"--peer is not given; name its interpreter, or leave {PUBLISHED!r} out of --methods"
        )
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as passing:
        folder = (args.keep or Path(passing)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for method in args.methods:
            columns = found[method] = {name: [] for name in (*args.protocols, "minutes")}
            for seed in range(args.seeds):
                one = figures(method, seed, args, folder)
                for name, column in columns.items():
                    column.append(one[name])
                print(method, seed, {k: round(v[-1], 4) for k, v in columns.items()}, flush=True)
    heads = ["method", *args.protocols, "minutes"]
    print(f"\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for method, columns in found.items():
        cells = [f"{fmean(v):.3f} ± {stdev(v) if len(v) > 1 else 0:.3f}" for v in columns.values()]
        print(f"| {method} | {' | '.join(cells)} |")
    if RANDOM in found:
        name = args.protocols[0]
        floor = fmean(found[RANDOM][name])
        ratios = {m: fmean(c[name]) / floor for m, c in found.items() if m != RANDOM}
        setting = (
            f"{args.data.name}, {args.split}, {name}: times random weights, {args.steps} steps of "
            f"{args.batch} views of {args.size} px, {args.seeds} seeds"
        )
        report("transfer", setting, ratios, found, where=machine(DEVICE), save=args.save)


if __name__ == "__main__":
    main()
