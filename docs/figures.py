"""Draws the pictures of these pages: runs the code of tutorial.md and saves its conflict plot.

Run `python docs/figures.py` with the library, scikit-learn and matplotlib installed.
"""

import re
from pathlib import Path

import matplotlib as mpl
import torch

mpl.use("Agg")
torch.set_num_threads(1)
docs = Path(__file__).parent
namespace: dict = {}
for code in re.findall(r"^```\{testcode\}\n(.*?)^```", (docs / "tutorial.md").read_text(), re.DOTALL | re.MULTILINE):
    exec(code, namespace)
namespace["ax"].figure.savefig(docs / "_static" / "conflict.png", dpi=110)
for name in ("joint", "alternating", "gaal"):
    print(name, {key: round(value, 3) for key, value in namespace[name].items()})
for row in namespace["monitor"].summary():
    print(row)
for mode in ("gradient", "update"):
    print(mode, namespace["harmful_steps"](mode))
