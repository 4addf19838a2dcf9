"""The report in a browser: it answers pointer, touch and keys, and keeps to itself."""

import json
import re
import shutil
from base64 import b64decode
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from evil_run import NAMES
from playwright.sync_api import Browser, Locator, Page, sync_playwright

from pixel_level_contrastive_learning.visualization.pca import likeness

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip(f"no browser to look at the page with: none of {', '.join(names)} is here")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(FLAGS))
        yield browser
        browser.close()


class Visit:
    """A page, what it complained about, and what it asked others for."""

    def __init__(self, browser: Browser, report: Path, **options: object) -> None:
        self.context = browser.new_context(
            **{"viewport": {"width": 1200, "height": 900}, **options}
        )
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector("#explorer", state="visible")

    def panel(self, network: int, side: int) -> Locator:
        return self.page.locator(f"canvas[data-network='{network}'][data-side='{side}']")

    def picture(self, network: int, side: int) -> str:
        """What a panel shows, once it was painted."""
        self.page.evaluate("() => new Promise((r) => requestAnimationFrame(() => setTimeout(r)))")
        return str(self.panel(network, side).evaluate("(canvas) => canvas.toDataURL()"))

    def pictures(self) -> list[str]:
        return [self.picture(network, side) for network in (0, 1) for side in (0, 1)]

    def point(self, network: int, side: int, u: float, v: float) -> None:
        panel = self.panel(network, side)
        panel.scroll_into_view_if_needed()
        box = panel.bounding_box()
        assert box is not None
        self.page.mouse.move(box["x"] + u * box["width"], box["y"] + v * box["height"])

    def told(self) -> str:
        """What a screen reader is told once the pointer rests."""
        self.page.wait_for_timeout(500)
        return self.page.locator("#status").text_content() or ""


def held_images(report: Path) -> list[dict[str, Any]]:
    """The explorer's images, as the page holds them."""
    text = re.search(r'id="explorer-data">(.*?)</script>', report.read_text(), re.DOTALL)
    assert text is not None
    return json.loads(text[1])["images"]


@pytest.fixture
def visit(browser: Browser, report: Path) -> Iterator[Visit]:
    visit = Visit(browser, report)
    yield visit
    assert visit.complaints == []
    assert {url for url in visit.asked if not url.startswith("data:")} == {report.as_uri()}
    assert visit.page.evaluate("() => window.hacked") is None
    visit.context.close()


def test_moving_the_pointer_changes_all_four_pictures(visit) -> None:
    visit.point(1, 0, 0.2, 0.2)
    before = visit.pictures()
    assert len(set(before)) == 4
    visit.point(1, 0, 0.8, 0.7)
    after = visit.pictures()
    assert all(one != two for one, two in zip(before, after, strict=True))
    visit.point(1, 0, 0.2, 0.2)
    assert visit.pictures() == before  # nothing but the pointer decides


def test_pointing_at_the_right_picture_asks_there(visit) -> None:
    visit.point(0, 1, 0.05, 0.05)
    assert visit.told().startswith("Right picture, row 1 of ")
    visit.point(0, 0, 0.05, 0.05)
    assert visit.told().startswith("Left picture, row 1 of ")


def test_keys_move_the_pixel_and_the_pictures_follow(visit) -> None:
    panel = visit.panel(1, 0)
    visit.point(1, 0, 0.01, 0.01)
    panel.focus()
    places, pictures = [], [visit.picture(1, 0)]
    for key in ("ArrowRight", "Shift+ArrowRight", "ArrowDown", "ArrowLeft", "ArrowUp", "End"):
        visit.page.keyboard.press(key)
        pictures.append(visit.picture(1, 0))
        match = re.match(r"Left picture, row (\d+) of (\d+), column (\d+) of (\d+)", visit.told())
        assert match is not None
        places.append(tuple(map(int, match.groups())))
    h, w = places[0][1], places[0][3]
    assert [(row, column) for row, _, column, _ in places] == [
        (1, 2), (1, 6), (2, 6), (2, 5), (1, 5), (1, w),
    ]  # fmt: skip
    assert h > 4
    assert all(one != two for one, two in pairwise(pictures))


def test_keys_reach_every_panel_and_control(visit) -> None:
    reached = set()
    for _ in range(30):
        visit.page.keyboard.press("Tab")
        reached.add(
            visit.page.evaluate(
                "() => document.activeElement.id || document.activeElement.getAttribute("
                "'aria-label') || document.activeElement.name"
            )
        )
    assert {"left", "right", "sharpness", "mode", "colours"} <= reached
    assert sum("Arrow keys move the pixel" in (name or "") for name in reached) == 4


def test_touching_a_picture_asks_there(browser, report) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    visit = Visit(browser, report, **phone)
    panel = visit.panel(1, 0)
    panel.scroll_into_view_if_needed()
    before = visit.pictures()
    box = panel.bounding_box()
    assert box is not None
    visit.page.touchscreen.tap(box["x"] + 5, box["y"] + 5)
    assert visit.pictures() != before
    assert visit.told().startswith("Left picture, row 1 of ")
    # A finger that moves down moves the pixel, and not the page.
    scrolled = visit.page.evaluate("() => window.scrollY")
    finger = visit.context.new_cdp_session(visit.page)
    for kind, down in (("Start", 5), *(("Move", y) for y in range(10, 100, 10)), ("End", None)):
        at = [] if down is None else [{"x": box["x"] + 5, "y": box["y"] + down}]
        finger.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": at})
    row = int(re.findall(r"row (\d+) of", visit.told())[0])
    rows = int(re.findall(r"of (\d+),", visit.told())[0])
    assert abs(row - 0.5 - rows * 90 / box["height"]) < 1
    assert visit.page.evaluate("() => window.scrollY") == scrolled
    assert visit.complaints == []
    visit.context.close()


@pytest.mark.parametrize("width", [320, 390, 820, 1600])
def test_the_page_fits_its_window(browser, report, width) -> None:
    visit = Visit(browser, report, viewport={"width": width, "height": 800})
    assert visit.page.evaluate("() => document.documentElement.scrollWidth") <= width
    visit.context.close()


def test_the_page_is_dark_where_the_reader_wants_it_dark(browser, report) -> None:
    shades = []
    for scheme in ("light", "dark"):
        visit = Visit(browser, report, color_scheme=scheme)
        ground = visit.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
        shades.append(sum(map(int, re.findall(r"\d+", ground)[:3])))
        visit.context.close()
    assert shades[0] > 600 > 150 > shades[1]


def test_names_are_shown_and_never_run(visit) -> None:
    options = visit.page.locator("#left option").all_text_contents()
    assert sorted(options) == sorted(NAMES)
    visit.page.locator("#left").select_option(label=NAMES[1])
    label = visit.panel(0, 0).get_attribute("aria-label")
    assert label == f"Left picture, {NAMES[1]}, Random weights. Arrow keys move the pixel."


def test_a_script_that_got_onto_the_page_is_not_run(browser, report, tmp_path) -> None:
    spoiled = tmp_path / "spoiled.html"
    inserted = "<script>window.hacked=1</script><img src=x onerror='window.hacked=2'>"
    spoiled.write_text(report.read_text().replace("<main", f"{inserted}<main"))
    visit = Visit(browser, spoiled)
    assert visit.page.evaluate("() => window.hacked") is None
    assert any("Content Security Policy" in message for message in visit.complaints)
    visit.context.close()


def test_other_pictures_can_be_chosen(visit) -> None:
    before = visit.pictures()
    visit.page.locator("#right").select_option(label=NAMES[3])
    middle = visit.pictures()
    assert before[1] != middle[1]
    visit.page.locator("#left").select_option(label=NAMES[3])
    after = visit.pictures()
    assert after[0] != middle[0]


def test_likeness_is_shown_as_heat_or_light_and_more_or_less_sharply(visit) -> None:
    heat = visit.picture(1, 0)
    visit.page.get_by_role("radio", name="Light").check()
    light = visit.picture(1, 0)
    assert heat != light
    visit.page.locator("#sharpness").focus()
    visit.page.keyboard.press("End")
    assert visit.picture(1, 0) != light
    visit.page.get_by_role("radio", name="Heat").check()
    assert visit.picture(1, 0) != heat  # still sharper


def test_colours_of_each_image_alone_take_the_place_of_those_of_all(visit) -> None:
    shared, separate = visit.page.locator("img.shared"), visit.page.locator("img.own-only")
    assert shared.count() == separate.count() == 8
    assert shared.first.is_visible()
    assert not separate.first.is_visible()
    visit.page.get_by_role("radio", name="each image").check()
    assert separate.first.is_visible()
    assert not shared.first.is_visible()


def test_a_ring_marks_where_the_spot_truly_lies_in_another_view(visit, report) -> None:
    images = held_images(report)
    whole = images[0]
    view = next(
        image for image in images if image["source"] == whole["source"] and not image["whole"]
    )
    h, w = whole["maps"][0]["h"], whole["maps"][0]["w"]
    linear = np.array(view["map"]).reshape(2, 3)
    # The middle of the view, as a cell of the whole image; and that cell's middle in the view.
    u, v = linear[:, :2] @ (0.5, 0.5) + linear[:, 2]
    middle = (np.floor(u * w) + 0.5) / w, (np.floor(v * h) + 0.5) / h
    target = np.linalg.solve(linear[:, :2], np.array(middle) - linear[:, 2])
    visit.point(0, 0, u, v)
    visit.picture(0, 1)
    ring = visit.panel(0, 1).evaluate(
        """(canvas, [u, v]) => {
          const zoom = canvas.width / canvas.clientWidth;
          const { width, height } = canvas;
          const { data } = canvas.getContext("2d").getImageData(0, 0, width, height);
          return Array.from({ length: 72 }, (_, k) => (k * Math.PI) / 36).map((turn) => {
            const x = Math.round(u * width + 11 * zoom * Math.cos(turn));
            const y = Math.round(v * height + 11 * zoom * Math.sin(turn));
            return Math.min(...data.slice(4 * (y * width + x), 4 * (y * width + x) + 3));
          });
        }""",
        target.tolist(),
    )
    # Half of the dashes are white, which no heat is.
    assert 15 < sum(shade > 200 for shade in ring) < 57


def test_the_share_of_like_pixels_is_what_python_finds(visit, report) -> None:
    images = held_images(report)
    visit.page.locator("#right").select_option(label=images[1]["name"])
    for network in (0, 1):
        visit.point(network, 0, 0.3, 0.6)
        figure = visit.page.locator(".figure b").nth(network)
        visit.picture(network, 0)
        maps = []
        for image in images[:2]:
            entry = image["maps"][network]
            numbers = np.frombuffer(b64decode(entry["data"]), np.int8)
            cells = torch.from_numpy(numbers.copy()).reshape(entry["h"], entry["w"], -1)
            maps.append(rearrange(cells * torch.tensor(entry["units"]), "h w d -> d h w"))
        count = sum(features[0].numel() for features in maps)
        mean = sum(features.sum(dim=(1, 2)) for features in maps) / count
        one, two = (features - mean[:, None, None] for features in maps)
        _, h, w = one.shape
        cell = int(0.6 * h), int(0.3 * w)
        similar = sum((likeness(one, cell, features) > 0.5).sum().item() for features in (one, two))
        assert figure.text_content() == f"{100 * similar / count:.0f} %"
