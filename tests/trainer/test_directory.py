"""The folder of a run: what replacing a run removes, and what it leaves."""

from pixel_level_contrastive_learning.trainer.directory import RunDirectory


def test_what_an_evaluation_left_goes_with_the_run_that_it_is_about(tmp_path) -> None:
    for name in ("evaluation.json", "correspondence.json", "predictions/0000_a.png", "mine.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / "config.yaml").touch()
    RunDirectory(tmp_path).prepare(overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "mine.txt"}
