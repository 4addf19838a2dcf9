"""Regression: the minimum is found, whatever the features' scale and wherever the fit starts."""

import pytest
import torch

from pixel_level_contrastive_learning.evaluation import regression
from pixel_level_contrastive_learning.evaluation.regression import Curvature, affine, fitted


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Features that vary far more along some directions than along others, and shares."""
    turn, _ = torch.linalg.qr(torch.randn(12, 12))
    cells = (torch.randn(300, 12) * torch.logspace(-1.5, 1.5, 12)) @ turn
    cells = (cells - cells.mean(0)) / cells.std(0)
    shares = torch.softmax(cells[:, :3] + torch.randn(300, 3), dim=1) * torch.rand(300, 1)
    return cells, shares


def loss(cells, shares, strength, weights) -> torch.Tensor:
    likelihood = torch.log_softmax(cells @ weights[:-1] + weights[-1], dim=1)
    penalty = strength / 2 * weights[:-1].square().sum()
    return -(shares * likelihood).sum() / shares.sum() + penalty


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
def test_the_minimum_is_that_of_plain_newton_steps(strength) -> None:
    cells, shares = problem()
    exact = torch.zeros(13, 3, dtype=torch.float64)
    for _ in range(30):
        values = (cells.double(), shares.double(), strength)
        own = exact.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(*values, own), own)
        table = torch.autograd.functional.hessian(lambda w, v=values: loss(*v, w), exact)
        # The classes' biases may shift together: hence the pseudo-inverse.
        step = torch.linalg.pinv(table.reshape(39, 39), hermitian=True) @ slope.flatten()
        exact = exact - step.view(13, 3)
    found = fitted(cells, shares, strength, torch.zeros(13, 3), Curvature.of(cells))
    lowest = loss(cells.double(), shares.double(), strength, exact).item()
    reached = loss(cells.double(), shares.double(), strength, found.double()).item()
    assert lowest - 1e-7 < reached < lowest + 1e-4
    chosen, best = (affine(cells.double(), w.double()).argmax(1) for w in (found, exact))
    assert (chosen == best).float().mean() > 0.98


def test_where_a_fit_starts_does_not_matter() -> None:
    cells, shares = problem()
    curvature = Curvature.of(cells)
    starts = torch.zeros(13, 3), torch.randn(13, 3)
    ends = [loss(cells, shares, 1e-2, fitted(cells, shares, 1e-2, s, curvature)) for s in starts]
    assert ends[0].item() == pytest.approx(ends[1].item(), abs=2e-4)


@pytest.mark.parametrize("rows", [1, 70, 299])
def test_a_fit_in_blocks_is_the_fit_at_once(monkeypatch, rows) -> None:
    cells, shares = (own.double() for own in problem())
    curvature, start = Curvature.of(cells), torch.zeros(13, 3, dtype=torch.float64)
    at_once = fitted(cells, shares, 1e-2, start, curvature)
    monkeypatch.setattr(regression, "BLOCK_ENTRIES", 3 * rows + 2)
    in_blocks = fitted(cells, shares, 1e-2, start, curvature)
    torch.testing.assert_close(in_blocks, at_once, rtol=0, atol=1e-9)


def test_curvature_to_powers_that_cancel() -> None:
    cells, _ = problem()
    curvature = Curvature.of(cells)
    table = 0.1 * cells.mT @ cells / 300 + 0.01 * torch.eye(12)
    torch.testing.assert_close(curvature.scaled(0.01, 1.0), table, rtol=1e-3, atol=1e-3)
    both = curvature.scaled(0.01, 0.5) @ curvature.scaled(0.01, -0.5)
    torch.testing.assert_close(both, torch.eye(12), rtol=0, atol=1e-3)


def test_curvature_saves_steps(monkeypatch) -> None:
    cells, shares = problem()
    evaluations = []

    def counted(*values):
        evaluations[-1] += 1
        return affine(*values)

    monkeypatch.setattr(regression, "affine", counted)
    for curvature in (Curvature.of(cells), Curvature(torch.ones(12), torch.eye(12))):
        evaluations.append(0)
        fitted(cells, shares, 1e-4, torch.zeros(13, 3), curvature)
    assert evaluations[0] < 0.7 * evaluations[1]


def test_nothing_is_drawn() -> None:
    cells, shares = problem()
    state = torch.get_rng_state()
    curvature = Curvature.of(cells)
    first, again = (fitted(cells, shares, 1e-2, torch.zeros(13, 3), curvature) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
