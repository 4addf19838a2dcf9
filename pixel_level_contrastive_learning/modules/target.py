"""The target: a slowly moving average of the encoder, which no gradient reaches."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..checks import raise_together, within
from .encoder import BOTH, Branches, Encoder, Projections
from .taps import can_learn, first_weight

HALVES = (torch.float16, torch.bfloat16)


class Target(Encoder):
    """The moving average of an encoder (arXiv:2011.10043, sec. 3.1).

    Runs without gradient and in train mode: its batch norm has statistics of its own. Its
    parameters are never held in less than float32, whatever the learner is cast to: in half
    precision a step of one per cent would round away.

    Args:
        online: The encoder to follow; the target begins as its copy.

    Raises:
        ValueError: Lazy layers have no weights yet.
    """

    def __init__(self, online: Encoder) -> None:
        if any(is_lazy(parameter) for parameter in online.parameters()):
            raise ValueError(
                f"{type(online.net).__name__} has lazy layers without weights yet: run it once on "
                "an image before handing it in"
            )
        super().__init__(
            copy.deepcopy(online.net),
            online.pixel_tap,
            online.instance_tap,
            copy.deepcopy(online.pixel_projector),
            copy.deepcopy(online.instance_projector),
        )
        self.requires_grad_(False)
        self.train()
        for module in self.modules():  # tensor by tensor, since `_apply` below keeps precision
            held: list[Tensor] = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in held:
                if tensor.dtype in HALVES:
                    tensor.data = tensor.float()
        self.compute_dtype = first_weight(online, torch.empty(0)).dtype

    @torch.no_grad()
    def forward(self, pixels: Tensor, branches: Branches = BOTH) -> Projections:
        half = self.compute_dtype in HALVES  # a learner cast to halves computes in halves
        kind = pixels.device.type
        with torch.autocast(kind, dtype=self.compute_dtype) if half else nullcontext():
            return super().forward(pixels, branches)

    @torch.no_grad()
    def follow(self, online: Encoder, decay: float) -> None:
        """Move every parameter of the target: ``decay`` of itself, the rest of the online one.

        Batch-norm buffers are the target's own and stay.

        Args:
            online: The encoder that is followed.
            decay: Share of itself that the target keeps, in [0, 1].

        Raises:
            ValueError: A decay outside [0, 1].
        """
        raise_together(within("decay", decay, 0, 1))
        pairs = list(zip(self.parameters(), online.parameters(), strict=True))
        moving = [(mine.detach(), other) for mine, other in pairs if can_learn(mine)]
        others = [other.detach().to(mine.dtype) for mine, other in moving]
        torch._foreach_lerp_([mine for mine, _ in moving], others, 1 - decay)

    @torch.no_grad()
    def reset(self, online: Encoder) -> None:
        """Make the target a copy of the online encoder again, buffers included."""
        for held in (nn.Module.parameters, nn.Module.buffers):
            for mine, other in zip(held(self), held(online), strict=True):
                mine.copy_(other)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as asked, but keep float32 where halves were asked for."""

        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in HALVES else moved

        # A move keeps any precision and a cast none: ask what becomes of the present one.
        device = next(self.parameters()).device
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=device)).dtype
        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]  # untyped in torch
        return self
