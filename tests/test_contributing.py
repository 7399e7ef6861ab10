"""CONTRIBUTING.md's walk-throughs, done as they are written, on a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAINING = """
import contextlib
import sys
from protocol import ROWS, SETS
from tabular_image import train

common = ["--epochs", "1", "--workers", "0", "--threads", "1", "--accelerator", "cpu", "--pictures", "false"]
for words in (
    ["--gaal.rule", "pcgrad"],
    ["--method", "late_fusion", "--late_fusion.image_weight", "0.25"],
    ["--dataset", "stripes"],
):
    assert train.main([*words, *common, "--out", words[-1]]) == 0, words
row = ROWS["late_fusion"]
assert (row.label, row.block, row.searched) == ("Late fusion", "fused", {"image_weight": (0.5, 0.25, 0.75)})
assert SETS["stripes"]["dataset"] == "stripes"
for topic in ([], ["late_fusion"], ["gaal"]):
    with contextlib.suppress(SystemExit):
        train.main(["--help", *topic])
"""


def walk_through(title: str) -> list[tuple[str, str, str]]:
    """Language, file and content of each block of a section that makes or changes a file."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^##+ ", page.split(f"### {title}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    blocks = re.findall(r"^ +```(diff|python)\n(.*?)^ +```$", section, re.MULTILINE | re.DOTALL)
    texts = [(language, textwrap.dedent(text).partition("\n")) for language, text in blocks]
    return [(language, head.split()[1], body) for language, (head, _, body) in texts]


def apply(root: Path, title: str) -> None:
    """Does what a section says: writes its files, and changes others where the lines of the block stand."""
    for language, name, body in walk_through(title):
        path = root / name
        if language == "python":
            assert not path.exists()
            path.write_text(body)
            continue
        for change in re.split(r"(?<=\n)(?=-)", body):
            lines = change.splitlines()
            before, after = ("\n".join(line[1:] for line in lines if line[0] != sign) for sign in "+-")
            text = path.read_text()
            assert text.count(before) == 1, f"{name} has no single place for {change}"
            path.write_text(text.replace(before, after))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("copy")
    unwanted = shutil.ignore_patterns("__pycache__", "results")
    for folder in ("gaal_surgery", "examples", "benchmarks", "tests"):
        shutil.copytree(ROOT / folder, root / folder, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", root)
    for title in ("Add a rule", "Add a method", "Add a data set"):
        apply(root, title)
    return root


def execute(root: Path, *words: str) -> str:
    paths = os.pathsep.join(str(root / folder) for folder in ("", "examples", "benchmarks/accuracy"))
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_what_was_added_trains_and_is_listed(copy: Path):
    printed = execute(copy, "-c", TRAINING)
    for word in ("late_fusion", "--late_fusion.image_weight", "stripes", "pcgrad"):
        assert word in printed
    for folder in ("pcgrad", "0.25", "stripes"):
        assert (copy / folder / "results.json").is_file()


@pytest.mark.slow
def test_tests_of_everything_find_what_was_added(copy: Path):
    names = "(pcgrad and not compiles) or late_fusion or stripes or label_of_its_own or every_rule_of_the_library"
    files = ["test_meta", "test_projection", "examples/methods/test_every_method", "benchmarks/test_accuracy"]
    words = ["-v", "-p", "no:cacheprovider", "-k", names, *(f"tests/{file}.py" for file in files)]
    report = execute(copy, "-m", "pytest", *words)
    for test in (
        "test_with_every_rule[pcgrad-others-gradient]",
        "test_keeps_the_structure_of_the_gradient[pcgrad-tensor]",
        "test_all_stages_train_and_all_predictions_are_finite[late_fusion]",
        "test_every_row_searches_as_much_of_its_own_as_gaal_or_all_it_has[late_fusion]",
        "test_a_module_begins_with_its_title_and_a_summary[stripes]",
    ):
        assert re.search(rf"{re.escape(test)}.* PASSED", report), report
