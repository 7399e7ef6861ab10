"""The documentation names what exists, and all of it."""

import ast
import re
import tomllib
from pathlib import Path

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
