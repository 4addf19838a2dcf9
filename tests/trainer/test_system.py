"""What the machine is: processes counted as launchers say, memory as containers say."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from pixel_level_contrastive_learning.trainer import system
from pixel_level_contrastive_learning.trainer.config import PretrainConfig
from pixel_level_contrastive_learning.trainer.system import Devices, find_devices


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in (*system.RANKS, "LOCAL_WORLD_SIZE", "WORLD_SIZE", "MASTER_ADDR", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


def test_a_cpu_is_one_device_unless_more_are_asked_for() -> None:
    assert find_devices(PretrainConfig()) == Devices("cpu", 1, 1)


@pytest.mark.parametrize("launched", [{"MASTER_ADDR": "host"}, {"SLURM_NTASKS": "2"}])
def test_several_machines_need_a_launcher(monkeypatch, launched) -> None:
    config = PretrainConfig(devices=1, num_nodes=2)
    message = "num_nodes is 2, but .* with srun, or torchrun --nnodes 2 "
    with pytest.raises(ValueError, match=message):
        find_devices(config)
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    assert find_devices(config).processes == 2


@pytest.mark.parametrize("name", ["RANK", "NODE_RANK", "SLURM_PROCID"])
def test_a_process_of_many_that_thinks_it_is_alone_is_refused(monkeypatch, name) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(
        ValueError, match=f"{name} is 1, as in a run with several .* or unset {name}"
    ):
        find_devices(PretrainConfig())
    monkeypatch.setenv("MASTER_ADDR", "host")
    assert find_devices(PretrainConfig(devices=1, num_nodes=2)).processes == 2


def test_more_processes_than_cores_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(system, "cores", lambda: 3)
    monkeypatch.setenv("MASTER_ADDR", "host")
    assert find_devices(PretrainConfig(devices=3, num_nodes=2)).processes == 6
    with pytest.raises(ValueError, match="devices is 4 processes on the CPU, which has 3 cores"):
        find_devices(PretrainConfig(devices=4))


def test_gpus_are_all_taken_unless_fewer_are_asked_for(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert find_devices(PretrainConfig()) == Devices("cuda", 4, 1)
    assert find_devices(PretrainConfig(devices=2)) == Devices("cuda", 2, 1)
    assert find_devices(PretrainConfig(accelerator="cpu")) == Devices("cpu", 1, 1)
    with pytest.raises(ValueError, match=r"devices is 5 .*; there are 4 of kind cuda: give fewer"):
        find_devices(PretrainConfig(devices=5))


def test_a_notebook_takes_one_gpu_and_a_mac_its_cpu_unless_told(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert find_devices(PretrainConfig()) == Devices("cpu", 1, 1)
    assert find_devices(PretrainConfig(accelerator="mps")) == Devices("mps", 1, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert find_devices(PretrainConfig()) == Devices("cuda", 1, 1)
    assert find_devices(PretrainConfig(devices=2)) == Devices("cuda", 2, 1)
    assert find_devices(PretrainConfig(accelerator="cpu")) == Devices("cpu", 1, 1)


@pytest.mark.parametrize("kind", ["gpu", "mps"])
def test_a_kind_of_device_that_is_not_there_is_refused(kind) -> None:
    with pytest.raises(
        ValueError, match=f"accelerator is '{kind}', which this machine lacks; leave it out"
    ):
        find_devices(PretrainConfig(accelerator=kind))


def test_what_torchrun_started_counts(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert find_devices(PretrainConfig()) == Devices("cpu", 2, 4)


@pytest.mark.parametrize("rank", system.RANKS)
def test_only_the_first_process_writes(monkeypatch, rank) -> None:
    assert system.is_writer()
    monkeypatch.setenv(rank, "0")
    assert system.is_writer()
    monkeypatch.setenv(rank, "1")
    assert not system.is_writer()


def test_free_memory_is_what_the_container_leaves(monkeypatch) -> None:
    contents = {
        "/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4096 kB\n",
        "/sys/fs/cgroup/memory.max": "3000000\n",
        "/sys/fs/cgroup/memory.current": "1000000\n",
    }
    monkeypatch.setattr(Path, "exists", lambda path: str(path) in contents)
    monkeypatch.setattr(Path, "read_text", lambda path, **_: contents[str(path)])
    cpu = torch.device("cpu")
    assert system.free_memory(cpu) == 2_000_000
    contents["/sys/fs/cgroup/memory.stat"] = "anon 700000\ninactive_file 300000\n"
    assert system.free_memory(cpu) == 2_300_000  # files that were read give way
    contents["/sys/fs/cgroup/memory.max"] = "max\n"
    assert system.free_memory(cpu) == 4096 * 1024


def test_the_machine_is_told_in_words() -> None:
    description = system.describe(Devices("cpu", 2, 1))
    assert f"torch {version('torch')}, torchvision" in description
    assert "2 x cpu (" in description
