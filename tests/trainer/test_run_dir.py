"""The folder of a run: what replacing a run removes, what it leaves, and who holds it."""

import os
import socket
import time

import pytest
import torch
from filelock import FileLock

from pixel_level_contrastive_learning.files import CannotWriteError
from pixel_level_contrastive_learning.trainer import run_dir
from pixel_level_contrastive_learning.trainer.run_dir import RunDir


def test_what_an_evaluation_left_goes_with_the_run_that_it_is_about(tmp_path) -> None:
    for name in ("evaluation.json", "correspondence.json", "predictions/0000_a.png", "mine.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "config.yaml").touch()
    RunDir(tmp_path).remove_run()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt"}


def test_pictures_of_ones_own_are_not_replaced(tmp_path) -> None:
    directory, preview = RunDir(tmp_path), tmp_path / "preview"
    preview.mkdir()
    (preview / "pairs-0.png").touch()
    directory.check(resume=False, overwrite=True)  # a dry run was here
    (preview / "mine.jpg").touch()
    with pytest.raises(ValueError, match="holds no run but has preview, which a run would replace"):
        directory.check(resume=False, overwrite=True)


def test_a_name_that_is_no_text_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="which is no UTF-8"):
        RunDir(tmp_path / os.fsdecode(b"\xe9")).check(resume=False, overwrite=False)


def test_a_run_that_trains_elsewhere_is_named_and_leaves_no_lock(tmp_path) -> None:
    run = RunDir(tmp_path / "run")
    with run.locked():
        (run.path / ".lock-holder").write_text(f"{os.getppid()} {socket.gethostname()}")
        with (
            pytest.raises(ValueError, match=rf"process {os.getppid()} on .* is training; wait for"),
            RunDir(run.path).locked(),
        ):
            pass
    assert not run.path.exists()
    with run.locked():
        assert sorted(path.name for path in run.path.iterdir()) == [".lock", ".lock-holder"]


def test_a_lock_left_by_a_killed_run_stands_in_nobodys_way(tmp_path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock-holder").write_text("1 elsewhere")
    run = RunDir(tmp_path)
    run.check(resume=False, overwrite=False)
    with run.locked():
        assert run.lock_holder() == (str(os.getpid()), socket.gethostname())
    assert list(tmp_path.iterdir()) == []


def test_workers_that_outlive_a_killed_run_are_waited_for(tmp_path, monkeypatch) -> None:
    waited: list[float] = []
    run, other = RunDir(tmp_path), FileLock(tmp_path / ".lock")
    other.acquire()
    (tmp_path / ".lock-holder").write_text(f"{2**22 + 1} {socket.gethostname()}")  # no such process

    def let_go(seconds: float) -> None:
        waited.append(seconds)
        other.release()

    monkeypatch.setattr(run_dir.time, "sleep", let_go)
    with run.locked():
        assert len(waited) == 1


def test_lines_of_metrics_are_whole_and_in_order_after_a_resume(tmp_path) -> None:
    lines = ['{"step": 1}', '{"step": 2}', '{"step": 2}', '{"st\x00p": 3}', '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))  # the last without its end
    assert RunDir(tmp_path).truncate(3) == 2
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
    assert RunDir(tmp_path).truncate(2) == 1
    assert RunDir(tmp_path).truncate(0) == 2


def test_dropping_lines_takes_a_time_in_proportion_to_their_number(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 40_001)))
    begun = time.process_time()
    assert RunDir(tmp_path).truncate(39_000) == 1000
    assert time.process_time() - begun < 2  # 0.2; ten where each line looks at those before it


def test_only_the_newest_checkpoints_are_kept(tmp_path) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    for step in (2, 10, 100):
        run.save_checkpoint({"step": step}, step, keep=2)
    assert [p.name for p in run.checkpoint_paths()] == [
        *("step-00000100.ckpt", "step-00000010.ckpt", "last.ckpt")
    ]


def test_a_checkpoint_with_a_flipped_bit_is_damaged(tmp_path) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    for step in (1, 2):
        held = {"steps_done": step, "state_dict": {"weight": torch.full((999,), 1.5)}}
        run.save_checkpoint(held, step, keep=2)
    path = run.checkpoint_path(2)
    held = bytearray(path.read_bytes())
    place = held.index(torch.full((9,), 1.5).numpy().tobytes()) + 2
    held[place] ^= 1
    path.write_bytes(held)
    found = run.newest_checkpoint()
    assert found is not None
    assert found[0] == run.checkpoint_path(1)


def test_a_checkpoint_that_cannot_be_linked_is_told_as_every_file(tmp_path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    run = RunDir(tmp_path)
    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(run_dir.shutil, "copyfile", refused)
    with pytest.raises(CannotWriteError, match=r"last.ckpt could not be written: Permission den"):
        run.save_checkpoint({}, 1, keep=1)
