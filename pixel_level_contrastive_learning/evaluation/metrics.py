"""Scoring: labelled images fed to a predictor, and how good its predictions are, pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from ..data.segmentation import IGNORED, SegmentationDataset
from .features import Preparation

UPSAMPLED_BYTES = 2**28
"""Scores that are enlarged to a mask's size at a time: 256 MiB."""


class Fed(NamedTuple):
    """Some images of one size, ready for a network, and their masks.

    Attributes:
        pixels: ``(b, c, h, w)`` float, normalised.
        masks: Each ``(height, width)`` uint8, at its own size.
        indices: Where they stand in their split.
    """

    pixels: Tensor
    masks: list[Tensor]
    indices: list[int]


def feed(split: SegmentationDataset, prepare: Preparation, batch: int = 16) -> Iterator[Fed]:
    """The images of a split in order, up to ``batch`` of the same size at a time."""
    pixels: list[Tensor] = []
    masks: list[Tensor] = []
    indices: list[int] = []
    for index in range(len(split)):
        example = split.read(index, prepare.shortest)
        full = example.mask.shape[0], example.mask.shape[1]
        unit = prepare.in_range(example.pixels, str(split.images[index]))
        ready = prepare.normalised(prepare.resized(unit, full))
        if pixels and (len(pixels) == batch or pixels[0].shape != ready.shape):
            yield Fed(torch.stack(pixels), masks, indices)
            pixels, masks, indices = [], [], []
        pixels.append(ready)
        masks.append(example.mask)
        indices.append(index)
    yield Fed(torch.stack(pixels), masks, indices)


class Scores(NamedTuple):
    """How good predictions are, each figure in [0, 1].

    Attributes:
        miou: Mean IoU over the classes that are in the masks or were predicted.
        accuracy: Share of pixels that are right.
        iou: IoU of each class; NaN of a class that is neither in the masks nor predicted.
    """

    miou: float
    accuracy: float
    iou: tuple[float, ...]


class Scored(NamedTuple):
    """Scores, and the predictions that were to be kept, by their place in the split."""

    scores: Scores
    kept: dict[int, Tensor]


Predict = Callable[[Tensor], Tensor]
"""Images ``(b, c, h, w)``, normalised, to class scores ``(b, classes, h', w')``."""


@torch.no_grad()
def score(
    predict: Predict,
    split: SegmentationDataset,
    prepare: Preparation,
    keep: Sequence[int] = (),
) -> Scored:
    """How good predictions are, pixel by pixel of the masks as they are stored.

    Scores are enlarged bilinearly to a mask's size and the largest taken; ignored pixels are left
    out. A class that is predicted but in no mask counts with an IoU of 0; one that is in neither
    does not count.

    Args:
        predict: Gives class scores for images.
        split: Images with masks.
        prepare: What is done to the images first.
        keep: Whose predictions ``(height, width)`` uint8 are to be kept.
    """
    count = len(split.classes)
    jaccard = MulticlassJaccardIndex(
        count, average="none", ignore_index=IGNORED, validate_args=False
    )
    accuracy = MulticlassAccuracy(count, average="micro", ignore_index=IGNORED, validate_args=False)
    kept = {}
    for fed in feed(split, prepare):
        for index, scores, mask in zip(fed.indices, predict(fed.pixels), fed.masks, strict=True):
            found = likeliest(scores, (mask.shape[0], mask.shape[1]))
            for metric in (jaccard, accuracy):
                metric.update(found[None], mask[None].long())
            if index in keep:
                kept[index] = found.to(torch.uint8)
    confusion = jaccard.confmat
    there = (confusion.sum(dim=0) + confusion.sum(dim=1)) > 0
    iou = torch.where(there, jaccard.compute(), torch.nan)
    return Scored(
        Scores(float(iou.nanmean()), float(accuracy.compute()), tuple(iou.tolist())), kept
    )


def likeliest(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class with the largest score at each pixel, ``(height, width)`` int64.

    Args:
        scores: ``(classes, h, w)``, enlarged bilinearly some classes at a time.
        size: ``(height, width)``.
    """
    some = max(1, UPSAMPLED_BYTES // (4 * size[0] * size[1]))
    highest, found = torch.full(size, -torch.inf), torch.zeros(size, dtype=torch.int64)
    for first in range(0, len(scores), some):
        large = interpolate(scores[None, first : first + some], size, mode="bilinear")[0]
        values, labels = large.max(dim=0)
        found = torch.where(values > highest, labels + first, found)
        highest = torch.maximum(values, highest)
    return found
