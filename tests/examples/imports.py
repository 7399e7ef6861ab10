"""Which packages a command has imported by the time it ends."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def run_with_imports(script: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The command's outcome, and the top-level names of everything that it imported."""
    done = subprocess.run([sys.executable, "-X", "importtime", script, *words], capture_output=True, text=True)
    names = set(re.findall(r"^import time: .*\| +([^.\s]+)", done.stderr, re.MULTILINE))
    assert "tabular_image" in names
    return done, names
