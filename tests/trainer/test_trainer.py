"""Whole runs of a tiny network, in this process."""

import csv
import errno
import json
import math
import re
import shutil
import time
from dataclasses import fields
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from run_folders import (
    card,
    checkpoint,
    config,
    equal,
    files,
    forget,
    log,
    losses,
    metrics,
    weights,
)
from run_folders import steps as steps_of
from torchvision.models import resnet18

from pixel_level_contrastive_learning import PixelCL, evaluate, load_backbone, pretrain
from pixel_level_contrastive_learning.backbones.checkpoint import read_backbone
from pixel_level_contrastive_learning.backbones.export import export
from pixel_level_contrastive_learning.files import CannotWriteError
from pixel_level_contrastive_learning.trainer import metrics as metrics_module
from pixel_level_contrastive_learning.trainer import setup, trainer
from pixel_level_contrastive_learning.trainer.auto import Schedule
from pixel_level_contrastive_learning.trainer.build import build_optimizer
from pixel_level_contrastive_learning.trainer.config import PretrainConfig
from pixel_level_contrastive_learning.trainer.metrics import NotFiniteError
from pixel_level_contrastive_learning.trainer.training_step import BACKBONE, TrainingStep

FIGURES = [
    *("step", "loss", "pixel_loss", "instance_loss", "pixel_cosine", "instance_cosine"),
    *("positive_pairs", "images_without_pairs", "grad_norm", "images_per_second", "waiting"),
    *("spread", "effective_rank", "lr", "target_momentum"),
]

# What a run leaves.


def test_a_run_leaves_what_is_needed(run, settings) -> None:
    result = pretrain(**settings(loggers=("tensorboard", "csv"), picture_every=3))
    assert result.run_dir == run
    assert {path.name for path in run.iterdir()} == {
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
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert all(list(line) == FIGURES for line in metrics(run))
    assert result.metrics == metrics(run)[-1]
    for text in ("torch 2.", "projection_hidden_size: 16"):
        assert text in log(run)
    content = card(run)
    assert (content["pixel_layer"], content["channels"], content["start"]) == ("6", 3, "random")
    assert equal(result.backbone.state_dict(), weights(run))


def test_figures_are_in_their_bounds_and_schedules_in_their_places(run, settings) -> None:
    pretrain(**settings(lr=0.5, batch_size=4, optimizer="sgd"))
    schedule = Schedule(6, 3, 1, 0.5 * 4 / 256, 1e-6, 0.99)
    for line in metrics(run):
        assert 0 <= line["pixel_loss"] <= 8
        assert 0 <= line["instance_loss"] <= 8
        assert line["loss"] == pytest.approx(line["pixel_loss"] + 0.1 * line["instance_loss"])
        assert -1 <= line["pixel_cosine"] <= 1
        assert 0 <= line["images_without_pairs"] <= 4
        assert line["positive_pairs"] > 0
        assert 0 <= line["waiting"] <= 1
        assert line["lr"] == pytest.approx(schedule.lr(int(line["step"]) - 1))
        assert line["target_momentum"] == pytest.approx(schedule.momentum(int(line["step"]) - 1))


def test_config_repeats_the_run(tmp_path, run, settings) -> None:
    pretrain(**settings())
    pretrain(config=str(run / "config.yaml"), out=tmp_path / "again")
    assert equal(weights(run), weights(tmp_path / "again"))


@pytest.mark.parametrize(("steps", "logged"), [(1, [1]), (6, [1, 6])])
def test_the_first_and_the_last_step_are_told_once(run, settings, steps, logged) -> None:
    pretrain(**settings(steps=steps))
    matches = re.findall(rf"INFO step (\d+)/{steps}: loss", log(run))
    assert [int(step) for step in matches] == logged


def test_images_may_be_a_sequence_of_tensors(run, settings) -> None:
    objects = [torch.rand(1, 40, 50) for _ in range(5)]
    pretrain(**settings(data=objects, steps=3))
    assert (card(run)["channels"], config(run)["data"]) == (1, [])
    with pytest.raises(ValueError, match="used Python objects: pass the same ones to pretrain"):
        pretrain(out=run, resume=True, steps=4)
    pretrain(objects, run, resume=True, steps=4)


def test_the_signature_names_every_setting() -> None:
    assert set(signature(pretrain).parameters) == {field.name for field in fields(PretrainConfig)}


@pytest.mark.parametrize("optimizer", ["adamw", "lars", "sgd", "lamb"])
def test_vectors_have_no_decay_and_the_target_no_optimiser(optimizer) -> None:
    learner = PixelCL(resnet18(), 64, projection_size=8, projection_hidden_size=8)
    schedule = SimpleNamespace(peak_lr=0.1)
    plan = SimpleNamespace(optimizer=optimizer, schedule=schedule, weight_decay=1e-3, sharded=False)
    idle = set(learner.unreached_parameters())
    matrices, vectors = build_optimizer(learner, plan, idle).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (1e-3, 0.0)
    assert all(p.ndim > 1 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    optimised = {id(p) for p in (*matrices["params"], *vectors["params"])}
    named = learner.named_parameters()
    reached = {id(p) for n, p in named if not n.startswith("target_encoder") and n not in idle}
    assert optimised == reached
    assert id(learner.net.fc.weight) not in optimised


# What is refused before anything is written, and what a dry run leaves.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "none"}, "none"),
        ({"model": "torchvision/resnet19"}, "resnet18"),
        ({"batch_size": 1}, r"batch_size is 1 on 1 device, but batch norm .* give 2 or more"),
        ({"optimizer": "adamww", "lr": 1.0}, "perhaps adamw"),
        ({"optimizer": "adahessian", "lr": 1.0}, "adahessian.*second derivatives.*use adamw"),
        ({"loggers": ("csv", "wandb")}, "'wandb', which is not installed; pip install wandb"),
        ({"weights": "other.pt"}, r"nothing in .*other.pt fits Sequential"),
        ({"probe": "labelled"}, "0.png does not exist; 1 of 4 images have no mask"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused_leaves_no_trace(
    tmp_path, run, settings, labelled, monkeypatch, changes, message
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics_module, "find_spec", lambda _: None)
    torch.save({"other.weight": torch.ones(3, 3)}, "other.pt")
    (labelled / "masks" / "val" / "0.png").unlink()
    with pytest.raises(ValueError, match=message):
        pretrain(**settings(**changes))
    assert not run.exists()


def test_without_instance_loss_a_batch_may_be_one_image(run, settings) -> None:
    pretrain(**settings(batch_size=1, instance_weight=0.0, steps=1))
    assert steps_of(run) == [1]


def test_where_no_run_or_no_data_is_there_it_is_said(tmp_path, run) -> None:
    with pytest.raises(ValueError, match=r"out is .*nowhere', which has no run to resume"):
        pretrain(out=tmp_path / "nowhere", resume=True)
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"holds a run: use --resume to continue it, or give a folder"
    ):
        pretrain(out=run)


def test_a_folder_in_use_is_refused_with_both_ways_out(run, settings) -> None:
    run.mkdir()
    (run / "mine.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"not empty; .* \(--resume\), replace it \(--overwrite\)"):
        pretrain(**settings())
    pretrain(**settings(overwrite=True, steps=1))
    assert (run / "mine.txt").read_text() == "keep me"


def test_no_run_takes_the_place_of_images(tmp_path, settings, images) -> None:
    mine = tmp_path / "mine"
    (mine / "notes").mkdir(parents=True)
    images.rename(mine / "pictures")
    options = settings(data=(str(mine / "pictures"),), out=str(mine))
    for flag in ("overwrite", "resume"):
        with pytest.raises(
            ValueError, match="is not a run but has pictures, which a run would replace"
        ):
            pretrain(**options, **{flag: True})
    (mine / "config.yaml").write_text("steps: 3")
    with pytest.raises(ValueError, match="pictures, which --overwrite would remove; name another"):
        pretrain(**options, overwrite=True)
    assert len(list((mine / "pictures").iterdir())) == 12


def test_a_run_among_its_images_sees_none_of_its_own_pictures(settings, images) -> None:
    run = images / "run"
    pretrain(**settings(steps=1, out=str(run), dry_run=True))
    assert (run / "preview" / "pairs-0.png").exists()
    pretrain(**settings(steps=1, out=str(run)))
    assert "12 images to train on" in log(run)
    with pytest.raises(ValueError, match="the images' folder; give the run another folder"):
        pretrain(**settings(steps=1, out=str(images), overwrite=True))


def test_a_dry_run_times_steps_without_the_first(settings, monkeypatch, caplog) -> None:
    seconds = iter([0.0, 9.0, 11.0, 16.0, 19.0, 31.0, 99.0])  # of steps: 9, 2, 5, 3, 12 and 68
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    with caplog.at_level("INFO"):
        assert pretrain(**settings(dry_run=True, steps=30)).metrics["seconds_per_step"] == 4.0
    assert "a step takes about 4 s, the run about 2 min" in caplog.text
    assert next(seconds) == 99.0


def test_a_dry_run_tells_and_draws_and_does_not_stand_in_the_way(run, settings) -> None:
    start = time.perf_counter()
    result = pretrain(**settings(dry_run=True))
    assert result.backbone is None
    assert set(result.metrics) == {
        *("positive_pairs", "images_without_pairs", "memory_mib", "seconds_per_step")
    }
    assert 0 < result.metrics["seconds_per_step"] < time.perf_counter() - start
    assert [p.name for p in run.rglob("*")] == ["preview", "pairs-0.png"]
    with Image.open(run / "preview" / "pairs-0.png") as picture:
        assert picture.width > 64
    pretrain(**settings(steps=1))


def test_a_dry_run_takes_a_few_images_of_a_large_batch(settings, monkeypatch, caplog) -> None:
    monkeypatch.setattr(setup, "DRY_RUN_IMAGES", 3)
    with caplog.at_level("INFO"):
        pretrain(**settings(dry_run=True, batch_size=8))
    for text in ("of 3 images have none", "for each of 8 images", "MiB are free on cpu"):
        assert text in caplog.text


@pytest.mark.parametrize(("epochs", "warned"), [(100, True), (1, False)])
def test_a_warm_up_that_takes_the_whole_run_is_told(settings, caplog, epochs, warned) -> None:
    pretrain(**settings(dry_run=True, warmup_epochs=epochs))  # an epoch has three steps of six
    assert ("the learning rate never reaches its peak" in caplog.text) is warned


@pytest.mark.parametrize(("size", "warned"), [(80, False), (120, True)])
def test_views_far_larger_than_the_images_are_told(settings, caplog, size, warned) -> None:
    pretrain(**settings(dry_run=True, image_size=size))
    assert ("as large as the images" in caplog.text) is warned


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "0 of 4 images have none"),
        ({"crop_area": (0.001, 0.002)}, "Raise crop_area or distance_thres"),
        ({"alpha": 0.0}, "the pixel loss is off (alpha is 0): no pairs to count or preview"),
    ],
)
def test_pairs_are_told_and_drawn_where_there_is_a_pixel_loss(
    run, settings, caplog, changes, message
):
    with caplog.at_level("INFO"):
        pretrain(**settings(dry_run=True, **changes))
    assert message in caplog.text
    assert ("images have none" in caplog.text) is run.exists() is ("alpha" not in changes)
    caplog.clear()
    pretrain(**settings(steps=1, **changes))
    assert ("step 1: 4 of 4 images have no matching" in log(run)) is ("crop_area" in changes)


# Resuming.


def test_a_run_resumed_in_the_middle_ends_the_same(run, settings) -> None:
    pretrain(**settings())
    expected, expected_losses = weights(run), losses(run)
    forget(run, "step-00000006", "last")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # cut off in writing
    pretrain(out=run, resume=True)
    assert equal(expected, weights(run))
    assert losses(run) == expected_losses


def test_a_truncated_checkpoint_is_passed_over_with_a_warning(run, settings) -> None:
    pretrain(**settings())
    expected = weights(run)
    last = run / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])  # and with it the newest, the same file
    pretrain(out=run, resume=True)
    for text in ("WARNING the checkpoint", "06.ckpt cannot be read", "resuming at step 4"):
        assert text in log(run)
    assert equal(expected, weights(run))


def test_where_no_checkpoint_can_be_read_nothing_is_removed(run, settings) -> None:
    pretrain(**settings())
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:99])
    before = files(run)
    with pytest.raises(ValueError, match=r"none of the 4 checkpoints in .* can be read; nothing"):
        pretrain(out=run, resume=True, steps=9)
    assert files(run) == before


def test_resuming_without_a_checkpoint_starts_at_0_and_says_so(run, settings) -> None:
    pretrain(**settings(resume=True, steps=2))
    assert "starting at step 0" in log(run)
    assert steps_of(run) == [1, 2]


def test_a_run_without_its_checkpoints_is_kept(run, settings) -> None:
    pretrain(**settings())
    shutil.rmtree(run / "checkpoints")
    before = files(run)
    with pytest.raises(
        ValueError, match=f"without checkpoints to resume .* with --weights {run} in an"
    ):
        pretrain(out=run, resume=True, steps=9)
    assert files(run) == before


def test_more_steps_may_be_asked_for_and_the_difference_is_told(run, settings) -> None:
    pretrain(**settings())
    file = run / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 4"))
    chosen = config(run)["chosen"]
    assert chosen["lr"] == 0.002
    pretrain(out=run, resume=True, steps=8, lr=1e-3)
    del chosen["lr"]
    assert config(run)["chosen"] == chosen
    for text in ("steps was 6 and is now 8", "lr was 0.002 and is now 0.001", "seed was 0 and is "):
        assert f"changed: {text}" in log(run)
    assert steps_of(run) == list(range(1, 9))


@pytest.mark.parametrize(("changes", "steps"), [({}, 2), ({"warmup_epochs": 2.0}, 6)], ids=str)
def test_a_warm_up_that_was_chosen_follows_the_length(run, settings, changes, steps) -> None:
    pretrain(**settings(steps=2, **changes))
    pretrain(out=run, resume=True, steps=20)
    assert f"20 steps of 4 images (3 per epoch, {steps} of warm-up)" in log(run)


def test_statistics_that_changed_are_refused_by_name(run, settings) -> None:
    pretrain(**settings())
    file = run / "statistics.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | {"std": [0.5, 0.5, 0.5]}))
    with pytest.raises(
        ValueError, match=r"statistics\.json does not belong to this run; delete it"
    ):
        pretrain(out=run, resume=True, steps=8)
    file.unlink()
    pretrain(out=run, resume=True, steps=8)
    assert json.loads(file.read_text()) == values
    assert "image statistics differ from those of the run" not in log(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [("statistics.json", '{"channels": 3,'), ("config.yaml", "steps: 6\nmax_rotation:")],
)
def test_a_damaged_file_of_a_run_is_named(run, settings, name, text) -> None:
    pretrain(**settings(steps=2))
    (run / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        pretrain(**settings(resume=True, steps=8))


def test_another_batch_goes_on_after_as_many_images(run, settings) -> None:
    options = settings(epochs=2)
    del options["steps"]
    pretrain(**options)  # 6 steps of 4
    pretrain(out=run, resume=True, batch_size=2, epochs=3)
    assert "resuming at step 12" in log(run)
    assert steps_of(run)[-1] == 18


def test_a_larger_batch_counts_its_steps_anew_and_loses_nothing(run, settings) -> None:
    options = settings(epochs=2, batch_size=2, checkpoint_every=2)
    del options["steps"]
    pretrain(**options)  # 12 steps of 2
    pretrain(out=run, resume=True, batch_size=4, epochs=3)  # 6 steps of 4 are done, of 9
    assert "resuming at step 6" in log(run)
    assert steps_of(run) == list(range(1, 10))
    names = sorted(path.stem for path in (run / "checkpoints").iterdir())
    assert names == ["last", "step-00000006", "step-00000008", "step-00000009"]
    pretrain(out=run, resume=True, epochs=4)
    assert steps_of(run) == list(range(1, 13))


def test_a_run_that_is_done_takes_no_other_settings_and_exports_anew(run, settings) -> None:
    expected = pretrain(**settings()).backbone.state_dict()
    before = files(run)
    shorter = "^6 steps done and {} wanted; give --steps or --epochs for more than 6"
    idle = "^6 steps done and {} wanted: no steps are left to train with another lr; leave that un"
    for change, steps, message in (
        ({"lr": 0.1}, 6, idle),
        ({"steps": 4}, 4, shorter),
        ({"epochs": 2}, 6, shorter),
        ({"steps": 4, "lr": 0.1}, 4, idle),
    ):
        with pytest.raises(ValueError, match=message.format(steps)):
            pretrain(out=run, resume=True, **change)
    with pytest.raises(ValueError, match="is the run that --overwrite would remove; name another"):
        pretrain(**settings(weights=str(run), overwrite=True))
    assert files(run) == before
    (run / "backbone.safetensors").unlink()
    pretrain(out=run, resume=True, workers=2, devices=1)  # on another machine
    assert equal(expected, weights(run))


def test_a_resumed_run_takes_its_new_weight_decay(run, settings) -> None:
    pretrain(**settings(weight_decay=0.0))
    pretrain(out=run, resume=True, steps=8, weight_decay=0.5)
    [optimizer] = checkpoint(run)["optimizer_states"]
    assert {group["weight_decay"] for group in optimizer["param_groups"]} == {0.0, 0.5}


def test_a_run_that_goes_on_is_read_at_its_last_checkpoint(run, settings, monkeypatch) -> None:
    pretrain(**settings())
    monkeypatch.setattr(trainer, "export_backbone", lambda *_: None)  # killed before
    pretrain(out=run, resume=True, steps=8)
    stored = checkpoint(run)["state_dict"]
    expected = {
        name.removeprefix(BACKBONE): tensor for name, tensor in stored.items() if BACKBONE in name
    }
    assert equal(load_backbone(run).state_dict(), expected)


def test_a_run_without_shards_does_not_go_on_in_shards(run, settings) -> None:
    pretrain(**settings())
    with pytest.raises(ValueError, match="strategy is 'fsdp', but the run began without it"):
        pretrain(out=run, resume=True, steps=8, strategy="fsdp")


def test_objects_are_asked_for_again_whatever_a_file_names(run, settings, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text(f"data: [{tmp_path / 'images'}]\n")
    options = settings(config=str(tmp_path / "mine.yaml"))
    options.pop("data")
    pretrain([torch.rand(3, 48, 48) for _ in range(8)], **options)
    with pytest.raises(ValueError, match="the run used Python objects"):
        pretrain(out=run, resume=True, steps=8)


def test_images_that_came_since_are_told(run, settings, images) -> None:
    pretrain(**settings(steps=1))
    pretrain(out=run, resume=True, steps=2)
    assert "but the run began with" not in log(run)
    (images / "new.png").write_bytes((images / "00.png").read_bytes())
    for count in (1, 2):  # and not, the second time, that there were 13
        pretrain(out=run, resume=True, steps=2 + count)
        message = "there are 13 images, but the run began with 12"
        assert log(run).count(message) == count
    assert "held out now" not in log(run)  # of so few images none are


def test_images_held_out_anew_may_have_been_trained_on(run, settings) -> None:
    given = settings(data=[torch.rand(3, 40, 40)] * 199)
    pretrain(**given | {"steps": 1})
    pretrain(**given | {"data": [*given["data"]] * 2, "resume": True, "steps": 2})
    message = "there are 398 images, but the run began with 199: some of those held out now may"
    assert message in log(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": 0.0}, "alpha from"),
        ({"instance_weight": 0.0}, "instance_weight from"),
        ({"loss": "pixcontrast"}, "loss from"),
        ({"projection_size": 32}, "projection_size from 16 to 32; leave these unchanged"),
        ({"model": "torchvision/resnet18"}, r"model from '.*nets.py:tiny' to 'torchvision/resnet"),
        ({"weights": "/second.pt"}, "weights from None to '/second.pt'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_run_goes_on_only_with_what_it_trained(run, settings, change, message) -> None:
    pretrain(**settings(steps=1))
    with pytest.raises(ValueError, match=f"a run cannot resume with other weights: {message}"):
        pretrain(out=run, resume=True, steps=2, **change)
    pretrain(out=run, resume=True, steps=2, alpha=0.5, pixel_layer="auto")  # decided as before
    assert steps_of(run) == [1, 2]


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


def test_a_refused_resume_leaves_the_run_as_it_was(tmp_path, run, settings) -> None:
    (tmp_path / "sized.py").write_text(SIZED)
    pretrain(**settings(model=f"{tmp_path / 'sized.py'}:sized", steps=2))
    before = files(run)
    with pytest.raises(ValueError, match=r"net.places has the shape \(8, 8, 8\) in the checkpoint"):
        pretrain(out=run, resume=True, steps=4, image_size=40)
    assert files(run) == before
    assert pretrain(out=run, resume=True, steps=4).metrics["step"] == 4


def test_a_run_may_be_named_from_home_and_resumed_from_anywhere(
    tmp_path, run, settings, monkeypatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    pretrain(**settings(out="~/run", model="nets.py:tiny", steps=1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pretrain(out="~/run", resume=True, steps=2)
    monkeypatch.chdir(tmp_path)
    pretrain(out="~/run", resume=True, steps=3, model="nets.py:tiny")
    assert steps_of(run) == [1, 2, 3]


def test_a_run_starts_from_weights_that_its_checkpoints_then_replace(
    tmp_path, run, settings, monkeypatch
) -> None:
    first, named = tmp_path / "first", tmp_path / "named"
    pretrain(**settings(steps=2, out=str(first)))
    path = first / "backbone.safetensors"
    pretrain(**settings(weights=path, lr=1e-12, final_lr=0.0, steps=1))
    start, end = weights(first), weights(run)
    learned = [name for name in start if "running" not in name and "tracked" not in name]
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in learned)
    assert card(run)["start"] == config(run)["weights"] == str(path)
    assert "matched 14 of 14 keys" in log(run)
    monkeypatch.chdir(tmp_path)
    pretrain(**settings(steps=1, weights="first", out="named"))
    assert card(named)["start"] == str(first)
    path.unlink()
    assert pretrain(out=run, resume=True, steps=2).metrics["step"] == 2


def test_a_csv_file_has_every_tenth_step_and_the_last_and_is_kept_when_the_run_goes_on(
    run, settings, monkeypatch
) -> None:
    first = run / "csv" / "metrics.csv"
    existing = []
    begin_step = metrics_module.MetricsWriter.begin_step

    def noted(writer: object, step: int, batch: object) -> bool:
        existing.append(first.exists())
        return begin_step(writer, step, batch)

    with monkeypatch.context() as patch:
        patch.setattr(metrics_module.MetricsWriter, "begin_step", noted)
        pretrain(**settings(loggers=("csv",), steps=12))
    assert existing == [False] * 10 + [True] * 2
    text = first.read_text()
    tenth, last = csv.DictReader(text.splitlines())
    assert (tenth["step"], last["step"]) == ("10", "12")
    assert float(tenth["loss"]) == pytest.approx(losses(run)[9])
    pretrain(out=run, resume=True, steps=20)
    assert first.read_text() == text
    resumed = (run / "csv" / "from-step-00000012" / "metrics.csv").read_text()
    assert [row["step"] for row in csv.DictReader(resumed.splitlines())] == ["20"]


# Networks of odd parts, and what goes wrong on the way.

ODD = """
import torch
from torch import nn


class Odd(nn.Module):
    _version = 2

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

    def _load_from_state_dict(self, state, prefix, metadata, *others):
        assert metadata.get("version") == 2  # as torchvision's MNASNet does
        super()._load_from_state_dict(state, prefix, metadata, *others)

    def forward(self, x):
        if not self.cached:
            self.stem.register_buffer("grid", torch.ones(1), persistent=False)
            self.cached = True
        return self.body(self.norm(self.stem(x)).relu() * self.stem.grid)


def odd(channels=3):
    return Odd(channels).to(torch.KIND)
"""
"""A table of indices, a mask of infinity, extra state, a version that is asked for, and a buffer
that is made on the way."""


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_a_network_of_odd_parts_is_trained_resumed_and_judged(
    tmp_path, run, settings, labelled, kind
) -> None:
    (tmp_path / "odd.py").write_text(ODD.replace("KIND", kind))
    options = settings(model=f"{tmp_path / 'odd.py'}:odd", picture_every=3, pixel_layer="body")
    pretrain(**options | {"steps": 3})
    pretrain(**options | {"resume": True})
    state = weights(run)
    assert state["_extra_state"] == {"version": 3}
    assert state["table"].tolist() == [0, 1, 2, 3, 4]
    assert state["mask"].isinf().sum() == 1
    assert state["body.weight"].dtype == getattr(torch, kind)
    for changes in ({}, {"protocol": "finetune", "seeds": 1, "steps": 2}):
        evaluation = evaluate(run, data=labelled, **changes)
        assert 0 < evaluation.rows[-1].scores["mIoU"] <= 1


def test_a_nan_stops_the_run_and_keeps_what_was_good(run, settings, monkeypatch) -> None:
    backward = TrainingStep.backward

    def poisoned(step: TrainingStep, batch: object, features: object) -> torch.Tensor:
        figures = backward(step, batch, features)
        return figures * math.nan if step.step == 4 else figures

    monkeypatch.setattr(TrainingStep, "backward", poisoned)
    with pytest.raises(
        NotFiniteError, match=r"step 5 .* the last good checkpoint, if any, is kept"
    ):
        pretrain(**settings())
    assert not (run / "backbone.safetensors").exists()
    bad_batch = torch.load(run / "bad_batch.pt", weights_only=True)
    assert bad_batch["one"].shape == (4, 3, 32, 32)
    assert "factors_one.hue" in bad_batch
    saved = checkpoint(run)
    assert saved["steps_done"] == len(metrics(run)) == 4
    assert all(tensor.isfinite().all() for tensor in saved["state_dict"].values())
    monkeypatch.undo()
    pretrain(out=run, resume=True)
    assert len(metrics(run)) == 6


def test_a_full_disk_is_told_and_loses_nothing(run, settings, monkeypatch) -> None:
    pretrain(**settings())

    def full(content: object, file: object) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(CannotWriteError, match=r"disk is full .* nothing that existed is lost"):
            pretrain(out=run, resume=True, steps=9)
    assert not list((run / "checkpoints").glob(".*"))
    pretrain(out=run, resume=True, steps=9)
    assert steps_of(run)[-1] == 9


def test_a_run_that_did_not_end_can_be_read(run, settings, monkeypatch, caplog) -> None:
    def cut_off(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "export_backbone", cut_off)
    with pytest.raises(KeyboardInterrupt):
        pretrain(**settings())
    assert not (run / "backbone.safetensors").exists()
    last, middle = (read_backbone(run / part) for part in ("", "checkpoints/step-00000004.ckpt"))
    assert f"{run} has no backbone.safetensors yet: loading its last checkpoint" in caplog.text
    for loaded, name in ((last, "last"), (middle, "step-00000004")):
        state = checkpoint(run, name)["state_dict"]
        assert loaded.report is not None
        assert loaded.report.complete
        assert loaded.card.pixel_layer != "auto"
        for key, tensor in loaded.net.state_dict().items():
            assert torch.equal(tensor, state[f"learner.online_encoder.net.{key}"])
    assert not equal(last.net.state_dict(), middle.net.state_dict())
    for source, mark, steps in ((run, "", 6), (run / "checkpoints/step-00000004.ckpt", name, 4)):
        written = export(source, "safetensors")
        assert written.path.name == f"backbone-{mark and mark + '-'}safetensors.safetensors"
        assert written.path.parent == run
        first = f"{written.path} (a checkpoint, after {steps} steps)"
        assert str(written).splitlines()[0] == first
