"""What pretraining is worth on labelled images, against random weights and the published package.

python benchmarks/transfer.py DATA --peer PEER/bin/python --seeds 3 --steps 500 --save

DATA holds ``images/{train,val,test}`` and ``masks/...``. Each method trains the same ResNet-18 for
as many steps of as many views of the unlabelled images of ``train``, with the same optimiser; its
features are then judged by `evaluate`: linearly, and fine-tuned on a tenth of the masks.
"""

import argparse
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

from pixel_level_contrastive_learning import evaluate, pretrain

OURS: dict[str, dict[str, Any]] = {
    "instance only": {"alpha": 0.0},
    "PixPro only": {"instance_weight": 0.0},
    "PixContrast only": {"loss": "pixcontrast", "instance_weight": 0.0},
    "PixPro + instance": {},
}
RANDOM, PUBLISHED = "random weights", "published package"
PROTOCOLS: dict[str, dict[str, Any]] = {
    "linear": {"protocol": "linear"},
    "finetune 10 %": {"protocol": "finetune", "fraction": 0.1},
}


def trained(method: str, seed: int, args: argparse.Namespace, folder: Path) -> tuple[Path, float]:
    """The weights that a method comes to, and the seconds it took."""
    out, start = folder / f"{method}-{seed}", time.perf_counter()
    images = args.data / "images/train"
    if method == RANDOM:
        torch.manual_seed(seed)
        out = out.with_suffix(".pt")
        torch.save(models.resnet18(weights=None).state_dict(), out)
    elif method == PUBLISHED:
        out = out.with_suffix(".pt")
        script = Path(__file__).with_name("published.py")
        command = [args.peer, script, images, "--out", out, "--steps", args.steps]
        command += ["--seed", seed, "--batch", args.batch, "--size", args.size]
        subprocess.run([str(word) for word in command], check=True)
    else:
        pretrain(
            images,
            out,
            model="torchvision/resnet18",
            image_size=args.size,
            batch_size=args.batch,
            steps=args.steps,
            seed=seed,
            **OURS[method],
        )
    return out, time.perf_counter() - start


def judged(weights: Path, protocol: dict[str, Any], seed: int, args: argparse.Namespace) -> float:
    """Mean IoU on the split that is reported."""
    settings: dict[str, Any] = {"layers": ["layer4"], "size": tuple(args.input), "seeds": 1}
    settings |= {"split": args.split, "seed": seed}
    found = evaluate(weights, data=args.data, **settings, **protocol)
    return found.ours.scores["mIoU"]


def main() -> None:
    """Train and judge every method with every seed, and print the table."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("data", type=Path)
    flags.add_argument("--methods", nargs="+", default=[RANDOM, PUBLISHED, *OURS])
    flags.add_argument("--protocols", nargs="+", default=list(PROTOCOLS), choices=list(PROTOCOLS))
    flags.add_argument("--peer", help="interpreter with the published package, version 0.1.1")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=500)
    flags.add_argument("--batch", type=int, default=24)
    flags.add_argument("--size", type=int, default=128, help="side of the views")
    flags.add_argument("--input", type=int, nargs=2, default=(180, 240), metavar=("H", "W"))
    flags.add_argument("--split", default="test", help="what is reported")
    flags.add_argument("--save", action="store_true", help="record the figures")
    args = flags.parse_args()
    unknown = set(args.methods) - {RANDOM, PUBLISHED, *OURS}
    if unknown:
        sys.exit(f"unknown methods {sorted(unknown)}; there are {[RANDOM, PUBLISHED, *OURS]}")
    if PUBLISHED in args.methods and args.peer is None:
        sys.exit(
            f"--peer is not given; name its interpreter, or leave {PUBLISHED!r} out of --methods"
        )
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in args.methods:
            columns = found[method] = {name: [] for name in (*args.protocols, "minutes")}
            for seed in range(args.seeds):
                weights, seconds = trained(method, seed, args, Path(folder))
                columns["minutes"].append(seconds / 60)
                for name in args.protocols:
                    columns[name].append(judged(weights, PROTOCOLS[name], seed, args))
                print(method, seed, {k: round(v[-1], 4) for k, v in columns.items()}, flush=True)
    print(f"\n| method | {' | '.join(args.protocols)} | minutes |\n|---|" + "---|" * 3)
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
        report("transfer", setting, ratios, found, where=machine(), save=args.save)


if __name__ == "__main__":
    main()
