"""What it costs to import the learner, and to ask the command line for help.

python benchmarks/startup.py

The import of ``PixelCL`` beside that of torch and torchvision alone, and ``pixelcl --help`` beside
an interpreter that does nothing: each a process of its own, in turns. And what neither may load.
"""

import argparse
import json
import subprocess
import sys
import time
from functools import partial

from measure import Figures, in_turns, machine, median, ratio, report

IMPORTS = {
    "torch and torchvision": "import torch, torchvision",
    "PixelCL": "import torch, torchvision; from pixel_level_contrastive_learning import PixelCL",
}
HELP = {
    "nothing": ["-c", "pass"],
    "help": ["-m", "pixel_level_contrastive_learning", "--help"],
}
LATER = ("kornia", "lightning", "matplotlib", "timm", "torchmetrics", "webdataset", "rich")
"""What is to be loaded when used, and not before."""


def run(arguments: list[str]) -> Figures:
    """Seconds that an interpreter takes from start to end."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return {"seconds": time.perf_counter() - start}


def loaded(statement: str) -> list[str]:
    """Which of `LATER` a statement loads after all."""
    show = f"import sys, json; print(json.dumps([n for n in {LATER} if n in sys.modules]))"
    command = [sys.executable, "-c", f"{statement}; {show}"]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    names: list[str] = json.loads(process.stdout.splitlines()[-1])
    return names


def main() -> None:
    """Measure both claims."""
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--save", action="store_true", help="record the ratios")
    args = flags.parse_args()
    contenders = {name: partial(run, ["-c", code]) for name, code in IMPORTS.items()}
    contenders |= {name: partial(run, flags_of) for name, flags_of in HELP.items()}
    results = in_turns(contenders, args.rounds)
    seconds = {name: median(figures, "seconds") for name, figures in results.items()}
    print("| process | s |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} |")
    early = loaded(IMPORTS["PixelCL"])
    print(f"\nLoaded with PixelCL though not used: {', '.join(early) or 'nothing'}")
    ratios = {
        "PixelCL / torch and torchvision": ratio(
            results["PixelCL"], results["torch and torchvision"]
        ),
        "help - nothing, s": seconds["help"] - seconds["nothing"],
    }
    report("startup", "start-up", ratios, seconds, where=machine(), save=args.save)


if __name__ == "__main__":
    main()
