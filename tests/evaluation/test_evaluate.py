"""The whole of it: commands as a user gives them, with labels and without."""

import json
import logging
import math
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from small_cards import preparation, small_card

from pixel_level_contrastive_learning import cli
from pixel_level_contrastive_learning.backbones.checkpoint import save_backbone
from pixel_level_contrastive_learning.data.sources import open_source
from pixel_level_contrastive_learning.evaluation import baselines, correspondence, segmentation
from pixel_level_contrastive_learning.evaluation.baselines import random_net
from pixel_level_contrastive_learning.evaluation.comparison import what_it_means
from pixel_level_contrastive_learning.evaluation.correspondence import (
    correspondence_in_words as without,
)
from pixel_level_contrastive_learning.evaluation.correspondence import evenly, left_out, some_images
from pixel_level_contrastive_learning.evaluation.evaluate import evaluate
from pixel_level_contrastive_learning.evaluation.finetuning import RATES
from pixel_level_contrastive_learning.evaluation.results import Evaluation, Row


@pytest.fixture
def run(model, tmp_path):
    """A run whose layer gives smoothed colours, as a good one would here."""
    card = small_card(model, image_size=(24, 24))
    net = random_net(card, 0)
    with torch.no_grad():
        for layer in (net.stem, net.body):
            layer.weight.zero_()
            layer.bias.zero_()
            for channel in range(3):
                layer.weight[channel, channel] = 1 / 9
    save_backbone(tmp_path / "run" / "backbone.safetensors", net, card)
    return tmp_path / "run"


@pytest.mark.parametrize("protocol", ["linear", "knn"])
def test_a_run_is_judged_beside_random_weights(run, labelled, tmp_path, protocol) -> None:
    out = tmp_path / "out"
    result = evaluate(run, data=labelled, protocol=protocol, seeds=2, out=out)
    assert [row.name for row in result.rows] == ["random weights", str(run)]
    assert [len(row.seeds) for row in result.rows] == [2, 1]  # its own weights know no chance
    assert set(result.ours.scores) == {"mIoU", "pixel accuracy"}
    assert list(result.ours.classes) == ["red", "green", "blue"]
    assert result.ours.scores["mIoU"] > 0.7
    assert result.settings["input size"] == "shorter side 34"
    assert result.settings["layers"] == ["body"]
    assert f"{result.ours.scores['mIoU']:.3f}" in result.table()
    assert " mIoU on val, " in result.sentence
    assert Evaluation.from_json((out / "evaluation.json").read_text()) == result
    pictures = sorted(path.name for path in (out / "predictions").iterdir())
    assert pictures == [f"000{number}_{number}.png" for number in range(4)]


@pytest.mark.parametrize("place", ["data", "images"])
def test_a_file_is_refused_as_out_before_anything_is_read(tmp_path, place) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file is a file; name a folder"):
        evaluate("runs/nowhere", **{place: "nowhere"}, out=tmp_path / "file")


def test_figures_are_written_before_pictures(run, labelled, tmp_path, monkeypatch) -> None:
    monkeypatch.delattr(segmentation, "write_panels")
    with pytest.raises(NameError):
        evaluate(run, data=labelled, protocol="knn", out=tmp_path)
    assert (tmp_path / "evaluation.json").is_file()


def test_the_same_weights_reach_the_same(run, labelled) -> None:
    torch.manual_seed(1)
    first = evaluate(run, data=labelled)
    torch.manual_seed(2)
    assert evaluate(run, data=labelled).rows == first.rows
    assert first.protocol == "linear, linear-all, knn"
    assert set(first.ours.scores) == {"mIoU", "pixel accuracy", "linear-all mIoU", "knn mIoU"}


def test_fine_tuning_takes_a_share_of_the_masks(run, labelled) -> None:
    settings = {"protocol": "finetune", "fraction": 0.3, "steps": 3}
    result = evaluate(run, data=labelled, **settings)
    assert [len(row.seeds) for row in result.rows] == [3, 3]
    assert result.ours.deviations["mIoU"] > 0
    assert result.settings["masks"] == [3]
    assert result.settings["steps"] == 3
    assert result.sentence.startswith("Fine-tuning reaches ")


def test_a_share_of_the_masks_makes_a_probe_depend_on_the_seed(run, labelled) -> None:
    result = evaluate(run, data=labelled, protocol="knn", fraction=0.2, seeds=2)
    assert [len(row.seeds) for row in result.rows] == [2, 2]
    assert result.ours.seeds[0] != result.ours.seeds[1]


def test_layers_and_sizes_may_be_named(run, labelled) -> None:
    result = evaluate(run, data=labelled, layers=("body", "act"), size=(32, 48))
    assert result.settings["layers"] == ["body + act"]
    assert result.settings["input size"] == "32x48"
    assert evaluate(run, data=labelled, layers="act").settings["layers"] == ["act"]
    with pytest.raises(ValueError, match=r"no layer 'bod'.*perhaps body"):
        evaluate(run, data=labelled, layers=("bod",))


def test_without_labels_views_and_health_are_looked_at(run, labelled, tmp_path) -> None:
    (labelled / "images/val/broken.png").write_text("no image")
    result = evaluate(run, images=labelled / "images/val", seeds=2, out=tmp_path)
    assert result.protocol == "correspondence"
    assert [len(row.seeds) for row in result.rows] == [2, 2]
    names = ["hit@1", "hit@1, colours kept", "hit within 2 cells"]
    chances = ["hit@1 by chance", "within 2 cells by chance"]
    assert list(result.ours.scores) == [*names, *chances, "spread", "effective rank"]
    assert 0 < result.ours.scores[chances[0]] < result.ours.scores[chances[1]] < 1
    assert result.rows[0].scores["hit@1 by chance"] == result.ours.scores["hit@1 by chance"]
    assert result.settings["images"] == 4
    (note,) = result.notes
    assert note.startswith("left out ")
    assert "broken.png" in note
    assert result.sentence.startswith("Cells find the same spot in another view of the image ")
    assert json.loads((tmp_path / "correspondence.json").read_text())["sentence"] == result.sentence


def test_without_labels_the_size_is_that_of_the_views(run, labelled) -> None:
    result = evaluate(run, images=labelled / "images/val", size=(48, 64))
    assert result.settings["views"] == "48x64"
    assert evaluate(run, images=labelled / "images/val", size=48).settings["views"] == "48x48"
    result = evaluate(run, images=labelled / "images/val", size=[48, 64])  # as in JSON
    assert result.settings["views"] == "48x64"


def test_weights_without_a_run_are_scaled_without_nodata(labelled, model, monkeypatch) -> None:
    for path in (labelled / "images").rglob("*.png"):
        with Image.open(path) as image:
            values = np.array(image, np.float32) + 100
        values[:, :16] = 20  # not so far away that it is found without a word
        tifffile.imwrite(path.with_suffix(".tif"), values, photometric="rgb")
        path.unlink()
    lows = []

    def line_up(*given):
        contenders, notes = baselines.line_up(*given)
        lows.append(min(contenders[0].card.low))
        return contenders, notes

    monkeypatch.setattr(segmentation, "line_up", line_up)
    for value in (None, 20.0):
        evaluate(f"random:{model}", data=labelled, protocol="knn", nodata=value)
    assert lows[0] == 20
    assert lows[1] > 100


@pytest.mark.parametrize("given", [{}, {"nodata": 7.0, "pages": "images"}])
def test_images_are_read_as_those_of_the_run(run, labelled, monkeypatch, given) -> None:
    (run / "config.yaml").write_text("nodata: -9999.0\npages: first\n")
    wanted = {"nodata": -9999.0, "pages": "first"} | given
    asked = []

    def opened(*_, ids=None, colours=None, **settings) -> None:
        asked.append(settings)
        raise StopIteration

    monkeypatch.setattr(correspondence, "open_source", opened)
    monkeypatch.setattr(
        "pixel_level_contrastive_learning.evaluation.evaluate.open_labelled", opened
    )
    for place in ("data", "images"):
        with pytest.raises(StopIteration):
            evaluate(run, **{place: labelled}, **given)
    assert asked == [wanted, wanted]


FINE = """
from torch import nn

def fine(channels=3):
    body = nn.Conv2d(channels, 8, 3, stride=2, padding=1), nn.ReLU()
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
"""


def test_a_network_without_a_coarse_map_is_evaluated_without_a_map_of_each_stride(
    run, labelled, tmp_path
) -> None:
    (tmp_path / "fine.py").write_text(FINE)
    weights = f"random:{tmp_path / 'fine.py'}:fine", run
    result = evaluate(weights, data=labelled, fractions=[0.2, 1], seeds=1)
    assert result.protocol == "linear, knn"
    (note,) = result.notes
    assert note.startswith("Left out linear-all and finetune: Sequential has no map to decode")
    with pytest.raises(
        ValueError, match="Sequential has no map to decode with a stride of 3 or more"
    ):
        evaluate(weights, data=labelled, protocol="linear-all")


def diverged(place: Path, model: str) -> Path:
    """A run whose features are beyond all numbers."""
    card = small_card(model, image_size=(24, 24))
    net = random_net(card, 0)
    with torch.no_grad():
        net.stem.weight.fill_(3e38)
    save_backbone(place / "backbone.safetensors", net, card)
    return place


def test_a_diverged_network_is_named_and_the_others_are_judged(
    run, labelled, model, tmp_path, caplog, capsys
) -> None:
    lost = diverged(tmp_path / "lost", model)
    result = evaluate([run, lost], data=labelled, protocol="knn", out=tmp_path)
    assert [row.name for row in result.rows] == ["random weights", str(run)]
    (note,) = result.notes
    assert note.startswith(f"{lost} is left out: body of this network give NaN or")
    assert note in caplog.messages
    words = "evaluate", str(lost), "--data", str(labelled), "--protocol", "knn"
    assert cli.main(words) == 1
    assert f"error: {lost}: body of this network give NaN" in capsys.readouterr().err
    result = evaluate([run, lost], data=labelled, protocol="finetune", steps=1, seeds=1)
    assert [row.name for row in result.rows] == ["random weights", str(run)]
    assert result.notes[0].startswith(
        f"{lost} is left out: fine-tuning at the learning rate 0.0003"
    )


def test_fractions_of_as_many_masks_count_once(run, labelled) -> None:
    settings = {"protocol": "knn", "fractions": [0.1, 0.12, 0.5, 0.97, 1], "seeds": 2}
    result = evaluate(run, data=labelled, **settings)
    assert result.settings["masks"] == [1, 5, 10]
    points = result.ours.curves["knn"]
    assert [(point.masks, len(point.seeds)) for point in points] == [(1, 2), (5, 2), (10, 1)]


def test_classifiers_of_one_share_of_the_masks_are_held_at_a_time(
    run, labelled, monkeypatch
) -> None:
    run_probes, shares = segmentation.run_probes, []

    def noted(reader, probes, *given, **settings):
        shares.append({len(probe.train) for probe in probes})
        return run_probes(reader, probes, *given, **settings)

    monkeypatch.setattr(segmentation, "run_probes", noted)
    evaluate(run, data=labelled, protocol=["linear", "knn"], fractions=[0.2, 1], seeds=1)
    assert shares == [{2}, {10}] * 2


def test_settings_about_labels_are_refused_without_any() -> None:
    with pytest.raises(ValueError) as error:
        evaluate("runs/a", images="b", protocol="knn", fraction=0.5, split="test", steps=9)
    lines = str(error.value).splitlines()
    assert [line.split()[0] for line in lines] == ["protocol", "fraction", "split", "steps"]
    assert lines[0] == (
        "protocol is 'knn', which needs labels; give data instead of images, or leave it out"
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"protocol": "finetune", "layers": ("body",)},
            "layers is ['body'], but finetune reads a map at every",
        ),
        ({"protocol": "linear", "steps": 9}, "steps is 9, which needs protocol finetune; add it"),
        ({"protocol": "knn", "steps": 9}, "steps is 9, which needs protocol finetune; add it"),
        ({"fraction": 0.5, "fractions": [0.1]}, "both fraction and fractions are given; give one"),
        ({"fractions": ["0.1", 1]}, "fractions is '0.1'; it must be a number above 0, at most 1"),
        ({"fractions": [0.1, 2]}, "fractions is 2; it must be a number above 0, at most 1"),
        ({"steps": 9}, "steps is 9, which needs protocol finetune; add it, or leave steps out"),
        ({"fractions": 0.5}, "fractions is 0.5, a single number; give it as fraction=0.5"),
        ({"fractions": []}, "fractions is empty; give fractions of the masks, such as"),
        ({"seed": 2**64}, f"seed is {2**64}; it must be a whole number of at most {2**63 - 1}"),
        ({"weights": []}, "weights is empty; give a run, a file or a name"),
        ({"images": "b"}, "both data and images are given"),
        (
            {"weights": torch.nn.Linear(2, 2)},
            "weights is a Linear; give its run's folder (res",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}"):
        evaluate(**{"weights": "runs/a", "data": "a"} | settings)


def test_bytes_of_names_that_are_no_text_lose_no_figure(run, labelled, tmp_path, caplog) -> None:
    caplog.set_level(logging.ERROR)  # such a name cannot be told from one pytest process to another
    (labelled / "images/val" / os.fsdecode(b"M\xfcnchen.png")).write_text("no image")
    result = evaluate(run, images=labelled / "images/val", out=tmp_path)
    assert Evaluation.from_json((tmp_path / "correspondence.json").read_text()) == result
    assert os.fsdecode(b"M\xfcnchen.png") in result.notes[0]


def test_large_images_are_looked_at_at_twice_the_views(run, tmp_path, monkeypatch) -> None:
    (tmp_path / "photos").mkdir()
    Image.effect_noise((1600, 1200), 90).convert("RGB").save(tmp_path / "photos/a.png")
    draw, seen = correspondence.draw_pairs, []

    def noted(images, *given, **settings):
        seen.append(images[0].shape)
        return draw(images, *given, **settings)

    monkeypatch.setattr(correspondence, "draw_pairs", noted)
    evaluate(run, images=tmp_path / "photos")
    assert set(seen) == {(3, 48, 64)}


def test_without_labels_each_network_sees_images_as_it_knows_them(model, tmp_path) -> None:
    """Of several runs each reaches what it reaches alone: other channels, range and layer."""
    dice, images = np.random.default_rng(0), tmp_path / "deep"
    images.mkdir()
    for number in range(3):
        values = dice.integers(0, 1000, (6, 8, 3)).repeat(8, 0).repeat(8, 1)
        tifffile.imwrite(images / f"{number}.tif", values.astype(np.uint16), photometric="rgb")
    runs = []
    for channels, high in ((3, 255.0), (3, 1000.0), (1, 1000.0)):
        form = {"mean": 0.5, "std": 0.25, "low": 0.0, "high": high}
        lists = {name: (value,) * channels for name, value in form.items()}
        card = small_card(model, image_size=(24, 24), channels=channels, **lists)
        runs.append(tmp_path / f"run{len(runs)}")
        save_backbone(runs[-1] / "backbone.safetensors", random_net(card, 1), card)
    *_, one, two, three = evaluate(runs, images=images).rows
    assert [row.scores for row in (one, two, three)] == [
        evaluate(run, images=images).ours.scores for run in runs
    ]
    assert one.scores != two.scores


def test_without_labels_a_network_of_one_size_stands_beside_others(run, labelled) -> None:
    images = labelled / "images/val"
    result = evaluate([run, "random:timm/test_vit"], images=images)
    assert result.settings["views"] == "24x24, 160x160"
    alone = evaluate("random:timm/test_vit", images=images).ours
    assert [row.scores for row in result.rows if row.name.endswith("(timm/test_vit)")] == [
        alone.scores
    ]
    with pytest.raises(ValueError, match="built for images of 160x160 only"):
        evaluate([run, "random:timm/test_vit"], images=images, size=32)


def test_views_of_one_seed_are_held_at_a_time(run, labelled, monkeypatch) -> None:
    calls, draw, figures = [], correspondence.draw_pairs, correspondence.figures_of
    monkeypatch.setattr(
        correspondence,
        "draw_pairs",
        lambda *given, **named: calls.append("draw") or draw(*given, **named),
    )
    monkeypatch.setattr(
        correspondence, "figures_of", lambda *given: calls.append("read") or figures(*given)
    )
    evaluate(run, images=labelled / "images/val", seeds=2)
    assert calls == ["draw", "draw", "read", "read"] * 2


def test_random_weights_are_what_others_have_to_beat(model, labelled) -> None:
    result = evaluate(f"random:{model}", data=labelled, protocol="knn")
    assert [row.name for row in result.rows] == ["random weights"]
    assert result.sentence.endswith("the baseline for other weights of this network.")


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ValueError) as error:
        evaluate("runs/a", protocol="linar", fraction=0, seeds=0, steps=0, size=-1)
    assert str(error.value).splitlines() == [
        "protocol is 'linar'; it must be one of 'linear', 'linear-all', 'knn', 'hummingbird', "
        "'overclustering', 'finetune' (perhaps 'linear')",
        "fraction is 0; it must be a number above 0, at most 1",
        "seeds is 0; it must be a whole number of at least 1",
        "size is -1; it must be a whole number of pixels or (height, width), such as 224",
        "steps is 0; it must be a whole number of at least 1",
        "neither data nor images is given; give data (--data, a folder of images and masks) to "
        "evaluate with labels, or images (--images) to evaluate without",
    ]


def test_several_weights_and_protocols_stand_side_by_side(run, labelled, model, tmp_path) -> None:
    protocols = ["knn", "hummingbird", "overclustering", "linear-all"]
    other = tmp_path / "other"
    other.mkdir()
    for name in ("backbone.safetensors", "backbone.json"):
        (other / name).write_bytes((run / name).read_bytes())
    result = evaluate([run, other, f"random:{model}"], data=labelled, protocol=protocols)
    random = [f"random weights (preprocessing of {name})" for name in ("run", Path(model).name)]
    assert [row.name for row in result.rows] == [*random, str(run), str(other)]
    assert result.rows[2].scores == result.rows[3].scores
    keys = ["mIoU", "pixel accuracy", "hummingbird mIoU", "overclustering mIoU"]
    assert list(result.ours.scores) == [*keys, "overclustering, 500 mIoU", "linear-all mIoU"]
    assert all(0.4 < value <= 1 for value in result.ours.scores.values())
    assert result.sentence.count("A nearest-neighbour vote reaches") == 2
    assert result.sentence.startswith(f"{run}: ")


@pytest.mark.parametrize(
    ("protocol", "labels"), [("knn", [" (body)", " (stem)"]), ("linear-all", [""])]
)
def test_runs_of_other_layers_have_other_random_weights_where_layers_are_read(
    run, labelled, tmp_path, protocol, labels
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "backbone.safetensors").write_bytes((run / "backbone.safetensors").read_bytes())
    card = (run / "backbone.json").read_text().replace('"body"', '"stem"')
    (other / "backbone.json").write_text(card)
    result = evaluate([run, other], data=labelled, protocol=protocol)
    random = [f"random weights{label}" for label in labels]
    assert [row.name for row in result.rows] == [*random, str(run), str(other)]
    assert [row.baselines[0] for row in result.rows[-2:]] == [random[0], random[-1]]


def test_fractions_give_label_curves(run, labelled, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO)
    settings = {"fractions": [1, 0.2, 0.5], "steps": 2, "seeds": 2}
    result = evaluate(run, data=labelled, protocol=["linear", "finetune"], out=tmp_path, **settings)
    assert result.settings["masks"] == [2, 5, 10]
    assert result.curves == ["linear", "finetune"]
    for row in result.rows:
        assert [point.masks for point in row.curves["finetune"]] == [2, 5, 10]
        assert [len(point.seeds) for point in row.curves["finetune"]] == [2, 2, 2]
        assert row.scores["finetune mIoU"] == row.curves["finetune"][-1].miou
    # With all masks frozen features know no chance.
    assert [len(point.seeds) for point in result.ours.curves["linear"]] == [2, 2, 1]
    assert result.ours.scores["mIoU"] == result.ours.curves["linear"][-1].miou
    assert " Label curve (fine-tuning): " in result.sentence
    assert (tmp_path / "label-curve.png").is_file()
    evaluate(run, data=labelled, protocol="knn", out=tmp_path)
    assert not (tmp_path / "label-curve.png").exists()
    assert set(result.settings["learning rates"]) == {"random weights", str(run)}
    assert set(result.settings["learning rates"].values()) <= set(map(str, RATES))
    (message,) = (text for text in caplog.messages if text.startswith("fine-tuning: "))
    assert message.startswith(
        "fine-tuning: 12 fits of 2 steps, and 8 to choose learning rates: about "
    )


def test_with_one_mask_no_learning_rate_is_chosen(run, labelled, caplog) -> None:
    caplog.set_level(logging.INFO)
    settings = {"fraction": 0.1, "steps": 1, "seeds": 1}
    result = evaluate(run, data=labelled, protocol="finetune", **settings)
    rates = set(result.settings["learning rates"].values())
    assert rates == {"0.0003 (decoder 0.001; not chosen: one mask)"}
    assert any("2 fits of 1 steps, and 0 to choose" in message for message in caplog.messages)


def test_weights_of_a_library_are_fed_as_the_run_is(run, labelled) -> None:
    settings = {"data": labelled, "protocol": "knn"}
    alone = evaluate("random:torchvision/resnet18", **settings)
    assert alone.settings["input size"] == "shorter side 314"
    together = evaluate(["random:torchvision/resnet18", run], **settings)
    assert together.settings["input size"] == "shorter side 34"


# What it means.


def rows(*figures: float, deviation: float = 0.0) -> list[Row]:
    return [Row(str(i), {"mIoU": value}, {"mIoU": deviation}) for i, value in enumerate(figures)]


@pytest.mark.parametrize(
    ("figures", "deviation", "words"),
    [
        ((0.2, 0.3), 0.0, "1.50 times random weights (0.200): clearly better than"),
        ((0.2, 0.205), 0.0, "no clear gain"),
        ((0.2, 0.24), 0.03, "no clear gain"),
        ((0.2, 0.1), 0.0, "worse than random"),
        ((0.2, 0.19), 0.03, "no clear gain"),
        ((0.2, 0.25, 0.3), 0.0, "and 1.20 times the starting weights (0.250): clearly better"),
        ((0.2, 0.35, 0.28), 0.0, "times the starting weights (0.350): worse than the start."),
        ((0.2, 0.35, 0.36), 0.0, "no clear gain"),
        ((0.2, 0.1, 0.15), 0.0, "worse than random"),
        ((0.2, 0.1, 0.2), 0.0, "no clear gain"),
        ((0.2, 0.1, 0.3), 0.0, "clearly better than random weights."),
        ((0.0, 0.0), 0.0, "no clear gain"),
        ((0.0, 0.3), 0.0, "on val, random weights 0.000: clearly better than"),
        ((0.0, 0.2, 0.3), 0.0, ", random weights 0.000 and 1.50 times the starting weights (0.2"),
    ],
)
def test_figures_are_put_into_words(figures, deviation, words) -> None:
    said = what_it_means(rows(*figures, deviation=deviation), "linear", "val")
    assert said.startswith(f"A linear probe reaches {figures[-1]:.3f} mIoU on val, ")
    assert words in said


@pytest.mark.parametrize(
    ("reached", "draws", "luck"), [(0.24, 1, True), (0.26, 1, False), (0.24, 3, False)]
)
@pytest.mark.parametrize("start", [None, "start (zero-init residual)"])
def test_one_draw_of_random_weights_is_not_trusted_for_a_small_gain(
    reached, draws, luck, start
) -> None:
    def drawn(value: float, name: str, count: int) -> Row:
        return Row.of(name, [{"mIoU": value, "hit@1": value}] * count)

    both = [drawn(0.2, "random weights", draws), drawn(reached, "runs/a", 1)]
    if start is not None:
        both = [drawn(0.1, "random weights", draws), drawn(0.2, start, draws), both[1]]
    said = what_it_means(both, "linear", "val")
    assert ("Repeat with --seeds 3" in said) is luck
    assert ("clearly better" in said) is not luck
    # Of another protocol there may be more seeds than of this one.
    more = [*both[-2].seeds, {"finetune mIoU": 0.2}, {"finetune mIoU": 0.2}]
    both[-2] = Row.of(both[-2].name, more)
    assert ("Repeat with --seeds 3" in what_it_means(both, "linear", "val")) is luck
    health = {"spread": 0.6, "effective rank": 20.0, "hit@1 by chance": 0.04}
    for row in both:
        row.scores.update(health | {"hit@1, colours kept": 0.3})
    assert ("Repeat with --seeds 3" in without(both)) is luck
    given = replace(seen(0.1), name="start (weights.pt)")  # which random weights are ahead of
    assert ("Repeat with --seeds 3" in without([both[-2], given, both[-1]])) is luck


def test_judging_by_what_was_learned_from_is_noted(run, labelled) -> None:
    (note,) = evaluate(run, data=labelled, split="train", protocol="knn").notes
    assert note.startswith("Scored on the training images")
    assert evaluate(run, data=labelled, protocol="knn").notes == ()


def seen(hit: float, spread: float = 0.6, kept: float = 0.4) -> Row:
    scores = {"hit@1": hit, "hit@1, colours kept": kept, "hit@1 by chance": 0.04}
    return Row("a", scores | {"spread": spread, "effective rank": 20.0})


def test_hits_are_put_into_words() -> None:
    said = without([seen(0.3), seen(0.6)])
    assert said.startswith(
        "Cells find the same spot in another view of the image 60% of the time (30% with random "
        "weights, 4.0% by chance): clearly better than random weights."
    )
    assert "have not collapsed" in said
    assert "no clear gain over random weights" in without([seen(0.3), seen(0.3)])
    assert "less often than random weights" in without([seen(0.3), seen(0.2)])
    said = without([seen(0.3), seen(0.6), seen(0.5)])
    assert "by chance); 60% with the starting weights: less often than the starting weights" in said
    assert "better than the starting weights. The" in without([seen(0.3), seen(0.4), seen(0.5)])
    said = without([seen(0.3), seen(0.1), seen(0.3, kept=0.3)])
    assert "better than the starting weights, but not than random weights. The" in said
    said = without([seen(0.3), seen(0.6, spread=math.nan)])
    assert "4.0% by chance). The features are not finite (spread nan" in said
    assert "have collapsed" in without([seen(0.3), seen(0.6, spread=0.01)])
    assert "with random weights, " in without([seen(0.3)])


def test_a_network_that_goes_by_colour_is_told_so() -> None:
    said = without([seen(0.3), seen(0.3, kept=0.6)])
    assert "Matching relies on colour: 60% with colours unchanged. Use" in said
    assert "relies on colour" not in without([seen(0.5), seen(0.5, kept=0.6)])
    assert "relies on colour" not in without([seen(0.2), seen(0.3, kept=0.6)])  # not on it alone
    assert "relies on colour" not in without([seen(0.3, kept=0.6)])  # nothing was trained


def plain(path: Path) -> None:
    Image.effect_noise((40, 32), 90).convert("RGB").save(path)


def deep(path: Path) -> None:
    Image.fromarray(np.full((32, 40), 999, np.uint16)).save(path)


def test_images_are_spread_evenly_and_the_others_wait() -> None:
    assert evenly(12, 3)[:3] == [0, 4, 8]
    assert sorted(evenly(12, 3)) == list(range(12))
    assert evenly(2, 5) == [0, 1]


def test_others_stand_in_for_images_that_are_not_for_this_network(tmp_path) -> None:
    for number in range(4):  # the evenly spread ones are deep
        (plain if number % 2 else deep)(tmp_path / f"{number}.png")

    def fit(prepare, pixels):
        return pixels.mT[:, : prepare.shortest]

    wanted = preparation(24), preparation(32)
    images, notes = some_images(open_source(tmp_path), wanted, 2, 48, fit)
    assert [(name, [tensor.shape for tensor in each]) for name, each in images] == [
        (f"{tmp_path}/{number}.png", [(3, 24, 32), (3, 32, 32)]) for number in (1, 3)
    ]
    words = "it is 16-bit or float, where the images looked at were 8-bit"
    assert notes == [f"left out {tmp_path}/{number}.png: {words}" for number in (0, 2)]


def test_an_odd_image_is_named_and_the_others_are_judged(model, tmp_path, caplog) -> None:
    (tmp_path / "images").mkdir()
    for number in range(3):
        plain(tmp_path / "images" / f"{number}.png")
    tifffile.imwrite(tmp_path / "images" / "odd.tif", np.zeros((32, 40, 5), np.uint8))
    result = evaluate(f"random:{model}", images=tmp_path / "images")
    assert result.settings["images"] == 3
    (note,) = result.notes
    assert note.startswith(f"left out {tmp_path}/images/odd.tif: it has 5 channels where ")
    assert note in caplog.messages


def test_of_many_images_left_out_some_are_named() -> None:
    notes = left_out([f"{number}.png: broken" for number in range(9)])
    assert notes == [*(f"left out {n}.png: broken" for n in range(5)), "left out 4 more images"]
    assert left_out([]) == []
