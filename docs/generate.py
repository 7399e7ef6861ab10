"""Renews the blocks of pages that come from elsewhere in the repository: `python docs/generate.py`.

A page marks such a block with two comments, which neither the site nor a repository page shows:

    <!-- begin: file ../examples/quickstart.py -->
    <!-- end -->

The text between the comments is replaced. The first word after "begin:" names a function of `BLOCKS`. The words after
the name are the function's arguments. Paths start at the page's folder. `--check` changes nothing, and fails where a
block is out of date.
"""

import csv
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"(<!-- begin: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".sh": "bash"}


def file(path: Path) -> str:
    """A file of code as a block of code."""
    return f"```{_LANGUAGES[path.suffix]}\n{path.read_text(encoding='utf-8').strip()}\n```"


def excerpt(path: Path, first: Path, end: Path) -> str:
    """The lines of a file from the first that begins with `first` to the last before `end`. "_" stands for a space."""
    lines = path.read_text(encoding="utf-8").splitlines()
    marks = [line.strip().replace(" ", "_") for line in lines]
    start, stop = (
        next((number for number, mark in enumerate(marks) if mark.startswith(word.name)), None) for word in (first, end)
    )
    if start is None or stop is None or stop <= start:
        raise ValueError(f"{path} has no lines from {first.name} to {end.name}; correct the block's begin comment")
    code = textwrap.dedent("\n".join(lines[start:stop])).strip()
    return f"```text\n{code}\n```"


def include(path: Path) -> str:
    """A file of Markdown, unchanged."""
    return path.read_text(encoding="utf-8").strip()


def overview() -> str:
    """README's table: accuracies of four ways to train on four sets, from the committed results."""
    sets = {
        "leaves100-texture": "leaves, texture (99 species)",
        "leaves100-margin": "leaves, margin (100 species)",
        "fashion": "fashion (30 article types)",
        "houses": "houses (4 price classes)",
    }
    rows = {
        "table": "table alone",
        "concatenation": "concatenation",
        "gaal": "GAAL (paper)",
        "gaal-joint-own-encoders": "recommended",
    }
    lines = []
    for name, title in sets.items():
        accuracies = _accuracies(name)
        lines.append((title, *(f"{accuracies[row]:.3f}" for row in rows)))
    return _table(("set", *rows.values()), lines)


def pieces() -> str:
    """Accuracies with and without surgery, a joint turn and the calibrated fusion, from the committed results."""
    rows = {
        "gaal": ("yes", "-", "mean"),
        "gaal-calibrated": ("yes", "-", "calibrated"),
        "alternating-calibrated": ("-", "-", "calibrated"),
        "alternating-joint": ("-", "shared head", "calibrated"),
        "alternating-joint-own-encoders": ("-", "own head, encoders", "calibrated"),
        "gaal-joint": ("yes", "shared head", "calibrated"),
        "gaal-joint-own": ("yes", "own head", "calibrated"),
        "gaal-joint-own-encoders": ("yes", "own head, encoders", "calibrated"),
    }
    return _by_set(("surgery", "joint turn", "fusion"), rows)


def gate() -> str:
    """Accuracies of one modality, by a network and by a classical model, from the committed results."""
    rows = {
        "image": ("MLP on the features",),
        "logistic-image": ("logistic regression on the features",),
        "table": ("MLP on the table",),
        "boosting-table": ("gradient boosting on the table",),
    }
    return _by_set(("one modality",), rows)


def methods() -> str:
    """A table of the registered methods."""
    from tabular_image.methods import METHODS

    rows = [
        (f"`{name}`", METHODS.title(name), METHODS.summary(name), entry.family, ", ".join(entry.predictions))
        for name, entry in METHODS.entries.items()
    ]
    return _table(("`--method`", "method", "what it is", "family", "predictions"), rows)


def datasets() -> str:
    """A table of the registered data sets that need no preparation."""
    from tabular_image.data import DATASETS

    folders = {"bundled": "none, bundled with a package", "your own": "anywhere"}
    rows = [
        (f"`{name}`", DATASETS.title(name), folders.get(entry.origin, f"`{name}/`"), entry.size, DATASETS.summary(name))
        for name, entry in DATASETS.entries.items()
        if entry.origin != "prepared"
    ]
    return _table(("`--dataset`", "data set", "folder in `--data_root`", "size", "image and table"), rows)


def prepared_datasets() -> str:
    """A table of the registered data sets that `prepare.py` makes from archives."""
    from tabular_image.data import DATASETS
    from tabular_image.prepare import ARCHIVES

    rows = [
        (
            f"`{name}`",
            f"[{DATASETS.title(name)}]({entry.page})",
            ", ".join(f"`{archive.name}`" for archive in ARCHIVES[name]()),
            entry.size,
            DATASETS.summary(name),
        )
        for name, entry in DATASETS.entries.items()
        if entry.origin == "prepared"
    ]
    return _table(("`--dataset`", "data set", "archives", "size", "image and table"), rows)


def _by_set(header: tuple[str, ...], rows: dict[str, tuple[str, ...]]) -> str:
    """A table of accuracies on fixed features: rows by name with their first cells, then a column for each set."""
    sets = ("leaves100-texture", "leaves100-margin", "fashion", "houses")
    columns = [_accuracies(name) for name in sets]
    lines = [(*cells, *(f"{column[row]:.3f}" for column in columns)) for row, cells in rows.items()]
    return _table((*header, *(name.removeprefix("leaves100-") for name in sets)), lines)


def _accuracies(name: str) -> dict[str, float]:
    """The committed accuracy of every row on a set, on fixed features."""
    path = ROOT / f"benchmarks/accuracy/results/features/table1-{name}-features.csv"
    with path.open(encoding="utf-8") as table:
        return {line["row"]: float(line["accuracy"]) for line in csv.DictReader(table)}


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("-",) * len(header), *([cell.replace("*", "\\*") for cell in row] for row in rows)]
    return "\n".join(f"|{'|'.join(line)}|" for line in lines)


BLOCKS: dict[str, Callable[..., str]] = {
    function.__name__: function
    for function in (excerpt, file, include, overview, pieces, gate, methods, datasets, prepared_datasets)
}


def renewed(page: Path) -> str:
    """The text of a page with renewed blocks."""

    def block(match: re.Match[str]) -> str:
        name, *arguments = match[2].split()
        content = BLOCKS[name](*[page.parent / argument for argument in arguments])
        return f"{match[1]}{content}\n{match[3]}"

    return _BLOCK.sub(block, page.read_text(encoding="utf-8"))


def stale() -> dict[Path, str]:
    """The pages with blocks that are out of date, each with the text that the page should have."""
    texts = {page: renewed(page) for page in PAGES}
    return {page: text for page, text in texts.items() if text != page.read_text(encoding="utf-8")}


if __name__ == "__main__":
    outdated = stale()
    for page, text in outdated.items():
        print(page.relative_to(ROOT))
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
    sys.exit(bool(outdated) and "--check" in sys.argv)
