"""Taps: which layers of a backbone can be read, how, and how the others are refused."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision import models

from pixel_level_contrastive_learning.modules.feature_info import Survey
from pixel_level_contrastive_learning.modules.hooks import (
    WRAPPERS,
    Reading,
    Tap,
    Taps,
    find_layer,
    first_weight,
    read_output,
)

ANY = Reading("b c h w", 8, (4, 4))
"""A reading for tests that do not look at it."""


def chain(**layers: nn.Module) -> nn.Sequential:
    """Layers that run one after the other, each under its name."""
    net = nn.Sequential()
    for name, layer in layers.items():
        net.add_module(name, layer)
    return net


def small_net(channels: int = 3) -> nn.Sequential:
    """Maps of stride 8 and 16, their average, and a head."""
    return chain(
        stem=nn.Conv2d(channels, 8, 8, 8),
        norm=nn.BatchNorm2d(8),
        act=nn.ReLU(inplace=True),
        deep=nn.Conv2d(8, 12, 2, 2),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
        head=nn.Linear(12, 5),
    )


class Calls(nn.Module):
    """A layer whose forward is a function of its layers and its input."""

    def __init__(self, function: Callable[[nn.Module, Tensor], object], **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def caught(net: nn.Module, name: str, x: Tensor, **tap: bool) -> Tensor | None:
    """What a tap on one layer catches."""
    return Taps(Tap(name, ANY, **tap)).run(net, x).get(name)


# Reading a layer while the network runs.


@pytest.mark.parametrize("name", ["stem", "deep", "pool"])
def test_a_tap_catches_what_its_layer_gives(name) -> None:
    net, x = small_net().eval(), torch.rand(2, 3, 64, 64)
    expected = x
    for own, layer in net.named_children():
        expected = layer(expected)
        if own == name:
            break
    assert torch.equal(caught(net, name, x), expected)


def test_a_layer_that_runs_twice_is_caught_the_second_time() -> None:
    net = Calls(lambda own, x: own.add(own.add(x)), add=Calls(lambda own, x: x + 1))
    assert caught(net, "add", torch.zeros(1)) == 2


def test_a_layer_that_does_not_run_is_not_caught() -> None:
    net = Calls(lambda own, x: own.used(x), used=nn.Identity(), spare=nn.Identity())
    assert caught(net, "spare", torch.zeros(1)) is None


def test_a_caught_layer_is_not_held_after_the_run() -> None:
    taps, net = Taps(Tap("stem", ANY)), small_net()
    taps.run(net, torch.rand(2, 3, 64, 64))
    assert not taps.caught


@pytest.mark.parametrize("overwritten", [True, False])
def test_a_layer_changed_in_place_is_caught_as_it_was(overwritten) -> None:
    net, x = small_net().eval(), torch.rand(2, 3, 64, 64)
    before = net.norm(net.stem(x))
    expected = before if overwritten else before.relu()
    assert before.min() < 0  # else the two are the same
    assert torch.equal(caught(net, "norm", x, overwritten=overwritten), expected)


@pytest.mark.parametrize("fails", [False, True], ids=["runs", "fails"])
def test_hooks_are_on_the_network_only_while_it_runs(fails) -> None:
    seen = []

    def count(_: nn.Module, x: Tensor) -> Tensor:
        seen.append(len(net.stem._forward_hooks))
        if fails:
            raise RuntimeError("out of memory")
        return x

    net = chain(stem=nn.Conv2d(3, 8, 8), end=Calls(count))
    taps = Taps(Tap("stem", ANY))
    for _ in range(2):
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                taps.run(net, torch.rand(1, 3, 8, 8))
        else:
            taps.run(net, torch.rand(1, 3, 8, 8))
        assert not net.stem._forward_hooks
        assert not taps.caught
    assert seen == [1, 1]


# Finding a layer by name, whatever was wrapped around it.


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
def test_a_layer_is_found_through_wrappers(wrapper) -> None:
    inner = chain(stem=nn.Identity(), block=chain(act=nn.ReLU()))
    act = inner.block.act
    inner.block = chain(**{wrapper: inner.block})
    outer = chain(**{wrapper: inner})
    assert find_layer(outer, "block.act") is act
    assert find_layer(outer, "stem") is inner.stem


@pytest.mark.parametrize("name", ["module", "module.0"])
def test_a_layer_may_be_called_like_a_wrapper(name) -> None:
    """Many networks keep a part of theirs under ``module``."""
    net = chain(module=nn.Sequential(nn.Conv2d(3, 8, 8, 8)), head=nn.Conv2d(8, 5, 1))
    tap = Survey(net, 3, (64, 64)).tap(name, pixel=True)
    assert tap.reading.channels == 8
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(caught(net, tap.name, x), net.module(x))


def test_a_layer_that_was_taken_out_is_named() -> None:
    net = small_net()
    del net.deep
    with pytest.raises(ValueError, match=r"(?s)(?=.*no longer)(?=.*'deep')(?=.*new learner)"):
        find_layer(net, "deep")


# What an output can be read as.


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 7, 4, 6), ("b c h w", 7, (4, 6), 0)),
        ((2, 4, 6, 7), ("b h w c", 7, (4, 6), 0)),
        ((2, 64, 96, 3), ("b h w c", 3, (64, 96), 0)),
        ((2, 24, 7), ("b n c", 7, (4, 6), 0)),
        ((2, 25, 7), ("b n c", 7, (4, 6), 1)),
        ((2, 29, 7), ("b n c", 7, (4, 6), 5)),
        ((2, 7), ("b c", 7, (1, 1), 0)),
        ((2, 7, 1, 1), ("b c h w", 7, (1, 1), 0)),
    ],
    ids=str,
)
def test_convention_how_a_shape_is_read(shape, expected) -> None:
    """Images of 64 x 96 and a stride of 16 make 4 x 6 cells."""
    assert read_output(torch.zeros(shape), (64, 96), batch=2)[:4] == expected


@pytest.mark.parametrize(
    "output",
    [
        (torch.zeros(2, 7, 4, 6),),
        {"out": torch.zeros(2, 7, 4, 6)},
        None,
        torch.zeros(2, 7, 4, 6, dtype=torch.int64),
        torch.zeros(5, 7, 4, 6),
        torch.zeros(2, 0, 4, 6),
        torch.zeros(2, 7, 1, 4, 6),
        torch.zeros(2),
    ],
    ids=["tuple", "dict", "nothing", "integers", "other batch", "empty", "five axes", "one axis"],
)
def test_what_is_neither_map_nor_tokens_nor_vector_cannot_be_read(output) -> None:
    assert read_output(output, (64, 96), batch=2) is None


# The layers that are taken where none is named.


def vit() -> nn.Module:
    """The transformer of torchvision, made small."""
    return models.VisionTransformer(
        image_size=64, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32
    )


@pytest.mark.parametrize(
    ("build", "side", "pixel", "cells", "instance"),
    [
        (models.resnet18, 64, "layer3", 4, "avgpool"),
        (models.resnet18, 128, "layer4", 4, "avgpool"),
        (models.resnet18, 224, "layer4", 7, "avgpool"),
        (models.resnet50, 128, "layer4", 4, "avgpool"),
        (models.resnet50, 64, "layer3", 4, "avgpool"),  # not what layer4 begins with
        (small_net, 64, "deep", 4, "pool"),
        (vit, 64, "encoder", 4, "encoder"),
        (models.mobilenet_v2, 128, "features", 4, "features"),  # its dropout is no pooled vector
    ],
)
def test_convention_the_default_is_the_deepest_map_of_four_by_four_and_the_pooled_vector(
    build, side, pixel, cells, instance
) -> None:
    survey = Survey(build(), 3, (side, side))
    assert survey.default_pixel() == pixel
    assert survey.default_instance(pixel) == instance
    assert survey.tap(pixel, pixel=True).reading.grid == (cells, cells)


@pytest.mark.parametrize(
    ("build", "pixel"),
    [
        (models.mobilenet_v3_small, "features.8"),
        (models.efficientnet_b0, "features.5"),
        (models.regnet_y_400mf, "trunk_output.block3"),
        (models.convnext_tiny, "features.5"),
        (models.densenet121, "features.denseblock3"),
    ],
)
def test_the_default_is_what_a_stage_gives_and_not_how_the_next_begins(build, pixel) -> None:
    """All of these expand, normalise or mix at the finer stride before they go coarser."""
    survey = Survey(build(), 3, (64, 64))
    assert survey.default_pixel() == pixel
    assert survey.tap(pixel, pixel=True).reading.grid == (4, 4)
    assert f" {pixel} (" in survey.advice(pixel=True)


def head(*layers: nn.Module) -> nn.Sequential:
    """A network whose maps have one stride, with layers that end it."""
    body = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.ReLU())
    return chain(body=body, head=nn.Sequential(*layers))


@pytest.mark.parametrize(
    ("net", "expected"),
    [
        (head(nn.Conv2d(8, 5, 1)), "body"),
        (head(nn.Conv2d(8, 5, 1), nn.Identity()), "body"),
        (head(nn.Conv2d(8, 5, 1), nn.BatchNorm2d(5)), "head"),  # a narrow end, not scores
        (head(nn.Conv2d(8, 8, 1)), "head"),
        (head(nn.Conv2d(8, 5, 1), nn.Conv2d(5, 8, 1)), "head"),
        (head(nn.Conv2d(8, 9, 1), nn.Conv2d(9, 4, 1)), "head.0"),
    ],
)
def test_class_scores_are_not_taken_unasked(net, expected) -> None:
    assert Survey(net, 3, (64, 64)).default_pixel() == expected


@pytest.mark.parametrize("aux", [False, True])  # an auxiliary head runs last and reads layer3
def test_the_answer_of_a_segmentation_network_is_not_taken_unasked(aux) -> None:
    """Its head runs at the stride of the backbone, and ends in dropout and scores."""
    net = models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=aux)
    survey = Survey(net, 3, (64, 64))
    assert survey.called("classifier").stride == survey.called("backbone.layer4").stride == 8
    assert survey.default_pixel() == "classifier.2"


def test_scores_alone_are_better_than_nothing() -> None:
    net = chain(scores=nn.Conv2d(3, 2, 8, 8))
    assert Survey(net, 3, (64, 64)).default_pixel() == "scores"


def test_no_stride_above_32_is_taken_unasked() -> None:
    net = chain(fine=nn.Conv2d(3, 8, 32, 32), coarse=nn.Conv2d(8, 8, 2, 2))
    assert Survey(net, 3, (256, 256)).default_pixel() == "fine"


def test_images_too_small_for_a_default_are_refused() -> None:
    with pytest.raises(ValueError, match=r"(?s)(?=.*4x4)(?=.*16x16)(?=.*larger images)"):
        Survey(small_net(), 3, (16, 16)).default_pixel()


def test_layers_are_named_by_name_or_by_index() -> None:
    survey = Survey(small_net(), 3, (64, 64))
    assert survey.tap(3, pixel=True) == survey.tap("deep", pixel=True)
    assert survey.tap(-3, pixel=False) == survey.tap("pool", pixel=False)
    assert survey.tap("deep", pixel=True)[:2] == ("deep", Reading("b c h w", 12, (4, 4)))


def test_a_layer_that_runs_twice_is_read_as_it_is_caught() -> None:
    net = small_net()
    net.deep = nn.Sequential(nn.Conv2d(8, 12, 2, 2), net.act)
    assert Survey(net, 3, (64, 64)).tap("act", pixel=True).reading[:3] == ("b c h w", 12, (4, 4))


@pytest.mark.parametrize(
    ("layer", "overwritten"), [("stem", False), ("norm", True), ("act", False)]
)
def test_layers_changed_in_place_are_noticed(layer, overwritten) -> None:
    assert Survey(small_net(), 3, (64, 64)).tap(layer, pixel=True).overwritten is overwritten


@pytest.mark.parametrize(
    "layers",
    [
        {"flat": nn.Flatten(), "drop": nn.Dropout(0.5, inplace=True), "head": nn.Linear(8, 5)},
        {"drop": nn.Dropout2d(0.5, inplace=True)},
    ],
    ids=["of a view", "of the whole"],
)
def test_dropout_in_place_is_noticed_though_it_is_idle_in_a_survey(layers) -> None:
    net = chain(stem=nn.Conv2d(3, 8, 8, 8), pool=nn.AdaptiveAvgPool2d(1), **layers)
    survey, x = Survey(net, 3, (64, 64)), torch.rand(8, 3, 64, 64)
    assert not survey.tap("stem", pixel=True).overwritten
    assert not survey.tap("drop", pixel=False).overwritten
    tap = survey.tap("pool", pixel=False)
    assert tap.overwritten
    assert torch.equal(Taps(tap).run(net.train(), x)["pool"], net.pool(net.stem(x)))


# What a survey must leave alone.


def test_a_survey_draws_nothing_and_changes_nothing() -> None:
    net = chain(
        stem=nn.Conv2d(3, 8, 8, 8),
        norm=nn.BatchNorm2d(8),
        drop=nn.Dropout(0.5),
        noise=Calls(lambda _, x: x + torch.rand_like(x)),
    )
    state = {name: held.clone() for name, held in net.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    for training in (False, True):
        Survey(net, 3, (64, 64), training=training)
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert (random.getstate(), str(np.random.get_state())) == generators[1:]
    assert all(torch.equal(held, state[name]) for name, held in net.state_dict().items())


# Refusals: what was found, and what would do.

STEM, STILL = nn.Conv2d(3, 8, 8, 8), nn.Conv2d(8, 8, 1)


def refused(net: nn.Module, layer: str | int, pixel: bool, texts: list[str]) -> None:
    """Assert that a tap on the layer is refused with all of the texts, after a good survey."""
    survey = Survey(net, 3, (64, 64))
    with pytest.raises(ValueError) as error:
        survey.tap(layer, pixel=pixel)
    for text in texts:
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("layer", "pixel", "texts"),
    [
        ("layer44", True, ["'layer44'", "perhaps", "layer4", "layer3 (256 channels, 4x4 cells)"]),
        ("nowhere", True, ["'nowhere'", "would do", "layer4 (512 channels, 2x2 cells)"]),
        ("nowhere", False, ["'nowhere'", "would do", "avgpool"]),
        (10, True, ["10 children", "no child 10", "from -10 to 9", "layer3 "]),
        (-11, False, ["10 children", "no child -11", "from -10 to 9", "avgpool"]),
        (-2, True, ["'avgpool'", "1x1", "(2, 512, 1, 1)", "layer3 (256 channels, 4x4 cells)"]),
        ("fc", True, ["'fc'", "(2, 1000)", "vector", "layer3 "]),
    ],
)
def test_layers_of_a_resnet_that_will_not_do_are_refused(layer, pixel, texts) -> None:
    refused(models.resnet18(), layer, pixel, texts)


def checkpointed(own: nn.Module, x: Tensor) -> Tensor:
    """A network whose block runs without gradient, and again in the backward pass."""
    return own.after(checkpoint(own.block, own.stem(x), use_reentrant=True))


@pytest.mark.parametrize(
    ("net", "layer", "texts"),
    [
        (
            Calls(
                lambda own, x: own.end(own.pair(x)[0]),
                pair=Calls(lambda _, x: (x, x)),
                end=STEM,
            ),
            "pair",
            ["'pair'", "tuple", "end (8 channels, 8x8 cells)"],
        ),
        (
            Calls(lambda own, x: own.end(x), spare=nn.Conv2d(3, 8, 1), end=STEM),
            "spare",
            ["'spare'", "did not run", "end (8 channels, 8x8 cells)"],
        ),
        (
            Calls(checkpointed, stem=STEM, block=nn.Sequential(STILL, nn.ReLU()), after=nn.ReLU()),
            "block.0",
            [
                "'block.0'",
                "re-entrant",
                "tap block.1 (8 channels, 8x8 cells) instead",
                "use_reentrant=False",
            ],
        ),
        (
            chain(stem=nn.Conv2d(3, 8, 8, 8).requires_grad_(False), end=nn.Identity()),
            "end",
            ["'end'", "frozen", "unfreeze"],
        ),
    ],
    ids=["tuple", "never run", "re-entrant checkpoint", "frozen"],
)
@pytest.mark.parametrize("pixel", [True, False], ids=["pixel", "instance"])
def test_layers_that_cannot_be_read_are_refused(net, layer, texts, pixel) -> None:
    refused(net, layer, pixel, texts if pixel else texts[:2])  # other layers would do for both


@pytest.mark.parametrize("channels", [1, 5])
def test_a_network_that_refuses_the_images_is_reported(channels) -> None:
    with pytest.raises(ValueError, match=rf"(?s)(?=.*{channels}, 64, 64)(?=.*image_size)"):
        Survey(small_net(), channels, (64, 64))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_a_network_that_cannot_be_copied_is_refused_with_what_to_do(norm) -> None:
    net = chain(stem=norm(nn.Conv2d(3, 8, 8, 8)))
    net(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"Sequential cannot be copied.*utils\.parametrizations"):
        Survey(net, 3, (64, 64))
    better = getattr(nn.utils.parametrizations, norm.__name__)
    net = chain(stem=better(nn.Conv2d(3, 8, 8, 8)))
    net(torch.rand(2, 3, 64, 64))
    assert Survey(net, 3, (64, 64)).default_pixel() == "stem"


# Parameters that a loss on a tap would never reach.


@pytest.mark.parametrize(
    ("layer", "idle"),
    [
        ("pool", ["head.weight", "head.bias"]),
        ("act", ["deep.weight", "deep.bias", "head.weight", "head.bias"]),
    ],
)
def test_parameters_behind_a_tap_are_unreached(layer, idle) -> None:
    survey = Survey(small_net(), 3, (64, 64))
    assert survey.unreached(survey.tap(layer, pixel=False)) == idle


def test_frozen_parameters_are_surveyed_as_if_they_learned() -> None:
    net = small_net()
    net.stem.requires_grad_(False)
    net.head.requires_grad_(False)
    survey = Survey(net, 3, (64, 64))
    assert survey.unreached(survey.tap("pool", pixel=False)) == ["head.weight", "head.bias"]
    assert not any(own.requires_grad for own in (*net.stem.parameters(), *net.head.parameters()))


def test_what_joins_a_tap_after_it_was_read_is_unreached() -> None:
    """A residual sum in place gives the tapped tensor a past that a copy of it does not have."""

    def joined(net: Calls, x: Tensor) -> Tensor:
        x = net.stem(x)
        y = net.block(x)
        y += net.side(x)
        return net.after(y)

    parts = {name: nn.Conv2d(8, 8, 1) for name in ("block", "side", "after")}
    net = Calls(joined, stem=nn.Conv2d(3, 8, 8, 8), **parts)
    survey = Survey(net, 3, (64, 64))
    tap = survey.tap("block", pixel=True)
    assert tap.overwritten
    behind = ["side.weight", "side.bias", "after.weight", "after.bias"]
    assert survey.unreached(tap) == behind
    Taps(tap).run(net, torch.rand(2, 3, 64, 64))["block"].sum().backward()
    assert [name for name, own in net.named_parameters() if own.grad is None] == behind


def test_a_table_of_indices_is_no_weight() -> None:
    net = small_net()
    net.stem.table = nn.Parameter(torch.arange(4), requires_grad=False)
    first = nn.Sequential()
    first.table = nn.Parameter(torch.arange(4), requires_grad=False)
    first.add_module("net", net)
    survey = Survey(first, 3, (64, 64))
    assert survey.images.dtype == torch.float32
    idle = survey.unreached(survey.tap("net.pool", pixel=False))
    assert idle == ["table", "net.stem.table", "net.head.weight", "net.head.bias"]
    assert first_weight(first, torch.empty(0)) is net.stem.weight


def test_copies_on_several_devices_are_refused() -> None:
    net = nn.DataParallel(small_net())
    net.device_ids = [0, 1]
    with pytest.raises(ValueError, match=r"DataParallel over 2 devices.*DistributedDataParallel"):
        find_layer(net, "stem")


class Closed(torch.autograd.Function):
    """A function that says nothing of the weights it uses and leaves gradients in them itself."""

    @staticmethod
    def forward(ctx, x: Tensor, block: nn.Module) -> Tensor:
        ctx.x, ctx.block = x.detach(), block
        return block(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, None]:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            ctx.block(x).backward(gradient)
        return x.grad, None


@pytest.mark.parametrize(
    "forward",
    [checkpointed, lambda own, x: own.after(Closed.apply(own.stem(x), own.block))],
    ids=["re-entrant checkpoint", "a function of one's own"],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_the_graph_does_not_show_are_reached(forward, frozen) -> None:
    parts = {
        "stem": nn.Conv2d(3, 8, 8, 8),
        "block": nn.Conv2d(8, 8, 1),
        "after": nn.Conv2d(8, 4, 1),
        "head": nn.Conv2d(4, 2, 1),
    }
    net = Calls(lambda own, x: own.head(forward(own, x)), **parts)
    net.block.requires_grad_(not frozen)
    survey = Survey(net, 3, (64, 64))
    taps = [survey.tap(name, pixel=True) for name in ("after", "stem")]
    behind = ["head.weight", "head.bias"]
    assert survey.unreached(taps[0]) == behind
    inside = ["block.weight", "block.bias", "after.weight", "after.bias"]
    assert survey.unreached(taps[1]) == inside + behind
    assert all(own.grad is None for own in net.parameters())
