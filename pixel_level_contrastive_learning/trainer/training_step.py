"""One training step: views made ready, loss, backward, optimiser, target; and its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from lightning.fabric import Fabric
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional
from torch.optim import Optimizer

from ..augment import Normalise, change_both
from ..backbones.state_dict import load_state
from ..blocks import full_precision
from ..data.dataset import TwoViewBatch
from ..losses import Terms
from ..modules.encoder import each_level
from ..pixel_cl import PixelCL
from ..step_graph import StepGraph, each_tensor
from ..views import View, to_device
from .auto import RunPlan
from .build import build_optimizer
from .config_io import absolute_settings
from .logging import LOG

METRIC_NAMES = (*Terms._fields, "grad_norm")
"""The metrics of a step, in the order of the tensor that carries them."""
PIXEL_COSINE, WITHOUT_PAIRS = map(METRIC_NAMES.index, ("pixel_cosine", "images_without_pairs"))
FEATURES = 256
"""Feature vectors that spread and effective rank are measured on."""
LEARNER = "learner."
"""Prefix of the learner's names in a checkpoint."""
BACKBONE = f"{LEARNER}online_encoder.net."
"""Prefix of the backbone's names in a checkpoint."""
FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)
"""How a sharded state is gathered and spread."""


class StepResult(NamedTuple):
    """What a step gives.

    The metrics are ``(8,)`` float32 on the learner's device, in the order of `METRIC_NAMES`: means
    (of images without pairs, the sum) over all processes; pairs are per image.
    """

    step: int  # counted from 1
    metrics: Tensor
    lr: float  # the step's own
    target_momentum: float
    images: int  # of the step, over all processes
    features: Tensor | None  # (n, c) float32 of the first view, where they were asked for


class TrainingStep:
    """Trains a learner, a batch a call; holds the step count and what a checkpoint needs.

    The learner is set up on the devices of ``fabric``, and sharded where the plan says so.

    Attributes:
        step: Steps done.
        samples: Images seen, over all processes.
        saved_at: Step of the newest checkpoint.
        accumulate: Parts that a process takes its share of a batch in.
        parts_before: ``accumulate`` and images a process when the checkpoint was written.
    """

    def __init__(
        self, fabric: Fabric, learner: PixelCL, plan: RunPlan, normalise: Normalise
    ) -> None:
        self.fabric, self.plan = fabric, plan
        if fabric.device.type == "cuda" and fabric.world_size > 1:
            # torch's own conversion drops the activations inside timm's norm layers.
            learner = convert_sync_batchnorm(learner)  # type: ignore[no-untyped-call]
        self.learner = learner
        self.normalise = normalise.to(fabric.device)
        self.model = fabric.setup_module(learner)
        idle = set(learner.unreached_parameters())
        self.optimizer = build_optimizer(learner, plan, idle)
        self.optimizer_step = cast(Optimizer, fabric.setup_optimizers(self.optimizer)).step
        self.graph: StepGraph | None = None
        self.step = self.samples = self.saved_at = 0
        self.accumulate = plan.accumulate or 1
        self.parts_before: tuple[int, ...] = ()

    def __call__(self, batch: TwoViewBatch, *, keep_features: bool = False) -> StepResult:
        """Take one step of the optimiser, and update the target."""
        step, schedule = self.step, self.plan.schedule
        torch.manual_seed(step_seed(self.plan.seed, step, self.fabric.global_rank))
        lr, momentum = schedule.lr(step), schedule.momentum(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.graph is not None:
            metrics, *features = self.graph(batch, torch.tensor(momentum))
            self.note_refusal(self.graph.refused)
        else:
            self.optimizer.zero_grad()
            metrics, *features = self.update(batch, momentum, keep_features=keep_features)
        images = len(batch.one) * self.fabric.world_size
        self.step, self.samples = step + 1, self.samples + images
        kept = features[0] if keep_features else None
        return StepResult(self.step, metrics, lr, momentum, images, kept)

    def update(
        self, batch: TwoViewBatch, momentum: float | Tensor, *, keep_features: bool = True
    ) -> tuple[Tensor, ...]:
        """Change weights and target by a batch; its metrics, and features where asked for."""
        features: list[Tensor] = []
        metrics = self.backward(batch, features if keep_features else None)
        self.optimizer_step()
        if self.plan.sharded:  # without a backward pass the target would stay whole
            self.learner.target_encoder.reshard()  # type: ignore[operator]  # fully_shard gave it
        self.learner.update_moving_average(momentum)
        return metrics, *features

    def capture(self) -> None:
        """From now on take steps as one CUDA graph, where that is possible."""
        if self.fabric.world_size > 1:
            self.note_refusal("several processes train together")
        else:
            self.graph = StepGraph(self.update, self.learner, self.optimizer)
            self.note_refusal(self.graph.refused)

    def note_refusal(self, reason: str | None) -> None:
        """Say why steps are not captured, if so, and take them as they are."""
        if reason is not None:
            self.graph = None
            LOG.info("steps are launched kernel by kernel, not as one CUDA graph: %s", reason)

    def backward(self, batch: TwoViewBatch, features: list[Tensor] | None) -> Tensor:
        """Leave the batch's gradient in the parameters; its metrics ``(8,)``, float32."""
        batch = move_batch(batch, self.fabric.device)
        parts = list(split_batch(batch, self.accumulate))
        images = len(batch.one) * self.fabric.world_size
        total = torch.zeros(len(METRIC_NAMES), device=self.fabric.device)
        for number, part in enumerate(parts, start=1):
            share = len(part.one) / len(batch.one)
            waits = self.fabric.world_size > 1 and number < len(parts)  # for the last part
            with self.fabric.no_backward_sync(self.model, enabled=waits):
                with features_of(self.learner, features):
                    views = make_views(part, self.normalise, self.plan)
                    terms: Terms = self.model(views, return_terms=True)
                self.fabric.backward(terms.loss * share)
            total += as_metrics(terms, len(part.one)) * share
        parameters = [p for p in self.learner.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.plan.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.plan.clip_grad, norm)
        if self.fabric.world_size > 1:
            torch.distributed.all_reduce(total)
            total /= self.fabric.world_size
        total[PIXEL_COSINE] /= (1 - total[WITHOUT_PAIRS]).clamp(min=1 / images)
        total[WITHOUT_PAIRS] *= images
        total[-1] = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return total

    def weights(self) -> dict[str, Tensor]:
        """The learner's state by its names in a checkpoint; takes every process if sharded."""
        state: Mapping[str, Any] = (
            get_model_state_dict(self.learner, options=FULL_STATE)
            if self.plan.sharded
            else self.learner.state_dict()
        )
        return {LEARNER + name: tensor for name, tensor in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds; every process takes part where the learner is sharded."""
        if self.plan.sharded:
            optimizer = get_optimizer_state_dict(self.learner, self.optimizer, options=FULL_STATE)
        else:
            optimizer = self.optimizer.state_dict()
        return {
            "state_dict": self.weights(),
            "optimizer_states": [optimizer],
            "steps_done": self.step,
            "samples": self.samples,
            "parts": [self.accumulate, self.plan.images_per_process],
            "settings": absolute_settings(self.plan.settings),
        }

    def load_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from a checkpoint."""
        state = {
            name.removeprefix(LEARNER): tensor for name, tensor in checkpoint["state_dict"].items()
        }
        [optimizer] = checkpoint["optimizer_states"]
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        if self.plan.sharded:
            set_model_state_dict(self.learner, state, options=FULL_STATE)
            set_optimizer_state_dict(self.learner, self.optimizer, optimizer, options=FULL_STATE)
        else:
            load_state(self.learner, state)
            self.optimizer.load_state_dict(optimizer)
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # the settings' own, which may have changed
        self.step = self.saved_at = checkpoint["steps_done"]
        self.samples = int(checkpoint["samples"])
        self.parts_before = tuple(checkpoint["parts"])


def move_batch(batch: TwoViewBatch, device: torch.device) -> TwoViewBatch:
    """The batch with pixels and maps on a device; colour factors are read on the CPU."""
    names = ("one", "two", "map_one", "map_two")
    moved: dict[str, Any] = {name: to_device(getattr(batch, name), device) for name in names}
    return batch._replace(**moved)


@torch.no_grad()
def make_views(batch: TwoViewBatch, normalise: Normalise, plan: RunPlan) -> tuple[View, View]:
    """The two views ``(b, c, h, w)`` of a batch, changed in colour and normalised on its device."""
    with full_precision(batch.one):
        pixels = (
            view.float() / 255 if view.dtype == torch.uint8 else view.float()
            for view in (batch.one, batch.two)
        )
        factors = batch.factors_one, batch.factors_two
        changed = change_both((next(pixels), next(pixels)), factors, plan.photometry[0].sigma[1])
        one, two = (
            normalise(view).contiguous(memory_format=torch.channels_last) for view in changed
        )
        return View(one, batch.map_one), View(two, batch.map_two)


@contextmanager
def features_of(learner: PixelCL, kept: list[Tensor] | None) -> Iterator[None]:
    """A context in which up to `FEATURES` backbone features of the first view are kept."""

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if kept is not None and not kept:  # a map (b, c, h, w), or vectors (b, c)
            vectors = inputs[0].detach().movedim(1, -1).flatten(0, -2)
            last = len(vectors) - 1
            if last >= FEATURES:  # spread so that they fall on all cells, whatever their number
                chosen = torch.linspace(0, last, FEATURES, device=vectors.device).long()
                vectors = vectors[chosen]
            kept.append(vectors.float())

    if kept is None:
        yield
        return
    encoder = learner.online_encoder
    pixel = each_level(encoder.pixel_projector)[0]
    head = pixel if learner.branches.pixel else encoder.instance_projector
    handle = head.register_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of what is random in the network at a step, on one process."""
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63


def possible_parts(images: int, parts: int) -> int:
    """Parts of two images at least, as one has no batch statistics: as many as asked, or fewer."""
    return max(1, min(parts, images // 2))


def split_batch(batch: TwoViewBatch, parts: int) -> Iterator[TwoViewBatch]:
    """The batch in `possible_parts`, whose sizes differ by one at most."""
    images = len(batch.one)
    parts = possible_parts(images, parts)
    for part in range(parts):
        yield slice_batch(batch, slice(images * part // parts, images * (part + 1) // parts))


def slice_batch(batch: Any, part: slice) -> Any:
    """Some samples of a batch: the slice of each tensor in it."""
    return each_tensor(batch, lambda tensor: tensor[part])


def as_metrics(terms: Terms, images: int) -> Tensor:
    """The terms of some images in the order of `METRIC_NAMES`, a mean over all of them each."""
    pairs, unpaired = terms.positive_pairs / images, terms.images_without_pairs / images
    terms = terms._replace(
        pixel_cosine=terms.pixel_cosine * (1 - unpaired),  # a mean over the images with pairs
        positive_pairs=pairs,
        images_without_pairs=unpaired,
    )
    values = torch.stack([value.detach().float() for value in terms])
    return functional.pad(values, (0, 1))  # the gradient's norm is that of the whole batch
