"""Fashion Product Images (Small), from Kaggle: catalogue photos with a short table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..errors import InputError
from .samples import Samples

_FEWEST = 40


def fashion(root: Path) -> Samples:
    """Which type of article a product is, among the types with at least 40 products.

    Layout of `root`: `styles.csv` (id, gender, masterCategory, subCategory, articleType, baseColour, season, year,
    usage) and `images/ID.jpg`, about 60 x 80.

    Two traps: masterCategory and subCategory nearly give the type away, so they are left out, as is the id; and "NA"
    is a value of some columns, not a missing one.

    Args:
        root: The folder of the set.

    Raises:
        InputError: `styles.csv` is missing.
    """
    path = root / "styles.csv"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {root} must hold styles.csv and images/ as Kaggle publishes them")
    # The full set has unquoted commas in its last column, productDisplayName, which would leak the type anyway.
    columns = ["id", "gender", "articleType", "baseColour", "season", "year", "usage"]
    frame = pd.read_csv(path, usecols=columns, keep_default_na=False, on_bad_lines="skip")
    frame = frame[frame.groupby("articleType")["id"].transform("size") >= _FEWEST].reset_index(drop=True)
    return Samples(
        name="fashion",
        images=[(root / "images" / f"{product}.jpg",) for product in frame["id"]],
        table=frame.drop(columns=["id", "articleType"]),
        numeric=["year"],
        categorical=["gender", "baseColour", "season", "usage"],
        target=frame["articleType"],
        ids=frame["id"],
    )
