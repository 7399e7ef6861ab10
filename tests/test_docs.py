"""The documentation names what exists."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_every_test_of_the_support_matrix_exists():
    named = re.findall(r"`(tests/[\w/]+\.py)::(?:\w+::)?(\w+)`", (ROOT / "docs" / "support.md").read_text())
    assert len(named) > 50
    functions = {path: functions_of(ROOT / path) for path, _ in named}
    assert not [f"{path}::{name}" for path, name in named if name not in functions[path]]


def functions_of(path):
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}
