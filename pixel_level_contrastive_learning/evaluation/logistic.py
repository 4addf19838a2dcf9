"""Multinomial logistic regression, fitted until it has converged, in tables of stated size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Self

import torch
from torch import Tensor

TOLERANCE = 2e-6
"""A fit has converged when a step lowers the loss by less."""
BLOCK_ENTRIES = 2**18
"""Scores of cells that are held at a time: 1 MiB in a table, of which a fit needs three."""


def affine(cells: Tensor, weights: Tensor) -> Tensor:
    """Scores of cells ``(n, c)`` by weights ``(c + 1, classes)``, the last row added to all."""
    by_class = weights[:-1].mT.contiguous()  # in this order a CPU is up to five times as fast
    return torch.addmm(weights[-1], cells, by_class.mT)


def row_blocks(cells: Tensor, shares: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cells ``(n, c)`` and their shares ``(n, classes)``, `BLOCK_ENTRIES` shares at a time."""
    rows = max(1, BLOCK_ENTRIES // shares.shape[1])
    return zip(torch.split(cells, rows), torch.split(shares, rows), strict=True)


class Curvature(NamedTuple):
    """How steep the fit is along each direction of the features: eigenvectors of ``X'X / n``.

    Features vary a hundred thousand times more along some directions than along others; in
    coordinates in which all are alike, L-BFGS needs a fifth of the steps.
    """

    values: Tensor  # (c,), at least 0
    vectors: Tensor  # (c, c), one a column

    @classmethod
    def of(cls, cells: Tensor) -> Self:
        """Of standardised features ``(n, c)``; costs ``n c^2 + c^3``."""
        values, vectors = torch.linalg.eigh(cells.mT @ cells / len(cells))
        return cls(values.clamp(min=0), vectors)

    def scaled(self, strength: float, power: float) -> Tensor:
        """``(c, c)``: the second derivative at this L2 strength, roughly, to a power."""
        # A tenth: p (1 - p), the curvature of the softmax, averaged over likely p.
        return (self.vectors * (0.1 * self.values + strength).pow(power)) @ self.vectors.mT


def fit_logistic(
    cells: Tensor,
    shares: Tensor,
    strength: float,
    start: Tensor,
    curvature: Curvature,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """The weights that minimise cross-entropy plus ``strength / 2`` times their squared sum.

    Beside its arguments it holds tables of a block's scores, some fifty of the weights' size and
    two of ``(c, c)``.

    Args:
        cells: ``(n, c)`` standardised features.
        shares: ``(n, classes)``; a cell counts as much as its shares sum to.
        strength: Of the L2 penalty, which leaves the bias out.
        start: ``(c + 1, classes)`` to begin at. The problem is convex: it decides the time alone.
        curvature: Of the features; decides the time alone, likewise.
        tolerance: The fit ends when a step lowers the loss by less.
    """
    back = curvature.scaled(strength, -0.5)
    even = torch.cat([curvature.scaled(strength, 0.5) @ start[:-1], start[-1:]])
    optimiser = torch.optim.LBFGS(
        [even],
        max_iter=500,
        history_size=20,
        tolerance_grad=1e-5,
        tolerance_change=tolerance,
        line_search_fn="strong_wolfe",
    )
    whole = shares.sum()

    def weights() -> Tensor:
        return torch.cat([back @ even[:-1], even[-1:]])

    def closure() -> float:
        now = weights()
        loss = strength / 2 * now[:-1].square().sum()
        slope = strength * now
        slope[-1] = 0
        for cell_block, share_block in row_blocks(cells, shares):
            logs = torch.log_softmax(affine(cell_block, now), dim=1)
            loss -= (share_block * logs).sum() / whole
            error = (logs.exp() * share_block.sum(dim=1, keepdim=True) - share_block) / whole
            # Ten times as fast on a CPU as cell_block.mT @ error.
            slope[:-1] += (error.mT @ cell_block).mT
            slope[-1] += error.sum(dim=0)
        even.grad = torch.cat([back @ slope[:-1], slope[-1:]])
        return float(loss)

    with torch.no_grad():
        optimiser.step(closure)  # type: ignore[no-untyped-call]  # untyped in torch
        return weights()
