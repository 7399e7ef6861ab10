"""What the paper's three data sets share: the command that prepares them, and splits that one seed fixes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd

from ..errors import InputError
from . import PAGES
from .samples import Samples
from .splits import split_rows

SEED = 2022  # of the published DVM preparation


def require(name: str, root: Path, path: str) -> Path:
    """The path below `root`, which `prepare.py` has written.

    Raises:
        InputError: The path does not exist.
    """
    if not (root / path).exists():
        raise InputError(
            f"{root / path} does not exist; download the archives from {PAGES[name]} and run "
            f"python examples/tabular_image/prepare.py {name} --archives FOLDER --data_root {root.parent}"
        )
    return root / path


def fix_split(samples: Samples, *, validation: float, test: float) -> Samples:
    """The data set with one stratified split, the same for every run: `--seed` does not change it."""
    split = pd.Series("train", index=range(len(samples)))
    for name, rows in split_rows(samples, validation=validation, test=test, seed=SEED).items():
        split[rows] = name
    return replace(samples, split=split)
