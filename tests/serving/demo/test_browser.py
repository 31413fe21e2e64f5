"""The page in a real browser: upload, ask, see the answer, and the overlay that follows the pointer."""

import base64
import io

import demo_browser
import numpy as np
import pytest
from PIL import Image

from agevlm.serving.demo.app import EXAMPLES


pytestmark = [
    pytest.mark.skipif(demo_browser.missing() is not None, reason=str(demo_browser.missing())),
    # Chromium itself dies now and then on a machine that is short of time. That is tried again; a wrong page is not.
    pytest.mark.flaky(reruns=2, only_rerun=["WebDriverException", "TimeoutException", "ReadTimeoutError"]),
]
QUESTION = "Is there a red apple in the image?"
MARKUP = "What is <img src=x onerror='window.ran = 1'> ${window.ran = 2} {{value}}"


@pytest.fixture
def page(server):
    with demo_browser.opened(server.address) as page:
        yield page


def seen(figure) -> list[tuple[str, str]]:
    """Token and layer of the overlays that are displayed."""
    heats = figure.find_elements("css selector", ".heat")
    return [(h.get_attribute("data-token"), h.get_attribute("data-layer")) for h in heats if h.is_displayed()]


def test_upload_ask_answer_overlay(page, example):
    page.upload(example)
    page.wait(lambda: page.all("#pictures img"))
    page.ask(QUESTION)
    ours, other = page.answers()
    assert seen(ours) == [("question", "mean")]
    stage = ours.find_element("css selector", ".stage")
    token = ours.find_element("css selector", ".token[data-token='0']")
    assert token.text.strip() in ("Yes", "No")  # the checkpoint answers presence questions so
    before = stage.screenshot_as_png
    page.point(token)
    page.wait(lambda: seen(ours) == [("0", "mean")])
    assert seen(other) == [("question", "0")]  # a concatenating model shows its first layer, as the paper does
    hovered = stage.screenshot_as_png
    assert hovered != before

    options = ours.find_elements("css selector", "option")
    assert [option.get_attribute("value") for option in options] == ["1", "4", "mean"]
    assert "% on the picture)" in other.find_element("css selector", "option").text
    scale = ours.find_element("css selector", ".peak").text
    options[0].click()
    page.wait(lambda: seen(ours) == [("0", "1")])
    assert stage.screenshot_as_png != hovered
    assert ours.find_element("css selector", ".peak").text != scale

    # The next answer starts with the look of its own question, which is text, whatever is in it.
    page.ask(MARKUP)
    ours, _ = page.answers()
    assert seen(ours) == [("question", "mean")]
    assert ours.find_element("css selector", "figure > .asked").text == MARKUP
    assert page.driver.execute_script("return window.ran") is None


def test_an_example_asks_itself_and_makes_room(page):
    cards = page.all(".card")
    assert [card.text for card in cards] == [*EXAMPLES.values()]
    assert not page.all(".place:has(figure)") and not page.one("#fresh").is_displayed()
    cards[0].click()
    ours, other = page.answers()
    assert ours.find_element("css selector", ".asked").text == QUESTION == other.find_element(
        "css selector", ".asked").text  # fmt: skip
    assert seen(ours) == [("question", "mean")] and not page.one("#examples").is_displayed()
    last = ours.find_elements("css selector", ".token")[-1]
    page.point(last)
    page.wait(lambda: seen(ours) == [(last.get_attribute("data-token"), "mean")])


def test_a_conversation_and_the_next(page, example):
    page.upload(example)
    page.wait(lambda: page.all("#pictures img"))
    page.ask(QUESTION)
    page.answers()
    assert page.one("#question textarea").get_attribute("value") == ""
    page.ask("Is there a car in the image?")
    for figure in page.answers():
        assert "eot_id" not in figure.text
        assert figure.find_element("css selector", ".earlier .asked").text == QUESTION
    page.one("#fresh").click()
    page.wait(lambda: not page.all("figure") and page.one("#examples").is_displayed())
    assert not page.all("#pictures img")


def test_the_map_that_is_seen_is_saved(page, example):
    page.upload(example)
    page.wait(lambda: page.all("#pictures img"))
    page.ask(QUESTION)
    ours, _ = page.answers()
    # A headless browser has nowhere to put a download; what would be put there is the link's.
    page.driver.execute_script(
        "window.saved = []; HTMLAnchorElement.prototype.click = function () { saved.push([this.download, this.href]) }"
    )
    for key in ("0", "question"):
        page.driver.execute_script("arguments[0].focus()", ours.find_element("css selector", f"[data-token='{key}']"))
        page.wait(lambda key=key: seen(ours) == [(key, "mean")])
        page.driver.execute_script("arguments[0].click()", ours.find_element("css selector", ".save"))
    saved = page.driver.execute_script("return window.saved")
    assert [name for name, _ in saved] == ["attention-agevlm-tiny.png"] * 2
    first, second = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(data.partition(",")[2]))).convert("RGB")).astype(int)
        for _, data in saved
    )
    assert first.shape == (640 + 82, 640, 3)
    assert np.abs(first - second)[:640].max() > 30  # another look
    assert (first[640:] == 0).any()  # words


@pytest.mark.parametrize("width", [375, 1280])
def test_nothing_is_wider_than_the_window(page, width):
    size = {"width": width, "height": 812, "deviceScaleFactor": 1, "mobile": width < 500}
    page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    widest = "return Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
    assert page.driver.execute_script(widest) <= width
    page.all(".card")[1].click()
    page.answers()
    assert page.driver.execute_script(widest) <= width


def test_a_tall_picture_fits_the_window(page, tmp_path):
    tall = tmp_path / "tall.png"
    Image.new("RGB", (40, 400), "red").save(tall)
    page.upload(tall)
    page.wait(lambda: page.all("#pictures img"))
    page.ask(QUESTION)
    shown = page.answers()[0].find_element("css selector", ".picture").rect
    assert shown["height"] == pytest.approx(10 * shown["width"], abs=10)
    assert shown["height"] <= 0.71 * page.driver.execute_script("return window.innerHeight")


def test_what_cannot_be_answered_is_said(page, example, tmp_path):
    page.upload(example)
    page.wait(lambda: page.all("#pictures img"))
    page.ask("   ")
    assert "question is empty" in page.message()
    text = tmp_path / "notes.png"
    text.write_text("no picture at all")
    page.upload(text)
    page.ask("What is this?")
    assert "notes.png is no picture" in page.message()
    large = tmp_path / "large.png"
    large.write_bytes(bytes(50_000_000))
    page.upload(large)
    assert "maximum" in page.message().lower()
    page.upload(example)
    page.wait(lambda: page.all("#pictures img"))
    page.ask("Is there a car in the image?")
    assert len(page.answers()) == 2


def test_nothing_comes_from_elsewhere(page, server):
    names = page.driver.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names and not [name for name in names if not name.startswith((server.address, "data:", "blob:"))]
