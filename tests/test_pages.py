"""The pages of the documentation: plain Markdown, links that lead somewhere, code that runs as it stands.

A reader meets a page on the site or in the repository, so that a page may use nothing that only one of the two shows.
All Python of a section (heading of the second level) runs in one namespace of its own. A page of `WHOLE` runs as one.
Code that begins with `>>>` is a doctest; a block of `text` directly below other code is what that code prints.
"""

import contextlib
import doctest
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from markdown_it import MarkdownIt
from markdown_it.token import Token
from tabular_image.command_line import as_written

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
WHOLE = {"tutorial.md", "predict.md"}
_FLAGS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def tokens(page: Path) -> list[Token]:
    return MarkdownIt("gfm-like", {"linkify": False}).parse(page.read_text(encoding="utf-8"))


@dataclass
class Section:
    page: Path
    title: str
    fences: list[Token] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{name(self.page)}: {self.title}"


def sections(page: Path) -> Iterator[Section]:
    section = Section(page, page.stem)
    parsed = tokens(page)
    for token, following in zip(parsed, [*parsed[1:], None], strict=True):
        if token.type == "heading_open" and token.tag == "h2" and page.name not in WHOLE:
            yield section
            section = Section(page, following.content)
        elif token.type == "fence":
            section.fences.append(token)
    yield section


RUNNABLE = [
    section
    for page in PAGES
    if page.name not in ("CONTRIBUTING.md", "CHANGELOG.md")
    for section in sections(page)
    if any(fence.info == "python" for fence in section.fences)
]


@pytest.mark.parametrize("section", RUNNABLE, ids=str)
def test_the_code_of_a_section_runs_by_itself(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    for number, fence in enumerate(section.fences):
        expected = section.fences[number + 1] if number + 1 < len(section.fences) else None
        if fence.info != "python":
            continue
        if fence.content.startswith(">>>"):
            test = doctest.DocTestParser().get_doctest(fence.content, namespace, str(section), None, fence.map[0])
            failures = io.StringIO()
            results = doctest.DocTestRunner(optionflags=_FLAGS).run(test, out=failures.write, clear_globs=False)
            assert results.failed == 0, failures.getvalue()
            namespace = test.globs
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            # As many lines up as the block begins, so that a traceback names the page's own line.
            exec(compile("\n" * (fence.map[0] + 1) + fence.content, name(section.page), "exec"), namespace)
        if expected is not None and expected.info == "text" and expected.map[0] <= fence.map[1] + 1:
            checker = doctest.OutputChecker()
            assert checker.check_output(expected.content, printed.getvalue(), _FLAGS), printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_is_plain_markdown(page):
    for fence in tokens(page):
        if fence.type == "fence":
            assert not fence.info.startswith("{"), f"line {fence.map[0] + 1}: {fence.info}"
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "code", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert not re.search(r"\{[a-z:]+\}`?", re.sub(r"(\$\$?).*?\1", "", text, flags=re.DOTALL)), "a role"
    assert not re.search(r"^\([\w-]+\)=", text, flags=re.MULTILINE), "a label"
    assert not re.search(r"^: ", text, flags=re.MULTILINE), "a definition list"


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    parsed = tokens(page)
    found: set[str] = set()
    for token, inline in zip(parsed, [*parsed[1:], None], strict=True):
        if token.type == "heading_open":
            anchor = slug("".join(child.content for child in inline.children))
            found.add(next(a for a in (anchor, *(f"{anchor}-{n}" for n in range(1, 50))) if a not in found))
    return found


def targets(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or ():
            if target := child.attrGet("href") or child.attrGet("src"):
                yield str(target)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in targets(page):
        parts = urlsplit(target)
        if parts.scheme:
            continue
        file = (page.parent / parts.path).resolve() if parts.path else page
        assert file.exists(), target
        if parts.fragment and file.suffix == ".md":
            assert parts.fragment in anchors(file), target


def commands(page: Path) -> Iterator[list[str]]:
    for token in tokens(page):
        if token.type == "fence" and token.info == "bash":
            lexer = shlex.shlex(token.content.replace("\\\n", " "), posix=True, punctuation_chars=";&|\n")
            lexer.whitespace = " \t"
            lexer.whitespace_split = True
            for ends, words in groupby(lexer, key=lambda word: set(word) <= set(";&|\n")):
                if not ends:
                    yield list(words)


# What a command names is the reader's own, or what CONTRIBUTING.md adds.
_yours = re.compile(r"^--help$|^METHOD$|\.yaml$|^my_|^(pcgrad|late_fusion|stripes)$")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_script_of_a_command_exists_and_takes_its_options(page):
    for words in commands(page):
        scripts = [
            word
            for word in words
            if word.endswith(".py") and word.startswith(("examples/", "benchmarks/")) and "$" not in word
        ]
        for script in scripts:
            assert (ROOT / script).is_file(), " ".join(words)
            if script.endswith("tabular_image/train.py") and not any(map(_yours.search, words)):
                as_written(words[words.index(script) + 1 :])


def test_generated_blocks_are_those_of_today(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.delitem(sys.modules, "generate", raising=False)
    import generate

    assert not [name(page) for page in generate.stale()], "run `python docs/generate.py`"
