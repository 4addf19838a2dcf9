"""How much a backbone knows about segmentation: a frozen linear probe on labelled images.

python benchmarks/transfer.py DATA improved-resnet.pt

DATA holds ``images/{train,val}`` and ``masks/{train,val}`` (PNG of class ids, 255 ignored). The
same network with random weights stands beside every file given.
"""

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision import models

from pixel_level_contrastive_learning.augment import IMAGENET_MEAN, IMAGENET_STD, Normalise

IGNORED = 255


class Labelled(NamedTuple):
    """Images ``(n, 3, h, w)`` uint8 and their masks ``(n, h, w)`` uint8."""

    images: Tensor
    masks: Tensor


def load(data: Path, split: str, size: tuple[int, int]) -> Labelled:
    """A split of a labelled folder, resized to ``size`` (masks to the nearest pixel)."""
    h, w = size
    images, masks = [], []
    for file in sorted((data / "images" / split).iterdir()):
        mask = Image.open(data / "masks" / split / f"{file.stem}.png")
        image = Image.open(file).convert("RGB").resize((w, h), Image.Resampling.BILINEAR)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        masks.append(torch.from_numpy(np.array(mask.resize((w, h), Image.Resampling.NEAREST))))
    return Labelled(torch.stack(images), torch.stack(masks))


@torch.no_grad()
def features(net: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What ``layer`` gives for each image, ``(n, c, h, w)``, the network in eval mode."""
    caught: list[Tensor] = []
    net = copy.deepcopy(net).eval()
    net.get_submodule(layer).register_forward_hook(lambda _, __, output: caught.append(output))
    normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD)
    for batch in images.split(16):
        net(normalise(batch.float() / 255))
    return torch.cat(caught)


def linear_probe(
    net: nn.Module, layer: str, train: Labelled, val: Labelled, epochs: int, seed: int
) -> float:
    """Mean IoU on ``val`` of one 1x1 convolution on frozen, standardised features."""
    torch.manual_seed(seed)
    known, unseen = features(net, layer, train.images), features(net, layer, val.images)
    mean, std = known.mean((0, 2, 3), keepdim=True), known.std((0, 2, 3), keepdim=True)
    known, unseen = ((x - mean) / std.clamp(min=1e-6) for x in (known, unseen))
    classes = int(train.masks[train.masks != IGNORED].max()) + 1
    head = nn.Conv2d(known.shape[1], classes, 1)
    batches = [index for _ in range(epochs) for index in torch.randperm(len(known)).split(16)]
    optimiser = torch.optim.Adam(head.parameters(), 3e-3, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, len(batches))
    for index in batches:
        scores = interpolate(head(known[index]), train.masks.shape[1:], mode="bilinear")
        loss = cross_entropy(scores, train.masks[index].long(), ignore_index=IGNORED)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    iou = MulticlassJaccardIndex(classes, average=None, ignore_index=IGNORED)
    with torch.no_grad():
        for x, masks in zip(unseen.split(16), val.masks.split(16), strict=True):
            scores = interpolate(head(x), masks.shape[1:], mode="bilinear")
            iou.update(scores.argmax(1), masks.long())
    present = torch.bincount(val.masks.flatten().long(), minlength=256)[:classes] > 0
    return float(iou.compute()[present].mean())


def main() -> None:
    """Probe random weights and every file given, and print the table."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("data", type=Path)
    flags.add_argument("weights", type=Path, nargs="+", help="backbones saved with torch.save(net)")
    flags.add_argument("--model", default="resnet18", help="their architecture, of torchvision")
    flags.add_argument("--layer", default="layer4")
    flags.add_argument("--size", type=int, nargs=2, default=(180, 240), metavar=("H", "W"))
    flags.add_argument("--split", default="val", help="what is reported; training is on train")
    flags.add_argument("--epochs", type=int, default=30)
    flags.add_argument("--seed", type=int, default=0)
    args = flags.parse_args()
    train, val = (load(args.data, split, tuple(args.size)) for split in ("train", args.split))
    probe = args.layer, train, val, args.epochs, args.seed
    nets = {str(file): torch.load(file, weights_only=False) for file in args.weights}
    torch.manual_seed(args.seed)
    random = linear_probe(getattr(models, args.model)(weights=None), *probe)
    table = Table("backbone", f"mIoU on {args.split}", "x random")
    table.add_row("random weights", f"{random:.3f}", "1.00")
    for name, net in nets.items():
        score = linear_probe(net, *probe)
        table.add_row(name, f"{score:.3f}", f"{score / random:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
