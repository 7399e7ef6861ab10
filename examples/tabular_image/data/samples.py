"""The rows of a data set, before any splitting or fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Samples:
    """All N rows of one data set before splitting.

    Attributes:
        name: The data set, as error messages and figures call it.
        images: Either a tuple of paths for each row, or uint8 pixels of shape (N, H, W) or (N, H, W, 3). Several paths
            of a row are tiled into one square mosaic. A None among paths is a black tile. A row without a path, or with
            None alone, has no picture.
        table: The raw columns, N rows.
        numeric: Columns of `table` that are numbers; missing values are allowed.
        categorical: Columns of `table` that are categories; missing values are allowed.
        dates: Columns of `table` that are datetimes; missing values are allowed.
        target: The class name of each row, or a number where `quantiles` is set or the task is regression. For the task
            multilabel bool (N, L), with a column for each label.
        ids: What `predictions.csv` and error messages call each row. The name of the series says what the ids are
            ("id", "line").
        quantiles: Cut a numeric target into this number of classes, at quantiles of the *training* rows.
        split: "train", "val" or "test" for each row, where the publisher fixed it.
        groups: Rows of one group never sit in two splits.
        grey: The images have one channel.
        image_size: Side in pixels that suits the images, where the user names none.
        note: What the reader decided by itself, for the user to check.
        task: What is predicted: "classification", "multilabel" or "regression".
        readings: How the text of a column was read, by its name, for `columns.reread`. Only columns of text have one.
        image_columns: The names of the columns of pictures in a table of new rows.
        features: Fixed features of each row's picture, float32 (N, F); None before `features.with_features`.
        fingerprints: A number for each row's pictures, uint64 (N,); None before `identity.fingerprinted`.
    """

    name: str
    images: Sequence[tuple[Path | None, ...]] | np.ndarray
    table: pd.DataFrame
    numeric: list[str]
    categorical: list[str]
    target: pd.Series | pd.DataFrame
    ids: pd.Series
    dates: Sequence[str] = ()
    quantiles: int | None = None
    split: pd.Series | None = None
    groups: pd.Series | None = None
    grey: bool = False
    image_size: int = 64
    note: str = ""
    task: Literal["classification", "multilabel", "regression"] = "classification"
    readings: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    image_columns: Sequence[str] = ("image",)
    features: np.ndarray | None = None
    fingerprints: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.target)

    def where(self, row: int) -> str:
        """Names a row for an error message, as in `houses, house 17`."""
        return f"{self.name}, {self.ids.name or 'row'} {self.ids.iloc[row]}"

    def take(self, rows: np.ndarray) -> Samples:
        """The data set reduced to `rows` (positions), in that order."""

        def pick(column: pd.Series | None) -> pd.Series | None:
            return None if column is None else column.iloc[rows].reset_index(drop=True)

        images = self.images[rows] if isinstance(self.images, np.ndarray) else [self.images[row] for row in rows]
        return replace(
            self,
            images=images,
            table=self.table.iloc[rows].reset_index(drop=True),
            target=self.target.iloc[rows].reset_index(drop=True),
            ids=self.ids.iloc[rows].reset_index(drop=True),
            split=pick(self.split),
            groups=pick(self.groups),
            features=None if self.features is None else self.features[rows],
            fingerprints=None if self.fingerprints is None else self.fingerprints[rows],
        )
