"""Links of docstrings by the short names that their modules use.

A docstring says ``:func:`reduce```, and its summary also stands in tables of other pages, where the
name means nothing. What Sphinx does not find is looked up among all names with that ending.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.util.nodes import make_refnode


def _find(app: Any, env: Any, node: Any, content: nodes.TextElement) -> nodes.Node | None:
    if node.get("refdomain") != "py":
        return None
    wanted = "." + node["reftarget"].rpartition("dvkernels.")[2]
    objects = env.domains.python_domain.objects
    found = [name for name in objects if name.endswith(wanted) and not objects[name].aliased]
    # The shortest is that of the package itself, not of one of its modules.
    found.sort(key=lambda name: (name.count("."), name))
    if not found:
        return None
    entry = objects[found[0]]
    return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content)


def setup(app: Any) -> dict[str, bool]:
    """Register the search, after Sphinx's own."""
    app.connect("missing-reference", _find, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
