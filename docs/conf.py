"""How Sphinx builds the site: `make docs`. Pages are Markdown; the reference is generated from docstrings."""

import sys
from pathlib import Path

import preble

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "Preble"
author = copyright = "The Preble developers"
version = release = preble.__version__
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "markdown_docstrings", "outside_links"]
exclude_patterns = ["_build", "_extensions"]

# Pages read the same on a git host: plain Markdown links between files, and anchors as GitHub makes them of headings.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
maximum_signature_line_length = 120

# Names of other projects, for which intersphinx would need the network; a type variable; what the machine compares to.
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|hypothesis|numpy|os|pathlib|types|typing)\..*"),
    ("py:.*", r"PathLike|NDArray\[.*\]|SearchStrategy"),
    ("py:.*", r"preble\.sched\.testing\.(deliveries\.E|model\.\w+)"),
]

html_theme = "furo"
html_title = f"Preble {version}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
