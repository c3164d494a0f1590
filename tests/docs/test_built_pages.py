"""Built documentation: complete, without private paths, self-contained, no wider than a phone.

``DVKERNELS_BUILT_DOCS`` names a folder that has been built already.
"""

from __future__ import annotations

import functools
import html
import http.server
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import public_names
import pytest

pytestmark = pytest.mark.built_docs

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("sphinx", "myst_nb", "numpydoc", "pydata_sphinx_theme", "sphinx_gallery")
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
PHONE = 390  # px
NAMES = public_names.public_names()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if built := os.environ.get("DVKERNELS_BUILT_DOCS"):
        return Path(built)
    for package in NEEDED:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: the extra docs")
    target = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", ROOT / "docs", target]
    ran = subprocess.run(build, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr
    return target


def pages(site: Path) -> dict[str, str]:
    found = {page.relative_to(site).as_posix(): page for page in site.rglob("*.html")}
    return {path: found[path].read_text("utf-8") for path in found if path[0] != "_"}


def article(page: str) -> str:
    """Return the text of a page's article, without code."""
    body = page.partition("<article")[2].partition("</article>")[0]
    return html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"(?s)<(pre|svg)\b.*?</\1>", "", body)))


def page_of(site: Path, name: str) -> str:
    return (site / "reference" / "api" / f"{name}.html").read_text("utf-8")


def test_every_public_name_has_a_page_with_an_example(site):
    for name, value in NAMES.items():
        page = page_of(site, name)
        assert f"<h1>{public_names.title(name)}<" in page, name
        assert f'id="{name}"' in page, name
        assert '<span class="gp">' in page or isinstance(value, int), f"{name} has no example"


def test_no_page_has_private_paths_or_raw_roles_or_empty_descriptions(site):
    public = {name.rpartition(".")[0] for name in NAMES} | {*NAMES}
    for path, page in pages(site).items():
        text = article(page)
        assert not re.findall(r":[a-z:]+:`[^`]*`", text), path
        paths = re.findall(r"\bdvkernels(?:\.[a-z_]+)+\.[A-Z]\w+", text)
        assert [each for each in paths if each not in public] == [], path
        if path.startswith("reference/"):
            assert not re.search(r"<dd>\s*(<p>\s*</p>\s*)?</dd>", page), path


def test_links_inside_the_pages_lead_somewhere(site):
    found = pages(site)
    ids = {path: {*re.findall(r'\bid="([^"]+)"', page)} for path, page in found.items()}
    for path, page in found.items():
        for target in re.findall(r'<a [^>]*?href="([^"]+)"', page):
            where, _, anchor = html.unescape(target).partition("#")
            if re.match(r"[a-z]+:", where):
                continue
            to = os.path.normpath(os.path.join(os.path.dirname(path), where)) if where else path
            assert (site / to).exists(), f"{path}: {target}"
            if anchor and to in ids:
                assert anchor in ids[to], f"{path}: {target}"


def test_nothing_is_loaded_from_elsewhere(site):
    loads = re.compile(
        r"""<(?:script|img|iframe|source|video)\b[^>]*?\bsrc=["'](?:https?:)?//"""
        r"""|<link\b[^>]*?\brel=["'](?:stylesheet|preload|icon)["'][^>]*?href=["'](?:https?:)?//"""
        r"""|@import\s+(?:url\()?["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
    )
    for path, page in pages(site).items():
        assert not loads.search(page), path
    for sheet in site.rglob("*.css"):
        assert not loads.search(sheet.read_text("utf-8")), sheet


def test_code_is_coloured_and_outputs_are_shown(site):
    page = (site / "tutorials" / "one-process-to-four.html").read_text("utf-8")
    assert '<span class="kn">import</span>' in page
    assert re.search(r"cell_output", page)


def test_every_example_is_in_the_gallery_with_what_it_prints_and_its_plot(site):
    for example in (ROOT / "examples").glob("*.py"):
        page = (site / "gallery" / f"{example.stem}.html").read_text("utf-8")
        assert f"{example.stem}.ipynb" in page, "it can be downloaded as a notebook"
        if "Not run for this page" not in page:
            assert "sphx-glr-script-out" in page, example.name
            has_plot = (ROOT / "docs" / "plots" / example.name).exists()
            assert (f"sphx_glr_{example.stem}_001" in page) == has_plot, example.name
    assert "gallery/bootstrap.html" in page_of(site, "dvkernels.MirroredStrategy")


def test_types_lead_to_their_pages_here_and_elsewhere(site):
    page = page_of(site, "dvkernels.MirroredStrategy")
    assert 'href="https://docs.python.org/3/library/functions.html#int"' in page
    assert 'href="dvkernels.Device.html#dvkernels.Device"' in page
    page = page_of(site, "dvkernels.kernels.all_gather")
    assert 'href="https://docs.python.org/3/glossary.html#term-sequence"' in page


def test_every_reference_is_a_link(site):
    xref = re.compile(r'(<a [^>]*>)?<code class="xref [^"]*"><span class="pre">(.*?)</span></code>')
    for path, page in pages(site).items():
        assert [name for link, name in xref.findall(page) if not link] == [], path


def test_the_version_switcher_of_every_page_leads_to_that_page(site):
    for path, page in pages(site).items():
        (listed,) = re.findall(r"theme_switcher_json_url = 'data:application/json,(.*?)'", page)
        for entry in json.loads(urllib.parse.unquote(listed)):
            # The theme appends the path of the page from the root of the pages.
            to = os.path.normpath(os.path.join(os.path.dirname(path), entry["url"] + path))
            assert to == path


WIDTHS = """<!doctype html><body><pre id="found">waiting</pre><script>
const pages = PAGES, found = {};
const frame = document.createElement("iframe");
frame.style = "width: PHONEpx; height: 800px; border: 0";
let next = 0;
frame.onload = () => {
  found[pages[next++]] = frame.contentDocument.scrollingElement.scrollWidth;
  if (next < pages.length) frame.src = "/" + pages[next];
  else document.getElementById("found").textContent = JSON.stringify(found);
};
frame.src = "/" + pages[0];
document.body.append(frame);
</script>"""


class _Handler(http.server.SimpleHTTPRequestHandler):
    """Serve the pages, and one that measures them."""

    widths = b""

    def do_GET(self):
        if self.path != "/widths":
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(self.widths)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def visit(site, tmp_path_factory):
    """Return a function that opens a page in Chromium, and returns its elements as text."""
    if not CHROMIUM:
        pytest.skip("Chromium is not installed")
    text = WIDTHS.replace("PAGES", json.dumps(sorted(pages(site)))).replace("PHONE", str(PHONE))
    handler = type("Handler", (_Handler,), {"widths": text.encode()})
    folder = tmp_path_factory.mktemp("chromium")
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(site))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def opened(path: str) -> str:
            url = path if "://" in path else f"http://127.0.0.1:{server.server_port}/{path}"
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
            flags += ["--virtual-time-budget=600000", f"--user-data-dir={folder}"]
            ran = subprocess.run(
                [CHROMIUM, *flags, url], capture_output=True, text=True, timeout=200, check=False
            )
            return ran.stdout

        yield opened
        server.shutdown()


@pytest.mark.browser
def test_no_page_is_wider_than_a_phone(visit, site):
    found = re.search(r'<pre id="found">(.*?)</pre>', visit("widths"), re.DOTALL)
    widths = json.loads(html.unescape(found[1]))
    assert widths.keys() == {*pages(site)}
    assert {name: width for name, width in widths.items() if width > PHONE} == {}


@pytest.mark.browser
def test_the_search_finds_names_also_without_a_server(visit, site):
    for start in ("", f"{site.resolve().as_uri()}/"):
        found = visit(f"{start}search.html?q=all_reduce")
        results = re.findall(r'<li class="[^"]*"><a href="([^"]*)"', found)
        assert any("dvkernels.kernels.all_reduce.html" in each for each in results[:3]), results
