"""From raw columns to numbers, with statistics of the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from ..errors import InputError
from .samples import Samples

MANY = 100  # categories; a column of more is hashed
HASHED = 64  # encoded columns of a hashed one
_DROWNED = 1e6  # as often as all others deviates a number beside which float32 cannot tell them apart


@dataclass(frozen=True)
class TableColumn:
    """Where a raw column stands in the encoded table.

    Attributes:
        name: As in the raw table; with the feature's name for those of a date or a hashed column.
        start: First encoded column.
        stop: One past the last: one column for a number, one a category for a categorical column.
        categorical: Whether it is one-hot encoded.
    """

    name: str
    start: int
    stop: int
    categorical: bool


@dataclass(frozen=True)
class EncodedTable:
    """A table as a network reads it.

    Attributes:
        values: Float32 (N, D), finite everywhere.
        columns: What its columns are: numbers first.
        problems: One sentence for each cell whose number cannot be used.
    """

    values: np.ndarray
    columns: list[TableColumn]
    problems: list[str]


def encode_table(samples: Samples, train: np.ndarray) -> EncodedTable:
    """Imputes and standardises numbers and the features of dates; one-hot encodes categories, or hashes many of them.

    A date becomes its year, its seconds since 1970, and month, day, hour and weekday as points on a circle (skrub's
    `DatetimeEncoder`). A categorical column of more than 100 values becomes 64 numbers: its values' n-grams of one to
    three letters, hashed (scikit-learn's `HashingVectorizer`), so that no column makes the table wide. A cell that is
    not finite, or whose number would drown all others of its column, counts as missing.

    Args:
        samples: The data set of N rows.
        train: Positions of the training rows; medians, means, deviations and categories come from these alone. A
            category that no training row has is a row of zeros in its block.

    Raises:
        InputError: There is no column, or a numeric column holds text.
    """
    if not (samples.numeric or samples.categorical or samples.dates):
        raise InputError(f"{samples.name}: the table has no column that can be used; name at least one")
    problems: list[str] = []
    text = {name: samples.table[name].map(str, na_action="ignore").fillna("") for name in samples.categorical}
    hashed = [name for name in text if text[name].nunique() > MANY]
    numeric = (
        pd.concat(
            [
                *(_numbers(samples, name, problems) for name in samples.numeric),
                *(_date_features(samples.table[name], train) for name in samples.dates),
                *(_hashes(text[name]) for name in hashed),
            ],
            axis=1,
        )
        if samples.numeric or samples.dates or hashed
        else pd.DataFrame(index=samples.table.index)
    )
    blocks = [_standardised(numeric, train)] if len(numeric.columns) else []
    columns = [TableColumn(str(name), place, place + 1, False) for place, name in enumerate(numeric.columns)]
    for name in samples.categorical:
        if name not in hashed:
            one_hot = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
            cells = text[name].to_numpy(dtype=object)[:, None]
            blocks.append(one_hot.fit(cells[train]).transform(cells))
            start = columns[-1].stop if columns else 0
            columns.append(TableColumn(name, start, start + blocks[-1].shape[1], True))
    return EncodedTable(np.concatenate(blocks, axis=1), columns, problems)


def _standardised(numbers: pd.DataFrame, train: np.ndarray) -> np.ndarray:
    """Float32 (N, columns): medians in the gaps, mean 0 and deviation 1 over the training rows."""
    # An empty column stays, as zeros: D must not depend on which rows happen to train.
    scaler = make_pipeline(SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler())
    values = numbers.to_numpy(dtype=float)
    # Squares of numbers beyond 1e150 have no float; a power of two changes no digit.
    exponents = np.frexp(np.nanmax(np.abs(values), axis=0, initial=0))[1]
    values = np.ldexp(values, np.where(np.abs(exponents) > 400, -exponents, 0))
    return np.asarray(scaler.fit(values[train]).transform(values), dtype=np.float32)


def _numbers(samples: Samples, column: str, problems: list[str]) -> pd.Series:
    """Floats (N,), NaN where a cell is missing or told in `problems`."""
    raw = samples.table[column]
    numbers = pd.to_numeric(raw, errors="coerce").astype(float)
    text = numbers.isna() & raw.notna()
    if text.any():
        row = int(text.to_numpy().argmax())
        raise InputError(
            f"{samples.where(row)}: column {column!r} is numeric but holds {raw.iloc[row]!r}; "
            "correct the value or name the column among the categorical ones"
        )
    infinite = np.isinf(numbers.to_numpy())
    drowning = _drowning(numbers.to_numpy())
    for unusable, what in ((infinite, "which is not finite"), (drowning, "beside which its other numbers vanish")):
        rows = np.flatnonzero(unusable)
        more = f", as do {len(rows) - 1} more cells" if len(rows) > 1 else ""
        for row in rows[:1]:
            problems.append(
                f"{samples.where(row)}: column {column!r} holds {raw.iloc[row]:g}, {what}; the cell counts as "
                f"missing{more}"
            )
    return numbers.where(~(infinite | drowning))


def _drowning(numbers: np.ndarray) -> np.ndarray:
    """Which numbers deviate so much more than all others that float32 cannot tell the others apart, bool (N,)."""
    finite = np.isfinite(numbers)
    with np.errstate(over="ignore"):
        far = np.abs(np.where(finite, numbers, 0) - (np.median(numbers[finite]) if finite.any() else 0))
    far[~finite] = 0
    ordered = np.sort(far[far > 0])
    jumps = np.flatnonzero(ordered[1:] / _DROWNED > ordered[:-1])
    # The numbers above a jump are the errors, where they are few.
    limits = [ordered[jump] for jump in jumps if len(ordered) - jump - 1 <= max(1, len(numbers) // 20)]
    return far > limits[0] if limits else np.zeros(len(numbers), dtype=bool)


def _date_features(dates: pd.Series, train: np.ndarray) -> pd.DataFrame:
    """Features of a column of datetimes, floats with NaN where it is missing."""
    from skrub import DatetimeEncoder  # takes seconds, and few tables have dates

    encoder = DatetimeEncoder(add_weekday=True, periodic_encoding="circular")
    dates = dates.reset_index(drop=True)
    encoder.fit(dates.iloc[train] if dates.iloc[train].notna().any() else dates)
    return encoder.transform(dates).astype(float).set_axis(dates.index)


def _hashes(cells: pd.Series) -> pd.DataFrame:
    """Hashed n-grams of the values, (N, 64)."""
    vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=(1, 3), n_features=HASHED, lowercase=False)
    codes, values = pd.factorize(cells)
    vectors = vectorizer.transform(values).toarray()[codes]
    return pd.DataFrame(vectors, columns=[f"{cells.name}: {place}" for place in range(HASHED)])
