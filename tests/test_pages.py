"""The pages as a reader sees them, in a browser: on a desktop and on a phone.

They are the pages in `site/`, of whichever builder: `make docs`, then
`make test ARGS="-m slow tests/test_pages.py"`. The browser is any Chromium of the machine.
"""

import functools
import http.server
import os
import shutil
import threading
from pathlib import Path

import pytest
import yaml
from files import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SITE = Path(os.environ.get("DENSEKIT_TEST_SITE", ROOT / "site"))
CHROMIUMS = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge"),
    *("chrome", "msedge"),
)
WIDTHS = {"desktop": (1280, 800), "phone": (390, 844)}  # in pixels

# What is wrong on a page, as sentences; and how many formulas and figures it has.
LOOK = r"""
async () => {
  const faults = [];
  const words = (element) => element.textContent.trim().replace(/\s+/g, " ").slice(0, 60);
  const shown = (element) => element.getClientRects().length > 0;

  const formulas = document.querySelectorAll(".arithmatex");
  for (let wait = 0; wait < 50; wait++) {
    if ([...formulas].every((formula) => formula.querySelector(".katex"))) break;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  for (const formula of formulas) {
    if (!formula.querySelector(".katex")) faults.push(`is not rendered: ${words(formula)}`);
  }
  for (const formula of document.querySelectorAll(".katex-error")) {
    faults.push(`is no formula: ${words(formula)}`);
  }
  const text = document.querySelector("article").cloneNode(true);
  for (const part of text.querySelectorAll("pre, code, .katex")) part.remove();
  for (const formula of text.textContent.match(/\\[(\[].*|\$\$.*|\\frac.*/g) ?? []) {
    faults.push(`is not rendered: ${formula.slice(0, 60)}`);
  }

  for (const image of document.images) {
    image.loading = "eager";
    await image.decode().catch(() => 0);
    if (image.naturalWidth === 0) faults.push(`does not load: ${image.src.slice(0, 60)}`);
  }

  if (document.documentElement.scrollWidth > innerWidth) {
    faults.push(`is ${document.documentElement.scrollWidth} pixels wide`);
  }
  // What is wider than the screen has to be inside of a box that scrolls.
  const outside = (element) => element.getBoundingClientRect().right > innerWidth + 1;
  const overflows = (element) =>
    element instanceof HTMLElement &&
    element.getBoundingClientRect().left + element.scrollWidth > innerWidth + 1;
  const scrolls = (element) => /auto|scroll/.test(getComputedStyle(element).overflowX);
  for (const element of document.querySelectorAll("article *")) {
    if (!shown(element) || element.closest(".katex-mathml")) continue;
    if (!outside(element) && !overflows(element)) continue;
    let box = element;
    while (box.tagName !== "ARTICLE" && (outside(box) || !scrolls(box))) box = box.parentElement;
    if (box.tagName === "ARTICLE") faults.push(`reaches over the side: ${words(element)}`);
  }
  for (const code of document.querySelectorAll(".doc-signature pre, .doc-signature code")) {
    if (shown(code) && code.clientWidth > 0 && code.scrollWidth > code.clientWidth + 1) {
      faults.push(`is not wrapped: ${words(code)}`);
    }
  }
  return { faults, formulas: formulas.length, figures: document.images.length };
}
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def address():
    """Where the pages are served: a search needs more than files."""
    if not (SITE / "index.html").is_file():
        pytest.skip(f"there are no pages in {SITE}: run `make docs` first")
    handler = functools.partial(Quiet, directory=SITE)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = [path for name in CHROMIUMS if (path := shutil.which(name))]
    if not found:
        pytest.skip(f"there is no Chromium, by any of the names {', '.join(CHROMIUMS)}")
    with playwright.sync_playwright() as started:
        # A container has no sandbox. The pages are our own.
        browser = started.chromium.launch(executable_path=found[0], args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=WIDTHS)
def page(request, browser, address):
    """A page of a new browser, and all that it complains of, in `page.faults`."""
    width, height = WIDTHS[request.param]
    context = browser.new_context(viewport={"width": width, "height": height})
    page = context.new_page()
    page.faults = faults = []

    def at(text):
        faults.append(f"{page.url.removeprefix(address)} {text}")

    def answered(response):
        if response.status >= 400:
            at(f"asks for {response.url}, and gets {response.status}")

    def asked(request):
        if not request.url.startswith((address, "data:", "blob:")):
            at(f"asks for {request.url}: the pages have to work offline")

    def said(message):
        if message.type in ("error", "warning"):
            at(f"says in the console: {message.text}")

    page.on("response", answered)
    page.on("request", asked)
    page.on("console", said)
    page.on("pageerror", lambda error: at(f"raises {error}"))
    yield page
    context.close()


def named_pages(entries):
    """The Markdown files that the navigation of mkdocs.yml names."""
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else named_pages(value)


def addresses():
    """The path of each page in the site, which has to be there."""
    # The file has tags of Python's, which only the builders know.
    text = (ROOT / "mkdocs.yml").read_text()
    navigation = yaml.load(text, Loader=yaml.BaseLoader)["nav"]
    names = list(named_pages(navigation))
    paths = [name.removesuffix(".md").removesuffix("index") for name in names]
    paths = [path if path.endswith("/") or not path else f"{path}/" for path in paths]
    missing = [path for path in paths if not (SITE / path / "index.html").is_file()]
    assert missing == [], f"{SITE} is older than mkdocs.yml: run `make docs` again"
    return paths


def test_every_page_is_whole_and_fits_the_screen(page, address):
    counts = {"formulas": 0, "figures": 0}
    for path in addresses():
        page.goto(address + path)
        seen = page.evaluate(LOOK)
        page.faults.extend(f"{path} {fault}" for fault in seen["faults"])
        for name in counts:
            counts[name] += seen[name]
    assert page.faults == []
    assert counts["figures"] > 5
    assert (counts["formulas"] > 0) == ("arithmatex" in (ROOT / "mkdocs.yml").read_text())


SPOILED = r"""
<article style="width: 300px">
  <img src="data:image/png;base64,AAAA">
  <p>An area is \(w h\).</p>
  <p class="arithmatex">\frac{{a}}{{b}}</p>
  <p><span class="katex"><span class="katex-error">a_</span></span></p>
  <div class="doc-signature"><pre style="width: 200px; overflow: auto">{long}</pre></div>
  <p>{long}</p>
</article>
""".format(long="word_" * 400)


def test_what_is_wrong_is_seen(page):
    page.set_content(SPOILED)
    faults = page.evaluate(LOOK)["faults"]
    starts = {
        *("is not rendered: \\(w h", "is not rendered: \\frac", "is no formula: a_"),
        *("does not load: data:", "is not wrapped: word_", "reaches over the side: word_"),
    }
    assert {start for start in starts if any(fault.startswith(start) for fault in faults)} == starts
    assert any(" pixels wide" in fault for fault in faults)


def test_the_search_finds_a_function(page, address):
    page.goto(address)
    # The field of mkdocs, or the button that opens it; the button of Zensical; on a phone a sign.
    ways = '.md-search__input, .md-search__button, .md-header__button[for="__search"]'
    page.locator(ways).locator("visible=true").first.click()
    page.wait_for_timeout(500)  # it opens slowly, and takes the keys then
    page.keyboard.type("sinkhorn")
    found = page.locator('a[href*="api/clustering/#densekit.clustering.sinkhorn"]')
    found.locator("visible=true").first.click(timeout=20_000)
    page.wait_for_url("**/api/clustering/**")
    assert page.faults == []
