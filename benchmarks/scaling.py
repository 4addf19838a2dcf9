"""Scaling on paper: a step on 1 to 512 GPUs, and a pass over up to a billion images.

python benchmarks/scaling.py                            # print the tables
python benchmarks/scaling.py --write docs/scaling.md    # put them into the guide
python benchmarks/scaling.py --peak 312e12 --bandwidth 2e12   # other hardware
python benchmarks/scaling.py --check                    # against the records of step.py here

One step of the learner runs on tensors without numbers (torch's `FakeTensorMode`), at two batches:
each operation counts its products, the bytes it reads and writes, and that it was started; it takes
the longer of products and traffic. In between costs lie on a line. The hardware is assumed.
"""

import argparse
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import ceil, log2
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import machine, records
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry
from torchvision import models

from pixel_level_contrastive_learning import PixelCL, View

LAYERS = {"resnet": ("layer4", "avgpool"), "convnext": ("features.7", "avgpool")}
GPUS, BATCHES, IMAGES = (1, 8, 64, 512), (4096, 16384), (10**6, 10**8, 10**9)
STATE = 20  # bytes a parameter: weight, gradient, Adam's two averages and the target, in float32
ADAM = 40  # bytes a parameter that a fused Adam and the target's update read and write
BUCKET = 25 * 2**20  # of DistributedDataParallel: the last one has no backward pass to hide behind
MARKS = "<!-- computed by benchmarks/scaling.py -->", "<!-- end -->"


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What is assumed of the machines, in FLOP, bytes and seconds: H100 SXM in nodes of eight.

    Attributes:
        peak: Matrix products a second, dense bfloat16.
        bandwidth: Of a GPU's memory, a second.
        memory: Of one GPU.
        link: Between the GPUs of a node, each way, a second.
        network: Between nodes, a GPU's share, a second.
        matrix_share: Share of the peak that products reach.
        memory_share: Share of the bandwidth that operations reach.
        wire_share: Share of link and network that collectives reach.
        launch: Time in which the host starts one operation.
        latency: Time of a collective in a node, however small.
        hop: Time more for each doubling of the nodes.
        reserve: Memory taken by context, workspaces and fragments.
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

    def all_reduce(self, size: float, gpus: int) -> float:
        """Seconds until all GPUs have the sum of ``size`` bytes: scattered, then gathered."""
        inside = min(gpus, 8)
        nodes = gpus // inside
        between = size / inside * (nodes - 1) / nodes / self.network
        return 2 * (between + size * (inside - 1) / inside / self.link) / self.wire_share

    def roundtrip(self, gpus: int) -> float:
        """Seconds of a collective too small to fill the wires."""
        return 0.0 if gpus == 1 else self.latency + self.hop * log2(max(1, gpus // 8))


class Roofline(TorchDispatchMode):
    """Adds up the products, traffic, launches and seconds of every operation that runs inside."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__()
        self.hardware = hardware
        self.flops = self.traffic = self.launches = self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or "empty" in func.name():  # neither moves a byte
            return out
        touched = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        # What was expanded is read once: its memory is smaller than its shape.
        traffic = sum(
            min(x.numel() * x.element_size(), x.untyped_storage().nbytes()) for x in touched
        )
        flops, hardware = products(func, args, kwargs or {}, out), self.hardware
        self.flops += flops
        self.traffic += traffic
        self.launches += 1
        self.seconds += max(
            flops / (hardware.peak * hardware.matrix_share),
            traffic / (hardware.bandwidth * hardware.memory_share),
        )
        return out


def products(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """Floating-point operations of the matrix products and convolutions of one operation."""
    if func._overloadpacket is torch.ops.aten.convolution_backward:
        # Torch's own count forgets the groups, and takes a depthwise convolution for a full one.
        grad, x, weight = (tensor.shape for tensor in args[:3])
        flops = conv_flop_count(list(x), list(weight), list(grad), transposed=args[7])
        return float(flops * sum(args[10][:2]))
    count_flops = flop_registry.get(func._overloadpacket)
    return float(count_flops(*args, **kwargs, out_val=out)) if count_flops else 0.0


class Counts(NamedTuple):
    """One step at one batch: both passes, bytes kept between them, parameters, batch norms."""

    forward: Roofline
    backward: Roofline
    kept: float
    parameters: int
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


def count(
    model: str, size: int, batch: int, hardware: Hardware, precision: str = "bfloat16"
) -> Counts:
    """What a step of ``batch`` ready-made views of ``size`` pixels costs, with default heads."""
    layers = next((pair for name, pair in LAYERS.items() if model.startswith(name)), (None, None))
    learner = PixelCL(getattr(models, model)(weights=None), size, *layers)
    learner.views.watch = lambda *_, **__: None  # type: ignore[assignment]  # no values to look at
    parameters = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    total, target = (
        sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
        for net in (learner, learner.target_encoder)
    )
    saved_tensors: dict[int, Tensor] = {}
    mode = FakeTensorMode()
    fake(learner, mode)
    with mode:
        weights = {p.untyped_storage()._cdata for p in learner.parameters()}

        def note(tensor: Tensor) -> Tensor:
            address = tensor.untyped_storage()._cdata
            if address not in weights:
                saved_tensors[address] = tensor
            return tensor

        pixels, to_image = torch.rand(batch, 3, size, size), torch.rand(batch, 2, 3)
        views = View(pixels, to_image), View(pixels.clone(), to_image.clone())
        half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
        saved = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with Roofline(hardware) as forward, half, saved:
            loss = learner(views)
        with Roofline(hardware) as backward:
            loss.backward()
        saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved_tensors.values())
    return Counts(forward, backward, saved_bytes, parameters, (total - target, target))


class Line(NamedTuple):
    """A cost that grows with the batch: so much at any, so much for each image."""

    fixed: float
    each: float

    def at(self, batch: float) -> float:
        return self.fixed + self.each * batch


class Model:
    """What a step of a model costs at any batch, from the counts at two."""

    def __init__(
        self,
        name: str,
        size: int,
        hardware: Hardware,
        batches: tuple[int, int] = (8, 32),
        precision: str = "bfloat16",
    ) -> None:
        self.name, self.hardware = name, hardware
        counts = [count(name, size, batch, hardware, precision) for batch in batches]
        self.counts = counts[0]

        def line(cost: Callable[[Counts], float]) -> Line:
            small, large = map(cost, counts)
            each = (large - small) / (batches[1] - batches[0])
            return Line(max(0.0, small - each * batches[0]), each)

        self.forward = line(lambda c: c.forward.seconds)
        self.backward = line(lambda c: c.backward.seconds)
        self.kept = line(lambda c: c.kept)
        self.flops = line(lambda c: c.forward.flops + c.backward.flops)
        self.traffic = line(lambda c: c.forward.traffic + c.backward.traffic)
        self.launches = self.counts.forward.launches + self.counts.backward.launches
        self.state = STATE * self.counts.parameters


class Cost(NamedTuple):
    """What one step costs on each GPU, in seconds, and the memory it takes, in bytes."""

    parts: int
    device: float
    host: float
    update: float
    wires: float
    norms: float
    memory: float

    @property
    def seconds(self) -> float:
        return self.device + self.host + self.update + self.wires + self.norms


def step(model: Model, gpus: int, batch: int) -> Cost:
    """One step of a global batch under DistributedDataParallel, in nodes of eight."""
    hardware, counts, local = model.hardware, model.counts, batch / gpus
    free = hardware.memory - hardware.reserve - model.state - model.kept.fixed
    parts = ceil(local / max(1, int(free / model.kept.each)))
    forward, backward = (parts * part.at(local / parts) for part in (model.forward, model.backward))
    device, gradients = forward + backward, 4 * counts.parameters
    whole = hardware.all_reduce(gradients, gpus)
    online, target = counts.norms
    return Cost(
        parts,
        device,
        max(0.0, parts * hardware.launch * model.launches - device),
        ADAM * counts.parameters / (hardware.bandwidth * hardware.memory_share),
        max(whole * min(1.0, BUCKET / gradients), whole - backward / parts),
        parts * (4 * online + 2 * target) * hardware.roundtrip(gpus),
        model.state + model.kept.at(local / parts) + hardware.reserve,
    )


def best(model: Model, gpus: int) -> float:
    """Images a second at the best of the batches."""
    return max(batch / step(model, gpus, batch).seconds for batch in BATCHES)


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tables(models_: list[Model], args: argparse.Namespace) -> str:
    """All that is told: the assumptions, the counts, the steps, the passes."""
    names = [model.name for model in models_]
    assumed = " ".join(f"--{n.replace('_', '-')} {v:g}" for n, v in asdict(args.hardware).items())
    columns: dict[str, Callable[[Model], str]] = {
        "parameters trained, million": lambda m: f"{m.counts.parameters / 1e6:.1f}",
        "GFLOP an image": lambda m: f"{m.flops.each / 1e9:.0f}",
        "traffic an image, MB": lambda m: f"{m.traffic.each / 1e6:.0f}",
        "kept for backward an image, MB": lambda m: f"{m.kept.each / 1e6:.0f}",
        "operations a step": lambda m: f"{m.launches:.0f}",
        "batch norms, online and target": lambda m: " + ".join(map(str, m.counts.norms)),
        "ms an image on the device": lambda m: f"{1e3 * (m.forward.each + m.backward.each):.2f}",
    }
    heads = ["", *names]
    counts = table(heads, [[name, *map(cell, models_)] for name, cell in columns.items()])
    heads = ["model", "GPUs", "images a step", "a GPU", "ms: device", "host", "update", "wires"]
    heads += ["batch norm", "images/s", "share of linear", "GB"]
    rows = []
    for model in models_:
        for gpus in GPUS:
            for batch in BATCHES if gpus > 1 else BATCHES[:1]:
                cost = step(model, gpus, batch)
                rate = batch / cost.seconds
                rows.append([model.name, str(gpus), str(batch), str(batch // gpus)])
                rows[-1] += [f"{1000 * part:.1f}" for part in cost[1:6]]
                rows[-1] += [f"{rate:.0f}", f"{rate / (gpus * best(model, 1)):.0%}"]
                rows[-1].append(f"{cost.memory / 1e9:.1f}")
    steps = table(heads, rows)
    heads = ["images", *(f"{name} on {gpus}, h" for name in names for gpus in GPUS)]
    rows = [
        [f"{n:,}", *(f"{n / best(m, gpus) / 3600:.2f}" for m in models_ for gpus in GPUS)]
        for n in IMAGES
    ]
    return "\n\n".join([f"Assumed: `{assumed}`.", counts, steps, table(heads, rows)])


def attainable(precision: str) -> Hardware:
    """This machine's CPU, by a product and a copy: what both reach is all there is."""
    side, dtype = 2048, torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = torch.rand(2, side, side).to(dtype)
    source = torch.rand(2**26)
    copied = source.clone()  # written once, since the system hands out memory page by page

    def fastest(call: Callable[[], object], runs: int = 5) -> float:
        spans = []
        for _ in range(runs):
            start = time.perf_counter()
            call()
            spans.append(time.perf_counter() - start)
        return min(spans)

    peak = 2 * side**3 / fastest(lambda: a @ b)
    bandwidth = 2 * source.nbytes / fastest(lambda: copied.copy_(source))
    return Hardware(peak=peak, bandwidth=bandwidth, matrix_share=1, memory_share=1, memory=1e15)


def check(hardware: Hardware) -> None:
    """Print computed steps beside the recorded ones of this machine."""
    rows = []
    for entry in records("step"):
        options, recorded = entry["details"]["asked"], entry["details"]["ours"]["seconds"]
        reachable = options["device"] == "cpu" or torch.cuda.is_available()
        if not reachable or entry["machine"] != machine(options["device"]):
            continue
        where = attainable(options["precision"]) if options["device"] == "cpu" else hardware
        batches = (max(2, options["batch"] // 2), max(2, options["batch"] // 2) * 2)
        model = Model(options["model"], options["size"], where, batches, options["precision"])
        seconds = step(model, 1, options["batch"]).seconds
        times = [f"{1000 * seconds:.1f}", f"{1000 * recorded:.1f}", f"{seconds / recorded:.2f}"]
        rows.append([entry["setting"], *times])
    print(table(["step", "computed, ms", "recorded, ms", "computed / recorded"], rows))


def main() -> None:
    """Print or write the tables, or check them."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--models", nargs="+", default=["resnet50", "convnext_base"])
    flags.add_argument("--size", type=int, default=224, help="of the views, in pixels")
    flags.add_argument("--write", type=Path, help="a page with marks for the tables")
    flags.add_argument("--check", action="store_true", help="against the records of step.py")
    for name, value in asdict(Hardware()).items():
        flags.add_argument(f"--{name.replace('_', '-')}", type=float, default=value)
    args = flags.parse_args()
    args.hardware = Hardware(**{name: getattr(args, name) for name in asdict(Hardware())})
    if args.check:
        check(args.hardware)
        return
    text = tables([Model(name, args.size, args.hardware) for name in args.models], args)
    if args.write is None:
        print(text)
        return
    begin, end = (re.escape(mark) for mark in MARKS)
    page, replaced = re.subn(
        f"{begin}.*{end}",
        lambda _: f"{MARKS[0]}\n{text}\n{MARKS[1]}",
        args.write.read_text(),
        flags=re.S,
    )
    if not replaced:
        raise SystemExit(f"{args.write} has no place for the tables; put in {' and '.join(MARKS)}")
    args.write.write_text(page)


if __name__ == "__main__":
    main()
