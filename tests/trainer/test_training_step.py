"""A training step: a batch made ready and split, batch norm over GPUs."""

from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pixel_level_contrastive_learning import PixelCL, augment
from pixel_level_contrastive_learning.augment import (
    VIEW_ONE,
    VIEW_TWO,
    Factors,
    Normalise,
    Photometry,
    change_colour,
)
from pixel_level_contrastive_learning.data.dataset import TwoViewBatch
from pixel_level_contrastive_learning.trainer import training_step
from pixel_level_contrastive_learning.trainer.memory import blank_views
from pixel_level_contrastive_learning.trainer.training_step import (
    TrainingStep,
    make_views,
    split_batch,
)


def batch(images: int) -> TwoViewBatch:
    each = torch.arange(images)
    factors = Factors(*(each for _ in Factors._fields))
    return TwoViewBatch(each, each, each, each, factors, factors, each)


@pytest.mark.parametrize(
    ("images", "parts", "sizes"),
    [
        (24, 4, [6, 6, 6, 6]),
        (25, 8, [3, 3, 3, 3, 3, 3, 3, 4]),
        (9, 5, [2, 2, 2, 3]),
        (7, 3, [2, 2, 3]),
        (5, 1, [5]),
        (3, 3, [3]),
        (1, 1, [1]),
    ],
)
def test_no_part_is_a_single_image(images, parts, sizes) -> None:
    made = list(split_batch(batch(images), parts))
    assert [len(part.one) for part in made] == sizes
    assert torch.equal(torch.cat([part.index for part in made]), torch.arange(images))
    assert torch.equal(torch.cat([part.factors_two.hue for part in made]), torch.arange(images))


@pytest.mark.parametrize("one_by_one", [(), ("cpu",)], ids=["as one", "one by one"])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32], ids=str)
def test_each_view_has_the_colours_and_the_map_drawn_for_it(kind, one_by_one, monkeypatch) -> None:
    monkeypatch.setattr(augment, "ONE_BY_ONE", one_by_one)
    raw = torch.randint(256, (2, 6, 3, 20, 16), dtype=torch.uint8)
    one, two = raw if kind == torch.uint8 else raw / 255
    maps = torch.rand(2, 6, 2, 3)
    factors = VIEW_ONE.draw(6), VIEW_TWO.draw(6)
    normalise = Normalise((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    plan = SimpleNamespace(photometry=(Photometry(sigma=(0.1, 2.0)),) * 2)
    made = make_views(TwoViewBatch(one, two, *maps, *factors, torch.arange(6)), normalise, plan)
    for view, pixels, own, where in zip(made, raw, factors, maps, strict=True):
        assert torch.equal(view.to_image, where)
        expected = normalise(change_colour(pixels / 255, own, 2.0))
        torch.testing.assert_close(view.pixels, expected, atol=1e-5, rtol=0)
        assert view.pixels.is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_over_gpus_keeps_the_activations_in_it(monkeypatch) -> None:
    """timm's layers hold one; torch's own conversion leaves it out."""
    net = timm.create_model("test_efficientnet", num_classes=0)
    learner = PixelCL(net, 64, projection_size=8, pixel_levels=2)
    views = blank_views(3, learner, (64, 64), torch.device("cpu"))
    expected = learner(views)
    gpus = SimpleNamespace(
        world_size=2,
        device=SimpleNamespace(type="cuda"),
        setup_module=lambda module: module,
        setup_optimizers=lambda optimizer: optimizer,
    )
    monkeypatch.setattr(training_step, "build_optimizer", lambda *_: torch.optim.Optimizer)
    monkeypatch.setattr(Normalise, "to", lambda normalise, _: normalise)
    step = TrainingStep(gpus, learner, SimpleNamespace(accumulate=1), Normalise((0.5,), (0.5,)))
    norms = [module for module in step.learner.modules() if isinstance(module, _BatchNorm)]
    assert len(norms) > 20
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
    torch.testing.assert_close(step.learner(views), expected)
