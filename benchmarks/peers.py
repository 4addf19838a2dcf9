"""Pretraining with other packages, run by the interpreter of their own environment.

PEER/bin/python benchmarks/peers.py published IMAGES [MORE] --out net.pt --steps 500 --seed 0
PEER/bin/python benchmarks/peers.py densecl IMAGES [MORE] --out net.pt --steps 500 --seed 0

published  pixel-level-contrastive-learning 0.1.1 with its own views, colour and losses; its layers
           are named, since its default pixel layer gives no map
densecl    DenseCL (arXiv:2011.09157), put together of lightly's blocks and transforms; one
           direction, so that a step has half the passes of the others

Both train a ResNet-18 with the optimiser, learning rate, warm-up and precision that ``transfer.py``
trains ours with. Imports nothing of this package.
"""

import argparse
import os
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from math import cos, pi
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import models
from torchvision.transforms.functional import pil_to_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUEUE, WIDTH, TEMPERATURE, MOMENTUM = 4096, 128, 0.2, 0.999  # of DenseCL, as lightly has them

Loss = Callable[[], Tensor]
"""The loss of the next batch."""


class DenseCL(nn.Module):
    """DenseCL of lightly's blocks: two branches, a momentum network, two queues.

    Args:
        net: A ResNet of torchvision, trained in place.
    """

    def __init__(self, net: models.ResNet) -> None:
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules import DenseCLProjectionHead

        width = net.fc.in_features
        self.online = nn.ModuleList(
            [
                nn.Sequential(*list(net.children())[:-2]),
                DenseCLProjectionHead(width, width, WIDTH),
                DenseCLProjectionHead(width, width, WIDTH),
            ]
        )
        self.target = deepcopy(self.online).requires_grad_(False)
        self.losses = nn.ModuleList(
            [NTXentLoss(TEMPERATURE, memory_bank_size=(QUEUE, WIDTH)) for _ in "12"]
        )

    def branches(self, parts: nn.ModuleList, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cells of the backbone ``(b, n, c)``, vectors ``(b, d)`` and cells ``(b, n, d)``."""
        body, pool, dense = parts
        features = body(pixels)
        cells = features.flatten(2).transpose(1, 2)
        return cells, pool(features.mean((2, 3))), dense(cells)

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """The mean of the loss of whole views and the loss of matched cells."""
        from lightly.models.utils import select_most_similar, update_momentum

        update_momentum(self.online, self.target, MOMENTUM)
        cells, vector, projected = self.branches(self.online, query)
        with torch.no_grad():
            key_cells, key_whole, key_dense = self.branches(self.target, key)
        matched = select_most_similar(cells, key_cells, key_dense)
        pairs = (vector, key_whole), (projected.flatten(0, 1), matched.flatten(0, 1))
        return sum(loss(*pair) for loss, pair in zip(self.losses, pairs, strict=True)) / 2


class Views(Dataset):
    """Both views of each image, cut by a transform of lightly."""

    def __init__(self, files: list[Path], transform: Callable[[Image.Image], list[Tensor]]) -> None:
        self.images = [Image.open(file).convert("RGB") for file in files]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> list[Tensor]:
        return self.transform(self.images[index])


def files_of(args: argparse.Namespace) -> list[Path]:
    """The images of all folders, in a fixed order."""
    return [file for folder in args.images for file in sorted(folder.iterdir())]


def published(net: models.ResNet, args: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """The published package's learner and the loss of its next batch."""
    from pixel_level_contrastive_learning import PixelCL

    # Its views have the size of its images, and its images must be square.
    images = torch.stack(
        [
            pil_to_tensor(Image.open(file).convert("RGB").resize((args.size, args.size)))
            for file in files_of(args)
        ]
    ).to(DEVICE)
    learner = PixelCL(
        net, image_size=args.size, hidden_layer_pixel="layer4", hidden_layer_instance=-2
    )

    def loss() -> Tensor:
        return learner(images[torch.randint(len(images), (args.batch,))].float() / 255)

    return learner, loss


def densecl(net: models.ResNet, args: argparse.Namespace) -> tuple[nn.Module, Loss]:
    """DenseCL's learner and the loss of its next batch."""
    from lightly.transforms import DenseCLTransform

    views = Views(files_of(args), DenseCLTransform(input_size=args.size))
    sampler = RandomSampler(views, replacement=True, num_samples=args.steps * args.batch)
    workers = max(1, min(16, (os.cpu_count() or 1) - 1))
    batches: Iterator[list[Tensor]] = iter(
        DataLoader(views, args.batch, sampler=sampler, num_workers=workers)
    )
    learner = DenseCL(net).to(DEVICE)
    return learner, lambda: learner(*(view.to(DEVICE) for view in next(batches)))


def schedule(step: int, steps: int, warmup: int) -> float:
    """Share of the peak learning rate: linear warm-up, then half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + cos(pi * (step - warmup) / (steps - warmup))) / 2


def main() -> None:
    """Train, and save the backbone's weights."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("method", choices=("published", "densecl"))
    flags.add_argument("images", type=Path, nargs="+")
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
    net = models.resnet18(weights=None).to(DEVICE)
    make = published if args.method == "published" else densecl
    learner, next_loss = make(net, args)
    trained = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, args.lr, weight_decay=1e-4)
    for step in range(args.steps):
        for group in optimiser.param_groups:
            group["lr"] = args.lr * schedule(step, args.steps, max(1, args.steps // 10))
        with torch.autocast(DEVICE, torch.bfloat16, enabled=args.bfloat16):
            loss = next_loss()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if args.method == "published":
            learner.update_moving_average()
    torch.save(net.cpu().state_dict(), args.out)


if __name__ == "__main__":
    main()
