"""What a step costs on many GPUs, out of what it costs on one and what the wires bear."""

from math import ceil
from typing import NamedTuple

from counts import Hardware, StepCounts, Work, count

ADAM, FOLLOW = 28, 12  # bytes a parameter that a fused update reads and writes, in float32
BUCKET = 25 * 2**20  # DistributedDataParallel's: the last one has no backward pass to hide behind


class Line(NamedTuple):
    """A cost that grows with the batch: so much at any, so much for each image."""

    fixed: float
    each: float

    def at(self, batch: float) -> float:
        """The cost at a batch."""
        return self.fixed + self.each * batch


def line(small: float, large: float, batches: tuple[int, int]) -> Line:
    """The line through the costs at two batches."""
    each = (large - small) / (batches[1] - batches[0])
    return Line(max(0.0, small - each * batches[0]), each)


class Model:
    """What a step of a model costs at any batch.

    Args:
        name: Of torchvision.
        size: Of the views, in pixels.
        hardware: What it runs on.
        batches: The two batches that are counted.
        precision: ``bfloat16`` or ``float32``.
    """

    def __init__(
        self,
        name: str,
        size: int,
        hardware: Hardware,
        batches: tuple[int, int] = (8, 32),
        precision: str = "bfloat16",
    ) -> None:
        self.name, self.size, self.hardware = name, size, hardware
        counts = [count(name, size, b, hardware, precision=precision) for b in batches]
        self.counts: StepCounts = counts[0]
        self.forward, self.backward = (
            line(*(getattr(c, half).seconds for c in counts), batches)
            for half in ("forward", "backward")
        )
        self.kept = line(*(c.kept for c in counts), batches)
        self.work = [Work(*map(sum, zip(c.forward, c.backward, strict=True))) for c in counts]
        self.flops = line(*(w.flops for w in self.work), batches)
        self.traffic = line(*(w.traffic for w in self.work), batches)

    def state(self, shards: int = 1) -> float:
        """Bytes of weights, gradients, Adam's two averages and the target, in float32."""
        return (16 * self.counts.trained + 4 * self.counts.followed) / shards


class Cost(NamedTuple):
    """What one step costs on each GPU, in seconds, and the memory it takes, in bytes."""

    parts: int
    device: float
    waiting: float
    update: float
    wires: float
    norms: float
    memory: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.device + self.waiting + self.update + self.wires + self.norms


def step(model: Model, gpus: int, batch: int, sharded: bool) -> Cost | None:
    """One step of a global batch on some GPUs; None where not one image fits.

    Args:
        model: What is trained.
        gpus: How many, in nodes of eight.
        batch: Images of all GPUs together.
        sharded: FSDP, weights and all that belongs to them cut in as many pieces; else DDP.
    """
    hardware, counts = model.hardware, model.counts
    local = batch / gpus
    shards = gpus if sharded else 1
    free = hardware.memory - hardware.reserve - model.state(shards) - model.kept.fixed
    fits = int(free / model.kept.each)
    if fits < 1:
        return None
    parts = ceil(local / fits)
    forward, backward = (parts * part.at(local / parts) for part in (model.forward, model.backward))
    device = forward + backward
    host = parts * hardware.launch * (counts.forward.launches + counts.backward.launches)
    update = (ADAM * counts.trained + FOLLOW * counts.followed) / shards
    wires = 0.0
    if sharded and gpus > 1:
        # Halves of the weights for each pass, forward and back; whole gradients once a view.
        passes = parts * (2 * 4 * counts.trained + 2 * 2 * counts.followed)
        wires = hardware.gather(passes + parts * 2 * 4 * counts.trained, gpus)
        wires = max(0.0, wires - max(device, host))
    elif gpus > 1:
        gradients = 4 * counts.trained
        whole = 2 * hardware.gather(gradients, gpus)  # scattered sums, then gathered
        last = whole * min(1.0, BUCKET / gradients)
        wires = max(last, whole - backward / parts)
    online, target = counts.norms
    norms = parts * (4 * online + 2 * target) * hardware.roundtrip(gpus)
    kept = model.kept.at(local / parts)
    return Cost(
        parts,
        device,
        max(0.0, host - device),
        update / (hardware.bandwidth * hardware.memory_share),
        wires,
        norms,
        model.state(shards) + kept + hardware.reserve,
    )
