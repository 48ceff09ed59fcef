"""A real browser opens every page of a report: REPORT_DIR, or one of made-up notebooks."""
import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import report_tools as h

import pages

pytestmark = pytest.mark.slow

sync_api = pytest.importorskip("playwright.sync_api")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")
CHROMIUM = shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
CANARY = "window.fired = 0; window.alert = () => { window.fired += 1 }"
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


FOLDED = "details.input:not([open])"
# Whether a folded cell's code can be seen: it has a place, and is not skipped.
SHOWN = """s => document.querySelector(s + " > :not(summary)").checkVisibility({contentVisibilityAuto: true})"""


def violations(page, width):
    """Return what axe-core finds on a page: [(width, rule, the first such element)]."""
    found = axe.Axe().run(page).response["violations"]
    return [(width, one["id"], one["nodes"][0]["html"][:200]) for one in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Give the report's folder; build one that holds every kind of notebook if none is named."""
    if os.environ.get("REPORT_DIR"):
        return Path(os.environ["REPORT_DIR"]).resolve()
    return h.make_gallery(tmp_path_factory)[1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Start Debian's Chromium with a profile of its own."""
    if not CHROMIUM:
        assert os.environ.get("CI") != "true", "CI must have chromium: apt-get install chromium"
        pytest.skip("no chromium on the PATH: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("profile")), executable_path=CHROMIUM, args=FLAGS)
        yield context
        context.close()


@pytest.fixture(scope="module")
def visits(browser, folder):
    """Open every page at two widths; note what it asks for, says and shows."""
    found, shots = {}, os.environ.get("SCREENSHOTS")
    page = browser.new_page()
    page.add_init_script(CANARY)
    page.on("console", lambda m: seen["said"].append(m.text))
    page.on("pageerror", lambda e: seen["said"].append(str(e)))
    page.on("request", lambda r: seen["asked"].append(r.url))
    for path in sorted(folder.glob("*.html")):
        seen = found[path.name] = dict(said=[], asked=[], overflow={}, axe=[], path=path)
        for width in 1440, 390:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(path.as_uri())
            seen["overflow"][width] = page.evaluate(OVERFLOW)
            seen["axe"] += violations(page, width)
            if shots:
                os.makedirs(shots, exist_ok=True)
                page.screenshot(path=f"{shots}/{path.stem}-{width}.png", full_page=True)
        seen["fired"] = page.evaluate("window.fired")
        seen["lang"] = page.evaluate("document.documentElement.lang")
        seen["title"] = page.title()
        seen["images"] = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.alt])")
        seen["links"] = page.evaluate("[...document.links].map(a => a.href)")
        seen["ids"] = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
        seen["folded"] = []
        if page.query_selector("#show-code") and page.query_selector(FOLDED):
            for _ in range(3):
                seen["folded"].append(page.evaluate(SHOWN, FOLDED))
                page.click("label[for=show-code]")
    assert "index.html" in found and len(found) > 1
    return found


def test_pages_ask_for_nothing_and_complain_of_nothing(visits):
    for name, seen in visits.items():
        assert not seen["said"], (name, seen["said"])
        outside = [u for u in seen["asked"] if not u.startswith(("file:", "data:"))]
        assert not outside, (name, outside)
        assert seen["fired"] == 0, name


FOREIGN = """[...document.querySelectorAll("script, textarea, iframe, object, form, base, [onerror]")]
    .map(e => e.outerHTML).concat([...document.links].map(a => a.href)
    .filter(href => href.startsWith("javascript:")))"""


def test_reviews_are_text_whatever_they_hold(browser, tmp_path):
    h.make_evil_page(tmp_path)
    page, said = browser.new_page(), []
    page.add_init_script(CANARY)
    page.on("console", lambda m: said.append(m.text))
    page.on("request", lambda r: said.extend([r.url] * (not r.url.startswith(("file:", "data:")))))
    for name, ways in ("01_evil", h.SEEN), ("index", ["question", "answer", "reason"]):
        page.goto((tmp_path / (name + ".html")).as_uri())
        text = page.evaluate("document.body.textContent")
        assert [way for way in ways if h.spelled(way) not in text] == []
        assert not pages.UNSEEN.search(page.content())
        assert page.evaluate(FOREIGN) == [] and page.evaluate("window.fired") == 0
    assert said == [] and page.title() == "Report \u00b7 sample"


def test_every_image_shows_and_has_a_text(visits):
    for name, seen in visits.items():
        for width, alt in seen["images"]:
            assert width > 0 and alt.strip(), (name, alt)


def test_every_page_has_its_language_and_a_title_of_its_own(visits):
    assert {seen["lang"] for seen in visits.values()} == {"en"}
    titles = [seen["title"].strip() for seen in visits.values()]
    assert all(titles) and len(set(titles)) == len(titles)


def test_internal_links_lead_somewhere(visits):
    for name, seen in visits.items():
        for link in (x for x in seen["links"] if x.startswith("file:")):
            target, _, mark = link.partition("#")
            path = Path(unquote(urlparse(target).path))
            assert path.exists(), (name, link)
            assert not mark or mark in visits[path.name]["ids"], (name, link)


def test_no_page_scrolls_sideways(visits):
    for name, seen in visits.items():
        assert seen["overflow"] == {1440: 0, 390: 0}, name


def test_code_folds_and_unfolds(visits):
    folds = [seen["folded"] for seen in visits.values() if seen["folded"]]
    assert folds and all(fold == [False, True, False] for fold in folds)


def test_axe_finds_no_violation(visits):
    assert {name: seen["axe"] for name, seen in visits.items() if seen["axe"]} == {}


@pytest.fixture(scope="module")
def odd_report(tmp_path_factory):
    """A report whose page has a figure of two panels as figures.save_figure shows it."""
    folder = tmp_path_factory.mktemp("odd")
    h.make_evil_page(folder)
    return folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violation_in_either_scheme(browser, odd_report, folder, scheme):
    page = browser.new_page()
    page.emulate_media(color_scheme=scheme)
    for path in sorted(odd_report.glob("*.html")) + [folder / "01_good.html"] * (folder / "01_good.html").exists():
        for width in 1440, 390:
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(path.as_uri())
            assert violations(page, width) == [], path.name
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark"), ground
    page.close()


def test_panels_stand_side_by_side_and_stack_on_a_phone(browser, odd_report):
    page = browser.new_page()
    tops = {}
    for width in 1440, 390:
        page.set_viewport_size({"width": width, "height": 900})
        page.goto((odd_report / "01_evil.html").as_uri())
        boxes = page.evaluate("[...document.querySelectorAll('figure img')].map(i => "
                              "[i.getBoundingClientRect().top, i.naturalWidth / i.clientWidth])")
        tops[width] = len({round(top) for top, _ in boxes})
        assert len(boxes) == 2 and all(sharp >= 2 for _, sharp in boxes), boxes
    assert tops == {1440: 1, 390: 2}
    page.close()


def test_contents_stand_beside_the_text_where_there_is_room(browser, folder):
    page = browser.new_page()
    page.goto((folder / "index.html").as_uri())
    for width, beside in (1100, True), (1000, False), (390, False):
        page.set_viewport_size({"width": width, "height": 900})
        right, left = page.evaluate("['.toc', 'main'].map((s, i) => document.querySelector(s)"
                                    ".getBoundingClientRect()[['right', 'left'][i]])")
        assert (right <= left) == beside, width
    page.close()


def test_print_shows_parameters_and_no_folded_code(browser, folder):
    page = browser.new_page()
    page.goto((folder / "report.html").as_uri())
    page.emulate_media(media="print")
    assert page.evaluate("[...document.querySelectorAll('.given table')].every(t => t.clientHeight > 0)")
    assert page.evaluate("document.querySelectorAll('.given table').length") > 0
    assert page.evaluate("[...document.querySelectorAll('details.input:not([open])')]"
                         ".every(e => !e.clientHeight)")
    assert page.evaluate("document.querySelectorAll('details.input:not([open])').length") > 0
    page.close()
