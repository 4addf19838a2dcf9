"""One step of training: views made ready, loss, backward, optimiser, target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import cos, pi
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from timm.layers import convert_sync_batchnorm  # type: ignore[attr-defined]
from timm.optim import create_optimizer_v2, list_optimizers  # type: ignore[attr-defined]
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..augment import Normalise, change_both
from ..blocks import full_precision
from ..pixel_cl import PixelCL, Terms
from ..views import View, to_device

if TYPE_CHECKING:
    from ..data.dataset import Pairs

WARMUP_FROM = 1 / 100
"""Share of the peak learning rate at step 0, as in the authors' release."""


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from a hundredth of the peak, then half a cosine (the authors' schedule).

    Attributes:
        peak: The largest learning rate.
        steps: Steps of the run.
        warmup: Steps of the warm-up; step ``warmup`` is the first at the peak.
        final: Where the cosine would arrive at step ``steps``.
    """

    peak: float
    steps: int
    warmup: int
    final: float

    def __call__(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step <= self.warmup:
            done = step / self.warmup if self.warmup else 1.0
            return self.peak * (WARMUP_FROM + (1 - WARMUP_FROM) * done)
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.final + (self.peak - self.final) * (1 + cos(pi * done)) / 2


@dataclass(frozen=True)
class TargetMomentum:
    """What share of itself the target keeps: from ``start`` to 1 by half a cosine.

    The authors move the target before a step and we after it: the update after step ``s``, counted
    from 0, is theirs of ``k = s + 1``.

    Attributes:
        start: The momentum at ``k = 0``.
        steps: Steps of the run.
    """

    start: float
    steps: int

    def __call__(self, step: int) -> float:
        """The momentum of the update that follows a step, counted from 0."""
        return 1 - (1 - self.start) * (cos(pi * (step + 1) / self.steps) + 1) / 2


FIGURES = (
    "loss",
    "pixel_loss",
    "instance_loss",
    "pixel_cosine",
    "instance_cosine",
    "positive_pairs",
    "images_without_pairs",
    "grad_norm",
)
"""What each step is judged by, in the order of the tensor that carries it."""
FUSED = ("adam", "adamw", "sgd")
"""Optimisers that torch has in one pass over the weights: a third of the time on a CPU."""
FEATURES = 256
"""Feature vectors that spread and rank are taken from."""


@dataclass(frozen=True)
class Practice:
    """How the learner is trained.

    Attributes:
        lr: Learning rate of a step.
        momentum: Target momentum of the update after a step.
        optimizer: The optimiser's name in timm.
        weight_decay: Its weight decay.
        clip_grad: Largest norm of the gradient; 0 is no limit.
        accumulate: Parts that a batch is taken in.
        seed: Seed of what is random in the network, such as dropout.
        largest_sigma: Largest blur in pixels.
    """

    lr: LearningRate
    momentum: TargetMomentum
    optimizer: str
    weight_decay: float
    clip_grad: float
    accumulate: int
    seed: int
    largest_sigma: float


class Step(NamedTuple):
    """What came of a step.

    Attributes:
        number: The step, counted from 1.
        figures: ``(8,)`` float32 on the learner's device, in the order of `FIGURES`; pairs are per
            image. The mean (of images without pairs, the sum) over all processes.
        lr: The learning rate it was taken with.
        target_momentum: The target's momentum.
        images: Images of the step, over all processes.
    """

    number: int
    figures: Tensor
    lr: float
    target_momentum: float
    images: int


class NotFiniteError(RuntimeError):
    """The loss or its gradient is NaN or infinite: the run cannot go on."""


class PretrainTask(LightningModule):
    """A learner and how it is trained.

    The optimiser is stepped by hand: the batch of a step is here as a whole, so that taking it in
    parts, or in smaller ones when memory runs out, is no more than a loop.

    Args:
        learner: What is trained.
        normalise: Brings views to about zero mean and unit variance.
        practice: How it is trained.
    """

    def __init__(self, learner: PixelCL, normalise: Normalise, practice: Practice) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.learner = learner
        self.normalise = normalise
        self.practice = practice
        self.accumulate = practice.accumulate  # parts that a batch is taken in
        self.images_each = 0  # images of a step on each device
        self.parts_before: tuple[int, ...] = ()  # both, when the checkpoint was written
        self.done = 0  # steps
        self.samples = 0  # over all processes
        self.latest: Step | None = None
        self.wants_features = False
        self.features: Tensor | None = None
        self.sharded = False

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Where ``DistributedDataParallel`` looks for parameters that never get a gradient."""
        return [f"learner.{name}" for name in self.learner.unreached_parameters()]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser over what the loss reaches; vectors and biases have no weight decay."""
        return optimizer_of(self.learner, self.practice, fused=not self.sharded)

    def configure_model(self) -> None:
        """Synchronise batch norm over GPUs, and shard the learner where that is the strategy."""
        if self.trainer.strategy.root_device.type == "cuda" and self.trainer.world_size > 1:
            # Lightning converts by torch, which would drop the activations of timm's own layers.
            self.learner = convert_sync_batchnorm(self.learner)  # type: ignore[no-untyped-call]
        mesh = getattr(self, "_device_mesh", None)
        if mesh is None or self.sharded:
            return
        from torch.distributed.fsdp import fully_shard

        learner = self.learner.to(memory_format=torch.contiguous_format)  # it shards no other
        for part in (
            learner.online_encoder,
            learner.online_predictor,
            learner.propagate_pixels,
            learner.target_encoder,
        ):
            if any(True for _ in part.parameters()):
                fully_shard(part, mesh=mesh["data_parallel"])
        self.sharded = True

    def transfer_batch_to_device(self, batch: Pairs, device: torch.device, _: int) -> Pairs:
        """Pixels and maps go to the device; colour factors are read on the CPU and stay."""
        return batch._replace(
            one=to_device(batch.one, device),
            two=to_device(batch.two, device),
            map_one=to_device(batch.map_one, device),
            map_two=to_device(batch.map_two, device),
        )

    def training_step(self, batch: Pairs, _: int) -> None:
        """Take one step of the optimiser, and let the target follow.

        Raises:
            NotFiniteError: On a CPU, before the step is taken; elsewhere the figures tell it when
                they have arrived.
        """
        practice, step = self.practice, self.done
        self.images_each = len(batch.one)
        images = self.images_each * self.trainer.world_size
        torch.manual_seed(step_seed(practice.seed, step, self.global_rank))
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        lr = practice.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.zero_grad()
        self.features = None
        figures = self.gradients(batch)
        if figures.device.type == "cpu" and not is_finite(figures):
            raise NotFiniteError(not_finite(step + 1, figures.tolist()))
        optimizer.step()
        if self.sharded:  # without a backward pass the target would stay whole
            self.learner.target_encoder.reshard()  # type: ignore[operator]  # fully_shard gave it
        momentum = practice.momentum(step)
        self.learner.update_moving_average(momentum)
        self.done = step + 1
        self.samples += images
        self.latest = Step(self.done, figures, lr, momentum, images)

    def gradients(self, batch: Pairs) -> Tensor:
        """Leave the gradient of a batch in the parameters; its figures ``(8,)``, float32."""
        parts = list(split(batch, self.accumulate))
        total = torch.zeros(len(FIGURES), device=batch.one.device)
        for number, part in enumerate(parts, start=1):
            share = len(part.one) / len(batch.one)
            self.synchronise(number == len(parts))
            with self.seen_features(self.wants_features and number == 1):
                terms = self.learner(self.views(part), return_terms=True)
            self.manual_backward(terms.loss * share)
            total += in_order(terms, len(part.one)) * share
        parameters = [p for p in self.learner.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.practice.clip_grad:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.practice.clip_grad, norm)
        total[FIGURES.index("images_without_pairs")] *= len(batch.one)
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
            total /= self.trainer.world_size
            total[FIGURES.index("images_without_pairs")] *= self.trainer.world_size
        total[-1] = whole_tensor(norm)
        return total

    @torch.no_grad()
    def views(self, batch: Pairs) -> tuple[View, View]:
        """The two views, changed in colour and normalised on the device.

        Their pixels are ``(b, c, h, w)`` uint8, or float in [0, 1].
        """
        with full_precision(batch.one):
            one, two = (
                pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
                for pixels in (batch.one, batch.two)
            )
            factors = batch.factors_one, batch.factors_two
            ready = (
                self.normalise(pixels).contiguous(memory_format=torch.channels_last)
                for pixels in change_both((one, two), factors, self.practice.largest_sigma)
            )
            return View(next(ready), batch.map_one), View(next(ready), batch.map_two)

    def synchronise(self, last: bool) -> None:
        """Let processes exchange gradients only with the last part of a batch."""
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            model.require_backward_grad_sync = last
        elif self.sharded:
            for part in self.learner.modules():
                if hasattr(part, "set_requires_gradient_sync"):
                    part.set_requires_gradient_sync(last)  # type: ignore[operator]

    def seen_features(self, wanted: bool) -> FeatureCatcher:
        """A context in which the backbone's features of the first view are kept."""
        return FeatureCatcher(self, wanted)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep our own clock; Lightning's loops begin anew at every start."""
        checkpoint.pop("loops", None)
        checkpoint["steps_done"] = self.done
        checkpoint["samples"] = self.samples
        checkpoint["parts"] = [self.accumulate, self.images_each]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note how batches were taken apart: batch norm sees parts, so that it matters."""
        self.parts_before = tuple(checkpoint["parts"])


class FeatureCatcher:
    """Keeps some features of the first view that goes through the encoder's projector.

    Args:
        task: Where to keep them.
        wanted: Whether to.
    """

    def __init__(self, task: PretrainTask, wanted: bool) -> None:
        self.task = task
        self.wanted = wanted

    def __enter__(self) -> None:
        if self.wanted:
            encoder = self.task.learner.online_encoder
            pixel = self.task.learner.branches.pixel
            head = encoder.pixel_projector if pixel else encoder.instance_projector
            self.handle = head.register_forward_pre_hook(self.keep)

    def __exit__(self, *_: object) -> None:
        if self.wanted:
            self.handle.remove()

    def keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Keep at most `FEATURES` vectors of a map ``(b, c, h, w)`` or of vectors ``(b, c)``."""
        if self.task.features is None:
            vectors = inputs[0].detach().movedim(1, -1).flatten(0, -2)
            stride = max(1, len(vectors) // FEATURES)
            self.task.features = vectors[::stride][:FEATURES].float()


def optimizer_of(
    learner: PixelCL, practice: Practice, *, fused: bool = True
) -> torch.optim.Optimizer:
    """The optimiser by its name in timm, over what the loss reaches.

    One-dimensional parameters have no weight decay, and so no LARS either, as with the authors.

    Args:
        learner: What is trained.
        practice: How.
        fused: Whether to update in one pass, where torch can.

    Raises:
        ValueError: timm has no optimiser of that name.
    """
    idle = set(learner.unreached_parameters())
    named = [(n, p) for n, p in learner.named_parameters() if p.requires_grad and n not in idle]
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": practice.weight_decay},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0},
    ]
    faster: dict[str, Any] = {"fused": True} if fused and practice.optimizer in FUSED else {}
    try:
        return create_optimizer_v2(
            [group for group in groups if group["params"]],
            opt=practice.optimizer,
            lr=practice.lr.peak,
            momentum=0.9,
            **faster,
        )
    except (ValueError, AssertionError, KeyError) as error:
        names = [str(name) for name in list_optimizers()]
        near = get_close_matches(practice.optimizer, names, n=3) or ["adamw", "lars", "sgd", "lamb"]
        raise ValueError(
            f"optimizer is {practice.optimizer!r}, which timm cannot make ({error}); perhaps "
            f"{' or '.join(near)}"
        ) from error


def step_seed(seed: int, step: int, rank: int) -> int:
    """The seed of what is random in the network at a step, on one process."""
    return (seed * 1_000_003 + step * 8191 + rank) % 2**63


def split(batch: Pairs, parts: int) -> Iterator[Pairs]:
    """The batch in parts whose sizes differ by one at most, and are two at least.

    A part of one image would have no batch statistics; there are fewer parts instead.
    """
    images = len(batch.one)
    parts = max(1, min(parts, images // 2))
    for part in range(parts):
        yield cut(batch, slice(images * part // parts, images * (part + 1) // parts))


def cut(batch: Any, part: slice) -> Any:
    """Some samples of a batch: the slice of each tensor in it."""
    if isinstance(batch, Tensor):
        return batch[part]
    return type(batch)(*(cut(held, part) for held in batch))


def in_order(terms: Terms, images: int) -> Tensor:
    """The figures of some images in the order of `FIGURES`, pairs and lacks of them per image."""
    values = (
        terms.loss.detach(),
        terms.pixel_loss,
        terms.instance_loss,
        terms.pixel_cosine,
        terms.instance_cosine,
        terms.positive_pairs / images,
        terms.images_without_pairs / images,
        torch.zeros_like(terms.pixel_loss),
    )
    return torch.stack([value.float() for value in values])


def whole_tensor(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of it where processes hold a shard each."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def is_finite(figures: Tensor) -> bool:
    """Whether no figure is NaN or infinite."""
    return bool(torch.isfinite(figures).all())


def not_finite(step: int, figures: Sequence[float]) -> str:
    """What to say of a step whose figures are NaN or infinite."""
    shown = ", ".join(f"{name} {value:.4g}" for name, value in zip(FIGURES, figures, strict=True))
    return (
        f"step {step} gave a loss or gradient that is NaN or infinite ({shown}); the last good "
        "checkpoint, if there was one, is kept: go on from it with --resume (without one begin "
        "anew with --overwrite) and a smaller --lr, a longer --warmup-epochs, --clip-grad 1 or "
        "--precision float32"
    )
