"""Houses Dataset (Ahmed and Moustafa, 2016): four photographs in one mosaic; rooms, area and zip code."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from ..errors import InputError
from .samples import Samples

_VIEWS = ("frontal", "bedroom", "bathroom", "kitchen")


def houses(root: Path, task: str = "") -> Samples:
    """535 houses of California; the class is the quartile of the price, or the target is the price.

    Layout of `root`: `Houses Dataset/HousesInfo.txt`, blank-separated without a header (bedrooms, bathrooms, area,
    zipcode, price), and `Houses Dataset/N_{frontal,bedroom,bathroom,kitchen}.jpg`, where house N, from 1, is row N.

    The price is the target and never in the table. The zip code is a category, and many zip codes are rare. Cut points
    between the classes come from training rows.

    Args:
        root: The folder of the set.
        task: "classification", or "regression" of the price.

    Raises:
        InputError: The table is missing, or `task` is "multilabel".
    """
    if task == "multilabel":
        raise InputError("houses has no labels; give --task classification or regression")
    folder = root / "Houses Dataset"
    path = folder / "HousesInfo.txt"
    if not path.is_file():
        raise InputError(f"{path} does not exist; {root} must hold the Houses Dataset as published")
    names = ["bedrooms", "bathrooms", "area", "zipcode", "price"]
    frame = pd.read_csv(path, sep=r"\s+", names=names, dtype={"zipcode": str})
    numbers = frame.index + 1
    return Samples(
        name="houses",
        images=[tuple(folder / f"{number}_{view}.jpg" for view in _VIEWS) for number in numbers],
        table=frame.drop(columns="price"),
        numeric=["bedrooms", "bathrooms", "area"],
        categorical=["zipcode"],
        target=frame["price"],
        ids=pd.Series(numbers, name="house"),
        quantiles=None if task == "regression" else 4,
        task="regression" if task == "regression" else "classification",
    )
