"""Fine-tuning: the whole network trained on masks, with a small decoder."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from math import cos, inf, pi
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision import tv_tensors
from torchvision.transforms import v2

from ..data.segmentation import IGNORED
from ..modules.feature_info import unfreeze
from .features import Preparation, Reader, autocast, deepest_maps, device_of, resized
from .metrics import PreparedSplit, Scored, score
from .probes import DivergedError, held_out_last

log = logging.getLogger(__name__)

STEPS = 1000
BATCH = 8
WIDTH = 64
"""Channels of the decoder."""
CROP = 256
"""Side of the crops, at most; a multiple of `CROP_UNIT`."""
CROP_UNIT = 32
CROP_AREA = (0.25, 1.0)
CROP_DETAIL = 2
"""Times the fed size at which images are kept, to cut crops of half the height at full detail."""


class LearningRates(NamedTuple):
    """Peak learning rates of AdamW."""

    backbone: float
    decoder: float
    chosen: bool = True  # False where a single mask left nothing to choose by

    def __str__(self) -> str:
        text = f"{self.backbone:g} (decoder {self.decoder:g})"
        return text if self.chosen else f"{text.removesuffix(')')}; not chosen: one mask)"


RATES = (
    LearningRates(3e-4, 1e-3),
    LearningRates(1e-4, 1e-3),
    LearningRates(1e-3, 1e-3),
    LearningRates(1e-3, 3e-3),
)
"""What `choose_rates` chooses from; the first where there is nothing to choose by."""


class Segmenter(nn.Module):
    """A backbone that takes images of a size, with a U-Net-like decoder: scores of its finest map.

    Reads the deepest map of each stride by hooks, so that a convolutional network gets a decoder
    with skips and a plain transformer, all of whose maps have one stride, an FCN head. The blocks
    are those of segmentation-models-pytorch.
    """

    def __init__(self, net: nn.Module, channels: int, size: tuple[int, int], classes: int) -> None:
        from segmentation_models_pytorch.base import SegmentationHead
        from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoderBlock

        super().__init__()
        self.net = unfreeze(net)
        self.reader = Reader(net, deepest_maps(net, channels, size), channels, size)
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


def finetune(
    net: nn.Module,
    train: PreparedSplit,
    scored: PreparedSplit,
    *,
    rates: LearningRates = RATES[0],
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
    keep: Sequence[int] = (),
) -> Scored:
    """How well a copy of the network segments after it was trained on masks, see `fit_segmenter`.

    Args:
        net: The network, on whatever device. It is copied and stays as it is.
        train: What is learnt from, with `CROP_DETAIL`.
        scored: What is scored, whole images.
        rates: Peak learning rates.
        steps: Updates.
        batch: Crops an update.
        seed: Decides the decoder's start, the crops and their order.
        keep: Images whose predictions are to be kept, by their place in ``scored``.

    Raises:
        DivergedError: Class scores that are NaN or infinite.
    """
    segmenter = fit_segmenter(net, train, rates=rates, steps=steps, batch=batch, seed=seed)

    def finite(pixels: Tensor) -> list[Tensor]:
        scores = predict(segmenter, pixels)
        if not scores.isfinite().all():
            raise DivergedError(
                f"fine-tuning at the learning rate {rates} gives NaN or infinite class scores; "
                "use an earlier checkpoint"
            )
        return [scores]

    (result,) = score(finite, scored, keep=keep)
    return result


def predict(segmenter: Segmenter, pixels: Tensor) -> Tensor:
    """Class scores in float32, on the network's device."""
    device = device_of(segmenter.net)
    with autocast(device):
        scores: Tensor = segmenter(pixels.to(device))
    return scores.float()


def fit_segmenter(
    net: nn.Module,
    train: PreparedSplit,
    *,
    rates: LearningRates = RATES[0],
    steps: int = STEPS,
    batch: int = BATCH,
    seed: int = 0,
) -> Segmenter:
    """A copy of the network with a decoder, trained on masks and in eval mode.

    AdamW with a tenth of the steps to warm up and a cosine down, random resized crops and flips;
    in bfloat16 where the device has it. Takes what `finetune` does.
    """
    device = device_of(net)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        torch.manual_seed(seed)
        side = crop_side(train)
        channels = train.preparation.statistics.channels
        backbone = copy.deepcopy(net).float()  # in halves small updates would round away
        segmenter = Segmenter(backbone, channels, side, len(train.classes)).to(device).train()
        inner = {id(weight) for weight in backbone.parameters()}
        decoder = [weight for weight in segmenter.parameters() if id(weight) not in inner]
        groups = [
            {"params": list(backbone.parameters()), "lr": rates.backbone},
            {"params": decoder, "lr": rates.decoder},
        ]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
        for _, (pixels, masks) in zip(
            range(steps), crops(train, side, batch, device), strict=False
        ):
            with autocast(device):
                scores = segmenter(pixels)
            loss = known_loss(resized(scores.float(), tuple(masks.shape[-2:])), masks)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return segmenter.eval()


def rate(step: int, steps: int) -> float:
    """The share of the peak learning rate at a step: up over a tenth of them, then a cosine."""
    return min((step + 1) / max(1, steps // 10), (1 + cos(pi * step / steps)) / 2)


def choose_rates(
    net: nn.Module,
    train: PreparedSplit,
    whole: PreparedSplit,
    *,
    steps: int = STEPS,
    seed: int = 0,
) -> LearningRates:
    """The learning rates with which the network segments a held-out fifth of the masks best.

    It stays as it is. Each try takes so many steps; ``train`` is kept with `CROP_DETAIL`, and
    ``whole`` are the same images without.
    """
    order, first = held_out_last(len(train))
    if first == len(order):
        default = RATES[0]._replace(chosen=False)
        log.info("learning rate %s", default)
        return default
    learnt = train.of(train.dataset.subset(order[:first]))
    held_out = whole.of(whole.dataset.subset(order[first:]))
    tried: dict[LearningRates, float] = {}
    for rates in RATES:
        tried[rates] = -inf
        with suppress(DivergedError):
            result = finetune(net, learnt, held_out, rates=rates, steps=steps, seed=seed)
            tried[rates] = result.scores.miou
    best = max(tried, key=lambda rates: tried[rates])
    log.info(
        "learning rate %s reaches %.3f on %d held-out masks (the others: %s)",
        best,
        tried[best],
        len(held_out),
        ", ".join(f"{rates} {miou:.3f}" for rates, miou in tried.items() if rates != best),
    )
    return best


class Cost(NamedTuple):
    """What fine-tuning takes, in seconds."""

    step: float
    image: float


def measure_cost(net: nn.Module, train: PreparedSplit, scored: PreparedSplit) -> Cost:
    """The seconds of a step, and of an image that is scored, by trying a few of both."""
    few = scored.of(scored.dataset.subset(list(range(min(len(scored), 16)))))

    def score_few(segmenter: Segmenter) -> None:  # whether it has diverged is told later
        score(lambda pixels: [predict(segmenter, pixels)], few)

    score_few(fit_segmenter(net, train, steps=1))  # decodes, and warms up the device
    device = device_of(net)
    clock = [now(device)]
    for steps in (1, 6):
        segmenter = fit_segmenter(net, train, steps=steps)
        clock.append(now(device))
    score_few(segmenter)
    clock.append(now(device))
    one, six, images = (after - before for before, after in pairwise(clock))
    return Cost(max(six - one, 0.0) / 5, images / len(few))


def now(device: torch.device) -> float:
    """Seconds on a clock, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def crop_side(train: PreparedSplit) -> tuple[int, int]:
    """The ``(height, width)`` of crops: what the network must have, else a square that fits."""
    prepare: Preparation = train.preparation
    if isinstance(prepare.size, tuple):
        return prepare.size
    mask = train.sample(0).mask
    shorter = min(prepare.fitted((mask.shape[0], mask.shape[1])))
    side = max(CROP_UNIT, min(CROP, shorter) // CROP_UNIT * CROP_UNIT)
    return side, side


def crops(
    train: PreparedSplit, side: tuple[int, int], batch: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Random crops without end: pixels ``(b, c, h, w)`` normalised, masks ``(b, h, w)`` int64.

    Draws from torch's generator of the CPU and cuts on the device. Every image comes once before
    any comes again.
    """
    change = v2.Compose(
        [v2.RandomResizedCrop(side, scale=CROP_AREA, antialias=True), v2.RandomHorizontalFlip()]
    )

    def endless() -> Iterator[int]:
        while True:
            yield from torch.randperm(len(train)).tolist()

    order = endless()
    while True:
        pixels: list[Tensor] = []
        masks: list[Tensor] = []
        for sample in train.read([next(order) for _ in range(batch)]):
            whole = tv_tensors.Image(sample.pixels.to(device, non_blocking=True))
            image, mask = change(whole, tv_tensors.Mask(sample.mask.to(device, non_blocking=True)))
            pixels.append(image.as_subclass(Tensor))
            masks.append(mask.as_subclass(Tensor).long())
        yield train.preparation.normalised(torch.stack(pixels)), torch.stack(masks)


def known_loss(scores: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy averaged over the pixels that are not ignored; 0 where all are."""
    total = cross_entropy(scores, masks, ignore_index=IGNORED, reduction="sum")
    return total / (masks != IGNORED).sum().clamp(min=1)
