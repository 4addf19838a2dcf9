"""Growth on paper: what a step costs on 1 to 512 GPUs, and what a pass over a billion images does.

python benchmarks/scaling.py                          # print the tables
python benchmarks/scaling.py --write docs/scaling.md  # put them into the guide
python benchmarks/scaling.py --peak 312 --bandwidth 2.0   # other hardware, in TB/s
python benchmarks/scaling.py --check               # against the records of step.py on this machine

Costs are counted from the model itself (`counts.py`): products, traffic, operations and kept bytes
of one step at two batches, and in between on a straight line. The hardware is assumed, and every
assumption is a flag.
"""

import argparse
import re
import time
from dataclasses import fields
from math import ceil
from pathlib import Path

import torch
from counts import Hardware
from growth import Model, step
from measure import machine, records

GPUS = (1, 8, 64, 512)
BATCHES = (1024, 4096, 16384)
IMAGES = (10**6, 10**8, 10**9)
MARKS = "<!-- computed by benchmarks/scaling.py -->", "<!-- end -->"
UNITS = {"peak": 1e12, "bandwidth": 1e12, "memory": 1e9, "link": 1e9, "network": 1e9}
UNITS |= {"launch": 1e-6, "latency": 1e-6, "hop": 1e-6, "reserve": 1e9}
"""What one of a flag's units is in `Hardware`'s."""


def counts_table(models_: list[Model]) -> str:
    """What one image and one step cost, as counted."""
    rows = ["| | " + " | ".join(f"{m.name}, {m.size} px" for m in models_) + " |"]
    rows.append("|---" * (1 + len(models_)) + "|")
    lines = {
        "parameters trained, million": lambda m: f"{m.counts.trained / 1e6:.1f}",
        "GFLOP an image (4 forward, 2 backward passes)": lambda m: f"{m.flops.each / 1e9:.0f}",
        "traffic an image, MB": lambda m: f"{m.traffic.each / 1e6:.0f}",
        "kept for backward an image, MB": lambda m: f"{m.kept.each / 1e6:.0f}",
        "state on one GPU, GB": lambda m: f"{m.state() / 1e9:.2f}",
        "operations a step": lambda m: f"{m.work[0].launches:.0f}",
        "batch norms, online and target": lambda m: " + ".join(map(str, m.counts.norms)),
        "ms an image on the device": lambda m: f"{1e3 * (m.forward.each + m.backward.each):.2f}",
        "of it by products alone, ms": lambda m: f"{1e3 * products(m):.2f}",
    }
    rows += [f"| {name} | {' | '.join(map(cell, models_))} |" for name, cell in lines.items()]
    return "\n".join(rows)


def products(model: Model) -> float:
    """Seconds an image if matrix products were all."""
    return model.flops.each / (model.hardware.peak * model.hardware.matrix_share)


def step_table(model: Model) -> str:
    """A row for each number of GPUs, batch and strategy."""
    rows = [
        f"**{model.name}, {model.size} px**\n",
        "| GPUs | global batch | a GPU | parts | strategy | device, ms | host, ms | update, ms | "
        "wires, ms | batch norm, ms | images/s | share of linear | memory, GB |",
        "|---" * 13 + "|",
    ]
    for gpus in GPUS:
        for batch in BATCHES:
            for sharded in (False, True) if gpus > 1 else (False,):
                cost, alone = step(model, gpus, batch, sharded), best(model, 1)
                if cost is None:
                    continue
                rate = batch / cost.seconds
                ms = [cost.device, cost.waiting, cost.update, cost.wires, cost.norms]
                times = " | ".join(f"{1000 * part:.1f}" for part in ms)
                rows.append(
                    f"| {gpus} | {batch} | {batch // gpus} | {cost.parts} | "
                    f"{'FSDP' if sharded else 'DDP'} | {times} | {rate:.0f} | "
                    f"{rate / (gpus * alone):.0%} | {cost.memory / 1e9:.1f} |"
                )
    return "\n".join(rows)


def best(model: Model, gpus: int) -> float:
    """Images a second at the best of the batches, by DDP."""
    costs = {batch: step(model, gpus, batch, sharded=False) for batch in BATCHES}
    return max((batch / cost.seconds for batch, cost in costs.items() if cost), default=0.0)


def pass_table(models_: list[Model], args: argparse.Namespace) -> str:
    """What one pass over many images costs in hours, storage and cores."""
    rows = [
        "| images | storage, TB | shards | order, GB a process | "
        + " | ".join(f"{m.name} on {g}, h" for m in models_ for g in GPUS)
        + " |",
        "|---" * (4 + len(models_) * len(GPUS)) + "|",
    ]
    for images in IMAGES:
        stored = images * args.image_kb * 1e3
        hours = [images / best(m, g) / 3600 for m in models_ for g in GPUS]
        rows.append(
            f"| {images:,} | {stored / 1e12:.2f} | {ceil(stored / (args.shard_gb * 1e9)):,} | "
            f"{8 * images / 1e9:.2f} | {' | '.join(f'{h:.2f}' for h in hours)} |"
        )
    rows.append("")
    for model in models_:
        rate, cores = best(model, 1), best(model, 1) / args.core_rate
        read, all_read = (best(model, gpus) * args.image_kb * 1e3 for gpus in (1, 512))
        rows.append(
            f"- {model.name}: a GPU takes {rate:.0f} images/s, that is {cores:.1f} cores at "
            f"{args.core_rate:g} images/s a core and {read / 1e6:.0f} MB/s; 512 GPUs read "
            f"{all_read / 1e9:.0f} GB/s."
        )
    return "\n".join(rows)


def assumptions(hardware: Hardware, args: argparse.Namespace) -> str:
    """All that was not counted, as flags."""
    said = [f"--{name.replace('_', '-')} {value:g}" for name, value in given(hardware).items()]
    said += [f"--image-kb {args.image_kb:g}", f"--core-rate {args.core_rate:g}"]
    return f"Assumed: `{' '.join([*said, f'--shard-gb {args.shard_gb:g}'])}`."


def given(hardware: Hardware) -> dict[str, float]:
    """The hardware in the units of the flags."""
    return {
        field.name: getattr(hardware, field.name) / UNITS.get(field.name, 1)
        for field in fields(Hardware)
    }


def attainable(precision: str, launch: float) -> Hardware:
    """This machine's CPU, by a product and a copy: what both reach is all there is."""
    side, dtype = 2048, torch.bfloat16 if precision == "bfloat16" else torch.float32
    a, b = torch.rand(2, side, side).to(dtype)
    source = torch.rand(2**26)
    copied = source.clone()  # written once, since the system hands out memory page by page

    def fastest(work: object, runs: int = 5) -> float:
        assert callable(work)
        spans = []
        for _ in range(runs):
            start = time.perf_counter()
            work()
            spans.append(time.perf_counter() - start)
        return min(spans)

    peak = 2 * side**3 / fastest(lambda: a @ b)
    bandwidth = 2 * source.nbytes / fastest(lambda: copied.copy_(source))
    return Hardware(
        peak=peak, bandwidth=bandwidth, matrix_share=1, memory_share=1, launch=launch, memory=1e15
    )


def check(hardware: Hardware) -> None:
    """Print computed steps beside the recorded ones of this machine."""
    print("| step | computed, ms | recorded, ms | computed / recorded |\n|---|---|---|---|")
    for entry in records("step"):
        asked, took = entry["details"]["asked"], entry["details"]["ours"]["seconds"]
        if entry["machine"] != machine(asked["device"]):
            continue
        on_cpu = asked["device"] == "cpu"
        where = attainable(asked["precision"], hardware.launch) if on_cpu else hardware
        batches = (max(2, asked["batch"] // 2), max(2, asked["batch"] // 2) * 2)
        model = Model(asked["model"], asked["size"], where, batches, asked["precision"])
        cost = step(model, 1, asked["batch"], sharded=False)
        assert cost is not None
        print(
            f"| {entry['setting']} | {1000 * cost.seconds:.1f} | {1000 * took:.1f} | "
            f"{cost.seconds / took:.2f} |"
        )


def write(path: Path, text: str) -> None:
    """Put the tables between the marks of a page."""
    begin, end = (re.escape(mark) for mark in MARKS)
    page, found = re.subn(
        f"{begin}.*{end}", lambda _: f"{MARKS[0]}\n{text}\n{MARKS[1]}", path.read_text(), flags=re.S
    )
    if not found:
        raise SystemExit(f"{path} has no place for the tables; put in {MARKS[0]} and {MARKS[1]}")
    path.write_text(page)


def main() -> None:
    """Print or write the tables, or check them."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--models", nargs="+", default=["resnet50", "convnext_base"])
    flags.add_argument("--size", type=int, default=224, help="of the views, in pixels")
    flags.add_argument("--image-kb", type=float, default=110, help="a stored JPEG")
    flags.add_argument("--shard-gb", type=float, default=1)
    flags.add_argument("--core-rate", type=float, default=150, help="images/s a core prepares")
    flags.add_argument("--write", type=Path, help="a page with marks for the tables")
    flags.add_argument("--check", action="store_true", help="against the records of step.py")
    for name, value in given(Hardware()).items():
        unit = f"in {UNITS[name]:g} of bytes, FLOP or seconds" if name in UNITS else "0 to 1"
        flags.add_argument(f"--{name.replace('_', '-')}", type=float, default=value, help=unit)
    args = flags.parse_args()
    hardware = Hardware(
        **{name: getattr(args, name) * UNITS.get(name, 1) for name in given(Hardware())}
    )
    if args.check:
        check(hardware)
        return
    models_ = [Model(name, args.size, hardware) for name in args.models]
    tables = [assumptions(hardware, args), counts_table(models_), *map(step_table, models_)]
    text = "\n\n".join([*tables, pass_table(models_, args)])
    if args.write:
        write(args.write, text)
    else:
        print(text)


if __name__ == "__main__":
    main()
