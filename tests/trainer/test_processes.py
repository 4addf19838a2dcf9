"""Runs in processes of their own: shared by two, and stopped."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_folders import checkpoint, metrics, steps

PACKAGE = "pixel_level_contrastive_learning"
ALONE = {name: value for name, value in os.environ.items() if "RANK" not in name}


def start(flags: list[str], **environment: str) -> subprocess.Popen[str]:
    """The command, started with ``python -m`` in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", PACKAGE, "pretrain", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=ALONE | {"OMP_NUM_THREADS": "1"} | environment,
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
    output = ended(process)
    assert process.returncode == 0, output
    return output


def wait_for(event: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Return once something is so, or the process has ended; kill it after two minutes."""
    deadline = time.monotonic() + 120
    while process.poll() is None and not event():
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"waited in vain for a process, which said: {process.communicate()[0]}")
        time.sleep(0.02)


def until_saved(process: subprocess.Popen[str], run: Path) -> None:
    """Wait for the first checkpoint."""
    wait_for(lambda: list(run.glob("checkpoints/step-*.ckpt")), process)


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
    # its batch in four parts sees the same quarters as two that take theirs in two.
    common = {"model": model, "steps": 10, "checkpoint_every": 10, "accelerator": "cpu"}
    # Batch norm of two samples magnifies what rounding did, and so does Adam where a gradient is 0.
    common |= {"batch_size": 24, "optimizer": "sgd", "pixel_levels": levels}
    common |= {"crop_area": (0.1, 0.3)}  # so that some images have no pairs
    done(flags(**common, out=str(tmp_path / "one"), accumulate=4))
    two_of = {"devices": 2, "accumulate": 2, "strategy": strategy}
    output = done(flags(**common, **two_of, out=str(tmp_path / "two")))
    assert output.count("run: ") == 1
    assert "2 x cpu" in output
    counted = "positive_pairs", "images_without_pairs"
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert steps(tmp_path / "two") == list(range(1, 11))
    assert any(line["images_without_pairs"] for line in one)
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "pixel_cosine", "instance_cosine", *counted):
            assert second[name] == pytest.approx(first[name], abs=1e-4), name
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-3)
    checkpoints = [checkpoint(tmp_path / run) for run in ("one", "two")]
    assert [contents["samples"] for contents in checkpoints] == [240, 240]
    ours, others = (contents["state_dict"] for contents in checkpoints)
    assert ours.keys() == others.keys()
    for name in ours:
        if "running" not in name and "tracked" not in name:  # what batch norm counts for itself
            assert torch.allclose(ours[name].float(), others[name].float(), atol=1e-4), name


def test_a_dry_run_times_the_steps_of_several_processes_and_tells_once(flags) -> None:
    output = done(flags(devices=2, accelerator="cpu", dry_run=True))
    texts = "\npositive_pairs: ", "\nmemory_mib: ", "\nseconds_per_step: ", "a step takes about "
    assert [output.count(text) for text in texts] == [1] * len(texts)


def test_the_death_of_one_process_ends_the_other_with_an_error(run, flags) -> None:
    process = start(flags(steps=4000, devices=2, accelerator="cpu"))
    until_saved(process, run)
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(child), signal.SIGKILL)
    ended(process)
    assert process.returncode not in (0, None)
    assert not (run / "backbone.safetensors").exists()


def test_a_signal_while_other_machines_are_waited_for_ends_the_process(flags) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    machine = {"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1]), "NODE_RANK": "0"}
    process = start(flags(num_nodes=2, devices=1, accelerator="cpu"), **machine)
    with socket.socket() as waiting:
        wait_for(lambda: waiting.connect_ex(address) == 0, process)
        process.terminate()
        ended(process, within=20)
    assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_whole_group_ends_a_run_with_workers_in_order(
    run, flags, number, code
) -> None:
    process = start(flags(steps=4000, workers=2))
    until_saved(process, run)
    os.killpg(process.pid, number)
    output = ended(process, within=60)
    assert process.returncode == code, output
    assert "stopped at step" in output
    assert "Traceback" not in output
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
