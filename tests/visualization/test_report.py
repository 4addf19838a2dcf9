"""The report: it holds everything, loads nothing, and nothing in the data breaks it."""

import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from evil_run import EVIL, NAMES, make_images
from PIL import Image

from pixel_level_contrastive_learning.augment import Photometry
from pixel_level_contrastive_learning.backbones.checkpoint import (
    BackboneCard,
    Loaded,
    save_backbone,
)
from pixel_level_contrastive_learning.backbones.factory import build_backbone
from pixel_level_contrastive_learning.data.statistics import Statistics
from pixel_level_contrastive_learning.evaluation.features import Preparation, Reader
from pixel_level_contrastive_learning.evaluation.results import Evaluation, Row
from pixel_level_contrastive_learning.geometry import unit_centres
from pixel_level_contrastive_learning.visualization import explorer
from pixel_level_contrastive_learning.visualization.explorer import (
    SHOWN_SIDE,
    WHOLE,
    Sample,
    fed,
    middle_part,
    other_view,
    read_samples,
    short_names,
)
from pixel_level_contrastive_learning.visualization.page import (
    POLICY,
    Page,
    as_json,
    in_short,
    render,
)
from pixel_level_contrastive_learning.visualization.report import (
    TRAINED,
    look,
    stride_of,
    visualize,
)
from pixel_level_contrastive_learning.visualization.verdict import RunVerdict, findings, judge_run


class Elements(HTMLParser):
    """Elements, their attributes, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.here = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.here = tag

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.here, []).append(data)


@pytest.fixture(scope="module")
def text(report: Path) -> str:
    return report.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def read(text: str) -> Elements:
    return Elements(text)


def test_the_page_names_no_place_but_itself(read) -> None:
    for tag, attributes in read.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), (tag, value)
    styles = "".join(read.texts["style"])
    assert "url(" not in styles
    assert "@import" not in styles


def test_only_the_scripts_of_the_template_are_on_the_page(read) -> None:
    scripts = [attributes for tag, attributes in read.elements if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "cargo"}, {}]
    assert not any(name.startswith("on") for _, held in read.elements for name in held)


def test_the_browser_is_told_to_run_nothing_else(read) -> None:
    policy = next(
        held["content"] for tag, held in read.elements if tag == "meta" and "http-equiv" in held
    )
    assert re.fullmatch(
        r"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src "
        r"'sha256-[A-Za-z0-9+/]{43}='; base-uri 'none'; form-action 'none'",
        policy,
    )
    assert POLICY.startswith("default-src 'none'")


def test_names_stand_on_the_page_as_they_are(read) -> None:
    captions = "".join(read.texts["bdi"])
    for name in NAMES:
        assert name in captions
    cargo = json.loads("".join(read.texts["script"][:1]))
    assert {image["name"] for image in cargo["images"] if image["whole"]} == set(NAMES)


def test_settings_and_scores_stand_on_the_page_as_they_are(text, read) -> None:
    assert EVIL not in text
    assert EVIL in read.texts["td"]
    assert "0.375 ± 0.011" in read.texts["td"]
    assert "0.125" in read.texts["td"]
    assert any(EVIL in words for words in read.texts["p"])


def test_every_picture_has_words_and_every_control_a_label(read) -> None:
    images = [held for tag, held in read.elements if tag == "img"]
    assert len(images) > 20
    assert all(held.get("alt") for held in images)
    assert {"lang": "en"} in [held for tag, held in read.elements if tag == "html"]
    charts = [held for _, held in read.elements if held.get("role") == "img"]
    assert len(charts) == 8
    assert all("from" in (held["aria-label"] or "") for held in charts)


def test_all_parts_are_there(read) -> None:
    headings = [words.strip() for words in read.texts["h2"] if words.strip()]
    assert headings == [
        "The features look sound",
        "Point at a pixel",
        "What the network sees",
        "The run",
        "How good the features are",
        "Matching cells",
        "While it learned",
        "Configuration",
    ]


def test_of_many_pictures_some_are_shown_the_first_and_the_last_included(read) -> None:
    steps = [words for words in read.texts["figcaption"] if words.startswith("step ")]
    assert steps[0] == "step 0"
    assert steps[-1] == "step 800"
    assert len(steps) == 6


def test_the_run_is_judged_in_words(read) -> None:
    told = "".join(read.texts["li"])
    assert "rose from" in told
    assert "40 matching pairs" in told
    assert "40% of the time goes by waiting for images" in told


@pytest.mark.parametrize(
    ("end", "heading"),
    [(0.9, "The features look sound"), (0.1, "Sound features, little learned")],
)
def test_a_run_that_learned_nothing_is_not_called_healthy(end, heading) -> None:
    held = {"step": [1, 2], "pixel_cosine": [0.2, end], "spread": [0.8], "effective_rank": [9]}
    assert judge_run(held, []).heading == heading
    del held["pixel_cosine"]
    assert judge_run(held, []).heading == "The features look sound"


def test_a_quick_loader_is_not_worth_a_word() -> None:
    assert findings({"step": [1, 2], "waiting": [0.1, 0.1]}) == []


def test_a_collapsed_run_is_called_one(run_maker, tmp_path) -> None:
    run = run_maker("collapsed")
    lines = [{"step": step, "spread": 0.01, "effective_rank": 1.0} for step in range(9)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = visualize(run, out=tmp_path / "collapsed.html", count=1).read_text()
    assert "Something is wrong with this run" in page
    assert "have collapsed" in page


def test_a_backbone_without_a_run_has_a_report_too(run_maker, tmp_path) -> None:
    run = run_maker("bare")
    images = tmp_path / "images"
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("backbone.safetensors", "backbone.json"):
        shutil.copy(run / name, alone / name)
    page = visualize(alone, images=images, out=tmp_path / "new folder" / "page.html", count=1)
    assert page == tmp_path / "new folder" / "page.html"
    words = Elements(page.read_text()).texts["h2"]
    assert "Point at a pixel" in words
    assert "The run" not in words
    assert "Configuration" not in words


def test_a_report_is_the_same_each_time_and_moves_no_generator(run_maker, tmp_path) -> None:
    run = run_maker("twice")
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one = visualize(run, out=tmp_path / "one.html", count=2).read_bytes()
    assert torch.equal(torch.get_rng_state(), before)
    assert visualize(run, out=tmp_path / "two.html", count=2).read_bytes() == one
    assert visualize(run, out=tmp_path / "three.html", count=2, seed=1).read_bytes() != one


def test_twelve_images_stay_under_ten_megabytes(run_maker, tmp_path) -> None:
    run = run_maker("twelve")
    card = json.loads((run / "backbone.json").read_text())
    # A stride of two on large views: maps that no page could carry as they are.
    card |= {"pixel_layer": "0", "image_size": [160, 160]}
    (run / "backbone.json").write_text(json.dumps(card))
    images = make_images(tmp_path / "twelve", 12)
    page = visualize(run, images=images, out=tmp_path / "large.html")
    assert page.stat().st_size < 10e6
    assert page.read_text().count('class="shared"') == 2 * 12


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([], "does not say what it saw"),
        (["gone/images"], "saw 'gone/images', which is not there"),
        ("gone", "saw 'gone', which is not there"),
    ],
)
def test_a_run_whose_images_are_not_there_asks_for_some(run_maker, tmp_path, data, why) -> None:
    run = run_maker("forgetful", data=data)
    with pytest.raises(ValueError) as error:
        visualize(run, out=tmp_path / "page.html")
    assert str(error.value) == (
        f"images is None and the run {why}; give images, such as a folder of some that were not "
        "trained on"
    )
    assert not (tmp_path / "page.html").exists()


def test_values_out_of_range_are_refused_at_once(tmp_path) -> None:
    with pytest.raises(ValueError) as error:
        visualize(tmp_path, count=0, seed=-1)
    assert str(error.value) == (
        "count is 0; it must be a whole number of at least 1\n"
        "seed is -1; it must be a whole number of at least 0"
    )


def test_a_folder_is_no_page(run_maker, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a folder; name a file, such as report\.html"):
        visualize(run_maker("page"), out=tmp_path)


def test_settings_that_are_none_are_refused(run_maker, tmp_path) -> None:
    run = run_maker("broken")
    (run / "config.yaml").write_text("- a list\n")
    with pytest.raises(ValueError) as error:
        visualize(run, out=tmp_path / "page.html")
    assert str(error.value) == (
        f"{run / 'config.yaml'} holds no settings; take the file that the run wrote"
    )


def scores(protocol: str, sentence: str) -> Evaluation:
    row = Row("random weights", {"figure": 0.25})
    given = {"weights": "a", "data": "b", "settings": {}, "rows": (row,)}
    return Evaluation(protocol=protocol, sentence=sentence, **given)


def test_figures_with_labels_and_without_are_both_shown(run_maker, tmp_path) -> None:
    run = run_maker("judged")
    (run / "predictions").mkdir()
    Image.new("RGB", (8, 4)).save(run / "predictions" / "0000_a.png")
    scores("correspondence", "Spots were found.").write(run)
    text = visualize(run, out=tmp_path / "page.html", count=1).read_text()
    assert "Spots were found." in text
    assert "What they predict" not in text  # which these figures are not about
    scores("linear", "Classes were found.").write(run)
    text = visualize(run, out=tmp_path / "page.html", count=1).read_text()
    told = ("Classes were found.", "What they predict", "Spots were found.")
    places = [text.index(words) for words in told]
    assert places == sorted(places)
    assert text.count('id="how-good-the-features-are"') == 1
    assert text.count('id="whether-spots-are-found-again"') == 1


def test_figures_of_earlier_weights_are_said_to_be_old(run_maker, tmp_path) -> None:
    run = run_maker("resumed")
    found = scores("linear", "Classes were found.").write(run)
    weights = run / "backbone.safetensors"
    for lead, told in ((-60, 0), (60, 1)):
        os.utime(weights, (0, found.stat().st_mtime + lead))
        text = visualize(run, out=tmp_path / "page.html", count=1).read_text()
        assert text.count("older than the run&#39;s weights") == told
    os.utime(weights, (0, 0))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000009.ckpt").touch()
    os.utime(found, (0, 1))
    text = visualize(run, out=tmp_path / "page.html", count=1).read_text()
    assert "older than the run&#39;s weights" in text


def test_a_broken_evaluation_is_named(run_maker, tmp_path) -> None:
    run = run_maker("odd")
    (run / "evaluation.json").write_text("{}")
    with pytest.raises(ValueError) as error:
        visualize(run, out=tmp_path / "page.html")
    assert str(error.value) == (
        f"{run / 'evaluation.json'} is not what an evaluation writes (KeyError('rows')); evaluate "
        "again with this folder as out, or take the file away"
    )


# Where things lie.

AVERAGES = """
from torch import nn

def averages(channels=3):
    net = nn.Sequential(nn.Conv2d(channels, channels, 8, 8, bias=False, groups=channels))
    nn.init.constant_(net[0].weight, 1 / 64)
    return net.append(nn.AdaptiveAvgPool2d(1))

def padded(channels=3):
    halves = (nn.Conv2d(channels if k == 0 else 4, 4, 3, 2, 1) for k in range(3))
    return nn.Sequential(nn.Sequential(*halves), nn.AdaptiveAvgPool2d(1))

def unpadded(channels=3):
    halves = (nn.Conv2d(channels if k == 0 else 4, 4, 3, 2) for k in range(3))
    return nn.Sequential(nn.Sequential(*halves), nn.AdaptiveAvgPool2d(1))

def pooled(channels=3):
    net = nn.Sequential(nn.Conv2d(channels, 4, 1), nn.AdaptiveAvgPool2d(5))
    return nn.Sequential(net, nn.AdaptiveAvgPool2d(1))

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 8, 8)
        self.norm = nn.LayerNorm([4, 4, 4])

    def forward(self, x):
        return self.norm(self.patches(x)).mean((2, 3))
"""


def loaded(folder: Path, function: str, side: int) -> Loaded:
    """One of these networks."""
    (folder / "averages.py").write_text(AVERAGES)
    card = BackboneCard(
        model=f"{folder / 'averages.py'}:{function}",
        channels=3,
        image_size=(side, side),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        pixel_layer="patches" if function == "Fixed" else "0",
        instance_layer="1",
    )
    return Loaded(build_backbone(card.model, channels=3, image_size=(side, side)), card, None)


@pytest.mark.parametrize("side", [28, 32, 35])
def test_a_spot_of_the_map_lies_where_it_is_in_the_image(tmp_path, side) -> None:
    ramp = torch.linspace(0, 1, 104).expand(3, 80, 104)
    seen = look(loaded(tmp_path, "averages", side), [ramp], torch.device("cpu"), fixed=False)
    (found,) = seen.maps[TRAINED]
    width = found.shape[-1]
    expected = (torch.arange(width) + 0.5) / width
    # But for the outermost ones, which see some of the mirror image.
    torch.testing.assert_close(found[0, 0, 2:-2], expected[2:-2], atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("function", "side", "stride"),
    [
        ("averages", 28, 8),  # three cells and a rest
        ("padded", 36, 8),  # five cells, of which the last sticks out
        ("padded", 32, 8),
        ("unpadded", 32, 11),  # three cells: as before, since true ones would leave the rim out
        ("pooled", 32, None),
    ],
)
def test_a_stride_is_that_of_the_network_and_not_of_the_view(
    tmp_path, function, side, stride
) -> None:
    own = loaded(tmp_path, function, side)
    reader = Reader(own.net, [own.card.pixel_layer], 3, own.card.image_size)
    assert stride_of(reader, own.card) == stride


def test_a_network_of_ones_own_that_takes_one_size_only_is_shown(tmp_path) -> None:
    own = loaded(tmp_path, "Fixed", 32)
    save_backbone(tmp_path / "run" / "backbone.safetensors", own.net, own.card)
    page = visualize(
        tmp_path / "run", images=make_images(tmp_path / "images", 1), out=tmp_path / "page.html"
    )
    assert page.exists()


# Parts.


def test_json_in_a_script_ends_no_script() -> None:
    held = as_json({"name": "</script><!-- & \u2028 é"})
    assert not set("<>&\u2028é") & set(held)
    assert json.loads(held) == {"name": "</script><!-- & \u2028 é"}


def test_what_is_filled_in_is_not_filled_in_again() -> None:
    verdict = RunVerdict(True, "{{ page.version }}", "{% raw %}", ["{# no comment #}"])
    page = Page("{{ cargo }}", {}, verdict, [], [], [], [], [], 0.7, [], {}, "secret")
    text = render(page, None)
    assert text.count("secret") == 1
    for words in ("{{ page.version }}", "{% raw %}", "{# no comment #}", "<bdi>{{ cargo }}</bdi>"):
        assert words in text


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (True, "yes"),
        (None, "none"),
        (0.00012345, "0.0001234"),
        (float("nan"), "not finite"),
        ((0.2, 1), "0.2, 1"),
        (["a", None], "a, none"),
        ("text", "text"),
    ],
)
def test_settings_are_shown_in_short(value, words) -> None:
    assert in_short(value) == words


def run(cosine: float, rank: float, spread: float, kept: float, hit1: float) -> dict[str, list]:
    """The figures of a run whose cells found their spot in 47 % of cases before the first step."""
    return {
        "step": [1, 2],
        "pixel_cosine": [0.1, cosine],
        "effective_rank": [60, rank],
        "spread": [0.8, spread],
        "hit1_colours_kept": [0.47, kept],
        "hit1": [0.475, hit1],
    }


@pytest.mark.parametrize(
    ("figures", "well", "heading"),
    [
        # The runs of docs/healthy-run.md.
        (run(0.75, 11, 0.75, 0.63, 0.59), True, "The run looks healthy"),
        (run(0.76, 1.6, 0.56, 0.48, 0.36), False, "The features are collapsing"),
        (run(0.80, 17, 0.65, 0.60, 0.45), False, "It goes by colour"),
        # Variations.
        (run(0.80, 17, 0.65, 0.90, 0.60), True, "The run looks healthy"),  # not alone
        (run(0.82, 21, 0.78, 0.50, 0.49), True, "Sound features, little learned"),
        (run(0.87, 2.5, 0.46, 0.50, 0.43), False, "Worse than at the start"),
        (run(0.05, 21, 0.78, 0.58, 0.54), True, "Sound features, little learned"),
        (run(0.87, 1.1, 0.46, 0.58, 0.54), False, "Something is wrong with this run"),
    ],
)
def test_what_a_run_is_called(figures, well, heading) -> None:
    found = judge_run(figures, [])
    assert (found.healthy, found.heading) == (well, heading)


@pytest.mark.parametrize(
    ("hit1", "cells", "heading"),
    [
        (0.43, 50, "Sound features, little learned"),  # a deviation is 0.07
        (0.43, 5000, "Worse than at the start"),
        (0.54, 50, "Sound features, little learned"),
        (0.54, 5000, "The run looks healthy"),
        (0.335, 50, "Worse than at the start"),
    ],
)
def test_chance_is_not_taken_for_learning(hit1, cells, heading) -> None:
    figures = run(0.8, 9, 0.7, 0.5, hit1) | {"hit_cells": [cells, cells]}
    assert judge_run(figures, []).heading == heading


def test_what_is_said_of_correspondence() -> None:
    good, colour = run(0.8, 9, 0.7, 0.58, 0.54), run(0.8, 21, 0.7, 0.63, 0.41)
    assert (
        "A cell finds its own spot in another view in 54% of cases, 48% before the first step."
        in findings(good)
    )
    assert not any("change colour more" in told for told in findings(good))
    assert any("left as they are it finds 63%: change colour more" in t for t in findings(colour))


def test_steps_without_a_rank_hide_no_collapse() -> None:
    figures = run(0.76, 1.6, 0.56, 0.48, 0.36)
    figures |= {"effective_rank": [float("nan"), 60, 1.6]}
    assert judge_run(figures, []).heading == "The features are collapsing"


def test_a_run_that_was_never_looked_at_is_judged_by_its_features() -> None:
    held = {"step": [1, 2], "spread": [0.8], "effective_rank": [9], "hit1": [float("nan")]}
    assert judge_run(held, []).heading == "The features look sound"


def test_the_likeness_of_pairs_alone_makes_no_run_healthy() -> None:
    held = {"step": [1, 2], "spread": [0.8] * 2, "effective_rank": [9] * 2}
    found = judge_run(held | {"pixel_cosine": [0.2, 0.8]}, [])
    assert found.heading == "The features look sound"
    assert "was not measured" in "".join(found.findings)
    found = judge_run(held | {"pixel_cosine": [0.8, 0.2]}, [])
    assert found.heading == "Sound features, little learned"


def test_a_run_of_the_instance_loss_alone_is_judged_by_what_it_has() -> None:
    figures = run(0.8, 11, 0.75, 0.63, 0.59)
    figures |= {"pixel_cosine": [0.0, 0.0], "positive_pairs": [0, 0], "instance_cosine": [0.1, 0.6]}
    assert judge_run(figures, []).heading == "The run looks healthy"
    told = findings(figures)
    assert told[0].startswith("The likeness of two views of an image rose from 0.10 to 0.60")
    assert any("alpha is 0, or no two views see the same spot" in own for own in told)
    figures |= {"pixel_cosine": [0.1, 0.3], "positive_pairs": [9, 9]}
    told = findings(figures)
    assert told[0].startswith("The likeness of cells that see the same spot rose from 0.10 to 0.30")
    assert "An image gives 9 matching pairs of cells on average." in told


def test_a_probe_is_told_of() -> None:
    figures = run(0.8, 11, 0.75, 0.63, 0.59)
    assert not any("probe" in own for own in findings(figures))
    told = findings(figures | {"probe_miou": [0.25, float("nan"), 0.31, 0.29]})
    assert any(
        "A probe reaches 0.290 mIoU; 0.250 before the first step, 0.310 at best." in t for t in told
    )


@pytest.fixture
def prepare() -> Preparation:
    statistics = Statistics(3, (0.5,) * 3, (0.25,) * 3, None, None, (64, 64))
    return Preparation(statistics, 48)


def test_images_are_read_and_broken_ones_replaced(tmp_path, prepare) -> None:
    for number in range(4):
        size = (40, 30) if number % 2 else (30, 40)
        Image.new("RGB", size, (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"")
    held = read_samples(tmp_path, prepare, 2)
    assert [sample.name for sample in held] == ["2.png", "1.png"]
    assert [sample.source for sample in held] == [0, 1]
    assert held[0].size == (SHOWN_SIDE, SHOWN_SIDE * 3 // 4)
    assert held[0].pixels[0].mean().item() == pytest.approx(120 / 255, abs=1e-3)
    assert held[0].whole
    assert fed(held[0], prepare).shape == (3, 64, 48)  # the shorter side is 48


def test_a_folder_of_nothing_but_broken_images_is_refused(tmp_path, prepare) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError) as error:
        read_samples(tmp_path, prepare, 2)
    assert str(error.value) == (
        f"none of 1 images can be used, the first because of {tmp_path}/a.png: the file is empty "
        "(0 bytes); give a folder of images that open in a viewer and are as the network knows "
        "them: 3 channels, 8-bit"
    )


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (np.zeros((30, 40), np.uint16), "it is 16-bit"),
        (np.zeros((30, 40, 5), np.uint8), "it has 5 channels"),
    ],
)
def test_an_image_that_is_not_for_this_network_is_named_and_left_out(
    tmp_path, prepare, caplog, odd, why
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", odd)
    Image.new("RGB", (40, 30)).save(tmp_path / "b.png")
    assert [sample.name for sample in read_samples(tmp_path, prepare, 2)] == ["b.png"]
    (told,) = caplog.messages
    assert told.startswith(f"left out {tmp_path}/a.tif: {why}")


def test_of_a_strip_the_middle_is_shown() -> None:
    strip = torch.arange(100.0).expand(1, 10, 100)
    assert middle_part(strip)[0, 0].tolist() == list(range(40, 60))
    assert middle_part(strip.mT).shape == (1, 20, 10)


def test_names_do_not_tell_where_the_folder_is() -> None:
    assert short_names(["/home/me/data/a.png", "/home/me/data/b.png"]) == ["a.png", "b.png"]
    assert short_names(["/x/train/a.png", "/x/val/a.png"]) == ["train/a.png", "val/a.png"]
    assert short_names(["item 0", "item 7"]) == ["item 0", "item 7"]
    assert short_names(["only.png"]) == ["only.png"]


def test_names_from_here_and_from_elsewhere_are_cut_alike(tmp_path, monkeypatch) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    here, elsewhere = "more/b.png", str(tmp_path / "a" / "c.png")
    assert short_names([elsewhere, here]) == ["a/c.png", "work/more/b.png"]
    assert short_names([elsewhere, "b.png"]) == ["a/c.png", "work/b.png"]


def test_of_names_on_several_drives_the_last_part_is_left(monkeypatch) -> None:
    def refuse(_: list[str]) -> str:
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", refuse)
    assert short_names(["/c/home/me/a.png", "/d/b.png"]) == ["a.png", "b.png"]


def test_names_that_are_no_text_can_be_written() -> None:
    name = os.fsdecode(b"/x/caf\xe9.png")
    assert short_names([name])[0].encode() == "caf\N{REPLACEMENT CHARACTER}.png".encode()


def test_another_view_knows_where_it_lies(monkeypatch) -> None:
    still = Photometry(prob_jitter=0, prob_gray=0, prob_blur=0)
    monkeypatch.setattr(explorer, "OTHER_COLOUR", still)
    h, w = 60, 80
    x, y = unit_centres(w, torch.zeros(1)), unit_centres(h, torch.zeros(1))
    where = torch.stack((x.expand(h, w), y[:, None].expand(h, w), torch.zeros(h, w)))
    view = other_view(Sample("a", where, 3, WHOLE), seed=5)
    assert view.source == 3
    assert not view.whole
    assert view.to_source[0, 0] < 0  # mirrored
    # What a pixel of the view holds is where it comes from.
    for row, column in ((10, 10), (30, 70), (50, 40)):
        point = torch.tensor([(column + 0.5) / w, (row + 0.5) / h, 1.0])
        torch.testing.assert_close(
            view.pixels[:2, row, column], view.to_source @ point, atol=2e-3, rtol=0
        )


def test_another_view_is_the_same_for_a_seed_and_moves_no_generator() -> None:
    sample = Sample("a", torch.rand(3, 32, 40), 0, WHOLE)
    before = torch.get_rng_state()
    one, two, three = (other_view(sample, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.pixels, two.pixels)
    assert not torch.equal(one.pixels, three.pixels)
    assert one.pixels.shape == sample.pixels.shape
