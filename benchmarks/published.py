"""Pretraining with the published package, run by the interpreter of its own environment.

PEER/bin/python benchmarks/published.py IMAGES --out net.pt --steps 500 --seed 0

Its own defaults for views, colour and losses; its layers are named, since its default pixel layer
gives no map. Optimiser, learning rate, warm-up and precision are those that ``transfer.py`` trains
ours with. Imports nothing of this package.
"""

import argparse
import warnings
from math import cos, pi
from pathlib import Path

import torch
from PIL import Image
from torchvision import models
from torchvision.transforms.functional import pil_to_tensor

from pixel_level_contrastive_learning import PixelCL


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2


def main() -> None:
    """Train, and save the backbone's weights."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("images", type=Path)
    flags.add_argument("--out", type=Path, required=True)
    flags.add_argument("--steps", type=int, default=500)
    flags.add_argument("--batch", type=int, default=24)
    flags.add_argument("--size", type=int, default=128)
    flags.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--bfloat16", action="store_true", help="autocast")
    args = flags.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(args.seed)
    # Its views have the size of its images, and its images must be square.
    images = torch.stack(
        [
            pil_to_tensor(Image.open(file).convert("RGB").resize((args.size, args.size)))
            for file in sorted(args.images.iterdir())
        ]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = models.resnet18(weights=None).to(device)
    images = images.to(device)
    learner = PixelCL(
        net, image_size=args.size, hidden_layer_pixel="layer4", hidden_layer_instance=-2
    )
    optimiser = torch.optim.AdamW(learner.parameters(), args.lr, weight_decay=1e-4)
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps, max(1, args.steps // 10))
        batch = images[torch.randint(len(images), (args.batch,))].float() / 255
        with torch.autocast(device, torch.bfloat16, enabled=args.bfloat16):
            loss = learner(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        learner.update_moving_average()
    torch.save(net.cpu().state_dict(), args.out)


if __name__ == "__main__":
    main()
