"""Signals, and workers that die: when a run ends, with which code, and what it leaves."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from run_folders import checkpoint, equal, files, log, weights

from pixel_level_contrastive_learning import pretrain
from pixel_level_contrastive_learning.__main__ import interrupt
from pixel_level_contrastive_learning.trainer import trainer
from pixel_level_contrastive_learning.trainer.signals import Interrupted, StopSignal
from pixel_level_contrastive_learning.trainer.training_step import TrainingStep


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, "130"), (signal.SIGTERM, "143")])
def test_a_signal_ends_the_step_saves_and_leaves(
    tmp_path, run, settings, monkeypatch, number, code
) -> None:
    backward = TrainingStep.backward

    def signalled(step: TrainingStep, batch: object, features: object) -> torch.Tensor:
        if step.step == 2:
            signal.raise_signal(number)
        return backward(step, batch, features)

    monkeypatch.setattr(TrainingStep, "backward", signalled)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=code):
        pretrain(**settings(checkpoint_every=100))
    assert signal.getsignal(number) is before
    assert checkpoint(run)["steps_done"] == 3
    assert "stopped at step 3 of 6 and saved" in log(run)
    monkeypatch.undo()
    pretrain(out=run, resume=True)
    pretrain(**settings(out=str(tmp_path / "whole")))
    assert equal(weights(run), weights(tmp_path / "whole"))


@pytest.mark.parametrize("moment", ["set_up", "choose_accumulate", "build_validation"])
def test_before_the_first_step_a_signal_ends_a_run_and_leaves_everything_as_it_was(
    run, settings, monkeypatch, caplog, moment
) -> None:
    real = getattr(trainer, moment)

    def signalled(*args: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return real(*args)

    def stopped(**options: object) -> None:
        monkeypatch.setattr(trainer, moment, signalled)
        with pytest.raises(Interrupted, match="130"):
            pretrain(**settings(steps=2, **options))
        monkeypatch.setattr(trainer, moment, real)

    stopped()
    assert not run.exists()
    assert len([record for record in caplog.records if record.levelname == "WARNING"]) == 1
    pretrain(**settings(steps=1))
    contents = {
        p: content for p, content in files(run).items() if p.suffix in (".ckpt", ".safetensors")
    }
    stopped(resume=True)
    if moment == "set_up":
        stopped(overwrite=True)
        stopped(overwrite=True, dry_run=True)
    assert contents.items() <= files(run).items()


def test_the_second_signal_leaves_at_once(monkeypatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignal() as stop:
        stop.exit_if_received()  # stays, since nothing has come yet
        signal.raise_signal(signal.SIGINT)
        assert (stop.number, codes) == (signal.SIGINT, [])
        with pytest.raises(Interrupted, match="130"):
            stop.exit_if_received()
        signal.raise_signal(signal.SIGINT)
    assert codes == [130]


@pytest.mark.parametrize("active", [True, False])
def test_signals_kill_only_while_other_machines_are_waited_for(active) -> None:
    with StopSignal() as stop:
        with stop.killing(active):
            assert (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL) is active
        assert signal.getsignal(signal.SIGTERM) == stop.handle


def test_only_the_process_that_writes_has_the_code_of_a_signal(monkeypatch) -> None:
    stop = StopSignal()
    stop.number = signal.SIGTERM
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(Interrupted, match=r"^0$"):
        stop.exit_if_received()


def test_forked_processes_leave_ctrl_c_to_their_parent(monkeypatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with StopSignal() as stop:
        stop.owner = -1  # as if this were a child
        signal.raise_signal(signal.SIGINT)
        assert (stop.number, codes) == (None, [])
        signal.raise_signal(signal.SIGTERM)
    assert codes == [143]


class Signalled:
    """A loader in whose second batch a signal comes."""

    def __iter__(self) -> Iterator[str]:
        yield "first"
        signal.raise_signal(signal.SIGTERM)
        yield "second"


@pytest.mark.parametrize(("alone", "batches"), [(True, ["first"]), (False, ["first", "second"])])
def test_a_signal_while_a_batch_is_waited_for_ends_the_stream_of_one_process(
    alone, batches
) -> None:
    with StopSignal() as stop:
        stop.alone = alone  # else others wait for a step of this process
        assert list(trainer.take(Signalled(), 2, stop)) == batches


class Dying:
    """A loader of two batches, whose workers then die."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self) -> Iterator[str]:
        yield from ("first", "second")
        raise self.error


# What a reader of the workers' queue meets: their end noted, a pipe closed in the middle of a
# tensor, a socket that nobody serves any more.
DEATHS = [
    RuntimeError("DataLoader worker (pid 1) exited unexpectedly"),
    EOFError(),
    ConnectionResetError(104, "Connection reset by peer"),
    FileNotFoundError(2, "No such file or directory"),
]


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_workers_that_die_are_an_error_unless_the_run_was_told_to_stop(error) -> None:
    stop = StopSignal()
    batches = trainer.take(Dying(error), 10, stop)
    assert [next(batches), next(batches)] == ["first", "second"]
    with pytest.raises(RuntimeError, match="worker"):
        next(batches)
    stop.number, stop.alone = signal.SIGTERM, False  # other processes have not heard of it yet
    assert list(trainer.take(Dying(error), 10, stop)) == ["first", "second"]


def test_a_file_that_cannot_be_read_is_no_death_of_a_worker() -> None:
    error = FileNotFoundError(2, "No such file or directory", "images/a.jpg")
    with pytest.raises(FileNotFoundError):
        list(trainer.take(Dying(error), 10, StopSignal()))


LATE = """
import os, signal, sys

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGTERM):
        kill(process, number)

late = Late()
from pixel_level_contrastive_learning.__main__ import main
sys.argv = ["pixelcl", "--version"]
sys.exit(main())
"""


def test_sigterm_while_python_ends_does_not_make_a_success_a_failure() -> None:
    assert subprocess.run([sys.executable, "-c", LATE], stdout=subprocess.DEVNULL).returncode == 0


INTERRUPTED = """
import signal

try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:  # as NumPy does
    raise ImportError("cannot load module more than once per process")
"""


def test_ctrl_c_while_a_command_imports_its_libraries_ends_it_without_a_traceback(tmp_path) -> None:
    (tmp_path / "torch.py").write_text(INTERRUPTED)
    code = (  # tests that run as a job in the background of a shell inherit that SIGINT is ignored
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from pixel_level_contrastive_learning.__main__ import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "layers", "torchvision/resnet18"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "stopped by SIGINT\n")


def test_ctrl_c_later_is_left_to_what_the_command_is_doing() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGINT, sys._getframe())
