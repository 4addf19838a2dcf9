"""How much memory a step takes, and how small the parts of a batch must be to fit."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from ..pixel_cl import PixelCL
from ..views import View
from .auto import is_adaptive
from .system import free_memory
from .training_step import PretrainTask

LOG = logging.getLogger("pixel_level_contrastive_learning")
MARGIN = 0.8
"""Share of the free memory that a step may take."""
MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """What a step takes, in bytes.

    Attributes:
        fixed: Weights, target, gradients and the optimiser's state.
        per_image: What an image leaves behind for the backward pass.
    """

    fixed: int
    per_image: int

    def of(self, images: int) -> int:
        """Bytes for a part of this many images."""
        return self.fixed + images * self.per_image

    def told(self, images: int) -> str:
        """The estimate in words."""
        return (
            f"about {self.of(images) / MIB:.0f} MiB a step on each device: "
            f"{self.fixed / MIB:.0f} MiB for weights, target, gradients and optimiser, and "
            f"{self.per_image / MIB:.1f} MiB for each of {images} images"
        )


def estimate(task: PretrainTask, size: tuple[int, int], precision: str) -> Estimate:
    """The memory of a step, from the forward pass of two images.

    Leaves weights, buffers and random generators as they are.
    """
    learner = task.learner
    trained = sum(p.nbytes for p in learner.parameters() if p.requires_grad)
    held = sum(t.nbytes for t in (*learner.parameters(), *learner.buffers()))
    states = 2 if is_adaptive(task.practice.optimizer) else 1
    device = next(learner.parameters()).device
    with untouched(learner), torch.autocast(device.type, torch.bfloat16, precision == "bfloat16"):
        views = blank_views(2, learner, size, device)
        kept = saved_bytes(lambda: learner(views), learner)
    return Estimate(held + trained * (1 + states), kept // 2)


def saved_bytes(forward: Callable[[], object], learner: PixelCL) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in learner.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(kept.values())


def blank_views(
    count: int, learner: PixelCL, size: tuple[int, int], device: torch.device
) -> tuple[View, View]:
    """Two views of nothing in particular, which overlap."""
    shape = count, learner.views.channels, *size
    whole = torch.tensor([[size[1], 0.0, 0.0], [0.0, size[0], 0.0]], device=device)

    def view() -> View:
        pixels = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        return View(pixels, whole.expand(count, -1, -1).contiguous())

    return view(), view()


@contextmanager
def untouched(learner: PixelCL) -> Iterator[None]:
    """A context after which buffers, gradients and random generators are as they were."""
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    cuda = [p.device for p in list(learner.parameters())[:1] if p.device.type == "cuda"]
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        for name, now in learner.named_buffers():
            if name in buffers and now.shape == buffers[name].shape:  # else made for these views
                now.copy_(buffers[name])
        learner.zero_grad(set_to_none=True)


@contextmanager
def by_itself(learner: PixelCL) -> Iterator[None]:
    """A context in which batch norm does not wait for other processes, which may try other sizes.

    It then takes its running statistics, and keeps as much for the backward pass.
    """
    together = [m for m in learner.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    for module in together:
        module.training = False
    try:
        yield
    finally:
        for module in together:
            module.training = True


def parts_tried(
    images: int, start: int, attempt: Callable[[int], None], release: Callable[[], None]
) -> int:
    """Into how many parts a batch must be taken so that an attempt at a part fits.

    Args:
        images: Images of the batch on each device.
        start: Parts to begin with.
        attempt: Takes a part of this many images as far as its backward pass.
        release: Gives back what a failed attempt left.

    Raises:
        MemoryError: Not even the smallest part fits.
    """
    parts = start
    while True:
        size = -(-images // parts)
        try:
            attempt(size)
        except torch.OutOfMemoryError:
            release()
            if size <= 2:
                raise MemoryError(
                    f"{size} images do not fit into memory; give a smaller image_size, "
                    "projection_hidden_size or model"
                ) from None
            LOG.info("%d images at a time do not fit into memory: trying half", size)
            parts *= 2
        else:
            return parts


class FitMemory(Callback):
    """Finds out before the first step into how many parts a batch must be taken.

    On a GPU a part is tried, and halved while memory runs out; elsewhere memory is estimated. The
    batch stays as it is: its parts are accumulated. A run that goes on keeps its parts, where a GPU
    has room for them.

    Args:
        images: Images of a step on each device.
        size: Size of the views.
        estimated: What a step takes; None where it is tried, on GPUs that hold the whole network.
    """

    def __init__(self, images: int, size: tuple[int, int], estimated: Estimate | None) -> None:
        self.images = images
        self.size = size
        self.estimated = estimated

    def on_train_start(self, trainer: Trainer, task: Any) -> None:
        goes_on = task.parts_before[1:] == (self.images,)
        start = task.parts_before[0] if goes_on else 1
        if self.estimated is None:
            parts = self.tried(trainer, task, start)
        elif goes_on:
            parts = start
        else:
            parts = parts_by(self.estimated, self.images, free_memory(task.device))
        if trainer.world_size > 1:
            agreed = torch.tensor(parts, device=task.device)
            torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
            parts = int(agreed)
        task.accumulate = parts
        if trainer.is_global_zero:
            LOG.info(
                "each device takes %d images a step, %d at a time (accumulate %d)",
                self.images,
                -(-self.images // parts),
                parts,
            )

    def tried(self, trainer: Trainer, task: PretrainTask, start: int) -> int:
        """Parts, ``start`` or more, found by taking one as far as its backward pass."""
        learner = task.learner

        def attempt(images: int) -> None:
            states = 2 if is_adaptive(task.practice.optimizer) else 1
            ballast = [
                torch.empty_like(p)
                for p in learner.parameters()
                if p.requires_grad
                for _ in range(states)
            ]  # what the optimiser will keep from its first step on
            with trainer.precision_plugin.forward_context():
                loss = learner(blank_views(images, learner, self.size, task.device))
            loss.backward()
            del ballast

        def release() -> None:
            learner.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

        with untouched(learner), by_itself(learner):
            return parts_tried(self.images, start, attempt, release)


def parts_by(taken: Estimate, images: int, free: int) -> int:
    """Into how many parts a batch must be taken by the estimate and the bytes that are free."""
    room = MARGIN * free - taken.fixed
    fit = max(2, int(room // max(1, taken.per_image)))
    return max(1, -(-images // fit))
