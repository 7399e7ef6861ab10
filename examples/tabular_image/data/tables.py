"""From raw columns to numbers, with statistics of the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from ..errors import InputError
from .samples import Samples


@dataclass(frozen=True)
class TableColumn:
    """Where a raw column stands in the encoded table.

    Attributes:
        name: As in the raw table.
        start: First encoded column.
        stop: One past the last: one column for a number, one a category for a categorical column.
        categorical: Whether it is one-hot encoded.
    """

    name: str
    start: int
    stop: int
    categorical: bool


def encode_table(samples: Samples, train: np.ndarray) -> tuple[np.ndarray, list[TableColumn]]:
    """Imputes and standardises the numeric columns, one-hot encodes the categorical ones.

    Args:
        samples: The data set of N rows.
        train: Positions of the training rows; medians, means, deviations and categories come from these alone.

    Returns:
        Float32 array (N, D), finite everywhere, and what its columns are: numbers first. A category that no training
        row has is a row of zeros in its block.

    Raises:
        InputError: There is no column, or a numeric column holds text.
    """
    if not samples.numeric and not samples.categorical:
        raise InputError(f"{samples.name}: the table has no numeric and no categorical column; name at least one")
    frame = pd.concat(
        [_numbers(samples, column) for column in samples.numeric]
        + [samples.table[column].map(str, na_action="ignore").astype(object) for column in samples.categorical],
        axis=1,
    )
    encoder = ColumnTransformer(
        [
            # An empty column stays, as zeros: D must not depend on which rows happen to train.
            (
                "numeric",
                make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()),
                samples.numeric,
            ),
            (
                "categorical",
                make_pipeline(
                    SimpleImputer(strategy="constant", fill_value="(missing)"),
                    OneHotEncoder(handle_unknown="ignore", sparse_output=False),
                ),
                samples.categorical,
            ),
        ]
    )
    encoder.fit(frame.iloc[train])
    one_hot = encoder.named_transformers_["categorical"]
    categories = one_hot[-1].categories_ if samples.categorical else []
    widths = [1] * len(samples.numeric) + [len(values) for values in categories]
    stops = np.cumsum(widths).tolist()
    columns = [
        TableColumn(name, stop - width, stop, categorical=position >= len(samples.numeric))
        for position, (name, width, stop) in enumerate(
            zip([*samples.numeric, *samples.categorical], widths, stops, strict=True)
        )
    ]
    return np.asarray(encoder.transform(frame), dtype=np.float32), columns


def _numbers(samples: Samples, column: str) -> pd.Series:
    raw = samples.table[column]
    numbers = pd.to_numeric(raw, errors="coerce").astype(float)
    text = numbers.isna() & raw.notna()
    if text.any():
        row = int(text.to_numpy().argmax())
        raise InputError(
            f"{samples.where(row)}: column {column!r} is numeric but holds {raw.iloc[row]!r}; "
            "correct the value or name the column among the categorical ones"
        )
    return numbers.replace([np.inf, -np.inf], np.nan)
