"""Runs in processes of their own: killed and resumed, and shared by two."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from run_folders import checkpoint, equal, losses, metrics, steps

PACKAGE = "pixel_level_contrastive_learning"
ALONE = {name: value for name, value in os.environ.items() if "RANK" not in name}


def start(flags: list[str]) -> subprocess.Popen[str]:
    """The command, started with ``python -m`` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", PACKAGE, "pretrain", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ALONE | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], within: float = 120) -> str:
    """What a process said, once it has ended."""
    try:
        return process.communicate(timeout=within)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise


def done(flags: list[str]) -> str:
    process = start(flags)
    said = ended(process)
    assert process.returncode == 0, said
    return said


def steps_saved(run: Path) -> int:
    return max((int(p.stem[5:]) for p in (run / "checkpoints").glob("step-*.ckpt")), default=0)


@pytest.mark.parametrize(
    ("workers", "times"),
    [
        (0, 1),
        pytest.param(0, 5, marks=pytest.mark.slow),
        pytest.param(2, 5, marks=pytest.mark.slow),
    ],
)
def test_killed_runs_end_as_an_undisturbed_one(tmp_path, flags, workers, times) -> None:
    length = 15 * (times + 1)
    kept = {"workers": workers, "steps": length, "checkpoint_every": 4, "accelerator": "cpu"}
    whole, run = tmp_path / "whole", tmp_path / "run"
    done(flags(**kept, out=str(whole)))
    dice = random.Random(workers)
    for number in range(times):
        target = 15 * number + dice.randint(4, 14)
        process = start(flags(**kept, resume=True))
        while process.poll() is None and steps_saved(run) < target:
            time.sleep(0.01)
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.communicate()
        os.killpg(process.pid, signal.SIGKILL) if workers else None
    done(flags(**kept, resume=True))
    assert equal(checkpoint(whole)["state_dict"], checkpoint(run)["state_dict"])
    assert losses(whole) == losses(run)
    assert steps(run) == list(range(1, length + 1))


@pytest.mark.parametrize(
    ("strategy", "levels"),
    [
        ("ddp", 1),
        pytest.param("ddp", 2, marks=pytest.mark.slow),
        pytest.param("fsdp", 1, marks=pytest.mark.slow),
        pytest.param("fsdp", 2, marks=pytest.mark.slow),
    ],
)
def test_two_processes_do_what_one_does(tmp_path, flags, strategy, levels) -> None:
    model = flags()[flags().index("--model") + 1].replace(":tiny", ":frozen")
    # The projectors have batch norm, and each process its own statistics: one process that takes
    # its batch in two parts sees the same halves.
    kept = {"model": model, "steps": 10, "checkpoint_every": 10, "accelerator": "cpu"}
    # Batch norm of two samples magnifies what rounding did, and so does Adam where a gradient is 0.
    kept |= {"batch_size": 12, "optimizer": "sgd", "pixel_levels": levels}
    done(flags(**kept, out=str(tmp_path / "one"), accumulate=2))
    said = done(flags(**kept, out=str(tmp_path / "two"), devices=2, strategy=strategy))
    assert said.count("run: ") == 1
    assert "2 x cpu" in said
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert steps(tmp_path / "two") == list(range(1, 11))
    for mine, theirs in zip(one, two, strict=True):
        for name in ("loss", "pixel_cosine", "instance_cosine", "positive_pairs"):
            assert theirs[name] == pytest.approx(mine[name], abs=1e-4), name
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-3)
    ours, others = (checkpoint(tmp_path / run)["state_dict"] for run in ("one", "two"))
    assert ours.keys() == others.keys()
    for name in ours:
        if "running" not in name and "tracked" not in name:  # what batch norm counts for itself
            assert torch.allclose(ours[name].float(), others[name].float(), atol=1e-4), name


def test_the_death_of_one_process_ends_the_other_with_an_error(flags) -> None:
    process = start(flags(steps=4000, devices=2, accelerator="cpu"))
    run = Path(flags()[flags().index("--out") + 1])
    while process.poll() is None and not steps_saved(run):
        time.sleep(0.02)
    [child] = [int(p) for p in children(process.pid)]
    os.kill(child, signal.SIGKILL)
    ended(process)
    assert process.returncode not in (0, None)
    assert not (run / "backbone.safetensors").exists()


def children(parent: int) -> list[str]:
    """The processes that another has started (Linux)."""
    return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()


def test_of_two_runs_started_at_once_one_is_refused(flags) -> None:
    run = Path(flags()[flags().index("--out") + 1])
    both = [start(flags(steps=400, accelerator="cpu")) for _ in "12"]
    said = [ended(process) for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], said
    winner = both[codes.index(0)]
    assert f"process {winner.pid} on " in said[codes.index(2)]
    assert steps(run) == list(range(1, 401))
    assert not list(run.glob(".lock*"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_ends_a_run_with_workers_in_order(flags, number, code) -> None:
    process = start(flags(steps=4000, workers=2))
    run = Path(flags()[flags().index("--out") + 1])
    while process.poll() is None and not steps_saved(run):
        time.sleep(0.02)
    os.killpg(process.pid, number)
    said = ended(process, within=60)
    assert process.returncode == code, said
    assert "stopped at step" in said
    assert "Traceback" not in said
    assert checkpoint(run)["steps_done"] == metrics(run)[-1]["step"]


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("visualize", signal.SIGTERM, 143),
        ("pretrain", signal.SIGTERM, 143),
        ("pretrain", signal.SIGINT, 130),
    ],
)
def test_a_signal_while_libraries_are_imported_ends_in_a_word(command, number, code) -> None:
    program = f"""
import os, signal, sys, time

class Finder:
    def find_spec(name, *_):
        if name == "torch":
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder)
sys.argv = ["pixelcl", "{command}", "nothing/here", "--out", "out"]
from {PACKAGE}.__main__ import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (code, f"stopped by {number.name}\n".encode())
