"""How much memory a step takes, and into how many parts a batch must be split to fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..checks import counted
from ..pixel_cl import PixelCL
from ..views import View
from .auto import RunPlan, is_adaptive
from .logging import LOG
from .system import free_memory
from .training_step import TrainingStep, possible_parts

USABLE_SHARE = 0.8
"""Share of the free memory that a step may take."""
TRIED_ON = ("cuda",)
"""Kinds of device on which memory is tried out; elsewhere it is estimated."""
MIB = 2**20


@dataclass(frozen=True)
class Estimate:
    """What a step takes, in bytes."""

    fixed: int  # weights, target, gradients and the optimiser's state
    per_image: int  # what an image leaves behind for the backward pass

    def total(self, images: int) -> int:
        """Bytes for a part of this many images."""
        return self.fixed + images * self.per_image

    def describe(self, images: int) -> str:
        """The estimate in words."""
        return (
            f"about {self.total(images) / MIB:.0f} MiB per step on each device: "
            f"{self.fixed / MIB:.0f} MiB for weights, target, gradients and optimiser, and "
            f"{self.per_image / MIB:.1f} MiB for each of {counted(images, 'image')}"
        )


def estimate(learner: PixelCL, plan: RunPlan) -> Estimate:
    """The memory of a step, from the forward pass of two images; leaves everything as it was."""
    trained = sum(p.nbytes for p in learner.parameters() if p.requires_grad)
    resident = sum(t.nbytes for t in (*learner.parameters(), *learner.buffers()))
    device = next(learner.parameters()).device
    half = plan.precision == "bfloat16"
    with unchanged(learner), torch.autocast(device.type, torch.bfloat16, enabled=half):
        views = blank_views(2, learner, plan.view_size, device)
        saved = saved_bytes(lambda: learner(views), learner)
    return Estimate(resident + trained * (1 + optimizer_states(plan)), saved // 2)


def optimizer_states(plan: RunPlan) -> int:
    """Tensors that the optimiser keeps for each parameter."""
    return 2 if is_adaptive(plan.optimizer) else 1


def saved_bytes(forward: Callable[[], object], learner: PixelCL) -> int:
    """Bytes that a forward pass keeps for its backward pass, weights left out."""
    weights = {p.untyped_storage().data_ptr() for p in learner.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        result = forward()
    del result
    return sum(sizes.values())


def blank_views(
    count: int, learner: PixelCL, size: tuple[int, int], device: torch.device
) -> tuple[View, View]:
    """Two views of noise, which overlap."""
    shape = count, learner.views.channels, *size
    to_image = torch.tensor([[size[1], 0.0, 0.0], [0.0, size[0], 0.0]], device=device)

    def view() -> View:
        pixels = torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        return View(pixels, to_image.expand(count, -1, -1).contiguous())

    return view(), view()


@contextmanager
def unchanged(learner: nn.Module) -> Iterator[None]:
    """A context after which buffers, gradients and random generators are as they were.

    Inside, batch norm does not wait for other processes, which may try other sizes: it uses its
    running statistics, and keeps as much for the backward pass.
    """
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    cuda = [p.device for p in list(learner.parameters())[:1] if p.device.type == "cuda"]
    synced = [m for m in learner.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    try:
        for module in synced:
            module.training = False
        with torch.random.fork_rng(cuda):
            yield
    finally:
        for module in synced:
            module.training = True
        for name, buffer in learner.named_buffers():
            if name in buffers and buffer.shape == buffers[name].shape:  # else made for these views
                buffer.copy_(buffers[name])
        learner.zero_grad(set_to_none=True)


def choose_accumulate(step: TrainingStep, needed: Estimate | None) -> int:
    """Into how many parts each process splits its share of a batch, so that memory suffices.

    A resumed run keeps its parts, where a GPU has room for them. Without an estimate of what a step
    takes it is tried out; processes with a shard each would have to try the same sizes at once.

    Raises:
        MemoryError: Not even the smallest part fits.
    """
    fabric, plan, images = step.fabric, step.plan, step.plan.images_per_process
    parts = step.parts_before[0] if step.parts_before[1:] == (images,) else 0
    if needed is None:
        parts = try_parts(step, parts or 1)
    elif not parts:
        sharing = fabric.world_size if fabric.device.type == "cpu" else 1
        free = free_memory(fabric.device) // sharing - plan.cache_bytes
        parts = parts_by(needed, images, free)
    if fabric.world_size > 1:
        agreed = torch.tensor(parts, device=fabric.device)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX)
        parts = int(agreed)
    parts = possible_parts(images, parts)
    if fabric.is_global_zero:
        LOG.info(
            f"each device processes {counted(images, 'image')} per step, "
            f"{-(-images // parts)} at a time (accumulate {parts})"
        )
    return parts


def try_parts(step: TrainingStep, parts: int) -> int:
    """Parts, doubled while the forward and backward pass of one is out of memory."""
    images = step.plan.images_per_process
    with unchanged(step.learner):
        while True:
            parts = possible_parts(images, parts)
            size = -(-images // parts)
            try:
                try_size(step, size)
                return parts
            except torch.OutOfMemoryError:
                pass  # what it held is free once it is forgotten
            step.learner.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            if parts >= images // 2:
                raise MemoryError(
                    f"{size} images do not fit into memory; give a smaller image_size, "
                    "projection_hidden_size or model"
                )
            LOG.info("%d images at a time do not fit into memory: trying half", size)
            parts *= 2


def try_size(step: TrainingStep, images: int) -> None:
    """Take as much memory as a step of so many images."""
    learner, plan = step.learner, step.plan
    trained = [p for p in learner.parameters() if p.requires_grad]
    # What the optimiser keeps from its first step on; that of a resumed run has it already.
    states = 0 if step.optimizer.state else optimizer_states(plan)
    ballast = [torch.empty_like(p) for p in trained for _ in range(states)]
    with step.fabric.autocast():
        loss = learner(blank_views(images, learner, plan.view_size, step.fabric.device))
    loss.backward()
    del ballast


def parts_by(needed: Estimate, images: int, free: int) -> int:
    """Parts of a batch of ``images`` by the estimate and the bytes that are free."""
    room = USABLE_SHARE * free - needed.fixed
    fit = max(2, int(room // max(1, needed.per_image)))
    return max(1, -(-images // fit))
