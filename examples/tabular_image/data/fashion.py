"""Fashion Product Images (Small; Kaggle): a catalogue photograph; gender, colour, season, year and usage."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..errors import InputError
from .samples import Samples
from .targets import read_target

_FEWEST = 40
_TARGETS = ("gender", "articleType", "baseColour", "season", "usage")


def fashion(root: Path, target_column: str | list[str] = "articleType", task: str = "") -> Samples:
    """Which type of article a product is, among the types with at least 40 products; or several labels of a product.

    Layout of `root`: `styles.csv` (id, gender, masterCategory, subCategory, articleType, baseColour, season, year,
    usage) and `images/ID.jpg`, about 60 x 80.

    There are two traps. masterCategory and subCategory nearly give the type away, so both are left out, and so is the
    id. "NA" is a value of some columns, and does not mean missing.

    Args:
        root: The folder of the set.
        target_column: The column that is predicted, or several columns, whose values are the labels.
        task: "classification" of one column, or "multilabel".

    Raises:
        InputError: `styles.csv` is missing, or a target column is unknown or does not fit `task`.
    """
    path = root / "styles.csv"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {root} must hold styles.csv and images/ as Kaggle publishes them")
    # The full set has unquoted commas in its last column, productDisplayName, which would leak the type anyway.
    columns = ["id", "gender", "articleType", "baseColour", "season", "year", "usage"]
    frame = pd.read_csv(path, usecols=columns, keep_default_na=False, on_bad_lines="skip")
    frame = frame[frame.groupby("articleType")["id"].transform("size") >= _FEWEST].reset_index(drop=True)
    names = [target_column] if isinstance(target_column, str) else list(target_column)
    for name in names:
        if name not in _TARGETS:
            raise InputError(f"fashion has no target {name!r}; choose from {', '.join(_TARGETS)}")
    several = len(names) > 1 or task == "multilabel"
    kind, target, _ = read_target(frame[names], "multilabel" if several else "classification", ",", str)
    if task not in ("", kind):
        raise InputError(f"fashion has no target for --task {task}; give --task classification or multilabel")
    return Samples(
        name="fashion",
        images=[(root / "images" / f"{product}.jpg",) for product in frame["id"]],
        table=frame.drop(columns=["id", *names]),
        numeric=["year"],
        categorical=[name for name in _TARGETS if name not in names],
        target=target,
        ids=frame["id"],
        task=kind,
    )
