"""Runs the library's own tests with the lowest versions that it allows, as somebody who downloads a release would.

``python tests/oldest.py FOLDER`` needs Python alone, and makes FOLDER anew. An environment in FOLDER builds the source
distribution and, from it, the wheel. A second environment takes its place, with the wheel and the lowest torch and
nothing else: the README's first program runs there. Then the environment gets the ``test`` extra, and the unpacked
source distribution passes its tests against the installed wheel. The lowest versions are the lower bounds of the
library and of its ``plot`` extra in ``pyproject.toml``. What the tests are written with is as new as there is.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = r"""
import pathlib, re
exec(re.search(r"^```python\n(.*?)^```", pathlib.Path("README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)[1])
"""


def lowest_versions() -> tuple[list[str], list[str]]:
    """Requirements of the library, and of its ``plot`` extra, pinned to their lower bounds."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = project["dependencies"], project["optional-dependencies"]["plot"]
    return tuple([re.sub(r">=([\d.]+)", r"==\1", bound) for bound in some] for some in bounds)


def main() -> None:
    """Ends with the exit status of the first command that fails."""
    folder = Path(sys.argv[1])
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        sys.exit(f"error: {folder} is no virtual environment and would be lost; name a new folder")
    venv.create(folder, clear=True, with_pip=True)
    python = folder.resolve() / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    # What is imported is what was installed: neither the clone nor the working folder is on any process's path.
    # pip compiles nothing, so that the first process which imports a module has to keep the bytecode for the others.
    left_out = ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | {"PYTHONSAFEPATH": "1"}
    library, plot = lowest_versions()

    with tempfile.TemporaryDirectory() as place:

        def run(*command: object, cwd: str | Path = place) -> None:
            status = subprocess.run([*map(str, command)], cwd=cwd, env=environment, check=False).returncode
            if status:
                sys.exit(status)

        # pip's cache would hold the gigabytes of torch and CUDA a second time.
        install = (python, "-m", "pip", "install", "-q", "--no-compile", "--no-cache-dir")
        run(*install, "build")
        run(python, "-m", "build", "-q", "--outdir", place, ROOT)
        (archive,), (wheel,) = Path(place).glob("*.tar.gz"), Path(place).glob("*.whl")
        shutil.unpack_archive(archive, place, filter="data")
        source = Path(place, archive.name.removesuffix(".tar.gz"))

        venv.create(folder, clear=True, with_pip=True)
        run(*install, *library, wheel)
        run(python, "-c", PROGRAM, cwd=source)
        run(*install, *library, *plot, f"{wheel}[test]")
        print("lowest versions:", *library, *plot, flush=True)
        # Warnings are no errors here: old releases warn of what they do themselves.
        warnings = ("-W", "default", "--disable-warnings")
        run(python, "-m", "pytest", "-n", 2, "-q", *warnings, "-m", "", cwd=source)


if __name__ == "__main__":
    main()
