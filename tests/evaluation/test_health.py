"""Health: spread and rank by hand, and what is said of them."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from pixel_level_contrastive_learning.evaluation.health import (
    COLLAPSED_RANK,
    COLLAPSED_SPREAD,
    effective_rank,
    gauge,
    spread,
    verdict,
)

AXES = torch.cat([torch.eye(8), -torch.eye(8)])
"""Both ends of eight axes: as spread out as can be."""


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (AXES, 1),
        # Each channel is 1 and 0: a deviation of a half; times the root of two channels.
        (torch.eye(2), math.sqrt(2) / 2),
        (torch.arange(1.0, 6)[:, None] * torch.tensor([3.0, -1, 2]), 0),  # however long
    ],
)
def test_spread_by_hand(features, expected) -> None:
    assert spread(features).item() == pytest.approx(expected, abs=1e-6)


def test_spread_looks_at_directions_alone() -> None:
    features = torch.randn(50, 6)
    longer = features * torch.rand(50, 1).add(0.1) * 1000
    torch.testing.assert_close(spread(longer), spread(features))


HALF = torch.diag(torch.tensor([math.sqrt(2), 1, 1]))
LINE = torch.linspace(-1, 1, 9)[:, None] * torch.tensor([1.0, 2, 3])


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        *((changed, 8) for changed in (AXES, AXES + 5, AXES * 1e30, AXES * 1e-30)),
        # Variances 2 : 1 : 1 are shares of a half and two quarters: 1.5 bits.
        (torch.cat([HALF, -HALF]), 2**1.5),
        (LINE, 1),
        (torch.ones(9, 3), 1),
    ],
)
def test_rank_by_hand(features, expected) -> None:
    assert effective_rank(features).item() == pytest.approx(expected, rel=1e-4)


def test_rank_is_the_same_from_either_side() -> None:
    few = torch.randn(5, 5, dtype=torch.float64)
    wide = torch.cat([few, torch.zeros(5, 40, dtype=torch.float64)], dim=1)
    torch.testing.assert_close(effective_rank(wide), effective_rank(few))


@pytest.mark.parametrize("figure", [spread, effective_rank])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_shows(figure, wrong) -> None:
    features = torch.randn(6, 4)
    features[2, 1] = wrong
    assert figure(features).isnan()


@pytest.mark.parametrize("figure", [spread, effective_rank])
def test_half_precision_and_autocast_change_little_and_no_gradient_is_carried(figure) -> None:
    features = torch.randn(64, 8, requires_grad=True)
    exact = figure(features)
    assert not exact.requires_grad
    rounded = figure(features.bfloat16())
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(figure(features), exact)


def test_a_gauge_takes_the_rank_of_directions() -> None:
    features = torch.randn(50, 6) * torch.rand(50, 1).add(0.01).pow(4).mul(1e4)
    figures = gauge(features)
    assert figures.spread == pytest.approx(spread(features).item())
    assert figures.effective_rank == pytest.approx(
        effective_rank(normalize(features, dim=1)).item(), rel=1e-4
    )


def test_healthy_features_are_called_so() -> None:
    said = verdict(0.7, 22.94)
    assert said.healthy
    assert str(said) == "The features have not collapsed (spread 0.70, effective rank 22.9)."
    assert verdict(COLLAPSED_SPREAD, COLLAPSED_RANK).healthy  # the bounds themselves


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((COLLAPSED_SPREAD * 0.9, 9.0), "nearly the same in every cell"),
        ((0.5, COLLAPSED_RANK * 0.9), "collapsed onto a line"),
        ((math.nan, 9.0), "the network has diverged"),
        ((0.5, math.inf), "the network has diverged"),
    ],
)
def test_sick_features_are_called_so_with_a_way_out(figures, words) -> None:
    said = verdict(*figures)
    assert not said.healthy
    assert words in said.sentence
    assert "learning rate" in said.sentence
