"""Runs the library's own tests with the lowest versions that it allows, in an environment made for that.

``python tests/oldest.py FOLDER`` makes the environment in FOLDER. The versions are the lower bounds of the library and
of its ``plot`` extra in ``pyproject.toml``. What the tests are written with is as new as there is.
"""

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = "expecttest hypothesis lightning numpy pandas pytest pytest-xdist pytorch_optimizer schedulefree scipy torchjd"
LEFT_OUT = ("test_docs.py", "test_faults.py", "test_notebooks.py", "test_pages.py")  # of documentation and pipeline


def lowest_versions() -> list[str]:
    """Requirements of the library and of its ``plot`` extra, pinned to their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = [*project["dependencies"], *project["optional-dependencies"]["plot"]]
    return [re.sub(r">=([\d.]+)", r"==\1", bound) for bound in bounds]


def main() -> int:
    """The exit status of the tests."""
    folder = Path(sys.argv[1])
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"

    def run(*arguments: object) -> int:
        return subprocess.run([python, "-m", *map(str, arguments)], cwd=ROOT, check=False).returncode

    lowest = lowest_versions()
    if run("pip", "install", "-q", "--no-compile", *lowest, *TOOLS.split()) or run("pip", "install", "-q", "-e", "."):
        return 1
    print("lowest versions:", *lowest, flush=True)
    tests = [test for test in ROOT.glob("tests/test_*.py") if test.name not in LEFT_OUT]
    # Warnings are no errors here: old releases warn of what they do themselves.
    return run("pytest", "-n", 2, "-q", "-W", "default", "--disable-warnings", "-m", "", *tests, "tests/integration")


if __name__ == "__main__":
    sys.exit(main())
