"""Configuration of the documentation: ``python -m sphinx -W docs site``.

Nothing is loaded from elsewhere, neither by the build nor by the pages. A site of several versions
names the address of their list, in the form of the theme, in ``DVKERNELS_DOCS_VERSIONS``.
"""

import os
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS / "_extensions"), str(ROOT)]
# The kernels of the notebooks run this checkout as well.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import gallery
import inventories
import public_names

import dvkernels

project = "dvkernels"
copyright = "the authors of dvkernels"
version = release = dvkernels.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "numpydoc",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "figures",
    "project_tables",
    "references",
    "versions",
]
exclude_patterns = [
    "_build",
    "_gallery_source",
    "_inventories",
    "gallery/**.ipynb",
    "gallery/**.py",
]
templates_path = ["_templates"]
source_suffix = {".rst": "restructuredtext", ".md": "myst-nb"}
suppress_warnings = ["config.cache"]

# Pages and notebooks.
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 120
nb_merge_streams = True

# Reference: the docstrings say the types.
add_module_names = False
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autosummary_generate = True
autosummary_context = {
    "title": public_names.title,
    "documented_elsewhere": public_names.documented_elsewhere,
    "slots": public_names.slots,
    "first_public_base": public_names.first_public_base,
}
numpydoc_show_class_members = False
numpydoc_xref_param_type = True
numpydoc_xref_aliases = inventories.aliases()
numpydoc_xref_ignore = "all"  # words that are no types
# All checks but these: one sentence may say all of a method, and its annotations its types.
numpydoc_validation_checks = {
    *("all", "ES01", "EX01", "GL02", "PR01", "PR03", "PR04", "RT01", "SA01", "SS01"),
}
numpydoc_validation_exclude = {
    r"\.__\w+__$",
    # It takes its parameters in __new__.
    r"\.ReduceOp$",
}
toc_object_entries_show_parents = "hide"
maximum_signature_line_length = 60

intersphinx_mapping = inventories.mapping(DOCS / "_inventories")

sphinx_gallery_conf = gallery.configuration(ROOT / "examples", DOCS)

# Appearance.
html_theme = "pydata_sphinx_theme"
html_title = "dvkernels"
html_static_path = ["_static"]
html_css_files = ["house.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "logo": {"text": "dvkernels"},
    "navbar_end": ["version-switcher", "theme-switcher"],
    # The extension versions.py gives each page its own list.
    "switcher": {
        "json_url": os.environ.get("DVKERNELS_DOCS_VERSIONS", ""),
        "version_match": version,
    },
    "check_switcher": False,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "footer_start": ["copyright"],
    "footer_end": [],
    "primary_sidebar_end": [],
    "show_toc_level": 2,
    "navigation_with_keys": False,
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"
