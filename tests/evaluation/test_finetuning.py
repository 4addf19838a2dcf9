"""Fine-tuning: a decoder for any backbone, crops that match their masks, a network that learns."""

from itertools import pairwise
from math import prod

import pytest
import torch
from small_cards import preparation
from torch import nn
from torch.nn.functional import cross_entropy
from torchvision import models

from pixel_level_contrastive_learning.data.segmentation import SegmentationDataset
from pixel_level_contrastive_learning.evaluation.features import Reader, deepest_maps
from pixel_level_contrastive_learning.evaluation.finetuning import (
    CROP_DETAIL,
    RATES,
    LearningRates,
    Segmenter,
    choose_rates,
    crop_side,
    crops,
    finetune,
    fit_segmenter,
    known_loss,
    rate,
)
from pixel_level_contrastive_learning.evaluation.metrics import PreparedSplit, Scored, Scores
from pixel_level_contrastive_learning.evaluation.probes import DivergedError


def for_crops(split, size=32) -> PreparedSplit:
    return PreparedSplit(split, preparation(size), CROP_DETAIL)


def whole(split) -> PreparedSplit:
    return PreparedSplit(split, preparation(32))


class Transformer(nn.Module):
    """Two blocks on a class token and a token for each patch of 16 x 16 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 16, stride=16)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in "ab")
        )
        self.head = nn.Linear(8, 5)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(pixels).flatten(2).mT
        tokens = self.blocks(torch.cat([tokens[:, :1] * 0, tokens], dim=1))
        return self.head(tokens[:, 0])


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
    )


def fcn() -> nn.Module:
    """A network whose auxiliary head runs last."""
    return models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (models.resnet18, {"layer4": 512, "layer3": 256, "layer2": 128, "layer1": 64}),
        # Blocks of these two begin at the stride of the stage before, and are not read there.
        (models.resnet50, {"layer4": 2048, "layer3": 1024, "layer2": 512, "layer1": 256}),
        (
            models.efficientnet_b0,
            {"features": 1280, "features.5": 112, "features.3": 40, "features.2": 24},
        ),
        (fcn, {"classifier.2": 512, "backbone.layer1": 256}),
        (Transformer, {"blocks": 8}),
    ],
)
def test_the_decoder_is_given_what_stages_give(build, expected) -> None:
    net = build()
    layouts = Reader(net, deepest_maps(net, 3, (64, 96)), 3, (64, 96)).layouts
    assert [(name, layout.channels) for name, layout in layouts.items()] == list(expected.items())


@pytest.mark.parametrize(
    ("build", "sizes"),
    [
        (models.resnet18, {(64, 96): (16, 24), (80, 70): (20, 18)}),
        (Transformer, {(64, 96): (4, 6)}),
    ],
)
def test_scores_stand_on_the_grid_of_the_finest_map(build, sizes) -> None:
    net = build()
    segmenter = Segmenter(net, 3, (64, 96), 5)
    assert segmenter.net is net
    for size, grid in sizes.items():
        assert segmenter(torch.rand(2, 3, *size)).shape == (2, 5, *grid)


def test_a_network_without_such_maps_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match="Sequential has no map to decode with a stride of 3"):
        Segmenter(net, 3, (32, 32), 2)


def test_the_rate_goes_up_for_a_tenth_and_down_to_nothing() -> None:
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(0.98, abs=0.01)
    assert all(later < now for now, later in pairwise(rates[9:]))
    assert rates[50] == pytest.approx(0.5)
    assert rates[99] < 0.001
    assert [rate(0, 1), rate(0, 9)] == [1, 1]


def test_ignored_pixels_do_not_count() -> None:
    scores = torch.randn(2, 3, 4, 4)
    masks = torch.randint(3, (2, 4, 4))
    masks[0] = 255
    assert known_loss(scores, masks).item() == pytest.approx(
        cross_entropy(scores[1:], masks[1:]).item()
    )
    assert known_loss(scores, torch.full_like(masks, 255)).item() == 0


@pytest.mark.parametrize(
    ("size", "side"), [(200, (192, 192)), (20, (32, 32)), (600, (256, 256)), ((48, 64), (48, 64))]
)
def test_crops_fit_the_network_and_the_image(train, size, side) -> None:
    assert crop_side(for_crops(train, size)) == side


def test_crops_and_their_masks_are_cut_alike(train) -> None:
    drawn = crops(for_crops(train), (32, 32), 10, torch.device("cpu"))
    pixels, masks = next(drawn)
    assert pixels.shape == (10, 3, 32, 32)
    assert (masks.shape, masks.dtype) == ((10, 32, 32), torch.int64)
    known = masks != 255
    assert 0.8 < known.float().mean() < 1
    # The colours are the classes, but for the blended pixels between them.
    assert (pixels.argmax(1) == masks)[known].float().mean() > 0.95
    another, _ = next(drawn)
    assert not torch.equal(another, pixels)


def test_every_image_comes_once_before_any_comes_again(train, monkeypatch) -> None:
    sample, seen = PreparedSplit.sample, []

    def noted(self, index):
        seen.append(index)
        return sample(self, index)

    monkeypatch.setattr(PreparedSplit, "sample", noted)
    drawn = crops(for_crops(train), (32, 32), 4, torch.device("cpu"))
    for _ in range(5):
        next(drawn)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))


def test_the_learning_rates_that_serve_held_out_masks_best_are_chosen(train, monkeypatch) -> None:
    asked = []

    def tried(net, learnt, held_out, *, rates, steps, seed):
        asked.append((len(learnt), len(held_out), steps, rates))
        assert not set(learnt.dataset.images) & set(held_out.dataset.images)
        assert held_out.cache is images.cache  # as whole images they are kept once
        scores = Scores([0.3, 0.1, 0.4, 0.2][len(asked) - 1], 0.5, ())
        return Scored(scores, {})

    monkeypatch.setattr("pixel_level_contrastive_learning.evaluation.finetuning.finetune", tried)
    images = whole(train)
    assert choose_rates(small(), for_crops(train), images, steps=7) == RATES[2]
    assert asked == [(8, 2, 7, rates) for rates in RATES]
    one = train.subset([3])
    kept = choose_rates(small(), for_crops(one), whole(one))
    assert kept[:2] == RATES[0][:2]
    assert str(kept) == "0.0003 (decoder 0.001; not chosen: one mask)"
    assert len(asked) == len(RATES)


def test_a_learning_rate_that_diverges_is_not_chosen_and_told(train, val, monkeypatch) -> None:
    def diverging(net, train, *, rates, **settings) -> nn.Module:
        segmenter = fit_segmenter(net, train, rates=rates, **settings)
        if rates != RATES[2]:
            segmenter.head.register_forward_hook(lambda *arguments: arguments[-1] * torch.nan)
        return segmenter

    name = "pixel_level_contrastive_learning.evaluation.finetuning.fit_segmenter"
    monkeypatch.setattr(name, diverging)
    assert choose_rates(small(), for_crops(train), whole(train), steps=1) == RATES[2]
    with pytest.raises(DivergedError, match=r"rate 0.0003 \(decoder 0.001\) gives NaN or infinite"):
        finetune(small(), for_crops(train), whole(val), steps=1)


def test_images_are_decoded_once_while_they_fit(train, monkeypatch) -> None:
    read, seen = SegmentationDataset.read, []

    def noted(self, index, shortest=None):
        seen.append(index)
        return read(self, index, shortest)

    monkeypatch.setattr(SegmentationDataset, "read", noted)
    split = for_crops(train)
    first = [sample.pixels for sample in split.read(range(10))]
    again = [sample.pixels for sample in split.of(train.subset([4, 2])).read([1, 0])]
    assert sorted(seen) == list(range(10))
    assert torch.equal(again[0], first[2])
    assert torch.equal(again[1], first[4])
    monkeypatch.setattr("pixel_level_contrastive_learning.evaluation.metrics.CACHE_BYTES", 50_000)
    small_cache = for_crops(train)
    for _ in range(2):
        list(small_cache.read(range(10)))
    assert len(seen) == 10 + 10 + 8  # two of 24 576 bytes fit


def test_a_network_learns_and_the_one_given_stays_as_it_was(train, val) -> None:
    net = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.get_rng_state()
    scored = finetune(net, for_crops(train), whole(val), steps=40, batch=4, keep=[1])
    hardly = finetune(net, for_crops(train), whole(val), steps=1, batch=4)
    assert scored.scores.miou > hardly.scores.miou + 0.2
    assert scored.kept[1].shape == (32, 48)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("rates", [LearningRates(0, 0.1), LearningRates(0.1, 0)])
def test_backbone_and_decoder_have_rates_of_their_own_and_decay(train, rates) -> None:
    net = small()
    net.idle = nn.Parameter(torch.ones(1))  # whose gradient is 0, so that it decays alone
    net.register_forward_pre_hook(lambda module, pixels: pixels[0] + 0 * module.idle)
    still, fitted = (
        dict(
            fit_segmenter(net, for_crops(train), rates=chosen, steps=3, batch=2).named_parameters()
        )
        for chosen in (LearningRates(0, 0), rates)
    )
    for name, weight in fitted.items():
        lr = rates.backbone if name.startswith("net.") else rates.decoder
        assert torch.equal(weight, still[name]) == (lr == 0), name
    decayed = prod(1 - 0.01 * rates.backbone * rate(step, 3) for step in range(3))
    assert fitted["net.idle"].item() == pytest.approx(decayed, rel=1e-5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64])
def test_a_network_of_another_precision_is_trained_in_float32(train, kind) -> None:
    net = small()
    net.table = nn.Parameter(torch.arange(4), requires_grad=False)  # which learns nothing
    net.to(kind)
    segmenter = fit_segmenter(net, for_crops(train), steps=1, batch=2)
    kinds = {weight.dtype for weight in segmenter.parameters()}
    assert kinds == {torch.float32, torch.int64}
    assert segmenter.net.table.tolist() == [0, 1, 2, 3]
    assert {weight.dtype for weight in net.parameters()} == {kind, torch.int64}


def test_what_is_predicted_for_an_image_does_not_hang_on_the_others(train, val) -> None:
    settings = {"steps": 5, "batch": 2}
    net = small()
    together = finetune(net, for_crops(train), whole(val), keep=[1, 2], **settings)
    alone = finetune(net, for_crops(train), whole(val.subset([1])), keep=[0], **settings)
    assert torch.equal(alone.kept[0], together.kept[1])


def test_a_seed_decides_everything(train, val) -> None:
    net = small()
    first, again, other = (
        finetune(net, for_crops(train), whole(val), steps=2, batch=2, seed=seed).scores
        for seed in (0, 0, 1)
    )
    assert str(first) == str(again)  # NaN equals nothing
    assert first.accuracy != other.accuracy
