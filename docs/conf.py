"""How Sphinx builds these pages: `make docs`."""

import importlib.metadata

project = "marlin-convert"
release = importlib.metadata.version("marlin-convert")
copyright = "the authors of marlin-convert, Apache-2.0"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_title = f"marlin-convert {release}"
html_theme = "alabaster"
html_theme_options = {"page_width": "62rem", "description": "4-bit MARLIN checkpoints, proven"}
html_show_sphinx = False
