"""The report: it holds everything, loads nothing, and nothing in the data breaks it."""

import json
import os
import re
import shutil
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from evil_run import EVIL, NAMES, diverge, make_images
from PIL import Image
from small_cards import small_card

from pixel_level_contrastive_learning.evaluation.results import CurvePoint, Evaluation, Row
from pixel_level_contrastive_learning.visualization import report as report_module
from pixel_level_contrastive_learning.visualization.report import (
    OF_OTHERS,
    POLICY,
    Report,
    default_page,
    embed,
    read_evaluations,
    render,
    run_facts,
    saved_pictures,
    setting_text,
    visualize,
    without_places,
)
from pixel_level_contrastive_learning.visualization.verdict import RunVerdict


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
    assert scripts == [{"type": "application/json", "id": "explorer-data"}, {}]
    assert not any(name.startswith("on") for _, attributes in read.elements for name in attributes)


def test_the_browser_is_told_to_run_nothing_else(read) -> None:
    policy = next(
        attributes["content"]
        for tag, attributes in read.elements
        if tag == "meta" and "http-equiv" in attributes
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
    data = json.loads("".join(read.texts["script"][:1]))
    assert {image["name"] for image in data["images"] if image["whole"]} == set(NAMES)


def test_settings_and_scores_stand_on_the_page_as_they_are(text, read) -> None:
    assert EVIL not in text
    assert EVIL in read.texts["td"]
    assert "0.375 ± 0.011" in read.texts["td"]
    assert "0.125" in read.texts["td"]
    assert any(EVIL in text for text in read.texts["p"])


def test_every_picture_has_words_and_every_control_a_label(read) -> None:
    images = [attributes for tag, attributes in read.elements if tag == "img"]
    assert len(images) > 20
    assert all(attributes.get("alt") for attributes in images)
    assert {"lang": "en"} in [attributes for tag, attributes in read.elements if tag == "html"]
    charts = [attributes for _, attributes in read.elements if attributes.get("role") == "img"]
    assert len(charts) == 8
    assert all("from" in (attributes["aria-label"] or "") for attributes in charts)


def test_all_parts_are_there(read) -> None:
    headings = [heading.strip() for heading in read.texts["h2"] if heading.strip()]
    assert headings == [
        "The features look healthy",
        "Point at a pixel",
        "What the network sees",
        "The run",
        "How good the features are",
        "Matching cells",
        "Features during training",
        "Configuration",
    ]


def test_of_many_pictures_some_are_shown_the_first_and_the_last_included(read) -> None:
    steps = [caption for caption in read.texts["figcaption"] if caption.startswith("step ")]
    assert steps[0] == "step 0"
    assert steps[-1] == "step 800"
    assert len(steps) == 6


def test_pictures_are_called_as_their_images_are(tmp_path) -> None:
    for name in ("0002_2024-01-05", "step-00000100"):
        Image.new("RGB", (8, 4)).save(tmp_path / f"{name}.png")
    captions = [own.caption for own in saved_pictures(tmp_path, "Prediction")]
    assert captions == ["0002_2024-01-05", "step 100"]


def test_the_run_is_judged_in_words(read) -> None:
    text = "".join(read.texts["li"])
    assert "rose from" in text
    assert "40 matching pairs" in text
    assert "40% of the time is spent waiting for images" in text


def test_a_collapsed_run_is_called_one(run_maker, tmp_path) -> None:
    run = run_maker("collapsed")
    lines = [{"step": step, "spread": 0.01, "effective_rank": 1.0} for step in range(9)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    page = visualize(run, out=tmp_path / "collapsed.html", count=1).read_text()
    assert "Something is wrong with this run" in page
    assert "have collapsed" in page


@pytest.mark.parametrize("with_metrics", [True, False])
def test_a_diverged_run_has_a_report_that_says_so(run_maker, tmp_path, with_metrics) -> None:
    run = run_maker("diverged")
    if not with_metrics:  # else by them its features have not collapsed
        (run / "metrics.jsonl").unlink()
    diverge(run)
    page = visualize(run, out=tmp_path / "diverged.html", count=1).read_text()
    assert "Something is wrong with this run" in page
    assert "The features are not finite" in page


def test_a_backbone_without_a_run_has_a_report_too(run_maker, tmp_path) -> None:
    run = run_maker("bare")
    images = tmp_path / "images"
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("backbone.safetensors", "backbone.json"):
        shutil.copy(run / name, alone / name)
    page = visualize(alone, images=images, out=tmp_path / "new folder" / "page.html", count=1)
    assert page == tmp_path / "new folder" / "page.html"
    headings = Elements(page.read_text()).texts["h2"]
    assert "Point at a pixel" in headings
    assert "The run" not in headings
    assert "Configuration" not in headings


def test_a_report_stands_by_default_beside_its_weights(run_maker, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = run_maker("one", distance_thres=0.5), run_maker("two")
    assert [visualize(run, count=1) for run in (one, two)] == [
        one / "report.html",
        two / "report.html",
    ]
    shutil.copy(one / "backbone.json", one / "given.json")
    weights = shutil.copy(one / "backbone.safetensors", one / "given.safetensors")
    page = visualize(weights, count=1)  # of the images and with the settings of its run
    assert page == one / "report-given.html"
    assert "whose centres are closer than 0.5 cell diagonals" in page.read_text()
    assert not list(tmp_path.glob("*.html"))
    checkpoint = one / "checkpoints" / "best.ckpt"
    assert default_page(checkpoint) == one / "report-best.html"
    with pytest.raises(ValueError, match="random:torchvision/resnet18 is not a run's folder; name"):
        visualize("random:torchvision/resnet18", images=tmp_path / "images")


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
    card |= {"pixel_layer": "0", "image_size": [160, 160], "fingerprint": None}
    (run / "backbone.json").write_text(json.dumps(card))
    images = make_images(tmp_path / "twelve", 12)
    page = visualize(run, images=images, out=tmp_path / "large.html")
    assert page.stat().st_size < 10e6
    assert page.read_text().count('class="shared"') == 2 * 12


@pytest.mark.parametrize("settings", [{}, {"nodata": 7.0, "pages": "images"}])
def test_images_are_read_as_those_of_the_run(run_maker, tmp_path, monkeypatch, settings) -> None:
    run = run_maker("read", nodata=-9999.0, pages="first")
    calls = []
    monkeypatch.setattr(
        report_module, "open_source", lambda _, **options: calls.append(options) or [][0]
    )
    with pytest.raises(IndexError):
        visualize(run, out=tmp_path / "page.html", **settings)
    assert calls == [{"nodata": -9999.0, "pages": "first"} | settings]


@pytest.mark.parametrize(
    ("data", "why"),
    [
        ([], "does not record its images"),
        (["gone/images"], "used 'gone/images', which is missing"),
        ("gone", "used 'gone', which is missing"),
    ],
)
def test_a_run_whose_images_are_not_there_asks_for_some(run_maker, tmp_path, data, why) -> None:
    run = run_maker("forgetful", data=data)
    with pytest.raises(ValueError) as error:
        visualize(run, out=tmp_path / "page.html")
    assert str(error.value) == (
        f"images is None and the run {why}; give images, such as a folder of images that were not "
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
    with pytest.raises(ValueError, match=f"^seed is {2**64}; it must be a whole number of at most"):
        visualize(tmp_path, seed=2**64)


def test_a_folder_is_no_page(run_maker, tmp_path) -> None:
    with pytest.raises(ValueError, match=r"a folder; name a file, such as report\.html"):
        visualize(run_maker("page"), out=tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the folder of out is .*file is a file; name a folder"):
        visualize(tmp_path / "page", out=tmp_path / "file" / "report.html")


def test_settings_that_are_none_are_refused(run_maker, tmp_path) -> None:
    run = run_maker("broken")
    (run / "config.yaml").write_text("- a list\n")
    with pytest.raises(
        ValueError, match=r"config\.yaml holds a list and no settings; give the con"
    ):
        visualize(run, out=tmp_path / "page.html")


def scores(protocol: str, sentence: str) -> Evaluation:
    row = Row("random weights", {"figure": 0.25})
    common = {"weights": "a", "data": "b", "settings": {}, "rows": (row,)}
    return Evaluation(protocol=protocol, sentence=sentence, **common)


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
    sentences = ("Classes were found.", "What they predict", "Spots were found.")
    places = [text.index(sentence) for sentence in sentences]
    assert places == sorted(places)
    assert text.count('id="how-good-the-features-are"') == 1
    assert text.count('id="how-well-cells-match-between-views"') == 1


def test_a_label_curve_stands_before_the_predictions(run_maker, tmp_path) -> None:
    run = run_maker("curved")
    (run / "predictions").mkdir()
    for path in (run / "predictions" / "0000_a.png", run / "label-curve.png"):
        Image.new("RGB", (8, 4)).save(path)
    evaluation = scores("finetune", "Masks were saved.")
    evaluation.write(run)
    page = tmp_path / "page.html"
    assert "How many masks they need" not in visualize(run, out=page, count=1).read_text()
    points = (CurvePoint(3, 0.4, 0.0, (0.4,)), CurvePoint(9, 0.5, 0.0, (0.5,)))
    row = replace(evaluation.rows[0], curves={"finetune": points})
    replace(evaluation, rows=(row,)).write(run)
    text = visualize(run, out=page, count=1).read_text()
    assert text.index("How many masks they need") < text.index("What they predict")
    table = text[text.index("mIoU by the number of masks: finetune") :]
    assert str(tmp_path) not in text
    assert re.findall(r">(0\.\d+)</td>", table)[:2] == ["0.400", "0.500"]
    (run / "label-curve.png").write_bytes(b"no picture")
    assert "How many masks they need" not in visualize(run, out=page, count=1).read_text()


def test_a_page_tells_nothing_of_the_machine() -> None:
    settings = without_places(
        {"data": ["/home/me/slides", "https://there/a.tar"], "out": "~/runs/one", "steps": 3}
    )
    assert settings == {"data": ["slides", "https://there/a.tar"], "out": "one", "steps": 3}


def test_figures_of_earlier_weights_are_said_to_be_old(run_maker, tmp_path) -> None:
    run = run_maker("resumed")
    random, run_row = (
        Row("random weights", {"mIoU": 0.3}),
        Row("runs/resumed", {"mIoU": 0.2}, baselines=("random weights",)),
    )
    path = replace(scores("linear", "Classes were found."), rows=(random, run_row)).write(run)
    weights = run / "backbone.safetensors"
    for lead, count in ((-60, 0), (60, 1)):
        os.utime(weights, (0, path.stat().st_mtime + lead))
        text = visualize(run, out=tmp_path / "page.html", count=1).read_text()
        assert text.count("older than the run&#39;s weights") == count
        assert ("Worse than random weights" in text) != count
    os.utime(weights, (0, 0))
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-00000009.ckpt").touch()
    os.utime(path, (0, 1))
    text = visualize(run, out=tmp_path / "page.html", count=1).read_text()
    assert "older than the run&#39;s weights" in text


def test_figures_of_other_weights_do_not_judge_the_run(run_maker) -> None:
    run = run_maker("mine")
    random = Row("random weights", {"mIoU": 0.3})
    names = "mine", "before/it/moved/mine", str(run / "checkpoints" / "best.ckpt"), "runs/other"
    notes = []
    for name in names:
        row = Row(name, {"mIoU": 0.2}, baselines=("random weights",))
        replace(scores("linear", "Worse."), rows=(random, row)).write(run)
        (evaluation,) = read_evaluations(run)
        notes.append(evaluation.notes)
    assert notes == [(), (), (), (OF_OTHERS,)]
    text = visualize(run, count=1).read_text()
    assert OF_OTHERS.replace("'", "&#39;") in text
    assert "Worse than random weights" not in text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{}", "KeyError('rows')"),
        ('{"rows": []}', "ValueError('rows is empty; it must hold a row for each network')"),
        ('{"rows": [{"name": "a", "scores": []}]}', "AttributeError("),
    ],
)
def test_a_broken_evaluation_is_named(run_maker, text, words) -> None:
    run = run_maker("odd")
    (run / "evaluation.json").write_text(text)
    with pytest.raises(ValueError) as error:
        read_evaluations(run)
    told = str(error.value)
    assert told.startswith(f"{run / 'evaluation.json'} is not a file of pixelcl evaluate ({words}")
    assert told.endswith("; evaluate again with this folder as out, or delete the file")


def test_a_figure_that_one_network_lacks_is_a_dash() -> None:
    random, ours = Row("random", {"mIoU": 0.125}), Row("a", {"mIoU": 0.25, "knn mIoU": 0.5})
    found = replace(scores("linear", ""), rows=(random, replace(ours, classes={"sky": 0.75})))
    cells = re.findall(r"<td>([^<]+)</td>", render(bare(evaluations=[found]), None))
    assert cells == ["0.125", "-", "0.250", "0.500", "-", "0.750"]


def test_the_size_of_the_views_is_height_and_width_as_in_the_log() -> None:
    facts = run_facts(small_card("timm/test_resnet", image_size=(32, 48)), {"step": [4.0]})
    assert (facts["views"], facts["steps"]) == ("32 x 48 px", "4")


def bare(**overrides: object) -> Report:
    """A report of nothing but these parts."""
    parts = {field.name: () for field in fields(Report)}
    defaults = {"name": "", "facts": {}, "verdict": RunVerdict(True, "", "", []), "settings": {}}
    return Report(**parts | defaults | {"threshold": 0.7, "version": ""} | overrides)


def test_json_in_a_script_ends_no_script() -> None:
    name = "</script><!-- & \u2028 é"
    text = render(bare(), {"name": name})
    (data,) = re.findall(r'id="explorer-data">(.*?)</script>', text)
    assert not set("<>&\u2028é") & set(data)
    assert json.loads(data) == {"name": name}


def test_what_is_filled_in_is_not_filled_in_again() -> None:
    verdict = RunVerdict(True, "{{ report.version }}", "{% raw %}", ["{# no comment #}"])
    text = render(bare(name="{{ explorer }}", verdict=verdict, version="secret"), None)
    assert text.count("secret") == 1
    for markup in ("{{ report.version }}", "{% raw %}", "{# no comment #}", "{{ explorer }}</bdi>"):
        assert markup in text


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
def test_settings_are_shown_setting_text(value, words) -> None:
    assert setting_text(value) == words


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "webp"), ("RGB", "jpeg")])
def test_pictures_are_held_by_their_uris(mode, kind) -> None:
    assert embed(Image.new(mode, (8, 4)), "gray").uri.startswith(f"data:image/{kind};base64,")
