"""Entries of the version switcher, with addresses relative to the page that shows them.

The theme reads a list from one address for all pages, where a relative link would mean another
folder in each, and cannot read files. Here each page carries its list, so it also works without a
server. A site of several versions names the address of their common list instead.
"""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote


def page_list(pagename: str, version: str) -> str:
    """Return the list of this version alone as a URL that holds it.

    >>> page_list("reference/values", "0.1.0")[:50]
    'data:application/json,%5B%7B%22version%22%3A%20%22'
    """
    root = "../" * pagename.count("/") or "./"
    entries = [{"version": version, "url": root, "preferred": True}]
    return "data:application/json," + quote(json.dumps(entries), safe="")


def _put_list(app: Any, pagename: str, _: str, context: dict[str, Any], __: Any) -> None:
    switcher = app.config.html_theme_options["switcher"]
    if not switcher["json_url"]:
        version = switcher["version_match"]
        context["theme_switcher"] = {**switcher, "json_url": page_list(pagename, version)}


def setup(app: Any) -> dict[str, bool]:
    """Register the handler, before that of the theme."""
    app.connect("html-page-context", _put_list, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
