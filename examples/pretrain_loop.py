"""Pretrain a ResNet-18 on a folder: python examples/pretrain_loop.py IMAGES --out net.pt."""

import argparse
from math import cos, pi
from pathlib import Path

import torch
from PIL import Image
from rich.progress import Progress
from torch.utils.data import DataLoader, RandomSampler
from torchvision import models
from torchvision.transforms import v2

from pixel_level_contrastive_learning import PixelCL


class Folder(list[Path]):
    """The images below a folder as squares ``(3, side, side)``, float in [0, 1]."""

    def __init__(self, folder: Path, side: int) -> None:
        endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
        super().__init__(f for f in sorted(folder.rglob("*")) if f.suffix.lower() in endings)
        crop = v2.Resize(side), v2.RandomCrop(side)
        self.square = v2.Compose([*crop, v2.PILToTensor(), v2.ToDtype(torch.float, scale=True)])

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.square(Image.open(super().__getitem__(index)).convert("RGB"))


flags = argparse.ArgumentParser(description=__doc__)
flags.add_argument("images", type=Path, help="folder of images, searched to any depth")
flags.add_argument("--out", default="improved-resnet.pt")
flags.add_argument("--size", type=int, default=128, help="side of the views, in pixels")
flags.add_argument("--batch", type=int, default=24)
flags.add_argument("--steps", type=int, default=300)
args = flags.parse_args()

torch.manual_seed(0)
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
images = Folder(args.images, side=2 * args.size)
draws = RandomSampler(images, replacement=True, num_samples=args.steps * args.batch)
resnet = models.resnet18(weights=None, zero_init_residual=True).to(device)
learner = PixelCL(resnet, args.size, instance_weight=0.1, cutout_ratio_range=(0.45, 1.0))
opt = torch.optim.AdamW(learner.parameters(), lr=2.8e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2.8e-3, args.steps, pct_start=0.1)

with Progress() as progress:
    task = progress.add_task("pretraining", total=args.steps)
    for step, batch in enumerate(DataLoader(images, args.batch, sampler=draws, num_workers=1)):
        with torch.autocast(device.type, torch.bfloat16):
            terms = learner(batch.to(device), return_terms=True)
        opt.zero_grad()
        terms.loss.backward()
        opt.step()
        schedule.step()
        learner.update_moving_average(1 - 0.005 * (1 + cos(pi * (step + 1) / args.steps)))
        shown = f"loss {terms.loss.item():.3f}  pixel_cosine {terms.pixel_cosine:.3f}  "
        shown += f"positive_pairs {terms.positive_pairs}"
        progress.update(task, advance=1, description=shown)
torch.save(resnet.cpu(), args.out)
