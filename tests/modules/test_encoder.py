"""The encoder: any backbone's layers, projected pixel by pixel and as a whole."""

from collections.abc import Callable

import pytest
import torch
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pixel_level_contrastive_learning.modules.encoder import (
    Branches,
    Encoder,
    map_projector,
    predictor,
    vector_projector,
)
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo

SIZE = (64, 96)
"""Views of 4 x 6 cells at a stride of 16."""


class Backbone(nn.Module):
    """A convolution of stride 16, a body made of it in any way, and what comes last.

    Args:
        body: What runs on the map ``(b, 8, h, w)``.
        run: How it runs.
    """

    def __init__(
        self, body: nn.Module, run: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 16, 16)
        self.body = body
        self.last = nn.ReLU(inplace=True)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(self.body, self.stem(x)))


class Prefixed(nn.Module):
    """A map ``(b, 8, h, w)`` as tokens ``(b, prefix + h * w, 8)``."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self.prefix = nn.Parameter(torch.randn(prefix, 8))

    def forward(self, x: Tensor) -> Tensor:
        prefix = self.prefix.expand(len(x), -1, -1)
        return torch.cat((prefix, rearrange(x, "b c h w -> b (h w) c")), dim=1)


def bare(net: nn.Module, layer: str = "body", instance: str | None = None) -> Encoder:
    """An encoder whose projectors change nothing, so that a projection is what was read."""
    info = FeatureInfo(net, 3, SIZE)
    hooks = [info.hook(layer, pixel=True)], info.hook(instance or layer, pixel=False)
    return Encoder(net, *hooks, nn.Identity(), nn.Identity())


def views(size: tuple[int, int] = SIZE) -> Tensor:
    """Two views."""
    return torch.rand(2, 3, *size)


# Layouts.


@pytest.mark.parametrize(
    ("body", "prefix"),
    [
        (nn.Identity(), 0),
        (Rearrange("b c h w -> b h w c"), 0),
        (Prefixed(0), 0),
        (Prefixed(1), 1),
        (Prefixed(5), 5),
    ],
    ids=["map", "channels last", "tokens", "a class token", "four registers and a class token"],
)
@pytest.mark.parametrize(
    "size", [SIZE, (96, 64), (64, 64), (128, 32)], ids=["as built", "upright", "square", "narrow"]
)
def test_any_layout_is_read_as_a_map_and_as_its_average(body, prefix, size) -> None:
    net, pixels = Backbone(body), views(size)
    [pixel], instance = bare(net)(pixels)
    expected = net.stem(pixels)
    cells = [*expected.flatten(2).unbind(dim=2)]
    if prefix:
        cells += [token.expand(2, -1) for token in body.prefix]
    torch.testing.assert_close(pixel, expected)
    torch.testing.assert_close(instance, sum(cells) / len(cells))


def test_a_vector_is_the_instance_as_it_is() -> None:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    net, pixels = Backbone(pool), views()
    _, instance = bare(net, "stem", "body.2")(pixels)
    torch.testing.assert_close(instance, pool(net.stem(pixels)))


def test_projectors_see_what_was_read() -> None:
    encoder, pixels = bare(Backbone(nn.Identity())), views()
    encoder.pixel_projector = nn.Conv2d(8, 4, 1)
    encoder.instance_projector = nn.Linear(8, 3)
    [pixel], instance = encoder(pixels)
    expected = encoder.net.stem(pixels)
    torch.testing.assert_close(pixel, encoder.pixel_projector(expected))
    torch.testing.assert_close(instance, encoder.instance_projector(expected.mean(dim=(2, 3))))


def standardised(x: Tensor) -> Tensor:
    """Vectors ``(n, c)``, each channel with mean 0 and variance 1."""
    return (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()


@pytest.mark.parametrize("head", [map_projector, vector_projector, predictor])
def test_convention_a_head_is_linear_twice_with_batch_norm_between(head) -> None:
    """Two layers, batch norm and ReLU between them; what is compared with a target, after them."""
    size = {"size": 5} if head is predictor else {"channels": 5, "out": 3}
    layers = head(**size, hidden=7).double()
    nn.init.normal_(layers[1].weight)
    nn.init.normal_(layers[1].bias)
    x = torch.randn(24, 5).double()
    first, last = (layers[at].weight.flatten(1) for at in (0, 3))
    hidden = standardised(x @ first.T + layers[0].bias) * layers[1].weight + layers[1].bias
    expected = hidden.relu() @ last.T
    expected = expected + layers[3].bias if head is predictor else standardised(expected)
    if head is map_projector:
        found = rearrange(
            layers(rearrange(x, "(b h w) c -> b c h w", b=2, h=3)), "b c h w -> (b h w) c"
        )
    else:
        found = layers(x)
    torch.testing.assert_close(found, expected)


# Layers that others overwrite, gradients, precision.


def test_a_layer_overwritten_in_place_is_read_and_trained_as_it_was() -> None:
    net = Backbone(nn.BatchNorm2d(8)).eval()
    pixels, parameters = views(), [*net.stem.parameters(), *net.body.parameters()]
    expected = net.body(net.stem(pixels))
    assert expected.min() < 0  # the layer after it would cut this off
    [pixel], _ = bare(net)(pixels)
    torch.testing.assert_close(pixel, expected)
    pull = torch.randn_like(pixel)
    gradients = (torch.autograd.grad((out * pull).sum(), parameters) for out in (pixel, expected))
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("net_dtype", [torch.float32, torch.float64], ids=str)
def test_views_are_cast_to_the_weights(dtype, net_dtype) -> None:
    net, pixels = Backbone(nn.Identity()).to(net_dtype), views().to(dtype)
    [pixel], _ = bare(net)(pixels)
    torch.testing.assert_close(pixel, net.stem(pixels.to(net_dtype)))


def checkpointing(reentrant: bool) -> Callable[[nn.Module, Tensor], Tensor]:
    """Run a body under activation checkpointing while it trains, as most networks do."""

    def run(body: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(body, x, use_reentrant=reentrant) if body.training else body(x)

    return run


@pytest.mark.parametrize(
    ("reentrant", "layer"), [(False, "body"), (False, "body.0"), (True, "body"), (True, "body.1")]
)
def test_checkpointing_changes_no_gradient(reentrant, layer) -> None:
    net, pixels = Backbone(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh())), views()
    net.last = nn.Identity()
    gradients = []
    for net.run in (nn.Module.__call__, checkpointing(reentrant)):
        net.zero_grad()
        bare(net, layer)(pixels).pixel[0].square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


# What is refused while it runs.


def stop_body(net: Backbone) -> None:
    net.run = lambda _, x: x


def widen_body(net: Backbone) -> None:
    net.body = nn.Conv2d(8, 16, 1)


def flatten_body(net: Backbone) -> None:
    net.body = nn.Flatten()


def halve_body(net: Backbone) -> None:
    net.body.register_forward_hook(lambda *ran: ran[-1][:1])


def name_body(net: Backbone) -> None:
    net.body.register_forward_hook(lambda *_: {"x": torch.zeros(1)})
    net.run = lambda body, x: body(x)["x"]


def freeze(net: Backbone) -> None:
    net.requires_grad_(False)


def checkpoint_body(net: Backbone) -> None:
    net.run = checkpointing(reentrant=True)


@pytest.mark.parametrize(
    ("change", "texts"),
    [
        (stop_body, ["did not run", "every time"]),
        (widen_body, ["(2, 16, 4, 6)", "c = 8", "new learner"]),
        (flatten_body, ["(2, 192)", "'b c h w'", "new learner"]),
        (halve_body, ["(1, 8, 4, 6) for 2 images", "new learner"]),
        (name_body, ["dict", "new learner"]),
        (freeze, ["without gradient", "frozen", "unfreeze"]),
        (checkpoint_body, ["without gradient", "re-entrant", "use_reentrant=False"]),
    ],
)
@pytest.mark.parametrize("kind", Branches._fields)
def test_a_layer_that_changed_since_it_was_looked_at_is_refused(change, texts, kind) -> None:
    net = Backbone(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Tanh()))
    layer = "body.0" if change is checkpoint_body else "body"
    encoder = bare(net, layer)
    change(net)
    only = Branches(pixel=kind == "pixel", instance=kind == "instance")
    with pytest.raises(ValueError) as error:
        encoder(views(), only)
    for text in (f"the {kind} layer {layer!r}", *texts):
        assert text in str(error.value)
