"""What a step of a model costs, counted on tensors that hold no numbers.

The learner is built, its weights are replaced by fake ones, and one step of it runs: every
operation is seen with its shapes, none is computed. Any batch of any model takes seconds and no
memory, on any machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import log2
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry
from torchvision import models

from pixel_level_contrastive_learning import PixelCL, View

TAPS = {"resnet": ("layer4", "avgpool"), "convnext": ("features.7", "avgpool")}
"""Pixel and instance layer by the beginning of the model's name."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What is assumed of the machines: the defaults are an H100 SXM in nodes of eight.

    Attributes:
        peak: Matrix products, in FLOP a second, dense bfloat16.
        bandwidth: Of its memory, in bytes a second.
        memory: Of one GPU, in bytes.
        link: Between the GPUs of a node, each way, in bytes a second.
        network: Between nodes, a GPU's share, in bytes a second.
        matrix_share: Share of the peak that matrix products reach.
        memory_share: Share of the bandwidth that everything reaches.
        wire_share: Share of link and network that collectives reach.
        launch: Seconds that the host takes to start one operation.
        latency: Seconds of a collective in a node, however small.
        hop: Seconds more for each doubling of the nodes.
        reserve: Bytes of a GPU taken by context, workspaces and fragments.
    """

    peak: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    link: float = 450e9
    network: float = 50e9
    matrix_share: float = 0.6
    memory_share: float = 0.7
    wire_share: float = 0.8
    launch: float = 6e-6
    latency: float = 20e-6
    hop: float = 10e-6
    reserve: float = 6e9

    def gather(self, bytes_: float, gpus: int) -> float:
        """Seconds until every GPU has all of ``bytes_``, of which each holds its part."""
        inside = min(gpus, 8)
        nodes = gpus // inside
        across = bytes_ / inside * (nodes - 1) / nodes / self.network
        within = bytes_ * (inside - 1) / inside / self.link
        return (across + within) / self.wire_share

    def roundtrip(self, gpus: int) -> float:
        """Seconds of a collective too small to fill the wires."""
        return 0.0 if gpus == 1 else self.latency + self.hop * log2(max(1, gpus // 8))


class Work(NamedTuple):
    """What some operations cost.

    Attributes:
        flops: Floating-point operations of the matrix products.
        traffic: Bytes read and written by all operations, each by itself.
        launches: Operations started.
        seconds: Their time on the device: each takes the longer of its products and its traffic.
    """

    flops: float = 0
    traffic: float = 0
    launches: float = 0
    seconds: float = 0


class Roofline(TorchDispatchMode):
    """Adds up the work of every operation that runs inside.

    Args:
        hardware: How fast operations are.
    """

    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self.hardware = hardware
        self.work = Work()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,  # the signature is torch's
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.name():  # neither moves a byte
            return out
        touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # What was expanded is read once: its memory is smaller than its shape.
        traffic = sum(
            min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in touched
        )
        flops = products(func, args, kwargs or {}, out)
        hardware = self.hardware
        seconds = max(
            flops / (hardware.peak * hardware.matrix_share),
            traffic / (hardware.bandwidth * hardware.memory_share),
        )
        more = (flops, traffic, 1, seconds)
        self.work = Work(*(a + b for a, b in zip(self.work, more, strict=True)))
        return out


def products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of one operation."""
    if func._overloadpacket is torch.ops.aten.convolution_backward:
        # Torch's own count forgets the groups, and takes a depthwise convolution for a full one.
        grad, x, weight = (tensor.shape for tensor in args[:3])
        once = conv_flop_count(list(x), list(weight), list(grad), transposed=args[7])
        return float(once * sum(args[10][:2]))
    counted = flop_registry.get(func._overloadpacket)
    return float(counted(*args, **kwargs, out_val=out)) if counted else 0.0


class StepCounts(NamedTuple):
    """One step of a learner at one batch.

    Attributes:
        forward: Both views through both networks, and the losses.
        backward: The gradients.
        kept: Bytes kept from the forward to the backward pass, weights' copies among them.
        trained: Parameters with gradient.
        followed: Parameters of the target.
        norms: Batch norms of the online and of the target network.
    """

    forward: Work
    backward: Work
    kept: float
    trained: int
    followed: int
    norms: tuple[int, int]


def fake(learner: nn.Module, mode: FakeTensorMode) -> None:
    """Replace every weight and buffer by one without numbers."""
    for module in learner.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                shadow = mode.from_tensor(parameter.detach())
                module._parameters[name] = nn.Parameter(shadow, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = mode.from_tensor(buffer)


def learner_of(model: str, size: int) -> PixelCL:
    """The learner with its default heads around a model of torchvision."""
    taps = next((taps for name, taps in TAPS.items() if model.startswith(name)), (None, None))
    return PixelCL(getattr(models, model)(weights=None), size, *taps)


def count(
    model: str, size: int, batch: int, hardware: Hardware, *, precision: str = "bfloat16"
) -> StepCounts:
    """What a step of ``batch`` ready-made views of ``size`` pixels costs."""
    learner = learner_of(model, size)
    learner.views.watch = lambda *_, **__: None  # type: ignore[assignment]  # no values to look at
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    followed = sum(p.numel() for p in learner.target_encoder.parameters())
    norms = [
        sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
        for net in (learner, learner.target_encoder)
    ]
    kept: dict[int, Tensor] = {}
    mode = FakeTensorMode()
    fake(learner, mode)
    with mode:
        weights = {p.untyped_storage()._cdata for p in learner.parameters()}
        pixels, to_image = torch.rand(batch, 3, size, size), torch.rand(batch, 2, 3)
        views = View(pixels, to_image), View(pixels.clone(), to_image.clone())
        half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        with Roofline(hardware) as forward, half, saved(kept, weights):
            loss = learner(views)
        with Roofline(hardware) as backward:
            loss.backward()
        bytes_ = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    online = norms[0] - norms[1]
    return StepCounts(forward.work, backward.work, bytes_, trained, followed, (online, norms[1]))


def saved(kept: dict[int, Tensor], weights: set[int]) -> Any:
    """A context that notes what is kept for the backward pass, each memory once."""

    def note(tensor: Tensor) -> Tensor:
        at = tensor.untyped_storage()._cdata
        if at not in weights:
            kept[at] = tensor
        return tensor

    pack: Callable[[Tensor], Tensor] = note
    return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
