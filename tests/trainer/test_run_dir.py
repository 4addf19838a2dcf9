"""The folder of a run: what replacing a run removes, and what it leaves."""

import os

import pytest

from pixel_level_contrastive_learning.trainer.run_dir import RunDirectory


def test_what_an_evaluation_left_goes_with_the_run_that_it_is_about(tmp_path) -> None:
    for name in ("evaluation.json", "correspondence.json", "predictions/0000_a.png", "mine.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "config.yaml").touch()
    RunDirectory(tmp_path).prepare(overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "mine.txt"}


def test_pictures_of_ones_own_are_not_replaced(tmp_path) -> None:
    directory, preview = RunDirectory(tmp_path), tmp_path / "preview"
    preview.mkdir()
    (preview / "pairs-0.png").touch()
    directory.check(resume=False, overwrite=True)  # a dry run was here
    (preview / "mine.jpg").touch()
    with pytest.raises(ValueError, match="holds no run but has preview, which a run would replace"):
        directory.check(resume=False, overwrite=True)


def test_a_name_that_is_no_text_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="which is no UTF-8"):
        RunDirectory(tmp_path / os.fsdecode(b"\xe9")).check(resume=False, overwrite=False)
