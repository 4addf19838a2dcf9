"""What happens beside the steps of a real run: loggers, warnings, the bar, parts of a batch."""

import io
import logging
import re
import time
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from rich.logging import RichHandler
from run_folders import checkpoint, config, log
from run_folders import metrics as figures_of

from pixel_level_contrastive_learning import PixelCL, pretrain
from pixel_level_contrastive_learning.trainer import logging as progress
from pixel_level_contrastive_learning.trainer import metrics, trainer


def test_a_run_that_collapses_says_so_in_words(run, settings, monkeypatch) -> None:
    monkeypatch.setattr(metrics, "spread", lambda _: torch.tensor(0.01))
    pretrain(**settings())
    warnings = [line for line in log(run).splitlines() if "WARN" in line]
    assert len(warnings) == 1  # once, though it stays so
    assert "step 1: the features are collapsing: their spread is 0.01, below 0.1" in warnings[0]


def test_a_terminal_sees_a_bar_and_a_file_does_not(tmp_path, settings, monkeypatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    pretrain(**settings())
    for word in ("pretrain", "6/6", "loss ", "pixel_cosine", "images/s", "waiting", "GiB"):
        assert word in screen.getvalue()
    narrow = io.StringIO()
    console = Console(file=narrow, force_terminal=True, width=80)
    pretrain(**settings(out=str(tmp_path / "narrow")))
    for word in ("pretrain", "6/6\x1b", "00:00\x1b", "loss ", "pixel_cosine", "images/s"):
        assert word in narrow.getvalue()
    assert "━" not in narrow.getvalue()
    assert "GiB" not in narrow.getvalue()
    silent = io.StringIO()
    console = Console(file=silent, force_terminal=False)
    pretrain(**settings(out=str(tmp_path / "again")))
    assert silent.getvalue() == ""


def test_lines_of_the_log_say_how_far_the_run_is_and_how_long_it_takes(
    run, settings, monkeypatch
) -> None:
    monkeypatch.setattr(metrics, "PRINT_EVERY", 0.0)
    result = pretrain(**settings(data=settings()["data"]))
    first, *between, last = [line for line in log(run).splitlines() if " INFO step " in line]
    assert "step 1/6: loss " in first
    assert "left" not in first
    assert len(between) == 4
    assert all(re.search(r"step [2-5]/6: .* data, \d+ s left$", line) for line in between)
    assert "step 6/6: " in last
    assert "matched" not in log(run)  # which reads as if something were loaded
    assert "step': 6" in repr(result)
    assert repr(result).count("\n") == 0


def test_the_speed_is_that_of_the_steps_and_not_of_what_is_done_between(
    run, settings, monkeypatch
) -> None:
    def slow(act: Callable[..., object]) -> Callable[..., object]:
        return lambda *args: (time.sleep(3), act(*args))[1]

    for owner, name in (
        (trainer, "save_checkpoint"),
        (trainer, "draw_batch"),
        (trainer.FeaturePictures, "draw"),
    ):
        monkeypatch.setattr(owner, name, slow(getattr(owner, name)))
    pretrain(**settings(steps=3, checkpoint_every=1, picture_every=2))
    assert all(line["images_per_second"] > 4 / 3 for line in figures_of(run))


@pytest.mark.parametrize(
    ("count", "message"), [(1, "1 image to train on: far too few"), (9, "9 images to"), (12, "")]
)
def test_a_run_on_hardly_any_images_is_warned_of(run, settings, count, message) -> None:
    pretrain(**settings(data=[torch.rand(3, 40, 48)] * count, steps=1, batch_size=2))
    warned = [line for line in log(run).splitlines() if "WARN" in line and "far too few" in line]
    assert len(warned) == bool(message)
    assert message in " ".join(warned)


@pytest.mark.parametrize("part", ["", "images", "images/train"])
def test_images_to_evaluate_on_are_not_trained_on_in_silence(run, settings, labelled, part) -> None:
    pretrain(**settings(data=(str(labelled / part),), steps=1))
    train, val = (labelled / "images" / split for split in ("train", "val"))
    message = f"training on both {train} and {val}; to evaluate on val, give {train} only"
    assert (message in log(run)) is (part != "images/train")


def only_up_to(images, monkeypatch) -> None:
    """Memory on the CPU, tried as on a GPU, has room for so many images at a time."""
    forward = PixelCL.forward

    def limited(learner, views, *args, **kwargs):
        if len(views[0].pixels) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(learner, views, *args, **kwargs)

    monkeypatch.setattr(trainer, "TRIED_ON", ("cpu",))
    monkeypatch.setattr(PixelCL, "forward", limited)


def test_a_batch_too_large_for_memory_is_taken_in_parts(run, settings, monkeypatch, caplog) -> None:
    only_up_to(2, monkeypatch)
    with caplog.at_level(logging.INFO):
        pretrain(**settings(batch_size=8))
    assert "8 images at a time do not fit into memory: trying half" in caplog.text
    assert "each device processes 8 images per step, 2 at a time (accumulate 4)" in caplog.text
    monkeypatch.undo()
    assert (run / "backbone.safetensors").exists()
    caplog.clear()
    monkeypatch.setattr(trainer, "TRIED_ON", ("cpu",))
    with caplog.at_level(logging.INFO):
        pretrain(out=run, resume=True, steps=8)  # keeps its parts: 8 would fit now
    assert "2 at a time (accumulate 4)" in caplog.text
    assert checkpoint(run)["parts"] == [4, 8]
    assert (config(run)["accumulate"], config(run)["chosen"]["accumulate"]) == (4, 4)
    assert "changed: accumulate" not in caplog.text
    repeated = {"config": run / "config.yaml", "out": run.with_name("again")}
    for changed, parts in (({}, [4, 8]), ({"batch_size": 4}, [1, 4])):
        done = pretrain(**repeated, **changed, overwrite=True)
        assert checkpoint(done.run_dir)["parts"] == parts  # what batch norm sees together


@pytest.mark.parametrize(("batch", "room", "least"), [(4, 0, 2), (5, 2, 3)])
def test_a_part_that_fits_nowhere_ends_the_run_in_words(
    settings, monkeypatch, batch, room, least
) -> None:
    only_up_to(room, monkeypatch)
    with pytest.raises(MemoryError, match=f"{least} images do not fit into memory; give a smaller"):
        pretrain(**settings(batch_size=batch))


@pytest.mark.parametrize("handler_class", [None, logging.StreamHandler, RichHandler])
def test_a_script_with_logging_of_its_own_reads_each_message_once(handler_class, capsys) -> None:
    root = logging.getLogger()
    handlers = [handler_class()] if handler_class else []  # as of logging.basicConfig
    try:
        root.handlers += handlers
        with progress.logging_to(terminal=True):
            progress.LOG.info("one message")
            progress.LOG.debug("for the file")
            progress.LOG.error("for the file", extra={"file_only": True})
    finally:
        root.handlers = [handler for handler in root.handlers if handler not in handlers]
    assert "".join(capsys.readouterr()) == "one message\n"
    assert progress.LOG.propagate
