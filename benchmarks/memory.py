"""Memory of a whole training step against the size of the map, each point in a process of its own.

python benchmarks/memory.py                       # this package
python benchmarks/memory.py --peer PEER/bin/python  # and the published one, from its environment

A step is forward, backward, Adam and the target's update, on a network whose map has as many cells
as its images have pixels. Counted is the peak of the process over what it holds after the imports
and one tiny step.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn


def peak() -> float:
    """The largest resident size of this process so far, in MiB.

    Of Linux: getrusage would count what the parent held when it forked.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def step(side: int, batch: int, channels: int, hidden: int) -> None:
    """One step on a map of ``side`` x ``side`` cells."""
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


def child(side: int, batch: int, channels: int, hidden: int, limit: int) -> None:
    """Print the peak of one point; dies of the limit where that is too little."""
    step(4, 2, 4, 4)
    before = peak()
    resource.setrlimit(resource.RLIMIT_DATA, (limit * 2**30, limit * 2**30))
    step(side, batch, channels, hidden)
    print(json.dumps({"mib": peak() - before}))


def measure(python: str, flags: list[str]) -> str:
    """One point in a process of its own: MiB, or that it did not fit."""
    command = [python, __file__, "--child", *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        short = "alloc" in done.stderr or "MemoryError" in done.stderr
        return "over the limit" if short else done.stderr.strip().splitlines()[-1]
    return f"{json.loads(done.stdout.splitlines()[-1])['mib']:.0f} MiB"


def main() -> None:
    """Measure every side, ours and the peer's, and print a table in Markdown."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--sides", type=int, nargs="+", default=[8, 16, 32, 64, 96, 128])
    flags.add_argument("--batch", type=int, default=2)
    flags.add_argument("--channels", type=int, default=64)
    flags.add_argument("--hidden", type=int, default=2048)
    flags.add_argument("--limit", type=int, default=20, help="GiB a process may take")
    flags.add_argument("--peer", help="a Python that has the published package installed")
    flags.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        child(args.sides[0], args.batch, args.channels, args.hidden, args.limit)
        return
    pythons = [sys.executable, *([args.peer] if args.peer else [])]
    print("| cells | this package |" + (" published package |" if args.peer else ""))
    print("|---" * (1 + len(pythons)) + "|")
    for side in args.sides:
        point = {"sides": side, "batch": args.batch, "channels": args.channels}
        point |= {"hidden": args.hidden, "limit": args.limit}
        flags_of = [part for name, value in point.items() for part in (f"--{name}", str(value))]
        row = [measure(python, flags_of) for python in pythons]
        print(f"| {side} x {side} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
