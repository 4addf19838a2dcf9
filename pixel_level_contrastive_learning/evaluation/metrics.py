"""Labelled images as networks are fed them, and how good predictions are, pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchmetrics.classification import MulticlassJaccardIndex

from ..data.loader import cores, in_order
from ..data.segmentation import IGNORED, SegmentationDataset
from .features import Preparation, Size, in_parts, resized

UPSAMPLED_BYTES = 2**28
"""Scores that are enlarged to a mask's size at a time: 256 MiB."""
CACHE_BYTES = 2**31
"""Prepared images that are kept in memory: 2 GiB. Those beyond are decoded again each time."""


class PreparedSample(NamedTuple):
    """An image as a network is fed it, before normalisation, and its mask."""

    pixels: Tensor  # (c, h, w) float32 in [0, 1]
    mask: Tensor  # (height, width) uint8 class ids, IGNORED where nothing is known


class SampleCache(dict[Path, PreparedSample]):
    """Samples by the path of their image, as many as fit: by default into `CACHE_BYTES`."""

    def __init__(self, most_bytes: int | None = None) -> None:
        super().__init__()
        self.free = CACHE_BYTES if most_bytes is None else most_bytes

    def keep(self, path: Path, sample: PreparedSample) -> None:
        """Keep a sample if there is room."""
        size = 4 * sample.pixels.numel() + sample.mask.numel()
        if path not in self and size <= self.free:
            self[path] = sample
            self.free -= size


@dataclass(frozen=True)
class PreparedSplit:
    """A split of a labelled folder, decoded by threads and kept in memory while it fits.

    Attributes:
        dataset: Images with masks.
        preparation: What is done to the images.
        detail: Times the fed size that an image is kept at, at most. With 1 it has the size it is
            fed at and its mask its own; with more its mask has the image's size, to cut crops of.
    """

    dataset: SegmentationDataset
    preparation: Preparation
    detail: int = 1
    cache: SampleCache = field(default_factory=SampleCache, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, by id."""
        return self.dataset.classes

    def of(self, dataset: SegmentationDataset) -> Self:
        """Another choice of the images, with the same cache."""
        return replace(self, dataset=dataset)

    def read(self, order: Sequence[int]) -> Iterator[PreparedSample]:
        """The samples at these places of the split; threads decode ahead.

        Raises:
            ValueError: An image cannot be read, or is not for this network.
        """
        if all(self.dataset.images[index] in self.cache for index in order):
            yield from map(self.sample, order)
            return
        with ThreadPoolExecutor(cores()) as pool:
            for _, sample in in_order(self.sample, order, cores(), pool):
                yield sample

    def sample(self, index: int) -> PreparedSample:
        """The sample at a place of the split."""
        path = self.dataset.images[index]
        if path in self.cache:
            return self.cache[path]
        prepare = self.preparation
        read = self.dataset.read(index, self.detail * prepare.shortest)
        unit, mask = prepare.in_range(read.pixels, str(path)), read.mask
        full = mask.shape[0], mask.shape[1]
        if self.detail == 1:
            sample = PreparedSample(prepare.resized(unit, full), mask)
        else:
            h, w = (
                min(a, self.detail * b) for a, b in zip(full, prepare.fitted(full), strict=True)
            )
            scaled = interpolate(mask[None, None], (h, w), mode="nearest-exact")
            sample = PreparedSample(resized(unit[None], (h, w), antialias=True)[0], scaled[0, 0])
        self.cache.keep(path, sample)
        return sample

    def size(self) -> Size:
        """The ``(height, width)`` of the first image, as it is fed."""
        h, w = self.sample(0).pixels.shape[-2:]
        return h, w


class Batch(NamedTuple):
    """Some images of one size, ready for a network, and their masks."""

    pixels: Tensor  # (b, c, h, w) float, normalised
    masks: list[Tensor]  # each (height, width) uint8, at its own size
    indices: list[int]  # where they stand in their split


def batches(split: PreparedSplit, size: int = 16) -> Iterator[Batch]:
    """The images of a split in order, up to ``size`` of the same shape at a time."""
    samples: list[PreparedSample] = []
    first = 0

    def batch() -> Batch:
        pixels = split.preparation.normalised(torch.stack([sample.pixels for sample in samples]))
        return Batch(
            pixels, [sample.mask for sample in samples], list(range(first, first + len(samples)))
        )

    for sample in split.read(range(len(split))):
        if samples and (len(samples) == size or samples[0].pixels.shape != sample.pixels.shape):
            yield batch()
            first, samples = first + len(samples), []
        samples.append(sample)
    yield batch()


class Scores(NamedTuple):
    """How good predictions are, each figure in [0, 1]."""

    miou: float  # over the classes that are in the masks or were predicted
    accuracy: float  # share of pixels that are right
    iou: tuple[float, ...]  # of each class; NaN of one that is neither in the masks nor predicted


class Scored(NamedTuple):
    """Scores, and the predictions that were to be kept, by their place in the split."""

    scores: Scores
    kept: dict[int, Tensor]


Predict = Callable[[Tensor], Sequence[Tensor]]
"""Images ``(b, c, h, w)``, normalised, to class scores ``(b, classes, h', w')`` by each of some
predictors."""


@torch.no_grad()
def score(
    predict: Predict, split: PreparedSplit, count: int = 1, keep: Sequence[int] = ()
) -> list[Scored]:
    """How good predictions are, pixel by pixel of the masks as they are stored.

    Scores are enlarged bilinearly to a mask's size and the largest taken; ignored pixels are left
    out. A class that is predicted but in no mask counts with an IoU of 0; one that is in neither
    does not count. It all happens where the class scores are.

    Args:
        predict: Gives class scores for images, by ``count`` predictors.
        split: Images with masks.
        count: How many predictors are scored at once.
        keep: Whose predictions ``(height, width)`` uint8 are to be kept, on the CPU.
    """
    tallies = [Tally(len(split.classes)) for _ in range(count)]
    for batch in batches(split):
        for tally, scores in zip(tallies, in_parts(predict, batch.pixels), strict=True):
            for index, image_scores, mask in zip(batch.indices, scores, batch.masks, strict=True):
                labels = likeliest(image_scores, (mask.shape[0], mask.shape[1]))
                tally.add(labels, mask)
                if index in keep:
                    tally.kept[index] = labels.to(torch.uint8).cpu()
    return [Scored(tally.scores(), tally.kept) for tally in tallies]


class Tally:
    """Counts the pixels of one predictor of so many classes, where its predictions are."""

    def __init__(self, classes: int) -> None:
        self.jaccard = MulticlassJaccardIndex(
            classes, average="none", ignore_index=IGNORED, validate_args=False
        )
        self.kept: dict[int, Tensor] = {}

    def add(self, predicted: Tensor, mask: Tensor) -> None:
        """Count the pixels of an image."""
        truth = mask.to(predicted.device).long()
        self.jaccard.to(predicted.device).update(predicted[None], truth[None])

    def scores(self) -> Scores:
        """The figures of all images so far."""
        confusion = self.jaccard.confmat
        present = (confusion.sum(dim=0) + confusion.sum(dim=1)) > 0
        iou = torch.where(present, self.jaccard.compute(), torch.nan)
        right = confusion.diag().sum() / confusion.sum()
        return Scores(float(iou.nanmean()), float(right), tuple(iou.tolist()))


def likeliest(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """The class ``(height, width)`` int64 with the largest score at each pixel of a mask.

    Scores ``(classes, h, w)`` are enlarged bilinearly, some classes at a time.
    """
    some = max(1, UPSAMPLED_BYTES // (4 * size[0] * size[1]))
    highest = scores.new_full(size, -torch.inf)
    classes = torch.zeros(size, dtype=torch.int64, device=scores.device)
    for first in range(0, len(scores), some):
        large = interpolate(scores[None, first : first + some], size, mode="bilinear")[0]
        values, labels = large.max(dim=0)
        classes = torch.where(values > highest, labels + first, classes)
        highest = torch.maximum(values, highest)
    return classes
