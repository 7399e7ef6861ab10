"""DVM-CAR (Huang et al., 2022): a photograph of a used car; 13 numbers and 4 categories of its advert."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..errors import InputError
from .paper import SEED, fix_split, require
from .samples import Samples

SIZES = ["Wheelbase", "Height", "Width", "Length"]  # mm
NUMERIC = [
    *SIZES,
    *("Adv_year", "Adv_month", "Reg_year", "Runned_Miles", "Price", "Seat_num", "Door_num"),
    *("Entry_price", "Engine_size"),
]
CATEGORICAL = ["Color", "Bodytype", "Gearbox", "Fuel_type"]
JITTER = 50  # mm

# Errors of the source that the published preparation corrects: model, column, wrong and right size.
_CORRECTIONS = [
    ("29_30", "Height", 805, 1805),  # Ford Ranger
    ("59_29", "Wheelbase", 5246, 3106),  # Mercedes-Benz
    ("43_9", "Wheelbase", 4065, 2580),  # Kia Rio
]
# Wheelbases of models for which the source has none, as in the published preparation: Peugeot RCZ, Ford Grand C-Max.
_WHEELBASES = {"69_36": 2612, "29_20": 2788}


def dvm(root: Path) -> Samples:
    """Which model a car is: 286 models, 176,414 adverts, one photograph each; 13 numbers and 4 categories.

    Layout of `root`: `dvm.csv` and the photographs it names, both written by `prepare.py` from the published archives
    (see `join_tables`), and optionally the id files of Hager et al. (2023),
    `{train,val,test}_ids_dvm_all_views.txt`: adverts as Genmodel_ID$$number, separated and ended by commas.

    There is one protocol. With the id files, their split is used (70,565 / 17,642 / 88,207), and adverts that the files
    do not list are left out. Without the id files, half of the adverts are the test split and a fifth of the rest is
    the validation split, stratified, always with the same seed.

    The trap: the sizes of a car nearly give its model away, so noise is added to the sizes, see `join_tables`.

    Args:
        root: The folder of the set.

    Raises:
        InputError: The set is not prepared, or only some of the id files are there.
    """
    text = ["Adv_ID", "Genmodel_ID", "image", *CATEGORICAL]
    frame = pd.read_csv(
        require("dvm", root, "dvm.csv"), dtype=dict.fromkeys(text, "str"), keep_default_na=False, encoding="utf-8"
    )
    samples = Samples(
        name="dvm",
        images=[(root / path,) for path in frame["image"]],
        table=frame[[*NUMERIC, *CATEGORICAL]],
        numeric=NUMERIC,
        categorical=CATEGORICAL,
        target=frame["Genmodel_ID"],
        ids=frame["Adv_ID"].rename("advert"),
        image_size=128,
    )
    published = _published_split(root)
    if published is None:
        note = f"split: drawn with seed {SEED}; {root} holds no published id files"
        return replace(fix_split(samples, validation=0.1, test=0.5), note=note)
    split = samples.ids.map(published)
    listed = np.flatnonzero(split.notna())
    note = (
        f"split: the published id files; {len(samples) - len(listed)} adverts that they do not list are left out, "
        f"{len(published) - len(listed)} that they list are not in dvm.csv"
    )
    return replace(samples, split=split, note=note).take(listed)


def join_tables(folder: Path, fewest: int = 100) -> pd.DataFrame:
    """The table of all adverts that can be used, from the published CSV files.

    An advert is joined to the entry price of its model in its year of registration, to its photograph (the first by
    name, any view) and to its sizes. Adverts with any missing value are dropped, then models with few adverts.

    Known errors of the sizes are corrected. A size that is missing or zero is taken from the first advert of the same
    model. Sizes are facts of the model: the four sizes would tell the model without any learning. A uniform integer
    from -50 to 50 mm is therefore added to each size of each advert, drawn in the order of Adv_ID with one seed.

    Args:
        folder: Holds `Ad_table.csv`, `Ad_table (extra).csv`, `Price_table.csv` and `Image_table.csv`.
        fewest: Models with fewer adverts are dropped.

    Returns:
        Adv_ID, Genmodel_ID, Image_name, the 13 numbers and the 4 categories, sorted by Adv_ID.

    Raises:
        InputError: A file or a column is missing.
    """
    from_advert = [column for column in NUMERIC if column not in (*SIZES, "Entry_price", "Engine_size")]
    adverts = _read(folder / "Ad_table.csv", ["Adv_ID", "Genmodel_ID", "Engin_size", *CATEGORICAL], from_advert)
    adverts["Engine_size"] = adverts.pop("Engin_size").str.extract(r"^(\d+(?:\.\d+)?)", expand=False).astype(float)

    prices = _read(folder / "Price_table.csv", ["Genmodel_ID"], ["Year", "Entry_price"])
    prices = prices.rename(columns={"Year": "Reg_year"})
    images = _read(folder / "Image_table.csv", ["Image_ID", "Image_name"])
    images["Adv_ID"] = images.pop("Image_ID").str.rsplit("$$", n=1).str[0]
    images = images.sort_values("Image_name").drop_duplicates("Adv_ID")

    # Missing values are dropped first, or a missing year would match a missing year.
    frame = (
        adverts.dropna()
        .merge(prices.dropna(), on=["Genmodel_ID", "Reg_year"], validate="many_to_one")
        .merge(images.dropna(), on="Adv_ID", validate="one_to_one")
        .merge(_read_sizes(folder / "Ad_table (extra).csv").dropna(), on="Adv_ID")
        .sort_values("Adv_ID", ignore_index=True)
    )
    frame[SIZES] += np.random.default_rng(SEED).integers(-JITTER, JITTER, (len(frame), len(SIZES)), endpoint=True)
    common = frame.groupby("Genmodel_ID")["Adv_ID"].transform("size") >= fewest
    return frame.loc[common, ["Adv_ID", "Genmodel_ID", "Image_name", *NUMERIC, *CATEGORICAL]].reset_index(drop=True)


def _read_sizes(path: Path) -> pd.DataFrame:
    """Adv_ID and the four sizes, corrected and filled, without noise."""
    table = _read(path, ["Adv_ID", "Genmodel_ID"], SIZES).drop_duplicates("Adv_ID")
    model = table.pop("Genmodel_ID")
    for wrong_model, column, wrong, right in _CORRECTIONS:  # before filling, which would spread them
        table.loc[(model == wrong_model) & (table[column] == wrong), column] = right
    table[SIZES] = table[SIZES].where(table[SIZES] > 0)
    table[SIZES] = table[SIZES].fillna(table[SIZES].groupby(model).transform("first"))
    table["Wheelbase"] = table["Wheelbase"].fillna(model.map(_WHEELBASES))
    return table


def _read(path: Path, text: list[str], numbers: list[str] | None = None) -> pd.DataFrame:
    """Some columns of a published table, whose header has stray blanks; text among the numbers counts as missing."""
    numbers = numbers or []
    if not path.is_file():
        raise InputError(f"{path} does not exist; take the file from the published archive of tables")
    frame = pd.read_csv(path, usecols=lambda column: column.strip() in (*text, *numbers), dtype=str)
    frame.columns = frame.columns.str.strip()
    missing = [column for column in (*text, *numbers) if column not in frame.columns]
    if missing:
        raise InputError(f"{path} has no column {missing[0]!r}; take the file from the published archive of tables")
    frame[numbers] = frame[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    return frame


def _published_split(root: Path) -> dict[str, str] | None:
    """The split of each advert; None without the id files."""
    paths = {split: root / f"{split}_ids_dvm_all_views.txt" for split in ("train", "val", "test")}
    absent = [path.name for path in paths.values() if not path.is_file()]
    if len(absent) == len(paths):
        return None
    if absent:
        raise InputError(
            f"{root} holds some of the id files but not {absent[0]}; add this file, or remove the other id files"
        )
    return {
        advert.strip(): split
        for split, path in paths.items()
        for advert in path.read_text().split(",")
        if advert.strip()
    }
