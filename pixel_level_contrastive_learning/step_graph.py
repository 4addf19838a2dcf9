"""Whole training steps as one CUDA graph: captured once, then launched by a single call.

A step of a small network keeps the GPU waiting for the host, which launches its thousand kernels
one by one. A graph launches them all at once.
"""

from __future__ import annotations

import gc
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checks import LIMITS, raise_together
from .graph_check import (
    CaptureError,
    State,
    bytes_of,
    check_changes,
    check_memory,
    check_results,
    copies,
    places_of,
    restore,
)
from .pixel_cl import PixelCL
from .views import View

WARM_UP = 3
"""Steps before the one that is captured: the optimiser and cuDNN make ready in them."""


class StepGraph:
    """A training step on one GPU that is captured as a CUDA graph and then replayed.

    The first `WARM_UP` calls run the step normally. The next call captures it and compares the
    graph's first replay with the same step run normally: weights, target, optimiser and results. If
    the step cannot be captured or the two differ, ``refused`` says why, and this step and all that
    follow run normally. On other devices, every call runs the step normally.

    Args:
        step: The gradient, optimiser step and target update for a batch. It takes tensors and
            nested tuples of them, and returns a tuple of tensors. It never reads a tensor's value,
            and changes tensors in place. Gradients are None before it.
        learner: What it trains.
        optimizer: A torch optimiser; its learning rates are read at each call.

    Attributes:
        refused: Why steps are not captured; None if nothing prevents it.
    """

    def __init__(
        self, step: Callable[..., tuple[Tensor, ...]], learner: PixelCL, optimizer: Optimizer
    ) -> None:
        self.step, self.learner, self.optimizer = step, learner, optimizer
        self.device = next(learner.parameters()).device
        self.refused = why_not(optimizer, self.device)
        self.numbers: list[dict[str, Any]] = []
        self.optimizer_state: Any = None
        self.switches: list[object] = []
        self.watched: tuple[list[nn.Module], list[Tensor]] = [], []
        self.rates: list[Tensor] = []
        stream: Any = torch.cuda.Stream
        self.stream: torch.cuda.Stream | None = None if self.refused else stream(self.device)
        self.graph: Any = None
        self.fixed: Any = None
        self.results: tuple[Tensor, ...] = ()
        self.calls = 0

    def __call__(self, *batch: Any) -> tuple[Tensor, ...]:
        """Take a step on a batch, of the same shapes each time; what ``step`` returns."""
        self.load(batch)
        self.calls += 1
        if self.refused is not None:
            self.optimizer.zero_grad()
            return self.step(*self.fixed)
        if self.calls <= WARM_UP:
            return self.as_it_is()
        if self.graph is None:
            return self.capture()
        if self.numbers != numbers_of(self.optimizer):
            self.give_up(CaptureError("a number of the optimiser changed that is no learning rate"))
        elif self.switches != switches_of(self.learner, *self.watched):
            words = "a setting or mode of the learner changed, or which weights learn"
            self.give_up(CaptureError(words))
        elif self.optimizer_state is not self.optimizer.state:
            self.give_up(CaptureError("the optimiser holds another state than when captured"))
        if self.refused is not None:
            return self.as_it_is()
        self.graph.replay()
        return tuple(result.clone() for result in self.results)

    def load(self, batch: Any) -> None:
        """Copy batch and learning rates to where the graph reads them."""
        if self.fixed is None:
            self.fixed = each_tensor(
                batch, lambda tensor: torch.empty_like(tensor, device=self.device)
            )
        for tensor, given in zip(tensors_in(self.fixed), tensors_in(batch), strict=True):
            if tensor.shape != given.shape:
                raise ValueError(
                    f"the batch holds a tensor {tuple(given.shape)} where the first one had "
                    f"{tuple(tensor.shape)}; captured steps take batches of one shape: leave out "
                    "the last, smaller one (drop_last=True)"
                )
            tensor.copy_(given, non_blocking=True)
        groups = self.optimizer.param_groups
        while len(self.rates) < len(groups):  # those of weights that learn from now on
            self.rates.append(torch.zeros((), device=self.device))
        for rate, group in zip(self.rates, groups, strict=True):
            rate.fill_(group["lr"])

    def as_it_is(self) -> tuple[Tensor, ...]:
        """The step in the form that can be captured, kernel by kernel."""
        self.optimizer.zero_grad()
        with on_stream(self.stream), self.capturable():
            return self.step(*self.fixed)

    def capture(self) -> tuple[Tensor, ...]:
        """Take a step both ways from the same state; the graph's counts if they agree."""
        state = self.state()
        before: State = {}
        try:
            before = copies(state)
            devices = [self.device] if self.stream else []
            with torch.random.fork_rng(devices), no_waiting(self.stream):
                results = self.as_it_is()
            if places_of(state) != places_of(self.state()):
                raise CaptureError("the step puts new tensors in the place of old ones")
            after = copies(state)
        except (RuntimeError, ValueError, TypeError) as error:  # it waits, or is out of memory
            if before:
                restore(self.state(), before)
            self.give_up(error)
            return self.as_it_is()
        restore(state, before)
        refused: Exception | None = None
        try:
            self.graph, self.results = self.recorded()
            self.graph.replay()
            check_results(self.results, results)
            check_changes(state, before, after)
            check_memory(self.device, spare=bytes_of(before) + bytes_of(after))
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            refused = error
        if refused is None:
            self.numbers, self.optimizer_state = numbers_of(self.optimizer), self.optimizer.state
            self.watched = list(self.learner.modules()), list(self.learner.parameters())
            self.switches = switches_of(self.learner, *self.watched)
            return tuple(result.clone() for result in self.results)
        self.give_up(refused)
        restore(state, after)
        return results

    def give_up(self, error: Exception) -> None:
        """Take all steps as they are from now on; what the capture held is given back."""
        first: BaseException = error
        while first.__context__ is not None:  # the end of a capture hides what broke it
            traceback.clear_frames(first.__traceback__)
            first = first.__context__
        traceback.clear_frames(first.__traceback__)
        said = str(first).strip().partition("\n")[0]
        self.refused = f"{type(first).__name__}: {said}"
        self.graph, self.results = None, ()
        self.optimizer.zero_grad()
        for group in self.optimizer.param_groups:
            for state in map(self.optimizer.state.get, group["params"]):
                if state and isinstance(state.get("step"), Tensor) and not group.get("fused"):
                    state["step"] = state["step"].cpu()  # where steps as they are read it
        if self.stream is not None:
            del first
            gc.collect()
            with suppress(RuntimeError):  # older torch, after a capture that failed
                torch.cuda.empty_cache()

    def recorded(self) -> tuple[Any, tuple[Tensor, ...]]:
        """The graph of a step, which is not taken yet, and the tensors that hold its results."""
        self.optimizer.zero_grad()
        torch.clear_autocast_cache()  # weights of an earlier step
        graph = torch.cuda.CUDAGraph()
        before = torch.cuda.current_stream(self.device)
        random = torch.cuda.get_rng_state(self.device)
        # Other threads, such as the one that pins the loader's memory, go on meanwhile.
        recording: Any = torch.cuda.graph(
            graph, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            with recording, self.capturable():
                return graph, self.step(*self.fixed)
        except BaseException:
            torch.cuda.set_stream(before)  # torch leaves its own in place where the end fails
            renew_generator(self.device, random)
            raise

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """A context in which the optimiser reads learning rates and counts on the device."""
        for state in self.optimizer.state.values():
            if isinstance(count := state.get("step"), Tensor):
                state["step"] = count.to(self.device)
        groups = self.optimizer.param_groups
        kept: list[dict[str, Any]] = [
            {name: group[name] for name in ("lr", "capturable") if name in group}
            for group in groups
        ]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = self.device.type == "cuda"
        try:
            yield
        finally:
            for group, as_before in zip(groups, kept, strict=True):
                group.update(as_before)

    def state(self) -> State:
        """What a step changes."""
        parameters = list(self.learner.parameters())
        return {
            "weights": [weight.detach() for weight in parameters if weight.requires_grad],
            "target": [weight.detach() for weight in parameters if not weight.requires_grad],
            "buffers": list(self.learner.buffers()),
            "optimiser": [
                value
                for state in self.optimizer.state.values()
                for value in state.values()
                if isinstance(value, Tensor)
            ],
        }


class CapturedStep:
    """Training steps for your own loop, each launched as one CUDA graph.

    A call replaces ``learner(images)``, ``backward()``, ``optimizer.step()`` and
    ``update_moving_average()``. Views are cut and augmented before; all else is in the graph.
    Learning rate schedulers work as usual; once another number of the optimiser, a setting or mode
    of the learner, or which weights learn has changed, steps run normally. What a network decides
    in Python (layers dropped by ``random``, say) is decided once, when the step is captured.

    Args:
        learner: On one GPU. On other devices, steps run normally.
        optimizer: A torch optimiser: of the Adam family, or SGD with ``fused=True``.
        dtype: Precision for autocast, ``torch.bfloat16``; None for no autocast.

    Raises:
        ValueError: Another precision (float16 scales its gradients on the host), or a wrapped
            learner, such as in ``DistributedDataParallel``.

    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.ReLU())
    >>> learner = PixelCL(net, 64, projection_size=16, instance_weight=0)
    >>> step = CapturedStep(learner, torch.optim.AdamW(learner.parameters(), lr=1e-3))
    >>> step(torch.rand(2, 3, 80, 100)).shape
    torch.Size([])
    """

    def __init__(
        self, learner: PixelCL, optimizer: Optimizer, dtype: torch.dtype | None = None
    ) -> None:
        if dtype not in (None, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; it must be torch.bfloat16, or None for float32")
        if not isinstance(getattr(learner, "_orig_mod", learner), PixelCL):  # compiled
            raise ValueError(
                f"learner is a {type(learner).__name__}; it must be the PixelCL itself. Several "
                "processes train together without graphs"
            )
        self.learner, self.dtype = learner, dtype
        self.graph = StepGraph(self.step, learner, optimizer)

    @property
    def refused(self) -> str | None:
        """Why steps are not captured but run normally; None if nothing prevents capture."""
        return self.graph.refused

    def __call__(self, images: Tensor | tuple[View, View], decay: float | None = None) -> Tensor:
        """Train on a batch, of the same shape each time.

        Args:
            images: As `PixelCL` takes them.
            decay: Share of itself that the target keeps, in [0, 1]; default
                ``moving_average_decay``.

        Returns:
            The loss before the step, as `PixelCL` gives it, without gradient.

        Raises:
            ValueError: As `PixelCL` raises it, a batch of another shape, or a decay out of range.
        """
        decay = self.learner.moving_average_decay if decay is None else decay
        raise_together(LIMITS["moving_average_decay"]("decay", decay))
        with torch.no_grad():
            one, two = self.learner.views(images)
        [loss] = self.graph(one, two, torch.tensor(float(decay)))
        return loss

    def step(self, one: View, two: View, decay: Tensor) -> tuple[Tensor]:
        """What is captured."""
        kind = one.pixels.device.type
        with torch.autocast(kind, self.dtype) if self.dtype else nullcontext():
            loss: Any = self.learner((one, two))
        loss.backward()
        self.graph.optimizer.step()
        self.learner.update_moving_average(decay)
        return (loss.detach(),)


def why_not(optimizer: Optimizer, device: torch.device) -> str | None:
    """Why steps on this device by this optimiser cannot be captured; None if nothing is known."""
    if device.type != "cuda" or torch.version.hip is not None:
        kind = device.type if torch.version.hip is None else "of AMD"
        return f"CUDA graphs run on GPUs of NVIDIA, and the device is {kind}"
    if all("capturable" in group or group.get("fused") for group in optimizer.param_groups):
        return None
    return f"{type(optimizer).__name__} reads its learning rate on the host"


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """A context on another stream, which waits for the present one; this waits for it after."""
    if stream is None:
        yield
        return
    now = torch.cuda.current_stream(stream.device)
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        yield
    now.wait_stream(stream)


def renew_generator(device: torch.device, state: Tensor) -> None:
    """Give the device's generator a state anew: a capture that failed leaves its own unusable."""
    generator: Any = torch.cuda.default_generators[device.index or 0]
    fresh: Any = torch.Generator(device)
    fresh.set_state(state)
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


@contextmanager
def no_waiting(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """A context on a GPU in which what would wait for the device raises: no graph can hold it."""
    if stream is None:
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def numbers_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What a graph holds of each group of an optimiser: its numbers but the learning rate."""
    return [
        {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
        for group in optimizer.param_groups
    ]


def switches_of(
    learner: PixelCL, modules: Sequence[nn.Module], weights: Sequence[Tensor]
) -> list[object]:
    """What a graph holds of a learner: its settings, its modes and which weights learn."""
    return [
        *(learner.alpha, learner.instance_weight, learner.level_weights, learner.use_pixpro),
        *(learner.distance_thres, learner.similarity_temperature),
        *(module.training for module in modules),
        *(weight.requires_grad for weight in weights),
    ]


def each_tensor(nested: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples with each of their tensors changed."""
    if isinstance(nested, Tensor):
        return change(nested)
    changed = [each_tensor(part, change) for part in nested]
    return type(nested)(*changed) if hasattr(nested, "_fields") else type(nested)(changed)


def tensors_in(nested: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples."""
    if isinstance(nested, Tensor):
        yield nested
        return
    for part in nested:
        yield from tensors_in(part)
