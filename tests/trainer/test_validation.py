"""Looking at the network while it learns: what is drawn and measured, and that it harms nothing."""

import json
import os

import pytest
import torch
from PIL import Image
from run_folders import checkpoint, equal, files, forget, lines, log, metrics, weights

from pixel_level_contrastive_learning import pretrain
from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.data.statistics import measure
from pixel_level_contrastive_learning.evaluation.evaluate import evaluate
from pixel_level_contrastive_learning.evaluation.features import Reader
from pixel_level_contrastive_learning.trainer.validation import best_note, central_views


@pytest.fixture(scope="module")
def many() -> list[torch.Tensor]:
    """Two hundred images, from which four are held out."""
    dice = torch.Generator().manual_seed(0)
    coarse = torch.rand(200, 3, 6, 6, generator=dice)
    return list(torch.nn.functional.interpolate(coarse, (40, 48), mode="bilinear"))


def test_correspondence_and_pictures_change_no_weight(tmp_path, run, settings, many) -> None:
    blind = tmp_path / "blind"
    pretrain(**settings(data=many, steps=4, out=str(blind)))
    pretrain(**settings(data=many, steps=4, picture_every=2))
    assert equal(weights(blind), weights(run))
    for line in metrics(run):
        assert 0 <= line["hit1"] <= line["hit_near"] <= 1
        assert 0 <= line["hit1_colours_kept"] <= 1
    # Measured before the first step and after the second, the figures hold until the next time.
    assert metrics(run)[0]["hit1"] == metrics(run)[1]["hit1"]
    assert metrics(run)[0]["hit_step"] == 0
    assert "hit1" not in metrics(blind)[0]
    for text in (
        "196 images to train on, 4 held out",
        "step 4: ",
        "% of cells find the same spot in",
    ):
        assert text in log(run)
    paths = sorted((run / "pictures").iterdir())
    assert [path.stem for path in paths] == ["step-00000000", "step-00000002", "step-00000004"]
    with Image.open(paths[-1]) as picture:
        assert picture.size == (4 * 160 + 3 * 4, 2 * 160 + 4)  # four images, and their colours


@pytest.mark.parametrize(("precision", "half"), [("float32", False), ("bfloat16", True)])
def test_looks_are_as_fast_as_the_training(settings, many, monkeypatch, precision, half) -> None:
    autocast_states = set()
    call = Reader.__call__

    def noted(reader: Reader, pixels: torch.Tensor) -> torch.Tensor:
        autocast_states.add(torch.is_autocast_enabled("cpu"))
        return call(reader, pixels)

    monkeypatch.setattr(Reader, "__call__", noted)
    pretrain(**settings(data=many, steps=1, picture_every=1, precision=precision))
    assert autocast_states == {half}


def test_pairs_are_drawn_anew_with_the_pictures(tmp_path, settings) -> None:
    previews = []
    for every in (0, 2, 3):
        out = tmp_path / str(every)
        pretrain(**settings(steps=4, out=str(out), picture_every=every))
        previews.append((out / "preview" / "pairs-0.png").read_bytes())
    assert len(set(previews)) == 3  # of the first, third and fourth batch


def test_a_resumed_run_goes_on_with_its_colours(run, settings) -> None:
    pretrain(**settings(steps=4, picture_every=2))
    assert "fewer than 200 images: none are held out, so" in log(run)
    last = run / "pictures" / "step-00000004.png"
    content = last.read_bytes()
    pretrain(out=run, resume=True, steps=5)  # draws step 4 once more
    assert last.read_bytes() == content
    pretrain(out=run, resume=True, steps=6, image_size=40)  # maps of another size


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_a_probe_is_noted_keeps_the_best_checkpoint_and_changes_no_weight(
    tmp_path, run, settings, labelled, protocol
) -> None:
    pretrain(**settings(out=str(tmp_path / "blind")))
    options = {"probe_every": 1, "probe_protocol": protocol, "keep_checkpoints": 1}
    pretrain(**settings(probe=str(labelled), **options))
    assert equal(weights(tmp_path / "blind"), weights(run))
    probed = lines(run / "probe.jsonl")
    assert [line["step"] for line in probed] == [0, 3, 6]  # twelve images in batches of four
    assert all(0 < line["miou"] <= 1 for line in probed)
    first, middle, last = (line["miou"] for line in probed)
    best = max(probed[1:], key=lambda line: line["miou"])
    assert checkpoint(run, "best")["steps_done"] == best["step"]
    assert [line["probe_miou"] for line in metrics(run)] == [first] * 3 + [middle] * 2 + [last]
    assert f"step 0: probe reaches a mean IoU of {first:.4f}\n" in log(run)
    assert f"step 3: probe reaches a mean IoU of {middle:.4f} (best" in log(run)
    path = run / "checkpoints" / "best.ckpt"
    text = f"{best['step']}, mIoU {best['miou']:.4f}: {path} (pixelcl export {path})\n"
    assert f"best step by the probe: {text}" in log(run)
    assert "fewer than 200 images: none are held out" not in log(run)  # nor drawn


@pytest.mark.parametrize(
    ("scores", "note"),
    [
        ({}, " (best)"),
        ({0: 0.1}, " (best)"),
        ({0: 0.9}, " (best so far, but below 0.9000 at step 0)"),
        ({0: 0.1, 1: 0.8}, ""),
    ],
)
def test_the_best_probe_is_called_so_with_what_the_start_had(scores, note) -> None:
    assert best_note(scores, 0.5) == note


def test_a_run_that_was_killed_in_a_probe_makes_up_for_it(run, settings, labelled) -> None:
    options = settings(probe=str(labelled), probe_every=1, checkpoint_every=3)
    pretrain(**options)
    before = files(run)
    probe, (best, first, last) = (
        run / "probe.jsonl",
        (run / "checkpoints" / f"{name}.ckpt" for name in ("best", "step-00000003", "last")),
    )
    probe.write_text(probe.read_text().splitlines(keepends=True)[0])
    forget(run, "best", "step-00000006", "last")
    os.link(first, last)
    pretrain(**options | {"resume": True})
    assert probe.read_bytes() == before[probe]
    is_first = lines(probe)[1]["miou"] >= lines(probe)[2]["miou"]
    assert (best.stat().st_ino == first.stat().st_ino) is is_first


def test_a_run_that_was_killed_before_its_last_probe_is_probed(run, settings, labelled) -> None:
    given = settings(probe=str(labelled), probe_every=1, steps=5, picture_every=3)
    pretrain(**given)
    whole, probe, figures = files(run), run / "probe.jsonl", run / "metrics.jsonl"
    probe.write_text("".join(probe.read_text().splitlines(keepends=True)[:-1]))
    *before, last = metrics(run)
    killed = [*before, last | {"probe_miou": before[-1]["probe_miou"]}]
    figures.write_text("".join(json.dumps(line) + "\n" for line in killed))
    (run / "pictures" / "step-00000005.png").unlink()
    again = pretrain(**given | {"resume": True})
    assert probe.read_bytes() == whole[probe]
    assert metrics(run) == [*before, last]
    assert again.metrics == last
    assert (run / "pictures" / "step-00000005.png").exists()
    assert pretrain(**given | {"resume": True}).metrics == last
    assert "all 5 steps are already done" in log(run)


def test_a_run_shorter_than_an_epoch_is_probed_at_both_ends(run, settings, labelled) -> None:
    pretrain(**settings(probe=str(labelled), steps=2))
    assert [line["step"] for line in lines(run / "probe.jsonl")] == [0, 2]
    assert checkpoint(run, "best")["steps_done"] == 2
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


def test_a_run_whose_eval_mode_overflows_goes_on_with_a_word(
    tmp_path, run, settings, many, labelled
) -> None:
    (tmp_path / "sick.py").write_text(SICK)
    options = {"model": f"{tmp_path / 'sick.py'}:sick", "pixel_layer": "1", "picture_every": 3}
    pretrain(**settings(data=many, probe=str(labelled), **options))
    for step in (0, 3, 6):
        assert f"step {step}: in eval mode the network gives NaN or infinite" in log(run)
    assert "step 6: probe skipped: in eval mode the network gives NaN or infinite" in log(run)
    assert not {"hit1", "probe_miou"} & metrics(run)[-1].keys()
    assert not list(run.glob("pictures/*"))
    assert not (run / "probe.jsonl").exists()


FIXED = """
from torch import nn
from torchvision.models import VisionTransformer

def vit(channels=3):
    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=16
    )
"""


def test_a_network_of_ones_own_with_a_fixed_size_is_probed(
    tmp_path, run, settings, labelled
) -> None:
    (tmp_path / "fixed.py").write_text(FIXED)
    pretrain(**settings(model=f"{tmp_path / 'fixed.py'}:vit", probe=str(labelled), steps=2))
    evaluation = evaluate(run, data=labelled, protocol="knn")
    assert evaluation.settings["input size"] == "32x32"
    assert evaluation.rows[-1].scores["mIoU"] == pytest.approx(
        lines(run / "probe.jsonl")[-1]["miou"]
    )


def test_a_probe_that_cannot_be_done_ends_the_run_before_its_first_step(
    run, settings, labelled
) -> None:
    path = labelled / "images" / "val" / "0.png"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"0\.png"):
        pretrain(**settings(probe=str(labelled)))
    assert not (run / "metrics.jsonl").exists()


def test_images_to_look_at_are_middle_parts_and_broken_ones_are_left_out(tmp_path) -> None:
    wide = Image.new("RGB", (90, 30), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 60, 30))
    wide.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    source = open_source(tmp_path)
    [view] = central_views(source, measure(source), (20, 20), 5)
    assert view.shape == (3, 20, 20)
    assert torch.allclose(view, torch.tensor([0.0, 0, 1])[:, None, None].expand(3, 20, 20))
