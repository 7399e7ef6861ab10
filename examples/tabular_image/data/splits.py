"""Training, validation and test rows: stratified, seeded, and whole groups together."""

from __future__ import annotations

import warnings
from itertools import islice

import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold, train_test_split

from ..errors import InputError
from .samples import Samples
from .targets import strata

_SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), "val"
)


def split_rows(
    samples: Samples,
    *,
    validation: float = 0.1,
    test: float = 0.2,
    folds: int | None = None,
    fold: int = 0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Assigns each row to one split.

    Args:
        samples: The data set of N rows. A published `split` is kept; where it has no validation rows, they are cut
            from its training rows. Rows that share a value of `groups` stay together.
        validation: Share of all rows for validation.
        test: Share of all rows for the test.
        folds: Number of stratified folds, of which one is the test split in place of `test`. Each row is in exactly one
            fold.
        fold: Which fold is the test split, from 0.
        seed: One seed always draws the same rows.

    Returns:
        Sorted row positions under "train", "val" and "test"; together they are all N rows, each once.

    Raises:
        InputError: A class has a single row or none to train on, a split would be empty, or a published split holds
            an unknown value or tears a group apart.
    """
    if not (0 < validation < 1 and 0 < test < 1 and validation + test < 1):
        raise InputError(
            f"validation={validation} and test={test} must be positive shares of the rows with a sum below 1; "
            "the defaults are 0.1 and 0.2"
        )
    if folds is not None and (samples.split is not None or not 0 <= fold < folds or folds < 2):
        raise InputError(
            f"{samples.name} has fixed splits; leave out --folds"
            if samples.split is not None
            else f"there is no fold {fold} of {folds}; give two or more --folds, and a --fold from 0 to folds - 1"
        )
    labels = strata(samples)
    _refuse_single_rows(samples, labels)
    everything = np.arange(len(samples))
    if folds is not None:
        rest, test_rows = _fold(samples, labels, folds, fold, seed)
        published = {"train": rest, "val": np.empty(0, dtype=int), "test": test_rows}
    elif samples.split is None:
        rest, test_rows = _cut(samples, everything, labels, round(test * len(samples)), "test", seed)
        published = {"train": rest, "val": np.empty(0, dtype=int), "test": test_rows}
    else:
        published = _published(samples, samples.split)
    if len(published["val"]) == 0 and len(published["train"]):
        size = (
            round(validation * len(samples)) if samples.split is None else round(validation * len(published["train"]))
        )
        published["train"], published["val"] = _cut(samples, published["train"], labels, size, "validation", seed)
    for name, rows in published.items():
        if len(rows) == 0:
            raise InputError(
                f"{samples.name}: the {name} split is empty ({len(samples)} rows in all); "
                + (f"raise the {name} share or add rows" if samples.split is None else f"mark some rows {name!r}")
            )
    _refuse_untrained_classes(samples, labels, published)
    return {name: np.sort(rows) for name, rows in published.items()}


def _refuse_single_rows(samples: Samples, labels: np.ndarray) -> None:
    if samples.task != "classification":
        return
    classes, first, counts = np.unique(labels, return_index=True, return_counts=True)
    if len(classes) < 2:
        raise InputError(f"{samples.name}: every row has the same target, {classes[0]!r}; add rows of another class")
    single = np.flatnonzero(counts == 1)
    if len(single):
        more = f" (and {len(single) - 1} more classes)" if len(single) > 1 else ""
        number = pd.to_numeric(pd.Series(classes), errors="coerce").notna().all()
        raise InputError(
            f"class {classes[single[0]]!r}{more} has a single sample, in {samples.where(first[single[0]])}; "
            "add samples of that class or remove the row" + (", or give --task regression" if number else "")
        )


def _published(samples: Samples, column: pd.Series) -> dict[str, np.ndarray]:
    names = column.astype(str).str.strip().str.lower().map(_SPLIT_NAMES)
    if names.isna().any():
        row = int(names.isna().to_numpy().argmax())
        raise InputError(f"{samples.where(row)}: unknown split {column.iloc[row]!r}; use 'train', 'val' or 'test'")
    if samples.groups is not None:
        torn = names.groupby(samples.groups.to_numpy()).nunique()
        if (torn > 1).any():
            raise InputError(
                f"{samples.name}: group {torn.index[torn > 1][0]!r} has rows in more than one split; "
                "move them to one split or drop the group column"
            )
    return {name: np.flatnonzero(names == name) for name in ("train", "val", "test")}


def _fold(samples: Samples, labels: np.ndarray, folds: int, fold: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts all rows into the rows of the other folds and the rows of fold number `fold`."""
    splitter = StratifiedKFold if samples.groups is None else StratifiedGroupKFold
    with warnings.catch_warnings():  # a class in fewer rows than folds is fine: training is checked at the end
        warnings.simplefilter("ignore", UserWarning)
        try:
            parts = splitter(folds, shuffle=True, random_state=seed).split(labels, labels, samples.groups)
            return next(islice(parts, fold, None))
        except ValueError as error:
            raise InputError(
                f"{samples.name} cannot be cut into {folds} folds ({error}); give fewer --folds"
            ) from error


def _cut(
    samples: Samples, rows: np.ndarray, labels: np.ndarray, size: int, name: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Parts `rows` into rows that stay and about `size` rows that leave for the split `name`."""
    if size == 0:
        return rows, rows[:0]
    if samples.groups is not None:
        groups = samples.groups.iloc[rows].to_numpy()
        folds = max(2, round(len(rows) / size))
        if len(np.unique(groups)) < folds:
            raise InputError(
                f"{samples.name}: {len(np.unique(groups))} groups are too few for a {name} split of {size} of "
                f"{len(rows)} rows; raise the share of the {name} split or drop the group column"
            )
        with warnings.catch_warnings():  # a class in fewer groups than folds is fine: training is checked at the end
            warnings.simplefilter("ignore", UserWarning)
            folded = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
            stay, leave = next(folded.split(rows, labels[rows], groups))
        return rows[stay], rows[leave]
    # A class of which one row is left (the other went to the test) can only train.
    classes, counts = np.unique(labels[rows], return_counts=True)
    lonely = pd.Index(labels[rows]).isin(classes[counts == 1])
    shared = rows[~lonely]
    needed = len(classes) - int(lonely.sum())
    if size < needed or len(shared) - size < needed:
        raise InputError(
            f"{samples.name}: a {name} split of {size} of {len(rows)} rows cannot hold each of the {needed} classes; "
            "change the share, add rows, or give a split column"
        )
    stay, leave = train_test_split(shared, test_size=size, stratify=labels[shared], random_state=seed)
    return np.concatenate([rows[lonely], stay]), leave


def _refuse_untrained_classes(samples: Samples, labels: np.ndarray, rows: dict[str, np.ndarray]) -> None:
    if samples.quantiles is not None or samples.task != "classification":  # the classes are cut from the training rows
        return
    untrained = ~pd.Index(labels).isin(labels[rows["train"]])  # numpy's isin compares every pair of objects
    if untrained.any():
        row = int(untrained.argmax())
        raise InputError(
            f"class {labels[row]!r} has no training row (its first row is {samples.where(row)}); "
            "move rows of that class to the training split or remove these rows"
        )
