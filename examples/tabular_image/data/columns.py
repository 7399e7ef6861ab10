"""What a column of text holds: numbers, dates, categories, or nothing that a model should see."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import pandas as pd
from skrub import ToDatetime

Kind = Literal["number", "date", "category", "left out"]

# What people write where they have no number and no date.
NO_VALUE = {
    *("na", "n/a", "n.a.", "nan", "none", "null", "nil", "missing", "unknown", "unk", "not available", "undefined"),
    *("?", "-", "--", ".", "..", "#n/a", "#na", "<na>", "#value!", "#div/0!", "#num!", "inconnu", "unbekannt", "nd"),
}
FEW = 0.05  # a column of numbers or dates may hold other text in this share of its cells
_SIGNS = str.maketrans({"\u2212": "-", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u2019": "'"})
_CELL = re.compile(
    r"(?P<currency>[$€£¥]?)\s*(?P<digits>[+-]?[\d.,][\d., ']*?(?:[eE][+-]?\d+)?)\s*(?P<unit>[^\d\s.,'_+-]\D{0,7}[23]?)?"
)
_INFINITE = re.compile(r"[+-]?inf(inity)?", re.IGNORECASE)
_CODE = re.compile(r"0\d+")  # a number would have lost its leading zero
_IDENTIFIER = re.compile(r"(^|.*[\W_])(?i:id|index|idx|uuid|guid)|.*[a-z]I[dD]")


def _convention(decimal: str, thousands: str) -> re.Pattern[str]:
    """Matches numbers with this decimal sign; the other sign, a blank or an apostrophe may separate the thousands."""
    groups = rf"[1-9]\d{{0,2}}(?:(?P<sign>[{thousands} '])\d{{3}})(?:(?P=sign)\d{{3}})*"
    return re.compile(rf"[+-]?(?:{groups}|\d+|(?=[{decimal}]))(?:[{decimal}]\d*)?(?:[eE][+-]?\d+)?")


_NAMES = {",": "comma", ".": "point", " ": "blank", "'": "apostrophe"}
_CONVENTIONS = {".": (_convention(".", ","), ","), ",": (_convention(",", "."), ".")}


@dataclass(frozen=True)
class Column:
    """A column of the table, and what the column is used as.

    Attributes:
        kind: What the column is used as.
        why: The reason, in words.
        values: Floats, datetimes or text, (N,); missing values are NaN, NaT and None.
        odd: Other text in a column of numbers or dates, by row. These cells count as missing.
        reading: How the text was read, for `reread`.
    """

    kind: Kind
    why: str
    values: pd.Series
    odd: dict[int, str] = field(default_factory=dict)
    reading: dict[str, str] = field(default_factory=dict)


def infer(cells: pd.Series, target: pd.Series, separator: str) -> Column:
    """Decides what a column is.

    A column is left out in three cases. The first is an empty column, or a column of one value. The second is a column
    with different texts in more than half of the rows. The third is an identifier: integers that are all different, and
    follow the order of the rows or of the classes, or are named like an identifier. Numbers with a leading zero are
    codes, and codes are categories.

    Args:
        cells: Text, (N,), "" where a cell is missing.
        target: The class of each row, (N,).
        separator: The sign between the cells of the file. Beside semicolons an ambiguous comma is a decimal sign.
    """
    filled = cells[cells != ""]
    if filled.empty:
        return _left_out(cells, "empty")
    if filled.nunique() == 1 and len(filled) == len(cells):
        return _left_out(cells, "one value")
    column = numbers(cells, separator) if not filled.str.fullmatch(_CODE).any() else None
    column = column or _dates(cells)
    if column is not None and column.kind == "number":
        reason = _numbers_the_rows(str(cells.name), column.values, target)
        return _left_out(cells, reason) if reason else column
    if column is not None:
        return column
    if filled.nunique() > len(cells) / 2 and len(filled) > 1:
        return _left_out(cells, "different texts in most rows")
    return category(cells)


def category(cells: pd.Series) -> Column:
    """A column of categories, which are the text as it is written."""
    codes = cells.str.fullmatch(_CODE).any()
    why = f"{cells[cells != ''].nunique()} different " + ("codes with leading zeros" if codes else "texts")
    return Column("category", why, cells.astype(object).where(cells != "", None))


def reread(cells: pd.Series, kind: Kind, reading: Mapping[str, str]) -> Column:
    """Reads new cells of a column as the first cells were read.

    Args:
        cells: Text, (N,), "" where a cell is missing.
        kind: What the column is used as.
        reading: The `reading` of the first `Column`. Without a reading, numbers have a decimal point, and dates have
            whatever format fits.
    """
    if kind == "number":
        column = numbers(cells, all_of_them=True, decimal=reading.get("decimal", "."), unit=reading.get("unit"))
        assert column is not None
        return column
    if kind == "date":
        form = reading.get("format")
        return _as_dates(cells, form) if form else _dates(cells) or _as_dates(cells, "%Y-%m-%d")
    return category(cells)


def numbers(
    cells: pd.Series,
    separator: str = ",",
    *,
    all_of_them: bool = False,
    decimal: str | None = None,
    unit: str | None = None,
) -> Column | None:
    """Numbers as people write them; None where more than a few cells hold something else.

    Point and comma are decimal and thousands sign, or the other way round, whichever makes more cells numbers. `1,000`
    fits both ways: it is one thousand, or 1.0 in a file with semicolons between the cells. Percentages become shares.
    Currency signs are dropped. A unit that all cells have is dropped too.

    Args:
        cells: Text, (N,), "" where a cell is missing.
        separator: The sign between the cells of the file.
        all_of_them: Read the column as numbers, however many cells hold other text.
        decimal: The decimal sign, where it is known.
        unit: The unit that cells may have, where it is known.
    """
    cells = cells.str.translate(_SIGNS)
    unique = pd.Series(cells[(cells != "") & ~cells.str.lower().isin(NO_VALUE)].unique(), dtype=str)
    parts = unique.str.extract(rf"^{_CELL.pattern}$")
    infinite = unique.str.fullmatch(_INFINITE)
    units = set(parts["unit"][parts["digits"].notna()].dropna()) - {"%"}
    whole = len(units) == 1 and parts["unit"][parts["digits"].notna()].notna().all()
    known_unit = parts["unit"] == unit
    fits = parts["digits"].notna() & (whole or parts["unit"].isna() | (parts["unit"] == "%") | known_unit)
    digits = parts["digits"].where(fits).fillna("")
    found = {sign: digits.str.fullmatch(pattern) & fits for sign, (pattern, _) in _CONVENTIONS.items()}
    commas = digits.str.contains(",").any()
    points, comma_points = found["."].sum(), found[","].sum()
    if decimal is None:
        decimal = "," if comma_points > points or (comma_points == points and commas and separator == ";") else "."
    good, thousands = found[decimal], _CONVENTIONS[decimal][1]
    plain = digits[good].str.replace(f"[{thousands} ']", "", regex=True).str.replace(decimal, ".", regex=False)
    values = pd.to_numeric(plain, errors="coerce").astype(float)
    values = values.where(parts["unit"][good] != "%", values / 100)
    values = pd.concat([values, unique[infinite].astype(float)]).dropna()
    known = dict(zip(unique[values.index], values, strict=True))
    found_values = cells.map(known).astype(float)
    other = found_values.isna() & (cells != "")
    texts = int((other & ~cells.str.lower().isin(NO_VALUE)).sum())
    if not all_of_them and (not known or texts > FEW * (cells != "").sum()):
        return None
    signs = "".join(digits[good])
    how = [
        *(["comma as decimal sign"] if decimal == "," and "," in signs else []),
        *([f"{_NAMES[sign]} between thousands" for sign in (thousands, " ", "'") if sign in signs]),
        *(["percent as shares"] if (parts["unit"][good] == "%").any() else []),
        *([f"in {min(units)}"] if whole else []),
    ]
    reading = {"decimal": decimal} | ({"unit": min(units)} if whole else {})
    return Column("number", "; ".join(["numbers", *how]), found_values, dict(cells[other].items()), reading)


def _dates(cells: pd.Series) -> Column | None:
    """Dates, with or without a time, in the format that fits most cells; None where more than a few cells misfit."""
    filled = cells[(cells != "") & ~cells.str.lower().isin(NO_VALUE)]
    unique = pd.Series(filled.unique(), dtype=str)
    if not unique.str.contains(r"\d.*\d").mean() >= 1 - FEW:
        return None
    samples = [unique, *(unique[place : place + 1] for place in range(10))]
    forms = dict.fromkeys(form for form in map(_format, samples) if form)
    read = [_as_dates(cells, form) for form in forms]
    best = max(read, key=lambda column: column.values.count(), default=None)
    return best if best is not None and best.values.count() >= (1 - FEW) * len(filled) else None


def _as_dates(cells: pd.Series, form: str) -> Column:
    """Dates in this format; other text counts as missing."""
    dates = pd.to_datetime(cells, format=form, errors="coerce", utc="%z" in form or None).dt.tz_localize(None)
    odd = dict(cells[dates.isna() & (cells != "")].items())
    return Column("date", f"dates as {form}", dates, odd, {"format": form})


def _format(sample: pd.Series) -> str | None:
    try:
        return ToDatetime().fit(sample.rename("date")).format_  # type: ignore[no-any-return]
    except ValueError:  # skrub's way to say: no dates
        return None


def _numbers_the_rows(name: str, values: pd.Series, target: pd.Series) -> str:
    """Why a column of numbers is an identifier; empty for other columns."""
    filled = values.dropna()
    if len(filled) < 5 or not filled.is_unique or not np.isfinite(filled).all() or (filled % 1 != 0).any():
        return ""
    if filled.is_monotonic_increasing or filled.is_monotonic_decreasing:
        return "an identifier: all different, in the order of the rows"
    classes = target[filled.sort_values().index]
    changes = int((classes.to_numpy()[1:] != classes.to_numpy()[:-1]).sum())
    if changes == classes.nunique() - 1 and classes.nunique() > 1 and len(classes) >= 4 * classes.nunique():
        return "an identifier: all different, in the order of the classes"
    return "an identifier: all different, and named so" if _IDENTIFIER.fullmatch(name) else ""


def _left_out(cells: pd.Series, why: str) -> Column:
    return Column("left out", why, cells)
