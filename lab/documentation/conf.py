"""Settings of Sphinx for the site of ``make docs``; ``build.py`` passes the folder of sources."""

from flip.version import __version__

project = "FLIP"
version = release = __version__
author = "the FLIP authors"
copyright = f"{author}, Apache-2.0"
root_doc = "docs/index"

extensions = ["myst_parser", "sphinx_argparse_cli", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
default_role = "literal"  # `text` of help texts is code
smartquotes_action = "qe"  # quotes and ellipses; no dashes, because options begin with two
source_suffix = {".md": "markdown"}
autodoc_typehints = "description"
autodoc_member_order = "bysource"
nitpicky = False  # types of torch and of the standard library have no page here
suppress_warnings = ["myst.header"]  # pages of one section begin with any level

html_theme = "furo"
html_title = f"FLIP {__version__}"
html_show_sphinx = False
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
