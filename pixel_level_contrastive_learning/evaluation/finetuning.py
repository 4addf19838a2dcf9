"""Fine-tuning: the whole network trained on a share of the masks, with a small decoder."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import cos, log2, pi

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..data.segmentation import IGNORED, SegmentationDataset
from ..modules.feature_info import FeatureInfo, Layer, default_maps, unfreeze
from .features import Preparation, Reader, device_of, resized
from .metrics import Scored, score

STEPS = 200
BATCH = 8
LR = 1e-3
"""Peak learning rate of the decoder."""
BACKBONE_LR = 3e-4
"""Peak learning rate of the backbone: a compromise between random and pretrained weights, the same
for all so that they are compared alike."""
WIDTH = 64
"""Channels of the decoder."""
FINEST_STRIDE = 3
"""Maps of a smaller stride than this are not read: they cost most and know least."""
CROP = 256
"""Side of the crops, at most; a multiple of `CROP_UNIT`."""
CROP_UNIT = 32
CROP_AREA = (0.25, 1.0)


class Segmenter(nn.Module):
    """Any backbone with a U-Net-like decoder: class scores for every cell of its finest map.

    Reads the deepest map of each stride by hooks, so that a convolutional network gets a decoder
    with skips and a plain transformer, all of whose maps have one stride, an FCN head. The blocks
    are those of segmentation-models-pytorch.

    Args:
        net: The backbone, trained along.
        channels: Channels of its images.
        size: ``(height, width)`` of images it takes.
        classes: How many to tell apart.
    """

    def __init__(self, net: nn.Module, channels: int, size: tuple[int, int], classes: int) -> None:
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock

        super().__init__()
        levels = deepest_maps(FeatureInfo(unfreeze(net), channels, size))
        self.net = net
        self.reader = Reader(net, [level.name for level in levels], channels, size)
        widths = [reading.channels for reading in self.reader.layouts.values()]
        ways = pairwise([0, *widths])
        self.blocks = nn.ModuleList(
            UnetDecoderBlock(width if before == 0 else WIDTH, 0 if before == 0 else width, WIDTH)
            for before, width in ways
        )
        self.head = SegmentationHead(WIDTH, classes)

    def forward(self, pixels: Tensor) -> Tensor:
        """Class scores ``(b, classes, h, w)`` of images ``(b, c, height, width)``."""
        deepest, *skips = self.reader.maps(pixels)
        decoded = self.blocks[0](deepest, *deepest.shape[-2:])
        for block, skip in zip(list(self.blocks)[1:], skips, strict=True):
            decoded = block(decoded, *skip.shape[-2:], skip)
        scores: Tensor = self.head(decoded)
        return scores


def deepest_maps(info: FeatureInfo) -> list[Layer]:
    """The deepest map of each stride from `FINEST_STRIDE` up, the coarsest first.

    Raises:
        ValueError: There is none.
    """
    fit = [own for own in info.layers if own.carries_gradient and own.stride >= FINEST_STRIDE]
    found: dict[int, list[Layer]] = {}
    for layer in default_maps(fit):
        found.setdefault(round(log2(layer.stride)), []).append(layer)
    if not found:
        raise ValueError(
            f"{info.net_type} has no map of a stride of {FINEST_STRIDE} or more that could be "
            f"decoded; {info.advice(pixel=True)}"
        )
    return [info.deepest(equals) for _, equals in sorted(found.items(), reverse=True)]


def finetuned(
    net: nn.Module,
    train: SegmentationDataset,
    judged: SegmentationDataset,
    prepare: Preparation,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
    keep: Sequence[int] = (),
) -> Scored:
    """How well a copy of the network segments after it was trained on masks, see `trained`.

    Args:
        net: The network, on whatever device. It is copied and stays as it is.
        train: What is learnt from.
        judged: What is scored, whole images.
        prepare: What is done to images first.
        steps: Updates.
        batch: Crops an update.
        seed: Decides the decoder's start, the crops and their order.
        keep: Images whose predictions are to be kept, by their place in ``judged``.
    """
    device = device_of(net)
    segmenter = trained(net, train, prepare, steps=steps, batch=batch, seed=seed)
    return score(lambda pixels: segmenter(pixels.to(device)).float().cpu(), judged, prepare, keep)


def trained(
    net: nn.Module,
    train: SegmentationDataset,
    prepare: Preparation,
    *,
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> Segmenter:
    """A copy of the network with a decoder, trained on masks and in eval mode.

    AdamW with a tenth of the steps to warm up and a cosine down, random resized crops and flips;
    the same for whatever weights it starts from. Takes what `finetuned` does.
    """
    device = device_of(net)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        side = crop_side(train, prepare)
        channels = prepare.statistics.channels
        own = copy.deepcopy(net).float()  # in halves small updates would round away
        segmenter = Segmenter(own, channels, side, len(train.classes)).to(device).train()
        inner = {id(weight) for weight in own.parameters()}
        decoder = [weight for weight in segmenter.parameters() if id(weight) not in inner]
        groups = [
            {"params": list(own.parameters()), "lr": BACKBONE_LR},
            {"params": decoder, "lr": LR},
        ]
        optimiser = torch.optim.AdamW(groups, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, steps))
        for _, (pixels, masks) in zip(
            range(steps), crops(train, prepare, side, batch), strict=False
        ):
            scores = segmenter(pixels.to(device)).float()
            loss = known_loss(resized(scores, tuple(masks.shape[-2:])), masks.to(device))
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
        return segmenter.eval()


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: up over a tenth of them, then a cosine."""
    return min((step + 1) / max(1, steps // 10), (1 + cos(pi * step / steps)) / 2)


def crop_side(train: SegmentationDataset, prepare: Preparation) -> tuple[int, int]:
    """The ``(height, width)`` of crops: what the network must have, else a square that fits."""
    if isinstance(prepare.size, tuple):
        return prepare.size
    mask = train.read(0, prepare.shortest).mask
    shorter = min(prepare.fitted((mask.shape[0], mask.shape[1])))
    side = max(CROP_UNIT, min(CROP, shorter) // CROP_UNIT * CROP_UNIT)
    return side, side


def crops(
    train: SegmentationDataset, prepare: Preparation, side: tuple[int, int], batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops without end: pixels ``(b, c, h, w)`` normalised, masks ``(b, h, w)`` int64.

    Draws from torch's generator. Every image comes once before any comes again.
    """
    change = v2.Compose(
        [v2.RandomResizedCrop(side, scale=CROP_AREA, antialias=True), v2.RandomHorizontalFlip()]
    )
    waiting: list[int] = []
    while True:
        pixels: list[Tensor] = []
        masks: list[Tensor] = []
        while len(pixels) < batch:
            waiting = waiting or torch.randperm(len(train)).tolist()
            index = waiting.pop()
            example = train.read(index, prepare.shortest)
            unit = prepare.in_range(example.pixels, str(train.images[index]))
            whole = resized(unit[None], tuple(example.mask.shape))[0]  # as large as its mask
            image, mask = change(tv_tensors.Image(whole), tv_tensors.Mask(example.mask))
            pixels.append(image.as_subclass(Tensor))
            masks.append(mask.as_subclass(Tensor).long())
        yield prepare.normalised(torch.stack(pixels)), torch.stack(masks)


def known_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy averaged over the pixels that are not ignored; 0 where all are."""
    total = cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)
