"""The target: a moving average of the encoder, which no gradient reaches."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pixel_level_contrastive_learning.modules.encoder import (
    Encoder,
    Projections,
    TargetEncoder,
    map_projector,
    vector_projector,
)
from pixel_level_contrastive_learning.modules.feature_info import FeatureInfo


def online_encoder(dtype: torch.dtype = torch.float32) -> Encoder:
    """A small encoder whose batch norm has seen a batch, so that its buffers are not as built."""
    net = nn.Sequential(nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8), nn.ReLU()).to(dtype)
    hook = FeatureInfo(net, 3, (64, 64)).hook(2, pixel=True)
    heads = map_projector(8, 16, 4), vector_projector(8, 16, 4)
    online = Encoder(net, [hook], hook, *(head.to(dtype) for head in heads))
    with torch.no_grad():
        online(torch.rand(4, 3, 64, 64))
    return online


@torch.no_grad()
def drift(online: Encoder) -> None:
    """Change the online encoder, weights and buffers, as training would."""
    for parameter in online.parameters():
        parameter += 0.1 * torch.randn_like(parameter)
    online(torch.rand(4, 3, 64, 64))


def parts(projections: Projections) -> tuple[Tensor, ...]:
    """The projections of one level and of the instance."""
    return *projections.pixel, projections.instance


def copied(tensors: Callable[[], object]) -> list[Tensor]:
    """What a module holds, so that it can be compared later."""
    return [tensor.detach().clone() for tensor in tensors()]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether all of them are equal."""
    return all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def all_differ(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether all of them differ."""
    return not any(torch.equal(one, two) for one, two in zip(first, second, strict=True))


# The beginning.


def test_the_target_begins_as_a_copy_that_shares_nothing() -> None:
    online = online_encoder()
    target = TargetEncoder(online)
    assert online.state_dict().keys() == target.state_dict().keys()
    assert same(copied(target.parameters), copied(online.parameters))
    assert same(copied(target.buffers), copied(online.buffers))
    addresses = {tensor.data_ptr() for tensor in online.state_dict().values()}
    assert addresses.isdisjoint(tensor.data_ptr() for tensor in target.state_dict().values())
    pixels = torch.rand(2, 3, 64, 64)
    for projected, expected in zip(parts(target(pixels)), parts(online(pixels)), strict=True):
        torch.testing.assert_close(projected, expected)


def test_the_target_trains_its_batch_norm_whatever_the_mode_of_the_network() -> None:
    online = online_encoder().eval()
    target = TargetEncoder(online)
    assert all(module.training for module in target.modules())
    assert not any(module.training for module in online.modules())
    before = copied(target.buffers)
    target(torch.rand(4, 3, 64, 64))
    assert all_differ(copied(target.buffers), before)


def test_eval_reaches_the_target() -> None:
    target = TargetEncoder(online_encoder()).eval()
    before = copied(target.buffers)
    target(torch.rand(4, 3, 64, 64))
    assert same(copied(target.buffers), before)


# Following.


@pytest.mark.parametrize("decay", [0, 0.25, 0.99, 1, torch.tensor(0.25)])
def test_convention_every_parameter_keeps_its_share_and_takes_the_rest(decay) -> None:
    online = online_encoder()
    target = TargetEncoder(online)
    before, buffers = copied(target.parameters), copied(target.buffers)
    drift(online)
    others = copied(online.parameters)
    assert all_differ(before, others)
    target.update(online, decay)
    for kept, other, moved in zip(before, others, target.parameters(), strict=True):
        torch.testing.assert_close(moved, decay * kept + (1 - decay) * other)
    assert same(copied(target.buffers), buffers)
    assert same(copied(online.parameters), others)


def test_the_target_is_not_the_online_network() -> None:
    online, pixels = online_encoder(), torch.rand(2, 3, 64, 64)
    target = TargetEncoder(online)
    before = parts(target(pixels))
    drift(online)
    target.update(online, 0.5)
    for moved, other, old in zip(parts(target(pixels)), parts(online(pixels)), before, strict=True):
        assert not torch.allclose(moved, other, atol=1e-3)
        assert not torch.allclose(moved, old, atol=1e-3)


@pytest.mark.parametrize("decay", [1.5, -0.1, float("nan"), "0.9"])
def test_a_decay_that_is_no_share_is_refused_and_moves_nothing(decay) -> None:
    online = online_encoder()
    target = TargetEncoder(online)
    drift(online)
    before = copied(target.parameters)
    with pytest.raises(ValueError, match=rf"decay is {decay!r}; .*from 0 to 1"):
        target.update(online, decay)
    assert same(copied(target.parameters), before)


def test_a_reset_makes_it_a_copy_again() -> None:
    online = online_encoder()
    target = TargetEncoder(online)
    drift(online)
    target.reset(online)
    assert same(copied(target.parameters), copied(online.parameters))
    assert same(copied(target.buffers), copied(online.buffers))
    assert not any(parameter.requires_grad for parameter in target.parameters())


def test_it_follows_a_network_that_was_wrapped_later() -> None:
    online = online_encoder()
    target = TargetEncoder(online)
    drift(online)
    before, others = copied(target.parameters), copied(online.parameters)
    online.net = torch.compile(online.net, backend="eager")
    target.update(online, 0.5)
    for kept, other, moved in zip(before, others, target.parameters(), strict=True):
        torch.testing.assert_close(moved, (kept + other) / 2)


# Gradients.


def test_no_gradient_reaches_the_target() -> None:
    target = TargetEncoder(online_encoder())
    projections = target(torch.rand(2, 3, 64, 64, requires_grad=True))
    assert not any(projected.requires_grad for projected in parts(projections))
    assert not any(parameter.requires_grad for parameter in target.parameters())


# Precision.


def held_in(module: nn.Module) -> set[torch.dtype]:
    """The floating precisions of all that a module holds."""
    tensors = [*module.parameters(), *module.buffers()]
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


CASTS = {
    "half": (torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float": (torch.float32, torch.float32),
    "double": (torch.float64, torch.float64),
}
"""What a cast computes in, and what the target is held in."""

PIXELS = torch.linspace(0, 1, 2 * 3 * 64 * 64).view(2, 3, 64, 64)


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("cast_first", [True, False], ids=["a cast network", "a cast learner"])
def test_the_target_is_never_held_in_halves_but_computes_in_them(cast, cast_first) -> None:
    computed, stored = CASTS[cast]
    if cast_first:
        online = online_encoder(computed)
        target = TargetEncoder(online)
    else:
        both = nn.ModuleList([online_encoder(), TargetEncoder(online_encoder())])
        online, target = getattr(both, cast)()
    assert held_in(online) == {computed}
    assert held_in(target) == {stored}
    for projected, other in zip(parts(target(PIXELS)), parts(online(PIXELS)), strict=True):
        assert projected.dtype == other.dtype == computed


@pytest.mark.parametrize("cast", CASTS)
def test_moving_to_a_device_changes_no_precision(cast) -> None:
    computed, stored = CASTS[cast]
    target = getattr(TargetEncoder(online_encoder()), cast)()
    for moved in (target.to("cpu"), copy.deepcopy(target)):
        assert held_in(moved) == {stored}
        assert all(projected.dtype == computed for projected in parts(moved(PIXELS)))


def test_small_steps_are_not_rounded_away() -> None:
    """At 0.999 a step moves a weight by less than bfloat16 can tell."""
    online = online_encoder().bfloat16()
    target = TargetEncoder(online)
    start = copied(target.parameters)
    with torch.no_grad():
        for parameter in online.parameters():
            parameter += 1
    aims = copied(online.parameters)
    for _ in range(10):
        target.update(online, 0.999)
    for kept, aim, moved in zip(start, aims, target.parameters(), strict=True):
        share = 0.999**10
        torch.testing.assert_close(moved, share * kept + (1 - share) * aim.float())
