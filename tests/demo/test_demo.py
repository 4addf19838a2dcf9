"""The demo, made small: scenes, a run, a table and a report."""

from pathlib import Path

import pytest

from pixel_level_contrastive_learning import cli
from pixel_level_contrastive_learning.demo import demo, scenes


@pytest.fixture(autouse=True)
def _few(monkeypatch) -> None:
    monkeypatch.setattr(demo, "SCENES", {"train": 24, "val": 4})


def cut_off(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_demo_ends_with_a_table_and_where_the_report_is(tmp_path, capsys) -> None:
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), "--steps", "1"]) == 0
    said = capsys.readouterr().out
    assert "mIoU" in said
    assert "Label curve (a linear probe): " in said
    curve = out / "run" / "label-curve.png"
    assert said.splitlines()[-2] == f"label curve: {curve}"
    assert curve.is_file()
    assert said.splitlines()[-1] == f"report: {out / 'run' / 'report.html'}"
    page = (out / "run" / "report.html").read_text()
    assert "How good the features are" in page
    assert (out / "run" / "evaluation.json").exists()
    assert cli.main(["demo", "--out", str(out), "--steps", "1"]) == 2
    assert "not empty" in capsys.readouterr().err
    (out / "notes.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(out), "--steps", "1", "--overwrite"]) == 0
    assert (out / "notes.txt").read_text() == "mine"


def test_what_is_no_demo_is_not_replaced(tmp_path, capsys) -> None:
    out = tmp_path / "mine"
    for path in (out / "scenes" / "images", out / "scenes" / "masks"):
        path.mkdir(parents=True)
    (out / "scenes" / "classes.txt").write_text("0 road\n")
    (out / "report.html").write_text("mine")
    assert cli.main(["demo", "--out", str(out), "--steps", "1", "--overwrite"]) == 2
    assert "is not a demo to replace; name another folder" in capsys.readouterr().err
    assert (out / "scenes" / "classes.txt").read_text() == "0 road\n"
    assert (out / "report.html").read_text() == "mine"


def test_a_demo_that_was_cut_off_is_begun_anew(tmp_path, monkeypatch) -> None:
    out = tmp_path / "demo"
    monkeypatch.setattr(scenes, "draw_scene", cut_off)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(out, steps=1)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(out, steps=1, overwrite=True)


def test_a_demo_is_drawn_at_home_and_not_into_a_file(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(scenes, "draw_scene", cut_off)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(Path("~/demo"), steps=1)
    assert (tmp_path / "demo" / "scenes").is_dir()
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file"), "--steps", "1"]) == 2
    assert "is a file; name a folder" in capsys.readouterr().err


def test_no_steps_are_refused_before_a_scene_is_drawn(tmp_path, capsys) -> None:
    out = tmp_path / "demo"
    assert cli.main(["demo", "--out", str(out), "--steps", "0"]) == 2
    assert "steps is 0" in capsys.readouterr().err
    assert not out.exists()
