"""Build the documents: ``sphinx-build -W --keep-going -b html docs docs/_build/html``. It needs no network."""

import sys
from pathlib import Path

import shardemb

sys.path.append(str(Path(__file__).parents[1]))
from benchmarks import history

project = "shardemb"
author = "the shardemb authors"
copyright = "the shardemb authors"
version = release = shardemb.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "numpydoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"shardemb {release}"
html_static_path = ["_static"]
html_css_files = ["overview.css"]

myst_heading_anchors = 3
myst_enable_extensions = ["deflist", "substitution"]
myst_substitutions = {"newest_entry": history.table()}

# The docstrings have the types, with shapes, so signatures stay short.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autosummary_generate = False
# `Store.commit` becomes a link, `ids` stays a word.
default_role = "autolink"
numpydoc_show_class_members = False
nitpicky = True
# Nothing here links to other projects' documents: that would need the network.
nitpick_ignore_regex = [(r"py:.*", r"(?!shardemb).*")]

# What is copied from a session are the commands, without prompts and results.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def setup(app):
    """Show the blank lines of sessions as blank lines; Sphinx does so only in docstrings."""

    def without_marks(app, name, source):
        source[0] = source[0].replace("\n<BLANKLINE>\n", "\n\n")

    app.connect("source-read", without_marks)
