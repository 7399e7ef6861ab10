import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import gaal_surgery
from gaal_surgery.surgery import RULES


def test_every_public_name_is_there_and_has_a_docstring():
    for name in gaal_surgery.__all__:
        assert getattr(gaal_surgery, name).__doc__, name


def test_every_rule_is_public():
    assert {rule.__name__ for rule in RULES.values()} <= {*gaal_surgery.__all__}


def test_the_version_is_that_of_the_distribution():
    assert gaal_surgery.__version__ == version("gaal_surgery")


def test_types_are_shipped():
    assert (Path(gaal_surgery.__file__).parent / "py.typed").is_file()


def test_importing_the_library_imports_nothing_but_torch():
    optional = {"matplotlib", "pandas", "scipy", "sklearn", "lightning", "torchvision", "torchmetrics"}
    if torch.__version__ >= "2.8":  # before, keeping the step from the compiler loads the compiler
        optional |= {"triton", "torch._dynamo"}
    program = f"import sys, torch; before = set(sys.modules); import gaal_surgery; \
print(({optional!r} & set(sys.modules)) - before)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
