"""Whole training steps as one CUDA graph: captured once, then launched by a single call.

A step of a small network keeps the GPU waiting for the host, which launches its thousand kernels
one by one. A graph launches them all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .checks import LIMITS, raise_together
from .pixel_cl import PixelCL
from .views import View

WARM_UP = 3
"""Steps before the one that is captured: the optimiser and cuDNN make ready in them."""
RESULTS_AGREE = 0.02
"""Largest mean difference of what a step and its graph return, relative to their mean size."""
CHANGES_AGREE = 0.2
"""Largest difference of what a step and its graph change, relative to the change: Adam magnifies
rounding where gradients are about 0."""

SPARE_SHARE = 0.1
"""Smallest share of a GPU's memory that is free beside a graph."""

State = Mapping[str, list[Tensor]]


class CaptureError(RuntimeError):
    """The graph of a step does something else than the step."""


class StepGraph:
    """A training step on one GPU that is captured as a CUDA graph, and replayed from then on.

    The first `WARM_UP` calls take the step as it is. The next captures it, and compares the graph's
    first replay with the same step as it is: weights, target, optimiser and results. If the step
    cannot be captured or the two differ, ``refused`` says why, the step counts as it is, and so do
    all that follow. On other devices each call takes the step as it is.

    Args:
        step: The gradient, the optimiser's step and the target's update for a batch. It takes
            tensors and nested tuples of them, and returns a tuple of tensors. It never reads a
            tensor's value, and changes tensors in place. Gradients are None before it.
        learner: What it trains.
        optimizer: Of torch; its learning rates are read at each call.

    Attributes:
        refused: Why steps are not captured; None while nothing speaks against it.
    """

    def __init__(
        self, step: Callable[..., tuple[Tensor, ...]], learner: PixelCL, optimizer: Optimizer
    ) -> None:
        self.step, self.learner, self.optimizer = step, learner, optimizer
        self.device = next(learner.parameters()).device
        self.refused = why_not(optimizer, self.device)
        self.rates = [torch.zeros((), device=self.device) for _ in optimizer.param_groups]
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
        self.graph.replay()
        return tuple(own.clone() for own in self.results)

    def load(self, batch: Any) -> None:
        """Copy batch and learning rates to where the graph reads them."""
        if self.fixed is None:
            self.fixed = each_tensor(batch, lambda own: torch.empty_like(own, device=self.device))
        for own, given in zip(tensors_in(self.fixed), tensors_in(batch), strict=True):
            if own.shape != given.shape:
                raise ValueError(
                    f"the batch holds a tensor {tuple(given.shape)} where the first one had "
                    f"{tuple(own.shape)}; captured steps take batches of one shape: leave out "
                    "the last, smaller one (drop_last=True)"
                )
            own.copy_(given, non_blocking=True)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])

    def as_it_is(self) -> tuple[Tensor, ...]:
        """The step in the form that can be captured, kernel by kernel."""
        self.optimizer.zero_grad()
        with beside(self.stream), self.capturable():
            return self.step(*self.fixed)

    def capture(self) -> tuple[Tensor, ...]:
        """Take a step both ways from the same state; the graph's counts if they agree."""
        state = self.state()
        try:
            before, after = copies(state), copies(state)
        except RuntimeError as error:  # out of memory
            self.give_up(error)
            return self.as_it_is()
        with torch.random.fork_rng([self.device] if self.stream else []):
            results = self.as_it_is()
        restore(after, state)
        restore(state, before)
        try:
            self.graph, self.results = self.recorded()
            self.graph.replay()
            check_results(self.results, results)
            check_changes(state, before, after)
            check_memory(self.device)
            return tuple(own.clone() for own in self.results)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            self.give_up(error)
            restore(state, after)
            return results

    def give_up(self, error: Exception) -> None:
        """Take all steps as they are from now on."""
        said = str(error).strip().partition("\n")[0]
        self.refused = f"{type(error).__name__}: {said}"
        self.graph, self.results = None, ()
        self.optimizer.zero_grad()
        if self.stream is not None:
            renew_generator(self.device)
            torch.cuda.empty_cache()

    def recorded(self) -> tuple[Any, tuple[Tensor, ...]]:
        """The graph of a step, which is not taken yet, and the tensors that hold its results."""
        self.optimizer.zero_grad()
        torch.clear_autocast_cache()  # weights of an earlier step
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins the loader's memory, go on meanwhile.
        recording: Any = torch.cuda.graph(
            graph, stream=self.stream, capture_error_mode="thread_local"
        )
        with recording, self.capturable():
            return graph, self.step(*self.fixed)

    @contextmanager
    def capturable(self) -> Iterator[None]:
        """A context in which the optimiser reads learning rates and counts on the device."""
        for held in self.optimizer.state.values():
            if isinstance(count := held.get("step"), Tensor):
                held["step"] = count.to(self.device)
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
            "weights": [own.detach() for own in parameters if own.requires_grad],
            "target": [own.detach() for own in parameters if not own.requires_grad],
            "buffers": list(self.learner.buffers()),
            "optimiser": [
                own
                for held in self.optimizer.state.values()
                for own in held.values()
                if isinstance(own, Tensor)
            ],
        }


class CapturedStep:
    """Training steps for a loop of one's own, each launched as one CUDA graph.

    A call stands for ``learner(images)``, ``backward()``, ``optimizer.step()`` and
    ``update_moving_average()``. Views are cut and change colour before; all else is in the graph.
    Schedulers of the learning rate work as ever. What a network decides in Python (layers left out
    by ``random``, say) is decided once, when the step is captured.

    Args:
        learner: On one GPU. On other devices steps are taken as they are.
        optimizer: Of torch: of the Adam family, or SGD with ``fused=True``.
        dtype: Computes in this precision by autocast, ``torch.bfloat16``; None does not.

    Raises:
        ValueError: Another precision (float16 scales its gradients on the host), or a learner
            inside something else, such as ``DistributedDataParallel``.

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
        """Why steps are not captured but taken as they are; None while nothing speaks against."""
        return self.graph.refused

    def __call__(self, images: Tensor | tuple[View, View], decay: float | None = None) -> Tensor:
        """Train on a batch, of the same shape each time.

        Args:
            images: As `PixelCL` takes them.
            decay: Share of itself that the target keeps, in [0, 1]; default
                ``moving_average_decay``.

        Returns:
            The loss before the step, a 0-d float32 tensor without gradient.

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
    if device.type != "cuda":
        return f"CUDA graphs run on GPUs, and the device is {device.type}"
    if all("capturable" in group or group.get("fused") for group in optimizer.param_groups):
        return None
    return f"{type(optimizer).__name__} reads its learning rate on the host"


@contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """A context on another stream, which waits for the present one; this waits for it after."""
    if stream is None:
        yield
        return
    now = torch.cuda.current_stream(stream.device)
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        yield
    now.wait_stream(stream)


def renew_generator(device: torch.device) -> None:
    """Give the device's generator a new state: a capture that failed leaves it unusable."""
    generator: Any = torch.cuda.default_generators[device.index or 0]
    fresh: Any = torch.Generator(device).manual_seed(torch.initial_seed())
    generator.graphsafe_set_state(fresh.graphsafe_get_state())


def each_tensor(held: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples with each of their tensors changed."""
    if isinstance(held, Tensor):
        return change(held)
    changed = [each_tensor(own, change) for own in held]
    return type(held)(*changed) if hasattr(held, "_fields") else type(held)(changed)


def tensors_in(held: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples."""
    if isinstance(held, Tensor):
        yield held
        return
    for own in held:
        yield from tensors_in(own)


def copies(state: State) -> State:
    """Copies of all tensors."""
    return {name: [own.clone() for own in held] for name, held in state.items()}


def restore(state: State, kept: State) -> None:
    """Give all tensors of ``state`` the values of ``kept``."""
    for name, held in state.items():
        for own, value in zip(held, kept[name], strict=True):
            own.copy_(value)


def check_results(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Refuse results that are not those of the step."""
    for own, other in zip(found, expected, strict=True):
        off, size = (own - other).abs().float().mean(), other.abs().float().mean()
        if not off <= RESULTS_AGREE * size:
            raise CaptureError(
                f"the graph gives results that differ by {float(off):.3g} from the step's own, of "
                f"{float(size):.3g} on average"
            )


def check_memory(device: torch.device) -> None:
    """Refuse a graph that leaves no memory for anything beside it: it never gives its own back."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself would count as used
        free, whole = torch.cuda.mem_get_info(device)
        if free < SPARE_SHARE * whole:
            raise CaptureError(
                f"the graph leaves {free / 2**20:.0f} MiB of {whole / 2**20:.0f} free, too little "
                "for pictures and probes"
            )


def check_changes(now: State, before: State, after: State) -> None:
    """Refuse changes that are not those of the step, which led from ``before`` to ``after``."""
    for name, held in now.items():
        off = moved = 0.0
        for own, old, new in zip(held, before[name], after[name], strict=True):
            counts = own.ndim == 0 and name in ("buffers", "optimiser")
            if counts and not torch.equal(own, new):
                raise CaptureError(f"the graph counts to {own} in the {name}, the step to {new}")
            if not counts:
                off += float((own - new).abs().sum(dtype=torch.float64))
                moved += float((new - old).abs().sum(dtype=torch.float64))
        if not off <= CHANGES_AGREE * moved:
            raise CaptureError(
                f"the graph leaves {name} that differ by {off:.3g} in sum from the step's own, "
                f"which moved them by {moved:.3g}"
            )
