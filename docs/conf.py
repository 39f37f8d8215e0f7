"""How Sphinx builds these pages: `make docs`."""

from losslens import __version__

project = "LossLens"
author = "The LossLens authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.mathjax"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
nitpicky = True

# The pages are plain Markdown, which GitHub shows as well: `$…$` for equations, and headings as anchors.
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
# A shell line in a block of Python, or JSON with a comment, is not worth a warning.
suppress_warnings = ["misc.highlighting_failure"]

html_theme = "furo"
html_title = f"LossLens {version}"
html_copy_source = False

linkcheck_anchors = False
linkcheck_ignore = [r"http://localhost.*"]
