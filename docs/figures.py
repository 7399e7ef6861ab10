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
page = (docs / "tutorial.md").read_text(encoding="utf-8")
namespace: dict = {}
for code in re.findall(r"^```python\n(?!>>>)(.*?)^```", page, re.DOTALL | re.MULTILINE):
    exec(code, namespace)
namespace["ax"].figure.savefig(docs / "_static" / "conflict.png", dpi=110)
for row in namespace["monitor"].summary():
    print(row)
print("applied updates that hurt their guide:", namespace["harmful"])
