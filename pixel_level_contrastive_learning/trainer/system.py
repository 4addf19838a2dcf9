"""The system: devices and processes, cores and memory, versions."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from ..checks import installed_version
from ..data.loader import CGROUP, cores
from .config import PretrainConfig

RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_PROCID")
"""Environment variables in which launchers give a process its rank; the writer is 0 in all."""
LIBRARIES = (
    *("torch", "torchvision", "lightning", "timm", "kornia"),
    "pixel-level-contrastive-learning",
)
UNLIMITED = 2**60
"""Bytes; a memory limit of this or more is none."""


class Devices(NamedTuple):
    """What a run computes on."""

    kind: str  # cuda, cpu or mps
    per_node: int  # devices, and so processes, on each machine
    nodes: int  # machines

    @property
    def processes(self) -> int:
        """Processes of the run, over all machines."""
        return self.per_node * self.nodes


def find_devices(config: PretrainConfig) -> Devices:
    """The devices that the settings and the launcher ask for.

    Raises:
        ValueError: There are fewer, or several machines without a launcher, which wait for ever.
    """
    cuda = torch.cuda.is_available()
    kinds = {"gpu": "cuda", "auto": "cuda" if cuda else "cpu"}
    kind = kinds.get(config.accelerator, config.accelerator)
    gpus = torch.cuda.device_count() if cuda else 0
    available = {"cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    nodes = config.num_nodes
    if nodes > 1 and "MASTER_ADDR" not in os.environ and not SLURMEnvironment.detect():
        raise ValueError(
            f"num_nodes is {nodes}, but no launcher started this process; start it on each machine "
            f"with srun, or torchrun --nnodes {nodes} --nproc-per-node DEVICES --rdzv-backend "
            "c10d --rdzv-endpoint HOST:29500 -m pixel_level_contrastive_learning pretrain ..., or "
            "leave num_nodes at 1"
        )
    if "LOCAL_WORLD_SIZE" in os.environ:  # torchrun has started the processes already
        per_node = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ.get("WORLD_SIZE", per_node)) // per_node
    elif config.devices == "auto":
        per_node = available.get(kind, 1)
        if hasattr(sys, "ps1"):  # a notebook or a prompt cannot be started anew for each GPU
            per_node = min(per_node, 1)
    else:
        per_node = config.devices
    device_count = available.get(kind, per_node)
    if device_count == 0:
        raise ValueError(
            f"accelerator is {config.accelerator!r}, which this machine lacks; leave it out"
        )
    if per_node > device_count:
        raise ValueError(
            f"devices is {config.devices!r} with accelerator {config.accelerator!r}; there are "
            f"{device_count} of kind {kind}: give fewer, or accelerator cpu"
        )
    if kind == "cpu" and config.devices != "auto" and per_node > cores():
        raise ValueError(
            f"devices is {per_node} processes on the CPU, which has {cores()} cores; give at most "
            "as many, or leave it out: one process uses all cores"
        )
    devices = Devices(kind, per_node, nodes)
    if devices.processes == 1 and not is_writer():
        rank = next(name for name in RANKS if os.environ.get(name, "0") != "0")
        raise ValueError(
            f"{rank} is {os.environ[rank]}, as in a run with several processes, but this run has "
            f"one; give num_nodes and devices, or unset {rank}"
        )
    return devices


def is_writer() -> bool:
    """Whether this process is the one that writes into the run's folder."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def cores_per_process(devices: Devices) -> int:
    """Cores for each process; srun gives each process cores of its own."""
    return max(1, cores() // (1 if SLURMEnvironment.detect() else devices.per_node))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; on a CPU, within the limits of a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    bounds = [UNLIMITED]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        amounts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        bounds.append(int(amounts["MemAvailable"].split()[0]) * 1024)
    elif hasattr(os, "sysconf"):  # macOS, which states what is installed, not what is free
        bounds.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit, used, stat = (CGROUP / f"memory.{name}" for name in ("max", "current", "stat"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        # Cached pages of files count as used, but are given back when memory is asked for.
        lines = stat.read_text().splitlines() if stat.exists() else []
        pages = dict(line.split() for line in lines)
        in_use = int(used.read_text()) - int(pages.get("inactive_file", 0))
        bounds.append(int(limit.read_text()) - in_use)
    return max(0, min(bounds))


def describe(devices: Devices) -> str:
    """The system and the versions, for the log."""
    name = torch.cuda.get_device_name() if devices.kind == "cuda" else processor_name()
    libraries = ", ".join(f"{library} {installed_version(library)}" for library in LIBRARIES)
    return (
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, "
        f"{libraries}; {devices.processes} x {devices.kind} ({name}), {cores()} cores"
    )


def processor_name() -> str:
    """The name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
