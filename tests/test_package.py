import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import gaal_surgery
from gaal_surgery.surgery import RULES

README = Path(__file__).resolve().parents[1] / "README.md"


def test_every_public_name_is_there_and_has_a_docstring():
    for name in gaal_surgery.__all__:
        assert getattr(gaal_surgery, name).__doc__, name


def test_every_rule_is_public_and_in_the_docs():
    reference = (README.parent / "docs" / "api.md").read_text()
    for rule in RULES.values():
        assert rule.__name__ in gaal_surgery.__all__
        assert rule.__name__ in reference


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


def test_the_loop_of_the_readme_trains_every_part():
    (loop,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    model = nn.Module()
    model.encoders = nn.ModuleDict({"image": nn.Linear(16, 8), "table": nn.Linear(4, 8)})
    model.head = nn.Linear(8, 3)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = {"image": torch.randn(32, 16), "table": torch.randn(32, 4)}
    names = {
        **{name: getattr(gaal_surgery, name) for name in ("FreshFeatures", "GradientAlignedAlternator")},
        **{"torch": torch, "F": F, "model": model, "loader": [(batch, torch.randint(3, (32,)))] * 3},
    }
    exec(loop, names)
    assert names["optimizer"].stats.guides == ("table",)
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
