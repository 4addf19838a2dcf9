"""The losses of the method: tensors in, a scalar out (arXiv:2011.10043, sec. 3).

Each covers one direction; the learner adds the other, with the views exchanged. Cosines are
computed in at least float32, whatever the precision of the inputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

from .blocks import Block, by_blocks
from .checks import LIMITS, raise_together
from .geometry import Positives, PositiveTable

EPSILON = 1e-6
"""Vectors shorter than this get no gradient."""


def unit(vectors: Tensor, dim: int = -1) -> Tensor:
    """The vectors along ``dim`` scaled to length 1, in at least float32; differentiable once.

    A vector shorter than `EPSILON` is divided by `EPSILON` instead and gets no gradient, which
    would otherwise be a million times too large: zero vectors stay zero and give no NaN.
    """
    scaled: Tensor = _Unit.apply(vectors, dim)
    return scaled


class _Unit(torch.autograd.Function):
    """`unit` in a third of the kernels that autograd would launch."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, dim: int) -> Tensor:
        wide = vectors if vectors.dtype == torch.float64 else vectors.float()
        length = torch.linalg.vector_norm(wide, dim=dim, keepdim=True)
        scaled: Tensor = wide / length.clamp_min(EPSILON)
        if ctx.needs_input_grad[0]:
            ctx.dim, ctx.dtype = dim, vectors.dtype
            ctx.save_for_backward(scaled, length)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        scaled, length = ctx.saved_tensors
        along = (gradient * scaled).sum(dim=ctx.dim, keepdim=True)
        across = torch.addcmul(gradient, scaled, along, value=-1)
        slope = across.div_(length.masked_fill(length <= EPSILON, torch.inf))
        return slope.to(ctx.dtype), None


class Terms(NamedTuple):
    """The loss and its parts: 0-d tensors on the learner's device.

    Attributes:
        loss: ``alpha * pixel_loss + instance_weight * instance_loss``; carries the gradient.
        pixel_loss: Both directions of the pixel term, before weighting. PixPro: in [0, 8].
        instance_loss: Both directions of the instance term, before weighting, in [0, 8].
        pixel_cosine: Mean cosine of the positive pairs, over both directions and all images with
            pairs, in [-1, 1]; 0 if there are none. The figure to watch: it should rise. With
            several pixel layers, the mean, weighted like the losses.
        instance_cosine: Mean cosine of prediction and target, in [-1, 1].
        positive_pairs: Matched cells of the whole batch, first direction, int64; with several pixel
            layers, of the first.
        images_without_pairs: Images whose views share no cell of the first pixel layer, int64; the
            whole batch if ``alpha`` is 0, since no cells are compared.
    """

    loss: Tensor
    pixel_loss: Tensor
    instance_loss: Tensor
    pixel_cosine: Tensor
    instance_cosine: Tensor
    positive_pairs: Tensor
    images_without_pairs: Tensor


class PixelLoss(NamedTuple):
    """A pixel loss of one direction, and the figure that shows its progress.

    Attributes:
        loss: A scalar, at least float32.
        cosine: ``(b,)`` mean cosine of each image's positive pairs, without gradient; 0 for an
            image without pairs, or if not requested.
    """

    loss: Tensor
    cosine: Tensor


def pixpro_loss(propagated: Tensor, target: Tensor, positives: Positives | Tensor) -> Tensor:
    """The pixel-to-propagation consistency loss of one direction.

    Per image ``2 - 2 * mean cosine over its positive pairs``, or exactly 0, with a connected graph,
    for an image without pairs; then the mean over the batch (sec. 3.2, Eq. 5, shifted by 2 per
    image so that it is never negative; gradients equal those of the authors' code). Differentiable
    once. Time grows with ``n1 * n2``, memory with ``n1 + n2``.

    Args:
        propagated: ``(b, d, n1)`` float pixels of one view after the propagation module.
        target: ``(b, d, n2)`` float pixels of the other view from the target network.
        positives: `Positives`, or its table ``(b, n1, n2)`` bool.

    Returns:
        A scalar in [0, 4], at least float32.

    Raises:
        ValueError: The shapes do not belong together, or the table is not bool.

    >>> pixels = torch.eye(2)[None]
    >>> table = torch.tensor([[[True, True], [False, False]]])
    >>> pixpro_loss(pixels, pixels, table).item()
    1.0
    """
    return pixpro(propagated, target, as_positives(propagated, target, positives)).loss


def pixpro(propagated: Tensor, target: Tensor, positives: Positives) -> PixelLoss:
    """`pixpro_loss`, with its mean cosine.

    The sum over pairs of ``<x_i, t_j>`` is the sum over ``i`` of ``<x_i, s_i>``, where ``s_i`` is
    the sum of the target vectors over the positives of ``i``: one product per block, and no graph
    if the target has no gradient.
    """
    x = unit(rearrange(propagated, "b d i -> b i d"))
    t = unit(rearrange(target, "b d j -> b j d"))

    def sums(block: Block, targets: Tensor) -> Tensor:
        return einsum(positives.block(block).to(targets), targets, "b i j, b j d -> b i d")

    # Not by einsum, which would copy both to make a matrix product of it.
    total = (x * by_blocks(sums, positives.shape, t)).sum(dim=(1, 2))
    count = positives.count()
    cosine = total / count.clamp(min=1)
    return PixelLoss(((2 - 2 * cosine).clamp(0, 4) * (count > 0)).mean(), cosine.detach())


def pixcontrast_loss(
    online: Tensor, target: Tensor, positives: Positives | Tensor, temperature: float
) -> Tensor:
    """The pixel contrast loss of one direction.

    ``-log(sum over positives of exp(cos / t) / sum over all of exp(cos / t))`` for every pixel
    with at least one positive, the mean over such pixels of an image (0 for an image without
    pairs), the mean over the batch (sec. 3.1, Eq. 2), by log-sum-exp. Differentiable once. Time
    grows with ``n1 * n2``, memory with ``n1 + n2``.

    Args:
        online: ``(b, d, n1)`` float pixels of one view from the online network.
        target: ``(b, d, n2)`` float pixels of the other view from the target network.
        positives: `Positives`, or its table ``(b, n1, n2)`` bool.
        temperature: ``t``, above 0; 0.3 in the paper.

    Returns:
        A scalar of at least 0, at least float32.

    Raises:
        ValueError: The shapes do not belong together, the table is not bool, or the temperature is
            not above 0.

    >>> pixels = torch.eye(2)[None]
    >>> round(pixcontrast_loss(pixels, pixels, torch.eye(2).bool()[None], 0.3).item(), 4)
    0.0351
    """
    raise_together(LIMITS["similarity_temperature"]("temperature", temperature))
    return pixcontrast(online, target, as_positives(online, target, positives), temperature).loss


def pixcontrast(
    online: Tensor,
    target: Tensor,
    positives: Positives,
    temperature: float,
    *,
    with_cosine: bool = False,
) -> PixelLoss:
    """`pixcontrast_loss`, with the cosine of its positive pairs at the cost of another sum."""
    x, t = unit(rearrange(online, "b d i -> b i d")), unit(rearrange(target, "b d j -> b j d"))

    def of_pixels(block: Block, pixels: Tensor, targets: Tensor) -> Tensor:
        rows = pixels[:, block.rows] / temperature
        scores = einsum(rows, targets, "b i d, b j d -> b i j")
        positive = positives.block(block)
        counted = positive.amax(dim=-1)
        losses = _NegativeLogShare.apply(scores, positive)
        sums = [torch.where(counted, losses, 0), counted.to(losses)]
        if with_cosine:
            sums.append((scores.detach() * positive).sum(dim=-1))
        return torch.stack(sums, dim=-1)

    losses, counted, *cosines = by_blocks(of_pixels, positives.shape, x, t).sum(1).unbind(dim=-1)
    loss = (losses / counted.clamp(min=1)).mean()
    if not cosines:
        return PixelLoss(loss, torch.zeros_like(counted))
    return PixelLoss(loss, temperature * cosines[0].detach() / positives.count().clamp(min=1))


class _NegativeLogShare(torch.autograd.Function):
    """``-log(sum over positives of exp(score) / sum over all of exp(score))`` along the last axis.

    Maps scores ``(..., n)`` and ``(..., n)`` bool to ``(...)``. Finite at any score, since both
    sums are taken relative to their largest term; autograd keeps one table in place of seven.
    Where nothing is positive the result is large, finite and not to be used.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, positive: Tensor) -> Tensor:
        log_share = scores.log_softmax(-1)
        of_positives = torch.where(positive, log_share, torch.finfo(scores.dtype).min)
        share_of_positives = of_positives.softmax(-1)
        log_sum = of_positives.amax(-1) - share_of_positives.amax(-1).log()
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(log_share.exp_().sub_(share_of_positives))
        return -log_sum.clamp(max=0)  # rounding could make it negative

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.unsqueeze(-1) * ctx.saved_tensors[0], None


def instance_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """The instance-level loss of one direction: the mean of ``2 - 2 cos``; differentiable once.

    Args:
        prediction: ``(b, d)`` float predictions of the online network for one view.
        target: ``(b, d)`` float projections of the target network for the other view.

    Returns:
        A scalar in [0, 4], at least float32 (sec. 3.3).

    Raises:
        ValueError: The shapes differ or are not ``(b, d)``.

    >>> instance_loss(torch.tensor([[3.0, 0], [0, 1]]), torch.tensor([[1.0, 0], [1, 0]])).item()
    1.0
    """
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise ValueError(
            f"prediction has shape {tuple(prediction.shape)} and target {tuple(target.shape)}; "
            "both must be (b, d): average maps over their cells first"
        )
    cosine = (unit(prediction) * unit(target)).sum(dim=-1)
    return (2 - 2 * cosine).clamp(0, 4).mean()


def as_positives(online: Tensor, target: Tensor, positives: Positives | Tensor) -> Positives:
    """The positives, once their shape and those of the pixels agree."""
    if isinstance(positives, Tensor) and positives.dtype != torch.bool:
        raise ValueError(
            f"the table of positives has dtype {positives.dtype}; it must be bool: pass "
            "positives.bool()"
        )
    expected = (online.shape[0], online.shape[-1], target.shape[-1])
    alike = online.ndim == 3 and online.shape[:2] == target.shape[:2]
    if not alike or positives.shape != expected:
        raise ValueError(
            f"got pixels {tuple(online.shape)} and {tuple(target.shape)} and pairs "
            f"{tuple(positives.shape)}; they must be (b, d, n1), (b, d, n2) and (b, n1, n2): "
            "flatten maps with einops.rearrange(map, 'b d h w -> b d (h w)')"
        )
    return PositiveTable(positives) if isinstance(positives, Tensor) else positives
