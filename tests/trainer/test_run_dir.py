"""The folder of a run: what replacing a run removes, what it leaves, and who holds it."""

import itertools
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from run_folders import lines

from pixel_level_contrastive_learning.files import CannotWriteError
from pixel_level_contrastive_learning.trainer import run_dir
from pixel_level_contrastive_learning.trainer.run_dir import RunDir, step_of


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
    with pytest.raises(ValueError, match="is not a run but has preview, which a run would replace"):
        directory.check(resume=False, overwrite=True)


@pytest.mark.parametrize("linked", ["run", "weights"])
def test_what_is_needed_is_not_removed_through_a_link(tmp_path, linked) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    run.mkdir()
    link.symlink_to(run)
    out, needed = (link, run) if linked == "run" else (run, link)
    with pytest.raises(ValueError, match="is the run that --overwrite would remove"):
        RunDir(out).check_outside([str(needed)])
    with pytest.raises(ValueError, match="checkpoints, which --overwrite would remove"):
        RunDir(out).check_outside([str(needed / "checkpoints" / "last.ckpt")])
    RunDir(out).check_outside([str(needed / "mine.pt")])


def test_a_name_that_is_no_text_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="which is not UTF-8"):
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
    start = time.process_time()
    assert RunDir(tmp_path).truncate(39_000) == 1000
    assert time.process_time() - start < 2  # 0.2; ten where each line looks at those before it


@pytest.mark.parametrize("last_alone", [False, True], ids=["numbered", "last alone"])
@pytest.mark.parametrize("killed_at", [None, *range(12)])
def test_steps_are_counted_anew_once_wherever_a_run_is_killed(
    tmp_path, monkeypatch, last_alone, killed_at
) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    for step in (4, 8, 12):
        run.save_checkpoint({"steps_done": step}, step, keep=9)
    for path in run.numbered() if last_alone else ():
        path.unlink()
    for name in ("metrics.jsonl", "probe.jsonl"):
        (tmp_path / name).write_text("".join(f'{{"step": {n}, "at": {n}}}\n' for n in (1, 4, 12)))
    acts = itertools.count()

    def may_die(act: Callable[..., object]) -> Callable[..., object]:
        def acting(*args: object, **kwargs: object) -> object:
            if next(acts) == killed_at:
                raise KeyboardInterrupt
            return act(*args, **kwargs)

        return acting

    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(os, "link", may_die(os.link))
        patch.setattr(Path, "replace", may_die(Path.replace))
        patch.setattr(Path, "unlink", may_die(Path.unlink))
        run.renumber(run.newest_checkpoint()[0], 12, 3)
    path, checkpoint = run.newest_checkpoint()
    number = step_of(path) if step_of(path) >= 0 else checkpoint["steps_done"]
    run.truncate(number)
    run.discard_after(number)
    if number != 3:
        run.renumber(path, number, 3)
    assert [path.name for path in run.checkpoint_paths()] == ["step-00000003.ckpt", "last.ckpt"]
    for name in ("metrics.jsonl", "probe.jsonl"):
        assert lines(tmp_path / name) == [{"step": 1, "at": 4}, {"step": 3, "at": 12}]
    assert not [*tmp_path.rglob(".*")]


def test_the_step_of_an_earlier_measurement_is_counted_anew_too(tmp_path) -> None:
    run = RunDir(tmp_path)
    run.checkpoints.mkdir()
    run.save_checkpoint({"steps_done": 8}, 8, keep=1)
    counted = ((2, 0), (4, 4), (6, 4), (8, 4))
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "hit_step": {hit}}}\n' for step, hit in counted)
    )
    run.renumber(run.checkpoint_path(8), 8, 4)
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": step // 2, "hit_step": hit // 2} for step, hit in counted
    ]


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
        contents = {"steps_done": step, "state_dict": {"weight": torch.full((999,), 1.5)}}
        run.save_checkpoint(contents, step, keep=2)
    path = run.checkpoint_path(2)
    contents = bytearray(path.read_bytes())
    place = contents.index(torch.full((9,), 1.5).numpy().tobytes()) + 2
    contents[place] ^= 1
    path.write_bytes(contents)
    newest = run.newest_checkpoint()
    assert newest is not None
    assert newest[0] == run.checkpoint_path(1)


def test_a_checkpoint_that_cannot_be_linked_is_told_as_every_file(tmp_path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    run = RunDir(tmp_path)
    monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(run_dir.shutil, "copyfile", refused)
    with pytest.raises(CannotWriteError, match=r"last.ckpt could not be written: Permission den"):
        run.save_checkpoint({}, 1, keep=1)
