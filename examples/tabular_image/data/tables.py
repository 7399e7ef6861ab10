"""From raw columns to numbers, with statistics of the training rows alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from sklearn.feature_extraction.text import HashingVectorizer
from sklearn.impute import SimpleImputer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from ..errors import InputError
from .samples import Samples

MANY = 100  # categories; a column with more categories is hashed
HASHED = 64  # encoded columns of a hashed column
_DROWNED = 1e6  # beside a number with this many times the deviation of the others, float32 cannot tell the others apart


@dataclass(frozen=True)
class TableColumn:
    """Where a raw column stands in the encoded table.

    Attributes:
        name: The name in the raw table. Columns of a date or of a hashed column also have the name of the feature.
        start: The first encoded column.
        stop: One past the last encoded column. A number has one column. A categorical column has one for each category.
        categorical: Whether the column is one-hot encoded.
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
        columns: What the columns of `values` are, numbers first.
        problems: Sentences about cells whose numbers cannot be used.
        encoder: Encodes other rows in the same way.
    """

    values: np.ndarray
    columns: list[TableColumn]
    problems: list[str]
    encoder: TableEncoder


@dataclass(frozen=True)
class TableEncoder:
    """How a raw table becomes numbers, fitted on training rows: see `encode_table`.

    Attributes:
        limits: For each number, the median, and the deviation from the median beyond which a cell counts as missing.
        timed: For each date, whether its training rows have a time of day.
        hashed: Categorical columns of more than 100 values.
        categories: The categories of each other categorical column, in the order of the encoded columns.
        scale: For each number, feature of a date and hash: exponent, median, mean and deviation, (4, columns).
    """

    limits: dict[str, tuple[float, float]]
    timed: dict[str, bool]
    hashed: list[str]
    categories: dict[str, list[str]]
    scale: np.ndarray

    def state(self) -> dict[str, Any]:
        """All attributes in builtin types."""
        return vars(self) | {"scale": self.scale.tolist()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> TableEncoder:
        """The encoder that `state` described."""
        limits = {name: (float(middle), float(limit)) for name, (middle, limit) in state["limits"].items()}
        return cls(**(state | {"limits": limits, "scale": np.array(state["scale"], dtype=float).reshape(4, -1)}))

    def encode(self, samples: Samples) -> EncodedTable:
        """Encodes the rows of a data set that has the same columns.

        Raises:
            InputError: A numeric column holds text.
        """
        problems: list[str] = []
        return self._encoded(samples, self._numbers(samples, problems), problems)

    def _encoded(self, samples: Samples, numbers: pd.DataFrame, problems: list[str]) -> EncodedTable:
        exponent, median, mean, deviation = self.scale
        values = np.ldexp(numbers.to_numpy(dtype=float), exponent.astype(int))
        scaled = ((np.where(np.isnan(values), median, values) - mean) / deviation).astype(np.float32)
        columns = [TableColumn(str(name), place, place + 1, False) for place, name in enumerate(numbers.columns)]
        blocks = [scaled]
        for name, categories in self.categories.items():
            blocks.append(_one_hot(_text(samples, name), categories))
            start = columns[-1].stop if columns else 0
            columns.append(TableColumn(name, start, start + len(categories), True))
        return EncodedTable(np.concatenate(blocks, axis=1), columns, problems, self)

    def _numbers(self, samples: Samples, problems: list[str]) -> pd.DataFrame:
        """Floats (N, columns), NaN where a cell is missing or named in `problems`."""
        parts = [
            *(_usable(samples, name, *limits, problems) for name, limits in self.limits.items()),
            *(_date_features(samples.table[name], timed) for name, timed in self.timed.items()),
            *(_hashes(_text(samples, name)) for name in self.hashed),
        ]
        return pd.concat(parts, axis=1) if parts else pd.DataFrame(index=samples.table.index)


def encode_table(samples: Samples, train: np.ndarray) -> EncodedTable:
    """Imputes and standardises numbers and the features of dates; one-hot encodes categories, or hashes many of them.

    A date becomes its year, its seconds since 1970, and month, day, hour and weekday as points on a circle (skrub's
    `DatetimeEncoder`). A categorical column of more than 100 values becomes 64 numbers, so that the table stays narrow:
    the n-grams of one to three letters of each value are hashed (scikit-learn's `HashingVectorizer`). A number counts
    as missing where it is not finite. A number also counts as missing where it is so far from the others that float32
    cannot tell the others apart.

    Args:
        samples: The data set of N rows.
        train: Positions of the training rows; medians, means, deviations and categories come from these alone. A
            category that no training row has is a row of zeros in its block.

    Raises:
        InputError: There is no column, or a numeric column holds text.
    """
    if not (samples.numeric or samples.categorical or samples.dates):
        raise InputError(
            f"{samples.name}: the table has no column that can be used; name a numeric or categorical column"
        )
    text = {name: _text(samples, name) for name in samples.categorical}
    hashed = [name for name in text if text[name].nunique() > MANY]
    unscaled = TableEncoder(
        limits={name: _limits(_as_floats(samples, name).to_numpy()) for name in samples.numeric},
        timed={name: _timed(samples.table[name], train) for name in samples.dates},
        hashed=hashed,
        categories={name: sorted(set(text[name].iloc[train])) for name in text if name not in hashed},
        scale=np.empty((4, 0)),
    )
    problems: list[str] = []
    numbers = unscaled._numbers(samples, problems)
    return replace(unscaled, scale=_scale(numbers, train))._encoded(samples, numbers, problems)


def _scale(numbers: pd.DataFrame, train: np.ndarray) -> np.ndarray:
    """Exponent, median, mean and deviation of each column, (4, columns), from the training rows.

    Squares of numbers beyond 1e150 overflow. A power of two scales such columns, as it changes no digit.
    """
    if not len(numbers.columns):
        return np.empty((4, 0))
    values = numbers.to_numpy(dtype=float)
    exponents = np.frexp(np.nanmax(np.abs(values), axis=0, initial=0))[1]
    exponents = np.where(np.abs(exponents) > 400, -exponents, 0)
    # An empty column stays, as zeros: the training rows must not change D.
    imputer, scaler = SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()
    scaler.fit(imputer.fit_transform(np.ldexp(values[train], exponents)))
    return np.stack([exponents, np.nan_to_num(imputer.statistics_), scaler.mean_, scaler.scale_])


def _one_hot(cells: pd.Series, categories: list[str]) -> np.ndarray:
    """Float32 (N, categories); zeros for a category that is not listed."""
    encoder = OneHotEncoder(
        categories=[np.array(categories, dtype=object)],
        handle_unknown="ignore",
        sparse_output=False,
        dtype=np.float32,
    )
    encoder.fit(np.array(categories, dtype=object)[:, None])
    return np.asarray(encoder.transform(cells.to_numpy(dtype=object)[:, None]))


def _text(samples: Samples, column: str) -> pd.Series:
    """A categorical column as text, "" where a cell is missing."""
    return samples.table[column].map(str, na_action="ignore").astype(object).fillna("")


def _as_floats(samples: Samples, column: str) -> pd.Series:
    """Floats (N,), NaN where a cell is missing.

    Raises:
        InputError: A cell holds text.
    """
    raw = samples.table[column]
    numbers = pd.to_numeric(raw, errors="coerce").astype(float)
    text = numbers.isna() & raw.notna()
    if text.any():
        row = int(text.to_numpy().argmax())
        raise InputError(
            f"{samples.where(row)}: column {column!r} is numeric but holds {raw.iloc[row]!r}; "
            "correct the value or name the column as categorical"
        )
    return numbers


def _usable(samples: Samples, column: str, middle: float, limit: float, problems: list[str]) -> pd.Series:
    """Floats (N,), NaN where a cell is missing or named in `problems`."""
    raw, numbers = samples.table[column], _as_floats(samples, column)
    infinite = np.isinf(numbers.to_numpy())
    drowning = _far(numbers.to_numpy(), middle) > limit
    for unusable, what in ((infinite, "which is not finite"), (drowning, "too far from the other numbers for float32")):
        rows = np.flatnonzero(unusable)
        more = f", as do {len(rows) - 1} more cells" if len(rows) > 1 else ""
        for row in rows[:1]:
            problems.append(
                f"{samples.where(row)}: column {column!r} holds {float(raw.iloc[row]):g}, {what}; the cell counts as "
                f"missing{more}"
            )
    return numbers.where(~(infinite | drowning))


def _limits(numbers: np.ndarray) -> tuple[float, float]:
    """The median of a column, and the deviation beyond which a number makes float32 lose the other numbers."""
    finite = np.isfinite(numbers)
    middle = float(np.median(numbers[finite])) if finite.any() else 0.0
    far = _far(numbers, middle)
    ordered = np.sort(far[far > 0])
    jumps = np.flatnonzero(ordered[1:] / _DROWNED > ordered[:-1])
    # A few numbers above a jump are errors.
    limits = [ordered[jump] for jump in jumps if len(ordered) - jump - 1 <= max(1, len(numbers) // 20)]
    return middle, float(limits[0]) if limits else np.inf


def _far(numbers: np.ndarray, middle: float) -> np.ndarray:
    """How far each number is from the median, (N,); 0 where it is missing or not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(np.isfinite(numbers), np.abs(numbers - middle), 0)


def _timed(dates: pd.Series, train: np.ndarray) -> bool:
    """Whether training rows have a time of day. All rows decide where no training row has a date."""
    known = dates.iloc[train].dropna() if dates.iloc[train].notna().any() else dates.dropna()
    return bool((known.dt.normalize() != known).any())


def _date_features(dates: pd.Series, timed: bool) -> pd.DataFrame:
    """Features of a column of datetimes, floats with NaN where a date is missing."""
    from skrub import DatetimeEncoder  # takes seconds, and few tables have dates

    encoder = DatetimeEncoder(add_weekday=True, periodic_encoding="circular")
    # The encoder looks only at the column it is fitted to for times of day.
    encoder.fit(pd.Series([pd.Timestamp("2000-01-01 01:00" if timed else "2000-01-01")], name=dates.name))
    dates = dates.reset_index(drop=True)
    return encoder.transform(dates).astype(float).set_axis(dates.index)


def _hashes(cells: pd.Series) -> pd.DataFrame:
    """Hashed n-grams of the values, (N, 64)."""
    vectorizer = HashingVectorizer(analyzer="char_wb", ngram_range=(1, 3), n_features=HASHED, lowercase=False)
    codes, values = pd.factorize(cells)
    vectors = vectorizer.transform(values).toarray()[codes]
    return pd.DataFrame(vectors, columns=[f"{cells.name}: {place}" for place in range(HASHED)])
