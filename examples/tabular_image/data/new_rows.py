"""Rows that a model has never seen, from a table that may lack the target, the pictures, or everything else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from ..errors import InputError
from .columns import reread
from .picture_files import find_pictures
from .reading import as_text
from .samples import Samples

if TYPE_CHECKING:
    from ..artifact import Recipe


def new_rows(frame: pd.DataFrame, recipe: Recipe, image_root: Path, name: str = "the table") -> Samples:
    """The rows as a data set without a target. A column that the table lacks has missing cells alone.

    Text is read as the text of the training table was. Columns that the model does not know are left out.

    Args:
        frame: N rows; cells may be text, numbers, dates or missing. Messages name a row by its index.
        recipe: What the model needs.
        image_root: Where relative paths of pictures start.
        name: What error messages call the table.

    Raises:
        InputError: There is no row, only some columns of a kind are missing, all columns are missing, or a path is
            ambiguous.
    """
    if not len(frame):
        raise InputError(f"{name} has no rows; give at least one")
    kinds = {column: kind for kind in ("numeric", "categorical", "dates") for column in getattr(recipe, kind)}
    there = [column for column in kinds if column in frame]
    pictured = [column for column in recipe.image_columns if column in frame]
    for wanted, found in ((list(kinds), there), (recipe.image_columns, pictured)):
        missing = [column for column in wanted if column not in found]
        if missing and found:
            raise InputError(
                f"{name} has no column {', '.join(map(repr, missing))}, which the model was trained with; add this "
                "column, with empty cells where values are unknown"
            )
    if not there and not pictured:
        needed = ", ".join([*kinds, *recipe.image_columns])
        raise InputError(f"{name} has no column that the model was trained with; it needs {needed}")
    ids = pd.Series(frame.index, name=frame.index.name or "row")
    frame = frame.reset_index(drop=True)
    absent = pd.Series(None, index=frame.index, dtype=object)
    table = {
        column: _values(frame[column], kinds[column], recipe.readings.get(column, {})) if column in there else absent
        for column in kinds
    }
    paths = frame[pictured].map(as_text) if pictured else pd.DataFrame({"image": [""] * len(frame)})
    return Samples(
        name=name,
        images=find_pictures(paths, image_root, lambda row: f"{name}, {ids.name} {ids[row]}"),
        table=pd.DataFrame(table, index=frame.index).astype(dict.fromkeys(recipe.dates, "datetime64[ns]")),
        numeric=recipe.numeric,
        categorical=recipe.categorical,
        dates=recipe.dates,
        target=pd.Series("", index=frame.index),
        ids=ids,
        grey=recipe.grey,
        image_size=recipe.image_size,
    )


def _values(cells: pd.Series, kind: str, reading: dict[str, str]) -> pd.Series:
    if kind == "numeric" and pd.api.types.is_numeric_dtype(cells):
        return cells.astype(float)
    if kind == "dates" and pd.api.types.is_datetime64_any_dtype(cells):
        return cells.dt.tz_localize(None)
    as_kind = {"numeric": "number", "categorical": "category", "dates": "date"}[kind]
    return reread(cells.map(as_text).astype(object), as_kind, reading).values
