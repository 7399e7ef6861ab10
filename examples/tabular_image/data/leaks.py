"""Leaks, which make a test look better than the model is: found before the training, and told with a remedy."""

from __future__ import annotations

import numpy as np
import pandas as pd
from sklearn.tree import DecisionTreeClassifier

from .samples import Samples
from .targets import strata

_GIVEN_AWAY = 0.99  # balanced accuracy of one column alone on held-out rows
_MEMBERS = 0.2  # different values as a share of the rows: from here on, values may name things that have several rows
_TREE_ROWS = 20_000  # rows that the tree of a column is fitted to


def leaks(samples: Samples, splits: dict[str, np.ndarray]) -> list[str]:
    """Sentences about answers of the test that the training or one column gives away.

    - The same picture in two splits.
    - A column that tells the class of held-out rows by itself.
    - A column of names whose rows are spread over splits, where no groups are given.

    Args:
        samples: The data set of N rows, with fingerprints of its pictures.
        splits: Positions of the rows of each split.
    """
    held_out = np.concatenate([splits["val"], splits["test"]])
    return [
        *_pictures(samples, splits),
        *_telling_columns(samples, splits["train"], held_out),
        *_torn_members(samples, splits["train"], held_out),
    ]


def _pictures(samples: Samples, splits: dict[str, np.ndarray]) -> list[str]:
    if samples.fingerprints is None:
        return []
    split = pd.Series("", index=range(len(samples)))
    for name, rows in splits.items():
        split.iloc[rows] = name
    rows = pd.DataFrame({"picture": samples.fingerprints, "split": split})
    rows = rows[rows["picture"] != 0]
    torn = rows[rows.groupby("picture")["split"].transform("nunique") > 1]
    if torn.empty:
        return []
    first = torn[torn["picture"] == torn["picture"].iloc[0]].drop_duplicates("split")["split"]
    name, ids = samples.ids.name or "row", samples.ids
    places = " and ".join(f"{name} {ids.iloc[row]} ({split})" for row, split in first.items())
    return [
        f"{samples.name}: {torn['picture'].nunique()} pictures are in more than one split, such as the picture of "
        f"{places}; remove such rows, or give a --group_column that keeps such rows in one split"
    ]


def _telling_columns(samples: Samples, train: np.ndarray, held_out: np.ndarray) -> list[str]:
    codes = pd.factorize(strata(samples))[0]
    if len(train) > _TREE_ROWS:
        train = np.random.default_rng(0).choice(train, _TREE_ROWS, replace=False)
    found = []
    for name in [*samples.numeric, *samples.categorical]:
        column = samples.table[name]
        cells = column.to_numpy(dtype=float) if name in samples.numeric else _most_common_class(column, codes, train)
        cells = np.nan_to_num(cells.astype(np.float64), nan=np.nan, posinf=np.nan, neginf=np.nan).clip(-1e30, 1e30)
        # Two leaves for each class: a column that needs more leaves is a feature, and does not give the class away.
        tree = DecisionTreeClassifier(max_leaf_nodes=2 * len(np.unique(codes)), random_state=0)
        tree.fit(cells[train, None], codes[train])
        right = tree.predict(cells[held_out, None]) == codes[held_out]
        share = pd.Series(right).groupby(codes[held_out]).mean().mean()
        if share >= _GIVEN_AWAY:
            found.append(
                f"{samples.name}: column {name!r} alone tells the class of {right.mean():.0%} of the held-out rows; "
                "leave the column out if nobody has its values at the time of a prediction"
            )
    return found


def _most_common_class(column: pd.Series, codes: np.ndarray, train: np.ndarray) -> np.ndarray:
    """For each row, the most common class of its category in training; -1 for a category without a training row."""
    text = column.astype(object).where(column.notna(), "").astype(str)
    common = pd.crosstab(text.iloc[train], codes[train]).idxmax(axis=1)
    return text.map(common).fillna(-1).to_numpy()


def _torn_members(samples: Samples, train: np.ndarray, held_out: np.ndarray) -> list[str]:
    if samples.groups is not None:
        return []
    found = []
    for name in [*samples.numeric, *samples.categorical]:
        column = samples.table[name]
        if name in samples.numeric and not _names_members(column, pd.Series(strata(samples))):
            continue
        values = column.dropna()
        if not _MEMBERS * len(values) <= values.nunique() < len(values):
            continue
        shared = column.iloc[held_out].isin(set(values.loc[values.index.isin(train)]))
        if shared.mean() > 0.1:
            found.append(
                f"{samples.name}: {shared.mean():.0%} of the held-out rows share their value of column {name!r} with "
                f"training rows; give --group_column {name} if rows of one value belong together, as for a patient"
            )
    return found


def _names_members(column: pd.Series, target: pd.Series) -> bool:
    """Whether integers name things that have several rows: rows with one number nearly always share a class."""
    filled = column.dropna()
    filled = filled[np.isfinite(filled)]
    if filled.empty or (filled % 1 != 0).any():
        return False
    classes = target[filled[filled.duplicated(keep=False)].index]
    purity = classes.groupby(filled).agg(lambda rows: rows.value_counts(normalize=True).iloc[0])
    chance = target.value_counts(normalize=True).iloc[0]
    return bool(len(purity) and purity.mean() > 0.9 + 0.1 * chance)
