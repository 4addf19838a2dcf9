"""Looking at the network while it learns: what is drawn and measured, and that it harms nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from pixel_level_contrastive_learning import pretrain
from pixel_level_contrastive_learning.backbones.checkpoint import read_backbone
from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.data.statistics import measure
from pixel_level_contrastive_learning.evaluation.evaluate import evaluate
from pixel_level_contrastive_learning.evaluation.features import Reader
from pixel_level_contrastive_learning.trainer.validation import central_views


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_backbone(run).net.state_dict()


@pytest.fixture(scope="module")
def many() -> list[torch.Tensor]:
    """Two hundred images, from which four are held out."""
    dice = torch.Generator().manual_seed(0)
    coarse = torch.rand(200, 3, 6, 6, generator=dice)
    return list(torch.nn.functional.interpolate(coarse, (40, 48), mode="bilinear"))


def test_correspondence_and_pictures_change_no_weight(tmp_path, settings, many) -> None:
    given = settings(steps=4)
    del given["data"]
    pretrain(many, **given | {"out": str(tmp_path / "blind")})
    pretrain(many, **given | {"out": str(tmp_path / "seen"), "picture_every": 2})
    blind, seen = weights(tmp_path / "blind"), weights(tmp_path / "seen")
    assert all(torch.equal(blind[name], seen[name]) for name in blind)
    figures = lines(tmp_path / "seen" / "metrics.jsonl")
    for line in figures:
        assert 0 <= line["hit1"] <= line["hit_near"] <= 1
        assert 0 <= line["hit1_colours_kept"] <= 1
    # Measured before the first step and after the second, the figures hold until the next time.
    assert figures[0]["hit1"] == figures[1]["hit1"]
    assert "hit1" not in lines(tmp_path / "blind" / "metrics.jsonl")[0]
    log = (tmp_path / "seen" / "train.log").read_text()
    assert "196 images to train on, 4 held out" in log
    assert "step 4: " in log
    assert "% of cells find their spot in another view" in log
    drawn = sorted((tmp_path / "seen" / "pictures").iterdir())
    assert [path.stem for path in drawn] == ["step-00000000", "step-00000002", "step-00000004"]
    with Image.open(drawn[-1]) as picture:
        assert picture.size == (4 * 160 + 3 * 4, 2 * 160 + 4)  # four images, and their colours


@pytest.mark.parametrize(("precision", "half"), [("float32", False), ("bfloat16", True)])
def test_looks_are_as_fast_as_the_training(settings, many, monkeypatch, precision, half) -> None:
    seen = set()
    read = Reader.__call__

    def noted(reader: Reader, pixels: torch.Tensor) -> torch.Tensor:
        seen.add(torch.is_autocast_enabled("cpu"))
        return read(reader, pixels)

    monkeypatch.setattr(Reader, "__call__", noted)
    given = settings(steps=1, picture_every=1, precision=precision)
    del given["data"]
    pretrain(many, **given)
    assert seen == {half}


def test_pairs_are_drawn_anew_with_the_pictures(tmp_path, settings) -> None:
    drawn = []
    for every in (0, 2, 3):
        out = tmp_path / str(every)
        pretrain(**settings(steps=4, out=str(out), picture_every=every))
        drawn.append((out / "preview" / "pairs-0.png").read_bytes())
    assert len(set(drawn)) == 3  # of the first, third and fourth batch


def test_a_resumed_run_goes_on_with_its_colours(tmp_path, settings) -> None:
    pretrain(**settings(steps=4, picture_every=2))
    last = tmp_path / "run" / "pictures" / "step-00000004.png"
    drawn = last.read_bytes()
    pretrain(out=tmp_path / "run", resume=True, steps=5)  # draws step 4 once more
    assert last.read_bytes() == drawn
    pretrain(out=tmp_path / "run", resume=True, steps=6, image_size=40)  # maps of another size


def test_a_probe_is_noted_and_the_best_checkpoint_kept(tmp_path, settings, labelled) -> None:
    pretrain(**settings(probe=str(labelled), probe_every=1, keep_checkpoints=1))
    run = tmp_path / "run"
    probed = lines(run / "probe.jsonl")
    assert [line["step"] for line in probed] == [0, 3, 6]  # twelve images in batches of four
    assert all(0 < line["miou"] <= 1 for line in probed)
    best = max(probed[1:], key=lambda line: line["miou"])
    kept = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert kept["steps_done"] == best["step"]
    figures = lines(run / "metrics.jsonl")
    assert [line["probe_miou"] for line in figures] == [
        *[probed[0]["miou"]] * 3,
        *[probed[1]["miou"]] * 3,
    ]
    log = (run / "train.log").read_text()
    assert f"step 0: mean IoU of the probe {probed[0]['miou']:.4f}\n" in log
    assert f"step 3: mean IoU of the probe {probed[1]['miou']:.4f} (best)\n" in log


def test_a_run_that_was_killed_in_a_probe_makes_up_for_it(tmp_path, settings, labelled) -> None:
    given = settings(probe=str(labelled), probe_every=1, checkpoint_every=3)
    pretrain(**given)
    run = tmp_path / "run"
    probed = (run / "probe.jsonl").read_text().splitlines(keepends=True)
    (run / "probe.jsonl").write_text(probed[0])
    best = run / "checkpoints" / "best.ckpt"
    for path in (best, run / "checkpoints" / "step-00000006.ckpt"):
        path.unlink()
    first, last = (run / "checkpoints" / name for name in ("step-00000003.ckpt", "last.ckpt"))
    last.unlink()
    os.link(first, last)
    pretrain(**given | {"resume": True})
    assert (run / "probe.jsonl").read_text() == "".join(probed)
    kept = best.stat().st_ino
    is_first = lines(run / "probe.jsonl")[1]["miou"] >= lines(run / "probe.jsonl")[2]["miou"]
    assert (kept == first.stat().st_ino) is is_first


def test_a_run_shorter_than_an_epoch_is_probed_at_both_ends(tmp_path, settings, labelled) -> None:
    pretrain(**settings(probe=str(labelled), steps=2))
    run = tmp_path / "run"
    assert [line["step"] for line in lines(run / "probe.jsonl")] == [0, 2]
    assert torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["steps_done"] == 2
    pretrain(out=run, resume=True, steps=5)  # goes on with what was noted
    assert [line["step"] for line in lines(run / "probe.jsonl")] == [0, 2, 3, 5]


SICK = """
from torch import nn


class Sick(nn.Module):
    def forward(self, x):
        return x if self.training else x / 0


def sick(channels=3):
    return nn.Sequential(nn.Conv2d(channels, 8, 4, 4), Sick())
"""


def test_a_run_whose_eval_mode_overflows_goes_on_with_a_word(tmp_path, settings, many) -> None:
    (tmp_path / "sick.py").write_text(SICK)
    model = f"{tmp_path / 'sick.py'}:sick"
    pretrain(**settings(data=many, model=model, pixel_layer="1", picture_every=3))
    run = tmp_path / "run"
    log = (run / "train.log").read_text()
    for step in (0, 3, 6):
        assert f"step {step}: in eval mode the network gives features that are NaN" in log
    assert "hit1" not in lines(run / "metrics.jsonl")[-1]
    assert not list(run.glob("pictures/*"))


def test_a_probe_of_features_that_are_no_numbers_is_left_out(tmp_path, settings, labelled) -> None:
    (tmp_path / "sick.py").write_text(SICK)
    model = f"{tmp_path / 'sick.py'}:sick"
    pretrain(**settings(model=model, pixel_layer="1", probe=str(labelled), steps=2))
    assert not (tmp_path / "run" / "probe.jsonl").exists()
    log = (tmp_path / "run" / "train.log").read_text()
    assert "step 2: not probed: in eval mode the network gives features that are NaN" in log


FIXED = """
from torch import nn
from torchvision.models import VisionTransformer

def vit(channels=3):
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16
    )
"""


def test_a_network_of_ones_own_with_a_fixed_size_is_probed(tmp_path, settings, labelled) -> None:
    (tmp_path / "fixed.py").write_text(FIXED)
    model = f"{tmp_path / 'fixed.py'}:vit"
    pretrain(**settings(model=model, probe=str(labelled), steps=2))
    run = tmp_path / "run"
    found = evaluate(run, data=labelled, protocol="knn")
    probed = lines(run / "probe.jsonl")
    assert found.settings["fed at"] == "32x32"
    assert found.rows[-1].scores["mIoU"] == pytest.approx(probed[-1]["miou"])


def test_a_probe_that_cannot_be_done_ends_the_run_before_its_first_step(
    tmp_path, settings, labelled
) -> None:
    path = labelled / "images" / "val" / "0.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"0\.png"):
        pretrain(**settings(probe=str(labelled)))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_probing_changes_no_weight(tmp_path, settings, labelled) -> None:
    pretrain(**settings(out=str(tmp_path / "blind")))
    for protocol in ("linear", "knn"):
        out = tmp_path / protocol
        pretrain(**settings(out=str(out), probe=str(labelled), probe_protocol=protocol))
        blind, seen = weights(tmp_path / "blind"), weights(out)
        assert all(torch.equal(blind[name], seen[name]) for name in blind)


def test_wrong_masks_are_refused_before_anything_is_written(tmp_path, settings, labelled) -> None:
    (labelled / "masks" / "val" / "0.png").unlink()
    with pytest.raises(ValueError, match=r"0.png is not there; 1 of 4 images have no mask"):
        pretrain(**settings(probe=str(labelled)))
    assert not (tmp_path / "run").exists()


def test_images_to_look_at_are_middle_parts_and_broken_ones_are_left_out(tmp_path) -> None:
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    wide.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    source = open_source(tmp_path)
    [seen] = central_views(source, measure(source), (20, 20), 5)
    assert seen.shape == (3, 20, 20)
    assert torch.allclose(seen, torch.tensor([0.0, 0, 1])[:, None, None].expand(3, 20, 20))
