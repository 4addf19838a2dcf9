"""What the machine is: its devices, its processes, its memory."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from math import ceil
from pathlib import Path
from typing import NamedTuple

import torch

from .config import PretrainConfig

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Where launchers tell a process its place; the one that writes is 0 in all of them."""
LIBRARIES = (
    "torch",
    "torchvision",
    "lightning",
    "timm",
    "kornia",
    "pixel-level-contrastive-learning",
)
GROUP = Path("/sys/fs/cgroup")
"""Where Linux tells a container's limits."""
UNLIMITED = 2**60
"""Limits of memory from here on are none, in bytes."""


class Devices(NamedTuple):
    """What a run computes on.

    Attributes:
        kind: ``cuda``, ``cpu`` or ``mps``.
        each_node: Devices, and so processes, on each machine.
        nodes: Machines.
    """

    kind: str
    each_node: int
    nodes: int

    @property
    def processes(self) -> int:
        """Processes of the run."""
        return self.each_node * self.nodes


def devices(config: PretrainConfig) -> Devices:
    """The devices that the settings and the launcher ask for.

    Raises:
        ValueError: There are fewer.
    """
    has_gpu = torch.cuda.is_available()
    has_mps = torch.backends.mps.is_available()
    kind = {"gpu": "cuda", "auto": "cuda" if has_gpu else "cpu"}.get(
        config.accelerator, config.accelerator
    )
    there = {"cuda": torch.cuda.device_count() if has_gpu else 0, "mps": int(has_mps)}
    nodes = config.num_nodes
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes already
        each = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ.get("WORLD_SIZE", each)) // each
    elif config.devices == "auto":
        each = there.get(kind, 1)
        if hasattr(sys, "ps1"):  # a notebook or a prompt cannot be started anew for each GPU
            each = min(each, 1)
    else:
        each = config.devices
    if each > there.get(kind, each) or each == 0:
        raise ValueError(
            f"devices is {config.devices!r} with accelerator {config.accelerator!r}; here are "
            f"{there.get(kind, 0)} of kind {kind}: give fewer, or accelerator cpu"
        )
    if kind == "cpu" and config.devices != "auto" and each > cores():
        raise ValueError(
            f"devices is {each} processes on the CPU, which has {cores()} cores; give as many at "
            "most, or leave it: one process uses all cores"
        )
    return Devices(kind, each, nodes)


def native_bfloat16(kind: str) -> bool:
    """Whether a kind of device has instructions of its own for bfloat16."""
    if kind == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    if kind != "cpu":
        return False
    asked = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # not public in torch
    return any(bool(getattr(torch.cpu, name, lambda: False)()) for name in asked)


def is_writer() -> bool:
    """Whether this process is the one of the run that writes."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def cores() -> int:
    """Cores that this process may use, within the limits of a container."""
    affine = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    most = GROUP / "cpu.max"
    quota, _, period = most.read_text().partition(" ") if most.exists() else ("max", "", "")
    return count if quota == "max" else min(count, max(1, ceil(int(quota) / int(period))))


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on a device; on a CPU, within the limits of a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    bounds = [UNLIMITED]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        bounds.append(int(lines["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf"):  # on macOS, which tells what there is, not what is free
        bounds.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    most, used, stat = (GROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if most.exists() and used.exists() and most.read_text().strip() != "max":
        # Pages of files count as used, but are given back when memory is asked for.
        held = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
        used_up = int(used.read_text()) - int(held.get("inactive_file", 0))
        bounds.append(int(most.read_text()) - used_up)
    return max(0, min(bounds))


def described(found: Devices) -> str:
    """The system and the versions, for the log."""
    name = torch.cuda.get_device_name() if found.kind == "cuda" else processor()
    libraries = ", ".join(f"{library} {installed(library)}" for library in LIBRARIES)
    return (
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"{libraries}; {found.processes} x {found.kind} ({name}), {cores()} cores"
    )


def processor() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def installed(library: str) -> str:
    """The version of a library."""
    try:
        return version(library)
    except PackageNotFoundError:
        return "?"
