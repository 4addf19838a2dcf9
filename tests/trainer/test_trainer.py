"""Whole runs of a tiny network, in this process."""

from __future__ import annotations

import json
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image

from pixel_level_contrastive_learning import evaluate, pretrain
from pixel_level_contrastive_learning.backbones.checkpoint import read_backbone
from pixel_level_contrastive_learning.backbones.export import export
from pixel_level_contrastive_learning.files import CannotWriteError
from pixel_level_contrastive_learning.trainer import metrics as metrics_module
from pixel_level_contrastive_learning.trainer import setup, trainer
from pixel_level_contrastive_learning.trainer.auto import Schedule
from pixel_level_contrastive_learning.trainer.metrics import MetricsWriter
from pixel_level_contrastive_learning.trainer.signals import Interrupted, StopSignal
from pixel_level_contrastive_learning.trainer.training_step import NotFiniteError, TrainingStep

FIGURES = [
    "step",
    "loss",
    "pixel_loss",
    "instance_loss",
    "pixel_cosine",
    "instance_cosine",
    "positive_pairs",
    "images_without_pairs",
    "grad_norm",
    "images_per_second",
    "waiting",
    "spread",
    "effective_rank",
    "lr",
    "target_momentum",
]


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_backbone(run).net.state_dict()


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_leaves_what_is_needed(tmp_path, settings) -> None:
    result = pretrain(**settings(loggers=("tensorboard", "csv"), picture_every=3))
    run = tmp_path / "run"
    assert result.run_dir == run
    names = {path.name for path in run.iterdir()}
    assert names == {
        *("config.yaml", "train.log", "metrics.jsonl", "statistics.json", "checkpoints"),
        *("backbone.safetensors", "backbone.json", "preview", "pictures", "tensorboard", "csv"),
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {
        *("last.ckpt", "step-00000002.ckpt", "step-00000004.ckpt", "step-00000006.ckpt")
    }
    assert [path.stem for path in sorted((run / "pictures").iterdir())] == [
        *("step-00000000", "step-00000003", "step-00000006")
    ]
    assert len(list((run / "preview").iterdir())) == 4
    assert any((run / "tensorboard").glob("events*"))
    lines = metrics(run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(list(line) == FIGURES for line in lines)
    assert result.metrics == lines[-1]
    log = (run / "train.log").read_text()
    assert "torch 2." in log
    assert "projection_hidden_size: 16" in log
    card = json.loads((run / "backbone.json").read_text())
    assert (card["pixel_layer"], card["channels"], card["start"]) == ("6", 3, "random")
    assert equal(result.backbone.state_dict(), weights(run))


def test_figures_are_in_their_bounds_and_schedules_in_their_places(tmp_path, settings) -> None:
    pretrain(**settings(lr=0.5, batch_size=4, optimizer="sgd"))
    schedule = Schedule(6, 3, 1, 0.5 * 4 / 256, 1e-6, 0.99)
    for line in metrics(tmp_path / "run"):
        assert 0 <= line["pixel_loss"] <= 8
        assert 0 <= line["instance_loss"] <= 8
        assert line["loss"] == pytest.approx(line["pixel_loss"] + 0.1 * line["instance_loss"])
        assert -1 <= line["pixel_cosine"] <= 1
        assert 0 <= line["images_without_pairs"] <= 4
        assert line["positive_pairs"] > 0
        assert 0 <= line["waiting"] <= 1
        assert line["lr"] == pytest.approx(schedule.lr(int(line["step"]) - 1))
        assert line["target_momentum"] == pytest.approx(schedule.momentum(int(line["step"]) - 1))


def test_the_backbone_has_learned_and_differs_from_its_start(tmp_path, settings) -> None:
    from pixel_level_contrastive_learning.backbones.factory import build_backbone

    given = settings()
    pretrain(**given)
    torch.manual_seed(0)
    start = build_backbone(given["model"]).state_dict()
    assert not equal(start, weights(tmp_path / "run"))


def test_config_repeats_the_run(tmp_path, settings) -> None:
    pretrain(**settings())
    pretrain(config=str(tmp_path / "run" / "config.yaml"), out=tmp_path / "again")
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "again"))


def test_a_run_resumed_in_the_middle_ends_the_same(tmp_path, settings) -> None:
    pretrain(**settings(workers=0))
    run = tmp_path / "run"
    whole, losses = weights(run), [line["loss"] for line in metrics(run)]
    (run / "checkpoints" / "step-00000006.ckpt").unlink()
    (run / "checkpoints" / "last.ckpt").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut off in writing
    pretrain(out=run, resume=True)
    assert equal(whole, weights(run))
    assert [line["loss"] for line in metrics(run)] == losses


def test_each_step_is_told_once(tmp_path, settings) -> None:
    for steps, told in ((1, [1]), (3, [1, 3])):
        pretrain(**settings(steps=steps, overwrite=True))
        log = (tmp_path / "run" / "train.log").read_text()
        assert [int(step) for step in re.findall(r"step (\d+): loss", log)] == told


def test_a_truncated_checkpoint_is_passed_over_with_a_warning(tmp_path, settings) -> None:
    pretrain(**settings())
    run = tmp_path / "run"
    whole = weights(run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])  # and with it the newest, the same file
    pretrain(out=run, resume=True)
    log = (run / "train.log").read_text()
    assert "WARNING the checkpoint" in log
    assert "step-00000006.ckpt cannot be read" in log
    assert "going on at step 4" in log
    assert equal(whole, weights(run))


def test_resuming_without_a_checkpoint_starts_at_0_and_says_so(tmp_path, settings) -> None:
    pretrain(**settings(resume=True))
    assert "starting at step 0" in (tmp_path / "run" / "train.log").read_text()
    assert len(metrics(tmp_path / "run")) == 6


def test_a_finished_run_resumed_writes_its_backbone_again(tmp_path, settings) -> None:
    pretrain(**settings())
    whole = weights(tmp_path / "run")
    (tmp_path / "run" / "backbone.safetensors").unlink()
    pretrain(out=tmp_path / "run", resume=True)
    assert equal(whole, weights(tmp_path / "run"))


def test_more_steps_may_be_asked_for_and_the_difference_is_told(tmp_path, settings) -> None:
    pretrain(**settings())
    pretrain(out=tmp_path / "run", resume=True, steps=8, lr=1e-3)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "changed: steps was 6 and is now 8" in log
    assert "changed: lr was 0.002 and is now 0.001" in log
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))


def test_settings_changed_in_the_file_are_told_too(tmp_path, settings) -> None:
    pretrain(**settings())
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 4"))
    pretrain(out=tmp_path / "run", resume=True, steps=8)
    assert "changed: seed was 0 and is now 4" in (tmp_path / "run" / "train.log").read_text()


def test_statistics_that_changed_are_refused_by_name(tmp_path, settings) -> None:
    pretrain(**settings())
    file = tmp_path / "run" / "statistics.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"std": [0.5, 0.5, 0.5]}))
    with pytest.raises(ValueError, match=r"statistics\.json is not the run's; remove it, and they"):
        pretrain(out=tmp_path / "run", resume=True, steps=8)
    file.unlink()
    pretrain(out=tmp_path / "run", resume=True, steps=8)
    assert json.loads(file.read_text()) == values
    log = (tmp_path / "run" / "train.log").read_text()
    assert "statistics of the images are not those of the run" not in log


@pytest.mark.parametrize(
    ("name", "text"),
    [("statistics.json", '{"channels": 3,'), ("config.yaml", "steps: 6\nmax_rotation:")],
)
def test_a_damaged_file_of_a_run_is_named(tmp_path, settings, name, text) -> None:
    pretrain(**settings())
    (tmp_path / "run" / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        pretrain(**settings(resume=True, steps=8))


def test_another_batch_goes_on_after_as_many_images(tmp_path, settings) -> None:
    given = settings(epochs=2)
    del given["steps"]
    pretrain(**given)  # 6 steps of 4
    pretrain(out=tmp_path / "run", resume=True, batch_size=2, epochs=3)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "going on at step 12" in log
    assert metrics(tmp_path / "run")[-1]["step"] == 18


def test_a_larger_batch_counts_its_steps_anew_and_loses_nothing(tmp_path, settings) -> None:
    given = settings(epochs=2, batch_size=2, checkpoint_every=2)
    del given["steps"]
    pretrain(**given)  # 12 steps of 2
    run = tmp_path / "run"
    pretrain(out=run, resume=True, batch_size=4, epochs=3)  # 6 steps of 4 are done, of 9
    assert "going on at step 6" in (run / "train.log").read_text()
    assert [line["step"] for line in metrics(run)] == list(range(1, 10))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-00000006.ckpt", "step-00000008.ckpt", "step-00000009.ckpt"]
    pretrain(out=run, resume=True, epochs=4)
    assert [line["step"] for line in metrics(run)] == list(range(1, 13))


def test_a_run_that_is_done_takes_no_other_settings(tmp_path, settings) -> None:
    pretrain(**settings())
    run = tmp_path / "run"
    before = {path: path.read_bytes() for path in run.glob("*.*") if path.name != "train.log"}
    for change in ({"lr": 0.1}, {"steps": 4}):
        with pytest.raises(ValueError, match=f"6 steps are done .* another {next(iter(change))};"):
            pretrain(out=run, resume=True, **change)
    assert {path: path.read_bytes() for path in before} == before
    assert pretrain(out=run, resume=True).backbone is not None


def test_images_that_came_since_are_told(tmp_path, settings, images) -> None:
    pretrain(**settings())
    pretrain(out=tmp_path / "run", resume=True, steps=7)
    log = tmp_path / "run" / "train.log"
    assert "when the run began" not in log.read_text()
    (images / "new.png").write_bytes((images / "00.png").read_bytes())
    pretrain(out=tmp_path / "run", resume=True, steps=8)
    told = "there are 13 images, and there were 12 when the run began"
    assert log.read_text().count(told) == 1
    pretrain(out=tmp_path / "run", resume=True, steps=9)
    assert log.read_text().count(told) == 2  # and not that there were 13


def test_paths_may_be_paths(tmp_path, settings, labelled) -> None:
    pretrain(**settings())
    first = tmp_path / "run"
    again = settings(out=tmp_path / "again", weights=first, probe=labelled)
    pretrain(**again)
    assert yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())["weights"] == str(first)


def test_a_batch_without_statistics_is_refused_and_leaves_no_trace(tmp_path, settings) -> None:
    with pytest.raises(
        ValueError, match=r"batch_size is 1 on 1 devices, but batch norm .* give 2 or more"
    ):
        pretrain(**settings(batch_size=1))
    assert not (tmp_path / "run").exists()
    pretrain(**settings(batch_size=1, instance_weight=0.0))


def test_a_run_without_images_is_told_of_the_one_that_is_there(tmp_path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"holds a run, which --resume goes on with\. For a new one name a folder"
    ):
        pretrain(out=tmp_path / "run")


def test_a_run_on_objects_is_resumed_with_the_same(tmp_path, settings) -> None:
    objects = [torch.rand(3, 40, 48) for _ in range(12)]
    pretrain(**settings(data=objects, steps=3))
    with pytest.raises(ValueError, match="was given Python objects: pass the same to pretrain"):
        pretrain(out=tmp_path / "run", resume=True, steps=4)
    pretrain(objects, tmp_path / "run", resume=True, steps=4)


def test_a_run_goes_on_only_with_what_it_trained(tmp_path, settings) -> None:
    pretrain(**settings())
    for change in ({"alpha": 0.0}, {"instance_weight": 0.0}, {"loss": "pixcontrast"}):
        with pytest.raises(ValueError, match=f"with other weights: {next(iter(change))} from"):
            pretrain(out=tmp_path / "run", resume=True, **change)
    pretrain(out=tmp_path / "run", resume=True, steps=7, alpha=0.5)


ODD = """
import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.table = nn.Parameter(torch.arange(5), requires_grad=False)
        self.stem = nn.Conv2d(channels, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.body = nn.Conv2d(8, 16, 1)
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.cached = False

    def get_extra_state(self):
        return {"version": 3}

    def set_extra_state(self, state):
        assert state == {"version": 3}

    def forward(self, x):
        if not self.cached:
            self.stem.register_buffer("grid", torch.ones(1), persistent=False)
            self.cached = True
        return self.body(self.norm(self.stem(x)).relu() * self.stem.grid)


def odd(channels=3):
    return Odd(channels).to(torch.KIND)
"""
"""A table of indices, a mask of infinity, extra state, and a buffer that is made on the way."""


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_network_of_odd_parts_is_trained_resumed_and_judged(
    tmp_path, settings, labelled, kind
) -> None:
    (tmp_path / "odd.py").write_text(ODD.replace("KIND", kind))
    given = settings(model=f"{tmp_path / 'odd.py'}:odd", picture_every=3, pixel_layer="body")
    pretrain(**given | {"out": str(tmp_path / "whole")})
    pretrain(**given | {"steps": 3})
    pretrain(**given | {"resume": True})
    run = tmp_path / "run"
    held, state = weights(run), weights(tmp_path / "whole")
    assert held.pop("_extra_state") == state.pop("_extra_state") == {"version": 3}
    assert held["table"].tolist() == [0, 1, 2, 3, 4]
    assert held["mask"].isinf().sum() == 1
    assert held["body.weight"].dtype == getattr(torch, kind)
    for how in ({}, {"protocol": "finetune", "seeds": 1, "steps": 2}):
        found = evaluate(run, data=labelled, **how)
        assert 0 < found.rows[-1].scores["mIoU"] <= 1


def test_where_no_checkpoint_can_be_read_nothing_is_removed(tmp_path, settings) -> None:
    pretrain(**settings())
    held = tmp_path / "run" / "checkpoints"
    for path in held.iterdir():
        path.write_bytes(path.read_bytes()[:99])
    before = sorted(held.iterdir()), (tmp_path / "run" / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match=r"none of the 4 checkpoints in .* can be read; nothing"):
        pretrain(out=tmp_path / "run", resume=True, steps=9)
    assert (sorted(held.iterdir()), (tmp_path / "run" / "metrics.jsonl").read_text()) == before


def test_replacing_a_run_never_removes_its_images(tmp_path, settings, images) -> None:
    mine = tmp_path / "mine"
    images.rename(tmp_path / "pictures")
    (mine / "notes").mkdir(parents=True)
    (tmp_path / "pictures").rename(mine / "pictures")
    given = settings(data=(str(mine / "pictures"),), out=str(mine))
    with pytest.raises(
        ValueError, match="holds no run but has pictures, which a run would replace"
    ):
        pretrain(**given, overwrite=True)
    (mine / "config.yaml").write_text("steps: 3")
    with pytest.raises(ValueError, match="pictures, which --overwrite would remove; name another"):
        pretrain(**given, overwrite=True)
    assert len(list((mine / "pictures").iterdir())) == 12


def test_a_run_may_be_named_from_home_and_resumed_from_anywhere(
    tmp_path, settings, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pretrain(**settings(out="~/run", model="nets.py:tiny"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pretrain(out="~/run", resume=True, steps=7)
    assert metrics(tmp_path / "run")[-1]["step"] == 7
    monkeypatch.chdir(tmp_path)
    pretrain(out="~/run", resume=True, steps=8, model="nets.py:tiny")


def test_other_weights_cannot_be_resumed(tmp_path, settings) -> None:
    pretrain(**settings())
    with pytest.raises(ValueError, match="projection_size from 16 to 32; leave these as they were"):
        pretrain(out=tmp_path / "run", resume=True, projection_size=32)


def test_another_network_is_refused_before_it_is_built(tmp_path, settings) -> None:
    pretrain(**settings())
    with pytest.raises(ValueError, match=r"model from '.*nets.py:tiny' to 'torchvision/resnet18'"):
        pretrain(out=tmp_path / "run", resume=True, model="torchvision/resnet18")
    pretrain(out=tmp_path / "run", resume=True, pixel_layer="auto")  # decided as before


def test_where_there_is_no_run_to_go_on_with_is_said(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"out is .*nowhere', where there is no run to resume"):
        pretrain(out=tmp_path / "nowhere", resume=True)


def test_a_logger_that_is_not_installed_is_refused_without_a_trace(
    tmp_path, settings, monkeypatch
) -> None:
    monkeypatch.setattr(metrics_module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"'wandb', which is not installed; pip install wandb"):
        pretrain(**settings(loggers=("csv", "wandb")))
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_refused_with_both_ways_out(tmp_path, settings) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"not empty; .* \(--resume\), replace it \(--overwrite\)"):
        pretrain(**settings())
    pretrain(**settings(overwrite=True))
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep me"


def test_what_is_refused_leaves_no_trace(tmp_path, settings) -> None:
    for wrong in ({"data": str(tmp_path / "none")}, {"model": "torchvision/resnet19"}):
        with pytest.raises(ValueError, match=r"none|resnet18"):
            pretrain(**settings(**wrong))
    assert not (tmp_path / "run").exists()


def test_a_dry_run_tells_and_draws_and_does_not_stand_in_the_way(tmp_path, settings) -> None:
    result = pretrain(**settings(dry_run=True))
    assert result.backbone is None
    assert set(result.metrics) == {"positive_pairs", "images_without_pairs", "memory_mib"}
    assert [p.name for p in (tmp_path / "run").rglob("*")] == ["preview", "pairs-0.png"]
    with Image.open(tmp_path / "run" / "preview" / "pairs-0.png") as drawn:
        assert drawn.width > 64
    pretrain(**settings(steps=1))


def test_a_dry_run_takes_a_few_images_of_a_large_batch(settings, monkeypatch, caplog) -> None:
    monkeypatch.setattr(setup, "DRY_RUN_IMAGES", 3)
    with caplog.at_level("INFO"):
        pretrain(**settings(dry_run=True, batch_size=8))
    assert "of 3 images have none" in caplog.text
    assert "for each of 8 images" in caplog.text
    assert "MiB are free on cpu" in caplog.text


@pytest.mark.parametrize("levels", [1, 2])
def test_taking_a_batch_in_parts_changes_no_gradient(tmp_path, settings, levels) -> None:
    frozen = settings()["model"].replace(":tiny", ":frozen")  # no batch norm, no dropout
    kept = {"model": frozen, "instance_weight": 0.0, "steps": 1, "pixel_levels": levels}
    losses = []
    for parts in (1, 2, 4):
        pretrain(**settings(**kept, out=str(tmp_path / f"run{parts}"), accumulate=parts))
        losses.append(metrics(tmp_path / f"run{parts}")[0])
    # The projector has batch norm, which sees parts: figures are near, counts the same.
    for other in losses[1:]:
        assert other["positive_pairs"] == losses[0]["positive_pairs"]
        assert other["images_without_pairs"] == losses[0]["images_without_pairs"]
        assert other["loss"] == pytest.approx(losses[0]["loss"], rel=0.1)


def test_a_nan_stops_the_run_and_keeps_what_was_good(tmp_path, settings, monkeypatch) -> None:
    backward = TrainingStep.backward

    def poisoned(step: TrainingStep, batch: object, features: object) -> torch.Tensor:
        figures = backward(step, batch, features)
        return figures * math.nan if step.step == 4 else figures

    monkeypatch.setattr(TrainingStep, "backward", poisoned)
    with pytest.raises(
        NotFiniteError, match=r"step 5 .* the last good checkpoint, if there was one, is kept"
    ):
        pretrain(**settings())
    run = tmp_path / "run"
    assert not (run / "backbone.safetensors").exists()
    held = torch.load(run / "bad_batch.pt", weights_only=True)
    assert held["one"].shape == (4, 3, 32, 32)
    assert "factors_one.hue" in held
    saved = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["steps_done"] == 4
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    assert len(metrics(run)) == 4
    monkeypatch.undo()
    pretrain(out=run, resume=True)
    assert len(metrics(run)) == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_saves_and_leaves(
    tmp_path, settings, monkeypatch, number, code
) -> None:
    backward = TrainingStep.backward

    def signalled(step: TrainingStep, batch: object, features: object) -> torch.Tensor:
        if step.step == 2:
            signal.raise_signal(number)
        return backward(step, batch, features)

    monkeypatch.setattr(TrainingStep, "backward", signalled)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as left:
        pretrain(**settings(checkpoint_every=100))
    assert left.value.code == code
    assert signal.getsignal(number) is before
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["steps_done"] == 3
    assert "stopped at step 3 of 6 as asked" in (tmp_path / "run" / "train.log").read_text()
    monkeypatch.undo()
    pretrain(out=tmp_path / "run", resume=True)
    pretrain(**settings(out=str(tmp_path / "whole")))
    assert equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_full_disk_is_told_and_loses_nothing(tmp_path, settings, monkeypatch) -> None:
    pretrain(**settings())
    run = tmp_path / "run"
    import errno

    real = torch.save

    def full(what: object, file: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CannotWriteError, match=r"the disk is full .* nothing that existed is lost"):
        pretrain(out=run, resume=True, steps=9)
    monkeypatch.setattr(torch, "save", real)
    assert not list((run / "checkpoints").glob(".*"))
    pretrain(out=run, resume=True, steps=9)
    assert metrics(run)[-1]["step"] == 9


def test_images_may_be_a_sequence_of_tensors(tmp_path, settings) -> None:
    given = settings()
    del given["data"]
    pretrain([torch.rand(1, 40, 50) for _ in range(5)], **given)
    card = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert card["channels"] == 1
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"] == []


def test_the_signature_names_every_setting() -> None:
    from dataclasses import fields
    from inspect import signature

    from pixel_level_contrastive_learning.trainer.config import PretrainConfig

    assert set(signature(pretrain).parameters) == {field.name for field in fields(PretrainConfig)}


def test_an_unknown_optimiser_names_the_nearest(tmp_path, settings) -> None:
    with pytest.raises(ValueError, match="perhaps adamw"):
        pretrain(**settings(optimizer="adamww", lr=1.0))


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "sgd", "lamb"])
def test_vectors_have_no_decay_and_the_target_no_optimiser(settings, optimizer) -> None:
    from torchvision.models import resnet18

    from pixel_level_contrastive_learning import PixelCL
    from pixel_level_contrastive_learning.trainer.build import build_optimizer

    learner = PixelCL(resnet18(), 64, projection_size=8, projection_hidden_size=8)
    schedule = SimpleNamespace(peak_lr=0.1)
    plan = SimpleNamespace(optimizer=optimizer, schedule=schedule, weight_decay=1e-3, sharded=False)
    idle = set(learner.unreached_parameters())
    matrices, vectors = build_optimizer(learner, plan, idle).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (1e-3, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    ours = {id(p) for p in (*matrices["params"], *vectors["params"])}
    reached = [
        p
        for n, p in learner.named_parameters()
        if not n.startswith("target_encoder") and n not in learner.unreached_parameters()
    ]
    assert ours == {id(p) for p in reached}
    assert id(learner.net.fc.weight) not in ours


def test_a_run_that_did_not_end_can_be_read(tmp_path, settings, monkeypatch, caplog) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "export_backbone", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pretrain(**settings())
    run = tmp_path / "run"
    assert not (run / "backbone.safetensors").exists()
    last, middle = (read_backbone(run / part) for part in ("", "checkpoints/step-00000004.ckpt"))
    assert f"{run} has no backbone.safetensors yet: loading its last checkpoint" in caplog.text
    for loaded, name in ((last, "last"), (middle, "step-00000004")):
        held = torch.load(
            run / "checkpoints" / f"{name}.ckpt", weights_only=True, map_location="cpu"
        )["state_dict"]
        assert loaded.report is not None
        assert loaded.report.complete
        assert loaded.card.pixel_layer != "auto"
        for key, tensor in loaded.net.state_dict().items():
            assert torch.equal(tensor, held[f"learner.online_encoder.net.{key}"])
    parameter = next(iter(last.net.state_dict()))
    assert not torch.equal(last.net.state_dict()[parameter], middle.net.state_dict()[parameter])
    written = export(run / "checkpoints" / "step-00000004.ckpt", "safetensors")
    assert written.path == run / "backbone-safetensors.safetensors"


SIZED = """
import torch
from torch import nn


class Sized(nn.Module):
    def __init__(self, side):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.places = nn.Parameter(torch.zeros(8, side // 4, side // 4))

    def forward(self, x):
        return self.norm(self.conv(x) + self.places)


def sized(image_size):
    return Sized(image_size[0])
"""


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path, settings) -> None:
    (tmp_path / "sized.py").write_text(SIZED)
    run = tmp_path / "run"
    pretrain(**settings(model=f"{tmp_path / 'sized.py'}:sized", steps=2))
    held = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=r"net.places has the shape \(8, 8, 8\) in the checkpoint"):
        pretrain(out=run, resume=True, steps=4, image_size=40)
    del held["train.log"]
    assert {name: (run / name).read_bytes() for name in held} == held
    assert pretrain(out=run, resume=True, steps=4).metrics["step"] == 4


def test_a_checkpoint_needs_no_start_weights_and_takes_no_others(tmp_path, settings) -> None:
    pretrain(**settings(steps=2, out=str(tmp_path / "first")))
    first = tmp_path / "first" / "backbone.safetensors"
    pretrain(**settings(steps=2, weights=str(first)))
    card = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert card["start"] == str(first)
    with pytest.raises(ValueError, match=r"cannot go on with other weights: weights from '.*first"):
        pretrain(out=tmp_path / "run", resume=True, steps=4, weights=str(tmp_path / "second.pt"))
    first.unlink()
    assert pretrain(out=tmp_path / "run", resume=True, steps=4).metrics["step"] == 4


def test_start_weights_are_known_from_everywhere(tmp_path, settings, monkeypatch) -> None:
    pretrain(**settings(steps=1, out=str(tmp_path / "first")))
    monkeypatch.chdir(tmp_path)
    pretrain(**settings(steps=1, weights="first"))
    card = json.loads((tmp_path / "run" / "backbone.json").read_text())
    assert card["start"] == str(tmp_path / "first")


@pytest.mark.parametrize("moment", ["set_up", "choose_accumulate", "build_validation"])
def test_before_the_first_step_a_signal_ends_a_run_and_leaves_everything_as_it_was(
    tmp_path, settings, monkeypatch, caplog, moment
) -> None:
    real, run = getattr(trainer, moment), tmp_path / "run"

    def signalled(*given: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return real(*given)

    def stopped(**how: object) -> None:
        monkeypatch.setattr(trainer, moment, signalled)
        with pytest.raises(Interrupted, match="130"):
            pretrain(**settings(steps=2, **how))
        monkeypatch.setattr(trainer, moment, real)

    stopped()
    assert not run.exists()
    assert len([own for own in caplog.records if own.levelname == "WARNING"]) == 1
    pretrain(**settings(steps=1))
    weights = ["backbone.safetensors", "checkpoints/last.ckpt"]
    held = [(run / name).read_bytes() for name in weights]
    stopped(resume=True)
    if moment == "set_up":
        stopped(overwrite=True)
        stopped(overwrite=True, dry_run=True)
    assert [(run / name).read_bytes() for name in weights] == held


def test_a_run_among_its_images_sees_none_of_its_own_pictures(tmp_path, settings, images) -> None:
    given = settings(steps=1, out=str(images / "run"))
    pretrain(**given, dry_run=True)
    assert (images / "run" / "preview" / "pairs-0.png").exists()
    pretrain(**given)
    log = (images / "run" / "train.log").read_text()
    assert "12 images to train on" in log
    with pytest.raises(ValueError, match="where the images are, too; give the run a folder of its"):
        pretrain(**settings(steps=1, out=str(images), overwrite=True))


def test_a_csv_file_is_written_at_once_and_kept_when_the_run_goes_on(tmp_path, settings) -> None:
    given = settings(loggers=("csv",), steps=10)
    first = tmp_path / "run" / "csv" / "metrics.csv"
    seen = []

    begin_step = MetricsWriter.begin_step

    def noted(writer: MetricsWriter, step: int, batch: object) -> bool:
        seen.append(first.exists())
        return begin_step(writer, step, batch)

    del given["steps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsWriter, "begin_step", noted)
        pretrain(**given, steps=12)
    assert seen == [False] * 10 + [True] * 2
    held = first.read_text()
    pretrain(out=tmp_path / "run", resume=True, steps=20)
    assert first.read_text() == held
    assert (tmp_path / "run" / "csv" / "from-step-00000012" / "metrics.csv").exists()


class Dying:
    """A loader of two batches, whose workers then die."""

    waited = 0.0

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


def stream(error: Exception, *, stopped: bool) -> Iterator[str]:
    stop = StopSignal()
    stop.number = signal.SIGTERM if stopped else None
    stop.alone = False  # other processes have not heard of it yet
    return trainer.take(Dying(error), 10, stop)


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_workers_that_die_after_the_run_was_told_to_stop_end_the_stream(error) -> None:
    assert list(stream(error, stopped=True)) == ["first", "second"]


def test_a_signal_while_a_batch_is_waited_for_ends_the_stream() -> None:
    class Waiting:
        def __iter__(self) -> Iterator[str]:
            yield "first"
            signal.raise_signal(signal.SIGTERM)
            yield "never given"

    with StopSignal() as stop:
        assert list(trainer.take(Waiting(), 10, stop)) == ["first"]
        stop.number, stop.alone = None, False  # others wait for a step of this process
        assert list(trainer.take(Waiting(), 2, stop)) == ["first", "never given"]


@pytest.mark.parametrize("error", DEATHS, ids=repr)
def test_workers_that_die_unasked_are_an_error(error) -> None:
    batches = stream(error, stopped=False)
    assert [next(batches), next(batches)] == ["first", "second"]
    with pytest.raises(RuntimeError, match="worker"):
        next(batches)


def test_a_file_that_cannot_be_read_is_no_death_of_a_worker() -> None:
    error = FileNotFoundError(2, "No such file or directory", "images/a.jpg")
    batches = stream(error, stopped=False)
    assert [next(batches), next(batches)] == ["first", "second"]
    with pytest.raises(FileNotFoundError):
        next(batches)
