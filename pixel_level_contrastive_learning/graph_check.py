"""Whether the graph of a step does what the step does: what both return, and what they change."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor

RESULTS_AGREE = 0.05
"""Largest difference of what a step and its graph return, relative to its size: of each value of
short vectors, of others on average."""
RESULTS_NEAR = 0.01
"""A difference of a value that counts for nothing: a cosine may be about 0."""
SHORT = 16
"""Values up to which a result is compared one by one."""
CHANGES_AGREE = 0.2
"""Largest difference of what a step and its graph change, relative to the change: Adam magnifies
rounding where gradients are about 0."""
SPARE_SHARE = 0.1
"""Smallest share of a GPU's memory that is free beside a graph."""

State = Mapping[str, list[Tensor]]
"""What a step changes, by kind."""


class CaptureError(RuntimeError):
    """The graph of a step does something else than the step."""


def places_of(state: State) -> list[int]:
    """The addresses of all tensors of a state."""
    return [tensor.data_ptr() for tensor in chain.from_iterable(state.values())]


def bytes_of(state: State) -> int:
    """Bytes that a state takes."""
    return sum(tensor.nbytes for tensor in chain.from_iterable(state.values()))


def copies(state: State) -> State:
    """Copies of all tensors."""
    return {name: [tensor.clone() for tensor in tensors] for name, tensors in state.items()}


def restore(state: State, kept: State) -> None:
    """Give all tensors of ``state`` the values of ``kept``."""
    for name, tensors in state.items():
        for tensor, value in zip(tensors, kept[name], strict=True):
            tensor.copy_(value)


def check_results(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Refuse results that are not those of the step."""
    for result, other in zip(results, expected, strict=True):
        off, size = (result - other).abs().float(), other.abs().float()
        if result.numel() > SHORT:
            off, size = off.mean(), size.mean()
        wrong = ~(off <= RESULTS_AGREE * size + RESULTS_NEAR).flatten()
        if wrong.any():
            raise CaptureError(
                f"the graph gives results that differ by {float(off.flatten()[wrong][0]):.3g} from "
                f"the step's own, of a size of {float(size.flatten()[wrong][0]):.3g}"
            )


def check_memory(device: torch.device, spare: int = 0) -> None:
    """Refuse a graph that leaves no memory for anything beside it: it never gives its own back.

    ``spare`` bytes are used now and will not be.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself would count as used
        free, whole = torch.cuda.mem_get_info(device)
        free += spare
        if free < SPARE_SHARE * whole:
            raise CaptureError(
                f"the graph leaves {free / 2**20:.0f} MiB of {whole / 2**20:.0f} free, too little "
                "for pictures and probes"
            )


def check_changes(now: State, before: State, after: State) -> None:
    """Refuse changes that are not those of the step, which led from ``before`` to ``after``."""
    for name, tensors in now.items():
        off = moved = 0.0
        stuck = False
        for tensor, old, new in zip(tensors, before[name], after[name], strict=True):
            if torch.equal(tensor, new):  # flags too, and masks that hold infinity
                moved += float((new.double() - old.double()).nan_to_num().abs().sum())
                continue
            if tensor.ndim == 0 and name in ("buffers", "optimiser"):
                raise CaptureError(f"the graph counts to {tensor} in the {name}, the step to {new}")
            stuck = stuck or torch.equal(tensor, old)
            off += float((tensor - new).abs().sum(dtype=torch.float64))
            moved += float((new - old).abs().sum(dtype=torch.float64))
        if not off <= CHANGES_AGREE * moved:
            raise CaptureError(
                f"the graph leaves {name} that differ by {off:.3g} in sum from the step's own, "
                f"which moved them by {moved:.3g}"
            )
        if stuck:
            raise CaptureError(f"the graph leaves a tensor of the {name} that the step moves")
