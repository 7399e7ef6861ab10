"""Sphinx configuration. The build works offline and takes warnings as errors; `.ci/run` has the commands.

Pages are plain Markdown, which a repository page shows as it stands. This file adds three things for the site: the
sidebar from the lists of `index.md`, the entries of `api.md` from the tables of that page, and links to the
repository's files and to the API.
"""

import ast
import os
import posixpath
import re
import tomllib
from pathlib import Path

import docutils.nodes
from sphinx.application import Sphinx
from sphinx.util.nodes import make_refnode

import gaal_surgery

ROOT = Path(__file__).resolve().parent.parent
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
REPOSITORY = URLS["Source"]
REVISION = os.environ.get("GITHUB_REF_NAME", "main")  # the branch or tag that a workflow publishes
_BRANCH = """
<svg viewBox="0 0 16 16" fill="none" stroke="currentColor" stroke-width="1.5">
<circle cx="4" cy="3" r="1.75"/><circle cx="4" cy="13" r="1.75"/><circle cx="12" cy="5" r="1.75"/>
<path d="M4 5v6M12 7c0 3-8 1-8 4"/></svg>
"""

project = "gaal_surgery"
author = "the gaal_surgery developers"
version = release = gaal_surgery.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

html_theme = "furo"
pygments_dark_style = "github-dark"
html_title = f"{project} {release}"
html_static_path = ["_static"]
templates_path = ["_templates"]
html_css_files = ["site.css"]
html_logo = html_favicon = "_static/logo.svg"
html_copy_source = False
html_show_copyright = False
html_context = {"links": {"Repository": REPOSITORY, "Other versions": URLS["Documentation"] + "versions/"}}
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "links.html",
        "sidebar/scroll-end.html",
    ]
}
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": REVISION,
    "source_directory": "docs/",
    "footer_icons": [{"name": "Repository", "url": REPOSITORY, "html": _BRANCH, "class": ""}],
}

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the tests run the notebooks; pages show the outputs that are stored in them

copybutton_exclude = ".linenos, .gp, .go"

linkcheck_ignore = [re.escape(REPOSITORY) + "/(blob|edit)/.*"]  # tests/test_pages.py checks these files
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_anchors_ignore_for_url = [r"https://github\.com/.*"]  # GitHub makes its anchors by scripts

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

# Links to types of torch and the standard library would need inventories from the network. Private aliases in
# signatures have no page.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|nn|collections|matplotlib|typing|gaal_surgery\.projection)\..*"),
    (
        "py:.*",
        r"Tensor|Optimizer|ProcessGroup|Axes|Any|Callable|Iterator|Literal|Mapping|Sequence|Gradient|Logits|LossFn|Rule|Uncertainty",
    ),
]

doctest_global_setup = """
import os
os.environ["MPLBACKEND"] = "Agg"
import torch
import torch.nn.functional as F
from gaal_surgery import *
torch.set_num_threads(1)
torch.manual_seed(0)
"""

_LINK = re.compile(r"""(!?\[(?:[^][]|\[[^]]*\])*\])\((\.\./[^)\s#]*)(#[^)\s]*)?(\s+\\?"(\w+)\\?")?\)""")
_PAGES = re.compile(r"^- \[([^]]*)\]\(([\w/-]+)\.(?:md|ipynb)\)", re.MULTILINE)
_NAMES = re.compile(r"^\|\s*`(\w+)`", re.MULTILINE)


def sections(page: str) -> list[str]:
    """The text before the first heading of the second level, then one part for each such heading."""
    return re.split(r"^(?=## )", page, flags=re.MULTILINE)


def with_sidebar(index: str) -> str:
    """The index, with a hidden table of contents for each list, under the heading of the list."""
    for section in sections(index):
        if pages := _PAGES.findall(section):
            heading = section.splitlines()[0].removeprefix("## ")
            lines = [f"{title} <{page}>" for title, page in pages]
            index += "\n".join(["\n```{toctree}", ":hidden:", f":caption: {heading}", "", *lines, "```\n"])
    return index


def with_entries(page: str) -> str:
    """The page of the API. Each table is followed by the full entries of the names in the table."""
    return "".join(section + entries(_NAMES.findall(section)) for section in sections(page))


def entries(names: list[str]) -> str:
    """The block that makes Sphinx write the full entries of these names; empty without names."""
    lines = ["\n```{eval-rst}", ".. currentmodule:: gaal_surgery", ""]
    for name in names:
        if isinstance(getattr(gaal_surgery, name), type):
            lines += [f".. autoclass:: {name}", "   :members:", "   :special-members: __call__, __getitem__", ""]
        else:
            lines += [f".. autofunction:: {name}", ""]
    return "\n".join([*lines, "```\n\n"]) if names else ""


def with_links_to_the_repository(page: str, folder: str) -> str:
    """The page, with links out of docs/ leading to the repository, and to a test where the link's title names one."""

    def link(match: re.Match[str]) -> str:
        label, target, anchor, title, test = match.groups(default="")
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        if label.startswith("!") or path.startswith("docs/"):
            return match[0]
        if test:
            anchor = f"#L{line_of(test, ROOT / path)}"
        return f"{label}({REPOSITORY}/blob/{REVISION}/{path}{anchor}{title})"

    return _LINK.sub(link, page)


def line_of(function: str, file: Path) -> int:
    """The line in which a file defines a function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return next(node.lineno for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == function)


def change_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Adds the sidebar, the entries of the API and the links to a page before Sphinx reads the page."""
    if page == "index":
        source[0] = with_sidebar(source[0])
    if page == "api":
        source[0] = with_entries(source[0])
    source[0] = with_links_to_the_repository(source[0], posixpath.dirname(page))


def keep_equations(app: Sphinx, doctree: docutils.nodes.document) -> None:
    """Gives numbered equations to MathJax unchanged. Sphinx would wrap them in an environment that refuses numbers."""
    for node in doctree.findall(docutils.nodes.math_block):
        if r"\tag" in node.astext():
            node["nowrap"] = True
            node.children = [docutils.nodes.Text(rf"\[{node.astext()}\]")]


def link_names(app: Sphinx, doctree: docutils.nodes.document, page: str) -> None:
    """Makes each name of the API that is written as code a link to the entry of the name."""
    objects = app.env.domains.python_domain.objects
    for node in list(doctree.findall(docutils.nodes.literal)):
        entry = objects.get(f"gaal_surgery.{node.astext()}")
        if entry and not isinstance(node.parent, docutils.nodes.reference | docutils.nodes.title):
            link = make_refnode(app.builder, page, entry.docname, entry.node_id, node.deepcopy())
            node.replace_self(link)


def setup(app: Sphinx) -> None:
    app.connect("source-read", change_source)
    app.connect("doctree-read", keep_equations)
    app.connect("doctree-resolved", link_names)
