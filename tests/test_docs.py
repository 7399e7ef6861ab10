"""The documentation names what exists, and all of it."""

import ast
import importlib
import re
import sys
import tomllib
from pathlib import Path

import pytest

import gaal_surgery

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def test_every_yes_of_the_support_page_leads_to_a_test_that_exists():
    page = (DOCS / "support.md").read_text(encoding="utf-8")
    named = re.findall(r'\]\(\.\./(tests/[\w/]+\.py) "(\w+)"\)', page)
    assert len(named) > 150
    functions = {path: functions_of(ROOT / path) for path, _ in named}
    assert not [f"{path}::{name}" for path, name in named if name not in functions[path]]
    for line in page.splitlines():
        for cell in line.strip("|").split("|") if line.startswith("|") else []:
            if re.match(r"\W*yes\b", cell):
                assert re.fullmatch(r'(\[\w+\]\(\.\./tests/\S+ "test_\w+"\)(, )?)+', cell), cell


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_public_name_has_one_row_on_the_page_of_the_api():
    rows = re.findall(r"^\|`(\w+)`\|", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(gaal_surgery.__all__)


def test_every_page_is_in_the_lists_of_the_index():
    listed = re.findall(r"^- \[[^]]*\]\((.+?)\)", (DOCS / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    pages = [page for pattern in ("*.md", "notebooks/*.ipynb") for page in DOCS.glob(pattern)]
    assert sorted(listed) == sorted(p.relative_to(DOCS).as_posix() for p in pages if p.name != "index.md")


def test_every_extra_is_on_the_page_of_the_installation():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    page = (DOCS / "installation.md").read_text(encoding="utf-8")
    assert not [extra for extra in extras if f"\n|`{extra}`|" not in page]


# What the site has beyond its pages.


@pytest.fixture
def conf(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    monkeypatch.delitem(sys.modules, "conf", raising=False)
    return importlib.import_module("conf")


def test_the_lists_of_the_index_are_the_sidebar(conf):
    index = "# Title\n\n## Start\n\n- [One](one.md): first.\n- [Two](a/two.ipynb): second.\n\n## Empty\n\ntext\n"
    added = conf.with_sidebar(index).removeprefix(index)
    assert added.split() == ["```{toctree}", ":hidden:", ":caption:", "Start", "One", "<one>", "Two", "<a/two>", "```"]


def test_the_page_of_the_api_gets_the_entry_of_every_public_name_in_its_section(conf):
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    names = [entries_of(section) for section in conf.sections(conf.with_entries(page))]
    assert names == [re.findall(r"^\|`(\w+)`", section, re.MULTILINE) for section in conf.sections(page)]


def entries_of(section):
    return re.findall(r"^\.\. auto(?:class|function):: (\w+)$", section, re.MULTILINE)


REPOSITORY = "https://github.com/gaal-surgery/gaal_surgery/blob/main/"


@pytest.mark.parametrize(
    ("folder", "link", "expected"),
    [
        ("", "[a file](../examples/quickstart.py)", f"[a file]({REPOSITORY}examples/quickstart.py)"),
        ("", "[a `part`](../README.md#the-loop)", f"[a `part`]({REPOSITORY}README.md#the-loop)"),
        ("", "![a picture](../benchmarks/a.png)", "![a picture](../benchmarks/a.png)"),
        ("", "[a page](limits.md)", "[a page](limits.md)"),
        ("notebooks", "[a page](../limits.md)", "[a page](../limits.md)"),
        ("notebooks", "[a file](../../examples)", f"[a file]({REPOSITORY}examples)"),
    ],
)
def test_links_out_of_the_documentation_lead_to_the_repository(folder, link, expected, conf, monkeypatch):
    monkeypatch.setattr(conf, "REVISION", "main")
    assert conf.with_links_to_the_repository(f"See {link}.", folder) == f"See {expected}."


def test_a_link_that_names_a_test_leads_to_its_line(conf):
    name = test_a_link_that_names_a_test_leads_to_its_line.__name__
    built = conf.with_links_to_the_repository(f'[yes](../tests/test_docs.py "{name}")', "")
    line = int(re.search(rf'/tests/test_docs\.py#L(\d+) "{name}"\)', built)[1])
    assert Path(__file__).read_text(encoding="utf-8").splitlines()[line - 1].startswith(f"def {name}(")
