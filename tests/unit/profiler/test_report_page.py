"""Page of a report: self-contained, safe for any name, usable by keyboard, screen reader and phone.

The tests in a browser need Chromium and the extra ``browser``.
"""

from __future__ import annotations

import json
import re
import shutil
import sys

import made_traces as made
import pytest

from dvkernels.cli import main

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SECTIONS = ("advice", "time", "timeline", "bandwidth", "late", "memory")
HOSTILE = "</script><script>document.title = 'x'</script><b onmouseover=alert(1)>&\"'"


def needs_report():
    for package in ("jinja2", "plotly"):
        pytest.importorskip(package, reason=f"{package} is not installed: the extra report")


def trace(path, **more):
    """Write a trace with all sections, and names that nobody should trust."""
    records = made.steady(20)
    records += [made.memory(10 * k, variables=1000 + k, prefetch=5) for k in range(30)]
    records += [made.span(HOSTILE, "range", 103, 106, 0), made.span("other", "odd", 104, 105, 7)]
    records += [{"ph": "M", "name": "thread_name", "pid": 0, "tid": 7, "args": {"name": HOSTILE}}]
    records += [made.reduce(105, 106, 0, 90, f"{HOSTILE}(x)", bytes=9)]
    return made.write(path, records, made.facts(share_of_other_programs=0.25, **more))


def report(path, *more):
    output = path.with_suffix(".html")
    assert main.main(["report", str(path), "-o", str(output), *more]) == 0
    return output


def test_without_the_extra_the_error_names_it_and_json_needs_none(tmp_path, monkeypatch, capsys):
    path = trace(tmp_path / "t.json")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main.main(["report", str(path), "-o", str(tmp_path / "r.html")]) == 2
    assert "pip install 'dvkernels[report]'" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
    assert main.main(["report", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["advice"][0]["problem"] == "late replica"


def test_the_output_is_replaced_whole_or_not_at_all(tmp_path, capsys):
    needs_report()
    path = trace(tmp_path / "t.json")
    output = report(path)
    assert output.read_text().startswith("<!doctype html>")
    output.write_text("kept")
    path.write_bytes(path.read_bytes()[:-10])
    assert main.main(["report", str(path), "-o", str(output)]) == 2
    assert output.read_text() == "kept"
    assert main.main(["report", str(path), "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert "--output: cannot write" in capsys.readouterr().err
    assert sorted(each.name for each in tmp_path.iterdir()) == ["t.html", "t.json"]


def test_names_stay_text_and_nothing_is_loaded(tmp_path):
    needs_report()
    text = report(trace(tmp_path / "t.json")).read_text()
    assert HOSTILE not in text
    markup = re.sub(r"<(script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
    assert "<b" not in markup.replace("<body", "").replace("<button", "")
    assert not re.search(r"<(link|img|iframe|object|embed)\b|\bsrc=|url\(|@import", markup)
    assert "default-src 'none'" in markup
    for section in SECTIONS:
        assert f'<section id="{section}"' in markup
    assert markup.count("<caption>") == markup.count("<table>") == 5
    plots = re.findall(r'<div class="plot"[^>]*>', markup)
    assert len(plots) == 5
    assert all('role="img" aria-label=' in each for each in plots)


def test_a_trace_without_events_has_a_page(tmp_path):
    needs_report()
    text = report(made.write(tmp_path / "t.json", [])).read_text()
    assert "The trace holds no step" in text


# -- in a browser ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    needs_report()
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: the extra browser"
    )
    if not CHROMIUM:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def address(browser, tmp_path_factory):
    return report(trace(tmp_path_factory.mktemp("page") / "t.json")).as_uri()


@pytest.fixture
def opened(browser, address):
    """Return a function that opens the page; at the end there was no error and no request."""
    pages, problems = [], []

    def opened(width=1280, scheme="light"):
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
        )
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url))
        page.goto(address)
        page.wait_for_selector("#plot-memory .main-svg")
        pages.append(context)
        return page

    yield opened
    for each in pages:
        each.close()
    assert [each for each in problems if each != address] == []


@pytest.mark.browser
def test_tables_sort_by_mouse_and_keyboard(opened):
    page = opened()
    header = page.locator("#time thead th").nth(2)
    cells = page.locator("#time tbody td:nth-child(3)")
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    values = [float(each) for each in cells.all_inner_texts()]
    assert values == sorted(values)
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    assert [float(each) for each in cells.all_inner_texts()] == values[::-1]


@pytest.mark.browser
def test_panels_open_and_the_timeline_moves_by_keyboard(opened):
    page = opened()
    panel = page.locator("#timeline details")
    assert not panel.locator("table").is_visible()
    panel.locator("summary").press("Enter")
    assert panel.locator("table").is_visible()

    def shown():
        return page.evaluate("[...document.getElementById('plot-timeline').layout.xaxis.range]")

    whole = shown()
    page.get_by_role("button", name="Zoom in").press("Enter")
    begin, end = shown()
    assert end - begin == pytest.approx((whole[1] - whole[0]) / 2)
    page.get_by_role("button", name="Later").press("Enter")
    assert shown()[0] > begin
    page.get_by_role("button", name="All", exact=True).press("Enter")
    assert shown() == whole


@pytest.mark.browser
def test_the_theme_follows_the_system_and_the_button(opened):
    page = opened(scheme="dark")

    def colors():
        return page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " document.getElementById('plot-time').layout.font.color]"
        )

    dark = colors()
    page.get_by_role("button", name="Dark").click()
    light = colors()
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    page.emulate_media(color_scheme="light")
    page.wait_for_selector("html[data-theme=light]")
    page.emulate_media(color_scheme="dark")
    page.wait_for_selector("html[data-theme=dark]")
    assert colors() == dark
    assert page.title() == "t: report of a trace"  # no script in a name has run


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_serious_violation_and_nothing_is_wider_than_the_page(opened, width, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe is not installed: the extra browser"
    )
    page = opened(width, scheme)
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(page).response["violations"]
    serious = [
        (each["id"], [node["html"][:200] for node in each["nodes"]])
        for each in found
        if each["impact"] in ("serious", "critical")
    ]
    assert serious == []
