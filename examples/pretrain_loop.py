"""Pretrain a ResNet-18 on a folder: python examples/pretrain_loop.py IMAGES --out net.pt."""

import argparse
from importlib.util import find_spec
from math import cos, pi
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import models
from torchvision.transforms import v2

from pixel_level_contrastive_learning import PixelCL


class Folder(list[Path]):
    """The images in a folder, as random square crops ``(3, side, side)``, float in [0, 1]."""

    def __init__(self, folder: Path, side: int) -> None:
        endings = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"}
        super().__init__(f for f in sorted(folder.rglob("*")) if f.suffix.lower() in endings)
        self.square = v2.Compose([v2.Resize(side), v2.RandomCrop(side), v2.PILToTensor()])

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.square(Image.open(super().__getitem__(index)).convert("RGB")) / 255


if __name__ == "__main__":  # spawned loader workers import this file
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("images", type=Path, help="folder of images, searched to any depth")
    for flag, default in {"--out": "net.pt", "--size": 128, "--batch": 24, "--steps": 300}.items():
        flags.add_argument(flag, type=type(default), default=default)  # --size: side of the views
    args = flags.parse_args()
    Path(args.out).absolute().parent.mkdir(parents=True, exist_ok=True)  # before hours of training
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    images = Folder(args.images, side=2 * args.size)
    if not images:
        flags.error(f"there is no image below {args.images}; give a folder of JPEGs, PNGs or TIFFs")
    with Image.open(next(iter(images))) as first:
        if first.mode[0] in "IF":
            flags.error(f"{first.filename} is 16-bit or float; `pixelcl pretrain` scales such")
    draws = RandomSampler(images, replacement=True, num_samples=args.steps * args.batch)
    resnet = models.resnet18(weights=None, zero_init_residual=True).to(device)
    learner = PixelCL(resnet, args.size, instance_weight=0.1, cutout_ratio_range=(0.45, 1.0))
    opt = torch.optim.AdamW(learner.parameters(), lr=2.8e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 2.8e-3, args.steps, pct_start=0.1)
    for step, batch in enumerate(DataLoader(images, args.batch, sampler=draws, num_workers=1), 1):
        with torch.autocast(device.type, torch.bfloat16):
            terms = learner(batch.to(device), return_terms=True)
        terms.loss.backward()
        opt.step()
        opt.zero_grad()
        schedule.step()
        learner.update_moving_average(1 - 0.005 * (1 + cos(pi * step / args.steps)))
        print(f"step {step}  loss {terms.loss:.3f}  pixel_cosine {terms.pixel_cosine:.3f}")
    torch.save(resnet.cpu().state_dict(), args.out)  # plain torchvision weights
    if find_spec("safetensors"):  # with `pip install ".[train]"`: a card, for pixelcl
        from pixel_level_contrastive_learning.backbones.checkpoint import card_of, save_card

        save_card(args.out, card_of(learner, "torchvision/resnet18"))
