"""Scoring: figures by hand, and classes chosen in parts as if at once."""

import math

import numpy as np
import pytest
import torch
from small_cards import preparation
from torch.nn.functional import interpolate, one_hot

from pixel_level_contrastive_learning.data.segmentation import SegmentationDataset
from pixel_level_contrastive_learning.data.sources import FileSource
from pixel_level_contrastive_learning.evaluation import metrics
from pixel_level_contrastive_learning.evaluation.metrics import (
    PreparedSplit,
    batches,
    likeliest,
    score,
)


def split(folder, masks, classes) -> SegmentationDataset:
    """Black images with these masks."""
    from PIL import Image

    images, paths = [], []
    for number, mask in enumerate(masks):
        ids = np.array(mask, np.uint8)
        for kind, pixels in (("image", np.zeros((*ids.shape, 3), np.uint8)), ("mask", ids)):
            Image.fromarray(pixels).save(folder / f"{kind}{number}.png")
        images.append(f"{folder}/image{number}.png")
        paths.append(f"{folder}/mask{number}.png")
    indices = tuple(range(len(images)))
    return SegmentationDataset(FileSource(images), FileSource(paths), indices, classes, folder)


def always(answers) -> metrics.Predict:
    """A predictor that gives these class ids ``(h, w)``, image by image."""
    waiting = iter(answers)

    def predict(pixels: torch.Tensor) -> list[torch.Tensor]:
        ids = torch.tensor([next(waiting) for _ in pixels])
        return [one_hot(ids, 4).permute(0, 3, 1, 2).float()]

    return predict


def test_figures_by_hand(tmp_path) -> None:
    masks = [[[0, 0, 1, 255], [0, 1, 1, 255]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
    predicted = [[[0, 1, 1, 0], [0, 1, 2, 1]], [[1, 1, 1, 1], [0, 0, 0, 0]]]
    judged = split(tmp_path, masks, ("a", "b", "c", "d"))
    (scored,) = score(always(predicted), PreparedSplit(judged, preparation((2, 4))), keep=[1])
    # Of 14 known pixels 12 are right. a: 6 both, 7 in either. b: 6 of 8. c: predicted, never there.
    # d: nowhere, so it does not count.
    assert scored.scores.accuracy == pytest.approx(12 / 14)
    assert scored.scores.iou[:3] == pytest.approx([6 / 7, 6 / 8, 0])
    assert math.isnan(scored.scores.iou[3])
    assert scored.scores.miou == pytest.approx((6 / 7 + 6 / 8 + 0) / 3)
    assert list(scored.kept) == [1]
    assert scored.kept[1].tolist() == predicted[1]


def test_masks_of_other_sizes_are_judged_pixel_by_pixel(tmp_path) -> None:
    judged = split(tmp_path, [np.kron([[0, 1]], np.ones((6, 6)))], ("a", "b", "c", "d"))
    (scored,) = score(always([[[0, 1]]]), PreparedSplit(judged, preparation((1, 2))))
    assert scored.scores.miou == 1
    assert scored.scores.accuracy == 1


def test_images_are_fed_by_size_in_order(val, tmp_path) -> None:
    fed = list(batches(PreparedSplit(val, preparation(16)), 3))
    assert [batch.indices for batch in fed] == [[0, 1, 2], [3]]
    assert fed[0].pixels.shape == (3, 3, 16, 24)
    assert fed[0].masks[0].shape == (32, 48)
    shapes = [(4, 8), (4, 8), (8, 4), (4, 8)]
    mixed = split(tmp_path, [np.zeros(shape) for shape in shapes], ("a", "b"))
    fed = list(batches(PreparedSplit(mixed, preparation(4))))
    assert [batch.indices for batch in fed] == [[0, 1], [2], [3]]
    assert fed[0].pixels.unique().tolist() == [-2]  # black


@pytest.mark.parametrize("some", [1, 2, 5, 100])
def test_classes_are_chosen_in_parts_as_if_at_once(monkeypatch, some) -> None:
    monkeypatch.setattr(metrics, "UPSAMPLED_BYTES", 4 * 12 * 20 * some)
    scores = torch.randn(5, 3, 5)
    large = interpolate(scores[None], (12, 20), mode="bilinear")[0]
    assert torch.equal(likeliest(scores, (12, 20)), large.argmax(0))
