"""What the benchmarks share: contenders taking turns, medians, the machine's name, records.

Absolute times say as much about the machine and its other work as about the code, so every claim
is a ratio: contenders are measured in turns (A B A B) in one run, each ratio is the median of the
ratios of single rounds, and the last recorded one is shown beside it.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Self

RESULTS = Path(__file__).parent / "results"

Figures = dict[str, Any]
"""What one measurement found, by name; JSON."""


class Contender:
    """A process of its own that measures itself again whenever it is asked.

    What it loads, keeps in memory or sets globally touches no other contender.

    Args:
        command: Starts a program that calls `serve`.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed on leaving
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )

    def __call__(self) -> Figures:
        """One measurement.

        Raises:
            RuntimeError: The process died; with the end of what it wrote.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write("again\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it died while loading: its output ends at once, and is read below
        for line in self.process.stdout:
            if line.startswith("{"):  # libraries greet on the same channel
                figures: Figures = json.loads(line)
                return figures
        self.process.wait()
        self.errors.seek(0)
        raise RuntimeError(f"a contender died:\n{self.errors.read()[-2000:]}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()


def serve(measure: Callable[[], Figures]) -> None:
    """The contender's side: one measurement for each line that comes in."""
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def in_turns(
    contenders: Mapping[str, Callable[[], Figures]], rounds: int
) -> dict[str, list[Figures]]:
    """What each contender finds, round after round: A B A B, so that all meet the same machine.

    One round more goes before them and is forgotten: some are still loading while others measure.
    """
    results: dict[str, list[Figures]] = {name: [] for name in contenders}
    for measure in contenders.values():
        measure()
    for _ in range(rounds):
        for name, measure in contenders.items():
            results[name].append(measure())
    return results


def median(results: Sequence[Figures], figure: str) -> float:
    """The median of one figure over the rounds."""
    return statistics.median(figures[figure] for figures in results)


def ratio(ours: Sequence[Figures], base: Sequence[Figures], figure: str = "seconds") -> float:
    """How many times the base: the median over rounds of the ratio within a round."""
    pairs = zip(ours, base, strict=True)
    return statistics.median(one[figure] / other[figure] for one, other in pairs)


def wait(device: str) -> None:
    """Return when the device has done what it was told."""
    if device == "cuda":
        import torch  # as in `machine`

        torch.cuda.synchronize()


def resident_peak() -> float:
    """The largest resident size of this process so far, in MiB.

    Of Linux: getrusage would count what the parent held when it forked.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def machine(device: str = "cpu") -> str:
    """This machine in words: processor, cores, memory, accelerator, versions."""
    import torch  # here and not above: contenders that measure start-up must not have loaded it

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    accelerator = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
    return (
        f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores, {gib:.0f} GiB"
        f"{accelerator}; torch {torch.__version__}, Python {platform.python_version()}"
    )


def records(benchmark: str) -> list[Figures]:
    """All that was ever saved of a benchmark, one entry for each setting and machine."""
    file = RESULTS / f"{benchmark}.json"
    entries: list[Figures] = json.loads(file.read_text()) if file.exists() else []
    return entries


def recorded(benchmark: str, setting: str, where: str) -> Figures | None:
    """The last entry of this setting; one of this machine before any other."""
    entries = [entry for entry in records(benchmark) if entry["setting"] == setting]
    same_machine = [entry for entry in entries if entry["machine"] == where]
    return max(same_machine or entries, key=lambda entry: str(entry["date"]), default=None)


def report(
    benchmark: str, setting: str, ratios: Figures, details: Figures, *, where: str, save: bool
) -> None:
    """Print the ratios beside the last recorded ones, and record them if asked to.

    Args:
        benchmark: Name of the file under ``results``.
        setting: What was measured, in words.
        ratios: What is claimed; printed.
        details: What the ratios were made of, and whatever else is worth keeping.
        where: The machine in words, as `machine` says it.
        save: Whether to replace this machine's entry for this setting.
    """
    last = recorded(benchmark, setting, where)
    print(f"\n{setting}, on {where}\n\n| ratio | now | recorded |\n|---|---|---|")
    for name, value in ratios.items():
        past = None if last is None else last["ratios"].get(name)
        print(f"| {name} | {value:.3f} | {'never' if past is None else format(past, '.3f')} |")
    if last is not None:
        print(f"\nRecorded {last['date']} on {last['machine']}.")
    if save:
        entry = {"setting": setting, "machine": where, "date": date.today().isoformat()}
        entries = [
            e for e in records(benchmark) if (e["setting"], e["machine"]) != (setting, where)
        ]
        entries.append(entry | {"ratios": ratios, "details": details})
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(sorted(entries, key=lambda e: str(e["setting"])), indent=1)
        (RESULTS / f"{benchmark}.json").write_text(text + "\n")
