"""The page in a real browser: the system's Chromium, driven by Playwright.

Without one the tests are skipped, or fail where OPTIMAL_SAMPLING_REQUIRE_BROWSER is 1.
"""

from __future__ import annotations

import os
import shutil
import time

import pytest
from tests.report.conftest import Draw, write_run

from optimal_sampling.report import ReportOptions
from optimal_sampling.report.page import write_report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "</script><script>window.hit=1</script></style><style>*{display:none}</style><b id=x>"
STRANGE = "a\x00\x1b[2J\u202eb\u202c مرحبا 👩‍👩‍👧 end"
pytestmark = pytest.mark.xdist_group("browser")


def chromium() -> str:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None and os.environ.get("OPTIMAL_SAMPLING_REQUIRE_BROWSER") == "1":
        pytest.fail("there is no Chromium: apt-get install chromium")
    if found is None:
        pytest.skip("there is no Chromium (apt-get install chromium)")
    return found


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A page of two runs: one with top tokens and odd texts, one of another rule."""
    folder = tmp_path_factory.mktemp("report")
    draws = [Draw(f"{row}+1={row + 1}", "correct", row=row, top=3) for row in range(40)]
    draws[1].verdict = "wrong"
    draws[3] = Draw(HOSTILE, "wrong", row=3, top=3)
    draws[4] = Draw(STRANGE, "no_answer", row=4)
    draws[5] = Draw("", error="the prompt is <b>too long</b>", row=5)
    draws[6] = Draw("one\ntwo  three 🙂\tfour", "correct", row=6, top=3)
    draws[7] = Draw("7 " * 2500, "correct", row=7)
    draws[8] = Draw("x\u202eabc", "correct", row=8)
    first = write_run(folder / "first", draws)
    second = write_run(folder / "second", [Draw("x", row=0)], alpha_method="fixed")
    path = folder / "page.html"
    write_report(ReportOptions(runs=(str(first), str(second)), output=str(path)))
    return path


class Watched:
    """A page, and what it has said and asked for."""

    def __init__(self, page):
        self.page = page
        self.said, self.requests = [], []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def count(self):
        return self.page.locator("#count").inner_text()


@pytest.fixture
def opened(browser, file):
    """Opens the page in a window of its own."""
    contexts = []

    def open_page(scheme="light", width=1280):
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, has_touch=width < 600
        )
        contexts.append(context)
        watched = Watched(context.new_page())
        watched.page.goto(file.as_uri())
        watched.page.set_default_timeout(20_000)
        watched.page.wait_for_selector("html[data-ready] #list .sample", state="attached")
        return watched

    yield open_page
    for context in contexts:
        context.close()


def wait(page, expression, seconds=20.0):
    """Until an expression is true. Playwright's own way needs `eval`, which the policy forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < end, expression
        page.wait_for_timeout(20)


def sample(page, index):
    """A sample of the list, scrolled to. Row i of the first run is sample i."""
    found = page.locator(f'.sample[data-index="{index}"]')
    found.evaluate("node => node.scrollIntoView({behavior: 'instant', block: 'center'})")
    found.locator("header").wait_for()
    return found


def test_a_missing_browser_is_no_pass(monkeypatch):
    """Guards: CI that skips these tests for ever, because its machine has no browser."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("OPTIMAL_SAMPLING_REQUIRE_BROWSER", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get install chromium"):
        chromium()
    monkeypatch.setenv("OPTIMAL_SAMPLING_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        chromium()


def test_it_opens_in_silence(opened):
    """Guards: an error in the console, and a request to anywhere, fonts and icons included."""
    watched = opened()
    assert watched.said == []
    assert [url for url in watched.requests if not url.startswith("data:")] == watched.requests[:1]
    assert "first, second" in watched.page.locator("h1").inner_text()
    assert watched.count() == "41 of 41 samples"
    assert watched.page.locator("#charts figure svg path").count() > 4


def test_markup_of_a_completion_is_inert(opened):
    """Guards: a completion that runs, hides the page, or loses its angle brackets."""
    page = opened().page
    page.locator("#search").fill("window.hit")
    wait(page, "document.querySelectorAll('.sample').length === 1")
    text = page.locator(".sample .text")
    assert text.evaluate("node => node.textContent").startswith(HOSTILE)
    assert text.is_visible()
    assert page.evaluate("window.hit") is None
    assert page.locator(".sample b").count() == 0


def test_a_token_under_the_pointer(opened):
    """Guards: a card of another token, and top tokens under the wrong heading."""
    page = opened().page
    token = sample(page, 0).locator(".t").nth(1)
    token.hover()
    card = page.locator("#card")
    card.wait_for(state="visible")
    assert card.locator(".token").inner_text().split() == ["+", "token", "2"]
    student, mixture, teacher = card.locator(".tops > div").all_inner_texts()
    assert student.split()[:5] == ["Student", "(", "60.0%", "+", "30.0%"]
    assert mixture.split()[:3] == ["q*", "+", "80.0%"]
    assert teacher.split()[:3] == ["Teacher", "+", "90.0%"]
    page.mouse.move(5, 5)
    card.wait_for(state="hidden")


def test_the_keyboard_alone(opened):
    """Guards: tokens, samples and switches that only a pointer reaches."""
    page = opened().page
    sample(page, 0).locator(".text").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    card = page.locator("#card .token")
    card.wait_for(state="visible")
    assert card.inner_text().split()[0] == "+"
    page.keyboard.press("End")
    wait(page, "document.querySelector('#card b').textContent.includes('end')")
    page.keyboard.press("Escape")
    page.locator("#card").wait_for(state="hidden")
    page.keyboard.press("j")
    wait(page, "document.activeElement.textContent.startsWith('1+1=2')")
    before = page.locator("#colour").input_value()
    page.keyboard.press("c")
    assert page.locator("#colour").input_value() != before
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"


def test_the_next_sample_after_one_that_failed(opened):
    """Guards: `j` that stays for ever before a sample without a text."""
    page = opened().page
    sample(page, 4).locator(".text").focus()
    for index in (5, 6):
        page.keyboard.press("j")
        wait(page, f"document.activeElement.closest('.sample')?.dataset.index === '{index}'")
    page.keyboard.press("ArrowRight")
    wait(page, "document.activeElement.dataset.place === '0'")


def test_another_colour_keeps_the_token(opened):
    """Guards: `c` that takes the focus away, so that the arrow keys begin again."""
    page = opened().page
    sample(page, 0).locator(".text").focus()
    for key in ("ArrowRight", "ArrowRight", "c"):
        page.keyboard.press(key)
    assert page.evaluate("document.activeElement.dataset.place") == "1"
    page.keyboard.press("Shift+ArrowRight")  # selects
    assert page.evaluate("document.activeElement.dataset.place") == "1"


def test_charts_by_keyboard(opened):
    """Guards: numbers of a chart that only a pointer reaches."""
    page = opened().page
    chart = page.locator("#charts .panels svg").first
    caption = page.locator("#charts .panels figcaption").first
    before = caption.inner_text()
    chart.focus()
    for _ in range(2):
        page.keyboard.press("ArrowRight")
    assert "; mean 0." in caption.inner_text()
    page.keyboard.press("Tab")
    assert caption.inner_text() == before


def test_a_slow_search_that_was_given_up(opened):
    """Guards: results of a search that ends after it was cleared."""
    watched = opened()
    page = watched.page
    page.evaluate(
        "(() => { const fast = unpack; unpack = async (id) => {"
        " await new Promise((done) => setTimeout(done, 700)); return fast(id); }; })()"
    )
    page.locator("#search").fill("window.hit")
    page.wait_for_timeout(250)
    page.locator("#search").fill("")
    page.wait_for_timeout(1200)
    assert watched.count() == "41 of 41 samples"


def test_filter_search_and_order(opened):
    """Guards: a filter that leaves others in, and an order that is not kept after a filter."""
    watched = opened()
    page = watched.page
    page.locator("#kind").select_option("wrong")
    assert watched.count() == "2 of 41 samples"
    page.locator("#kind").select_option("")
    page.locator("#order").select_option("tokens")
    wait(page, "document.querySelector('.sample .text')?.innerText.startsWith('7')")
    page.locator("#search").fill("ASK 1")  # in the prompts of rows 1 and 10 to 19
    wait(page, "document.getElementById('count').textContent.startsWith('11 of')")
    page.locator("#list").evaluate("node => node.scrollIntoView({behavior: 'instant'})")
    wait(page, "CSS.highlights.get('search').size === 11")
    page.locator("#search").fill("0+1=1")
    wait(page, "document.getElementById('count').textContent.startsWith('2 of')")
    wait(page, "CSS.highlights.get('search').size === 2")
    page.locator("#search").fill("nowhere")
    page.wait_for_selector("text=No sample is like that.")
    page.locator("#search").fill("")
    page.locator("#run").select_option("1")
    wait(page, "document.getElementById('count').textContent.startsWith('1 of')")


def test_colours_and_their_legend(opened):
    """Guards: colours of another diagnostic than the legend's."""
    page = opened().page
    first = sample(page, 0).locator(".t").first
    page.locator("#colour").select_option("alpha")
    low = first.get_attribute("class")
    high = sample(page, 0).locator(".t").nth(4).get_attribute("class")
    assert (low.strip(), high) == ("t", "t h5")  # alpha 0.5, and 0.5 + 0.5 * 4/6
    page.locator("#colour").select_option("kl_student")
    assert first.get_attribute("class") == "t a2"  # 0.5 of 2 nats in eight levels
    assert "KL(q, student)" in page.locator(".legend").inner_text()
    page.locator("#colour").select_option("")
    assert first.get_attribute("class").strip() == "t"


def test_light_and_dark(opened):
    """Guards: dark text on a dark ground, and a switch that does not."""
    colours = (
        "(() => { const s = getComputedStyle(document.documentElement); return s.background })()"
    )
    light, dark = opened("light").page, opened("dark").page
    assert "253, 253, 252" in light.evaluate(colours)
    assert "19, 20, 22" in dark.evaluate(colours)
    light.locator("#theme").click()
    assert "19, 20, 22" in light.evaluate(colours)
    dark.keyboard.press("d")
    assert "253, 253, 252" in dark.evaluate(colours)
    assert dark.locator("#theme").inner_text() == "Dark"


@pytest.mark.parametrize("marks", [True, False])
def test_copied_text_is_the_text(opened, marks):
    """Guards: dots for spaces, an end token, or line breaks between tokens in what is copied."""
    page = opened().page
    page.locator("#marks").set_checked(marks)
    text = sample(page, 6).locator(".text")
    copied = text.evaluate(
        "node => { getSelection().selectAllChildren(node); return getSelection().toString() }"
    )
    assert copied == "one\ntwo  three 🙂\tfour"
    mark = text.locator(".w").first
    if marks:
        content = mark.evaluate("node => getComputedStyle(node, '::before').content")
        assert content == '"↵"'
    else:
        assert text.locator(".w").count() == 0


def test_strange_characters_are_shown(opened):
    """Guards: direction marks and escapes that change how a text reads without being seen; an emoji
    of several characters taken apart."""
    page = opened().page
    text = sample(page, 4).locator(".text")
    marks = text.locator(".w.control").evaluate_all("all => all.map((each) => each.dataset.m)")
    assert marks == ["NUL", "ESC", "‹202E›", "‹202C›"]
    assert "مرحبا" in text.inner_text()
    assert text.evaluate("node => getComputedStyle(node).unicodeBidi") == "plaintext"
    assert "👩‍👩‍👧" in text.evaluate("node => node.textContent")


def test_a_mark_of_direction_turns_nothing(opened):
    """Guards: a completion that reads "abc" and is shown as "cba"."""
    page = opened().page
    tokens = sample(page, 8).locator(".t")
    left = {
        tokens.nth(n).inner_text(): tokens.nth(n).bounding_box()["x"] for n in range(tokens.count())
    }
    assert left["x"] < left["a"] < left["b"] < left["c"]


CONTRASTS = """
(() => {
  const context = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (...colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    const parts = [...context.getImageData(0, 0, 1, 1).data].slice(0, 3).map((x) => x / 255);
    const [r, g, b] = parts.map((x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = getComputedStyle(document.documentElement).backgroundColor;
  const made = (name) => {
    const node = document.body.appendChild(document.createElement("span"));
    node.className = name;
    return getComputedStyle(node);
  };
  const ratio = (text, back) => {
    const [low, high] = [light(text), light(ground, back)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  };
  const found = {};
  for (const hue of "sha")
    for (let n = 1; n <= 8; n++) {
      const { color, backgroundColor } = made(`${hue}${n}`);
      found[`${hue}${n}`] = ratio(color, backgroundColor);
    }
  for (const name of ["soft", "student", "teacher", "error", "end", "badge correct"])
    found[name] = ratio(made(name).color, ground);
  return found;
})()
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_legible_on_every_colour(opened, scheme):
    """Guards: text whose contrast is below 4.5 (WCAG 2.2, AA), by its own formula."""
    found = opened(scheme).page.evaluate(CONTRASTS)
    assert len(found) == 30
    assert {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}
    assert found["h8"] < found["h1"]


def test_a_failed_sample(opened):
    """Guards: an error that is markup, or that is nowhere."""
    page = opened().page
    assert sample(page, 5).locator(".error").inner_text() == "the prompt is <b>too long</b>"


def test_a_long_sample_is_shown_in_parts(opened):
    """Guards: a page that stands still over 30,000 tokens, and a text cut without a word."""
    page = opened().page
    long = sample(page, 7)
    assert long.locator(".t").count() == 3000
    long.get_by_role("button", name="Show the other 2,000 tokens").click()
    assert long.locator(".t").count() == 5001  # and the end
    page.keyboard.press("c")
    assert long.locator(".t").count() == 5001


def test_samples_are_made_as_they_are_scrolled_to(opened):
    """Guards: thousands of spans before the first paint, and rows that stay empty."""
    page = opened().page
    made = "document.querySelectorAll('.sample header').length"
    sample(page, 0)
    assert page.evaluate(made) < 30
    assert sample(page, 39).locator(".text").inner_text().startswith("39+1=40")
    wait(page, "!document.querySelector('.sample').firstChild")


def test_a_phone(opened):
    """Guards: a page wider than the screen, and a card beyond its edge."""
    page = opened(width=390).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sample(page, 0).locator(".t").first.tap()
    page.locator("#card").wait_for(state="visible")
    box = page.locator("#card").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390
    assert box["y"] + box["height"] <= 900
