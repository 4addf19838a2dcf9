"""Memory against the size of the map, each point in a process of its own.

python benchmarks/memory.py                          # a whole step and the losses, this package
python benchmarks/memory.py --peer PEER/bin/python   # and the published one, from its environment
python benchmarks/memory.py --part losses --batch 4 --channels 256 --sides 128
python benchmarks/memory.py --part step --batch 4 --channels 256 --hidden 256 --sides 128

A ``step`` is forward, backward, Adam and the target's update, on a network whose map has as many
cells as its images have pixels. ``losses`` are pixel propagation and both pixel losses of one
direction on given maps, forward and backward; of the published package, whose losses cannot be
called, it is propagation alone. Counted is the peak of the process over what it holds after the
imports and one tiny run. A process may take ``--limit`` GiB of data and ``--timeout`` seconds.
"""

import argparse
import json
import resource
import subprocess
import sys
from math import log

import torch
from measure import Figures, machine, report, resident_peak
from torch import nn

OVER = "over the limit"
LATE = "over the time"


def step(side: int, batch: int, channels: int, hidden: int) -> None:
    """One step on a map of ``side`` x ``side`` cells; of either package."""
    from pixel_level_contrastive_learning import PixelCL

    layers = nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()
    net = nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    learner = PixelCL(
        net,
        image_size=side,
        hidden_layer_pixel=0,
        hidden_layer_instance=-1,
        projection_hidden_size=hidden,
        augment_fn=nn.Identity(),
    )
    optimiser = torch.optim.Adam(learner.parameters())
    learner(torch.rand(batch, 3, side, side)).backward()
    optimiser.step()
    learner.update_moving_average()


def losses(side: int, batch: int, channels: int, hidden: int) -> None:  # noqa: ARG001  # as `step`
    """Propagation and both pixel losses on maps of ``side`` x ``side`` cells; of either package."""
    from pixel_level_contrastive_learning import PPM

    online = torch.randn(batch, channels, side, side, requires_grad=True)
    propagated = PPM(chan=channels)(online)
    try:
        from pixel_level_contrastive_learning import geometry
        from pixel_level_contrastive_learning import losses as ours
    except ImportError:  # the published package: nothing more can be called
        propagated.square().mean().backward()
        return
    boxes = torch.tensor([[0.0, 0, 80, 80], [20, 20, 100, 100]])
    one, two = geometry.box_to_map(boxes, torch.tensor([False, False])).split(1)
    maps = one.expand(batch, 2, 3), two.expand(batch, 2, 3)
    positives = geometry.Positives(*maps, (side, side), (side, side), 0.7)
    target = torch.randn(batch, channels, side * side)
    loss = ours.pixpro_loss(propagated.flatten(2), target, positives)
    (loss + ours.pixcontrast_loss(online.flatten(2), target, positives, 0.3)).backward()


PARTS = {"step": step, "losses": losses}


def child(part: str, side: int, batch: int, channels: int, hidden: int, limit: int) -> None:
    """Print the peak of one point; dies of the limit where that is too little."""
    PARTS[part](4, 2, 4, 4)
    before = resident_peak()
    resource.setrlimit(resource.RLIMIT_DATA, (limit * 2**30, limit * 2**30))
    PARTS[part](side, batch, channels, hidden)
    print(json.dumps({"mib": resident_peak() - before}))


def point(python: str, part: str, side: int, args: argparse.Namespace) -> float | str:
    """One point in a process of its own: MiB, or why there is none."""
    flags = {"part": part, "sides": side, "batch": args.batch, "channels": args.channels}
    flags |= {"hidden": args.hidden, "limit": args.limit}
    command = [python, __file__, "--child"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        return LATE
    if process.returncode:
        out_of_memory = any(word in process.stderr for word in ("alloc", "MemoryError"))
        killed = process.returncode < 0  # by the system, which was out of memory before the limit
        return OVER if out_of_memory or killed else process.stderr.strip().splitlines()[-1]
    return float(json.loads(process.stdout.splitlines()[-1])["mib"])


def slope(peaks: dict[int, float], sides: list[int]) -> float | None:
    """Growth of log memory over log cells between the two largest sides that are 2 to 1."""
    pairs = [(side // 2, side) for side in sides if side // 2 in peaks and side in peaks]
    if not pairs:
        return None
    small, large = pairs[-1]
    return log(peaks[large] / peaks[small]) / log((large / small) ** 2)


def sweep(part: str, args: argparse.Namespace) -> None:
    """Measure every side of one part, ours and the peer's; print the table and the slope."""
    pythons = {"this package": sys.executable}
    pythons |= {"published package": args.peer} if args.peer else {}
    print(f"\n| cells, {part} | {' | '.join(pythons)} |\n{'|---' * (1 + len(pythons))}|")
    results: dict[str, dict[int, float | str]] = {name: {} for name in pythons}
    for side in args.sides:
        row = []
        for name, python in pythons.items():
            failed = any(peak in (OVER, LATE) for peak in results[name].values())
            # A larger map would not fit either, and would take ever longer to say so.
            peak = "not tried" if failed else point(python, part, side, args)
            results[name][side] = peak
            row.append(f"{peak:.0f} MiB" if isinstance(peak, float) else peak)
        print(f"| {side} x {side} | {' | '.join(row)} |", flush=True)
    peaks = {
        side: peak  # none at all where the tiny run took as much
        for side, peak in results["this package"].items()
        if isinstance(peak, float) and peak > 0
    }
    ratios: Figures = {f"GiB at {side} x {side}": mib / 1024 for side, mib in peaks.items()}
    growth = slope(peaks, args.sides)
    if growth is not None:
        ratios["slope of log memory over log cells"] = growth
    published = results.get("published package", {})
    ratios |= {
        f"published / ours at {side} x {side}": peak / peaks[side]
        for side, peak in published.items()
        if isinstance(peak, float) and side in peaks
    }
    setting = f"{part}, batch {args.batch}, {args.channels} channels, hidden {args.hidden}"
    report("memory", setting, ratios, results, where=machine(), save=args.save)


def main() -> None:
    """Measure both parts, or one point as a child."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--part", choices=PARTS, help="default: both")
    flags.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32, 64, 96, 128])
    flags.add_argument("--batch", type=int, default=2)
    flags.add_argument("--channels", type=int, default=64)
    flags.add_argument("--hidden", type=int, default=2048)
    flags.add_argument("--limit", type=int, default=20, help="GiB a process may take")
    flags.add_argument("--timeout", type=float, default=900, help="seconds a process may take")
    flags.add_argument("--peer", help="a Python that has the published package installed")
    flags.add_argument("--save", action="store_true", help="record the figures")
    flags.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        sizes = args.sides[0], args.batch, args.channels, args.hidden
        child(args.part or "step", *sizes, args.limit)
        return
    for part in [args.part] if args.part else PARTS:
        sweep(part, args)


if __name__ == "__main__":
    main()
