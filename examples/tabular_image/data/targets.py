"""What is predicted: the target of a data set as numbers, and what the numbers mean."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..errors import InputError
from .columns import NO_VALUE, numbers
from .samples import Samples

Task = Literal["classification", "multilabel", "regression"]

_FEW_CLASSES = 20  # numbers with at most this many different values are classes
_FEW_ROWS = 0.1  # integers are classes too, if the different values are at most this share of the rows
_STRATA = 20  # sets of labels that the splits hold in equal shares
_SIGNS = re.compile(r"[|;]")
_TRUE, _FALSE = {"1", "1.0", "true", "yes", "y", "t", "x"}, {"0", "0.0", "false", "no", "n", "f", ""}


@dataclass(frozen=True)
class Target:
    """What the numbers of an encoded target mean.

    Attributes:
        task: What is predicted: one class of several, several labels, or a number.
        names: The classes, the labels, or the one name of the number.
        counts: Training rows of each class, or with each label; for a number, all training rows.
        rows: Training rows.
        mean: Mean of the number over the training rows; the encoded number is (number - mean) / deviation.
        deviation: Standard deviation of the number over the training rows.
        log: Whether the natural logarithm replaced the number, before mean and deviation were taken.
    """

    task: Task
    names: tuple[str, ...]
    counts: tuple[int, ...]
    rows: int
    mean: float = 0.0
    deviation: float = 1.0
    log: bool = False


def encode_target(samples: Samples, train: np.ndarray, *, log: bool = False) -> tuple[Target, Tensor]:
    """The target of all N rows.

    Args:
        samples: The data set.
        train: Positions of the training rows; cut points, mean and deviation come from these alone.
        log: Learn the logarithm of a number.

    Returns:
        What the numbers mean, and the numbers: classes long (N,), labels float (N, L) of 0 and 1, or a standardised
        number float (N,).

    Raises:
        InputError: A number has no logarithm, all training rows have the same number, or `log` is set for a target that
            is not a number.
    """
    if log and samples.task != "regression":
        raise InputError(
            f"--log_target is for a number, and the task of {samples.name} is {samples.task}; leave out --log_target"
        )
    match samples.task:
        case "classification":
            names, values = _classes(samples, train)
            counts = values[train].bincount(minlength=len(names))
        case "multilabel":
            names = [str(name) for name in samples.target.columns]
            values = torch.from_numpy(samples.target.to_numpy(dtype=np.float32, copy=True))
            counts = values[train].sum(dim=0).long()
        case "regression":
            return _number(samples, train, log)
    return Target(samples.task, tuple(names), tuple(counts.tolist()), len(train)), values


def strata(samples: Samples) -> np.ndarray:
    """A class of each row, (N,), that splits hold in equal shares.

    Classes stay classes. A number becomes the tenth of the rows that it is in. Labels become the set of labels, where
    the set is frequent. A number that is cut into classes is cut at quantiles of all rows here, which serve only to
    balance the splits.
    """
    match samples.task:
        case "classification" if samples.quantiles is None:
            return samples.target.astype(str).to_numpy()
        case "multilabel":
            sets = samples.target.astype(int).astype(str).agg("".join, axis=1)
            return sets.where(sets.isin(sets.value_counts().index[:_STRATA]), "rare").to_numpy()
    parts = samples.quantiles or int(np.clip(len(samples) // _STRATA, 1, 10))
    return pd.qcut(samples.target.rank(method="first"), parts, labels=False).to_numpy()


def read_target(
    cells: pd.DataFrame, task: str, separator: str, where: Callable[[int], str]
) -> tuple[Task, pd.Series | pd.DataFrame, str]:
    """A target as people write it.

    Several columns are labels. A column of yes and no (or 1 and 0, true and false) is one label. Any other of several
    columns has a label for each of its values. One column whose cells are lists is labels too. One column of many
    different numbers is a number. Any other column is classes.

    Args:
        cells: The target columns as text, N rows.
        task: The task that the user names; "" infers the task.
        separator: The sign between the cells of the file.
        where: Names the row at a position for an error message.

    Returns:
        The task, the target as `Samples` has it, and what was decided, in words.

    Raises:
        InputError: The cells do not fit `task`.
    """
    if len(cells.columns) > 1:
        if task not in ("", "multilabel"):
            raise InputError(f"--task {task} takes one target column, not {len(cells.columns)}; give --task multilabel")
        labels = pd.concat([_labels_of(cells[name]) for name in cells], axis=1)
        return "multilabel", labels, f"{len(labels.columns)} labels"
    column = cells.iloc[:, 0]
    decided = task or _infer(column, separator)
    match decided:
        case "multilabel":
            lists = column.map(_parts)
            names = sorted({name for names in lists for name in names})
            if not names:
                raise InputError(
                    f"target column {column.name!r} holds no label; name a column of lists, or several columns"
                )
            labels = pd.DataFrame({name: lists.map(lambda its, name=name: name in its) for name in names})
            return "multilabel", labels, f"{len(names)} labels, from lists"
        case "regression":
            found = numbers(column, separator, all_of_them=True)
            assert found is not None
            missing = found.values.isna() | ~np.isfinite(found.values)
            if missing.any():
                row = int(missing.to_numpy().argmax())
                raise InputError(
                    f"{where(row)}: the target {column.name!r} is a number but holds {column.iloc[row]!r}; correct the "
                    "cell, or give --task classification"
                )
            return "regression", found.values, f"a number, {found.values.nunique()} different; {found.why}"
    return "classification", column, f"{column.nunique()} classes"


def _infer(column: pd.Series, separator: str) -> Task:
    filled = column[column != ""]
    lists = filled[filled.str.contains(_SIGNS) | filled.str.fullmatch(r"\[.*\]")]
    if len(lists):
        labels = {name for cell in filled for name in _parts(cell)}
        if len(labels) < filled.nunique():  # labels recur in other combinations
            return "multilabel"
    found = numbers(column, separator)
    if found is not None:
        values = found.values.dropna()
        several = values.nunique()
        whole = (values % 1 == 0).all()
        if several > _FEW_CLASSES and not (whole and several <= _FEW_ROWS * len(values)):
            return "regression"
    return "classification"


def _labels_of(column: pd.Series) -> pd.DataFrame:
    """The labels, (N, L) bool, that one of several columns stands for."""
    lower = column.str.lower()
    if lower.isin(_TRUE | _FALSE).all():
        return lower.isin(_TRUE).to_frame(str(column.name))
    values = sorted(set(column) - {""})
    return pd.DataFrame({f"{column.name}: {value}": column == value for value in values})


def _parts(cell: str) -> list[str]:
    """The labels that a cell lists: in JSON or Python, or between `|` or `;`, or else between commas."""
    cell = cell.strip()
    if cell.startswith("[") and cell.endswith("]"):
        try:
            return [str(name).strip() for name in cast(list[object], ast.literal_eval(cell))]
        except (SyntaxError, ValueError):
            cell = cell[1:-1]
    signs = _SIGNS if _SIGNS.search(cell) else ","
    names = (name.strip().strip("'\"") for name in re.split(signs, cell))
    return [name for name in names if name and name.lower() not in NO_VALUE]


def _classes(samples: Samples, train: np.ndarray) -> tuple[list[str], Tensor]:
    """Class names (C) and the class of each row, long (N,)."""
    if samples.quantiles is None:
        classes, target = np.unique(samples.target.astype(str), return_inverse=True)
        return classes.tolist(), torch.from_numpy(target)
    shares = np.arange(1, samples.quantiles) / samples.quantiles
    cuts = np.unique(samples.target.iloc[train].quantile(shares))
    target = np.digitize(samples.target, cuts)
    names = [f"{cut:,.6g}" for cut in cuts]
    inner = [f"{low} to {high}" for low, high in pairwise(names)]
    return [f"below {names[0]}", *inner, f"{names[-1]} and above"], torch.from_numpy(target)


def _number(samples: Samples, train: np.ndarray, log: bool) -> tuple[Target, Tensor]:
    values = samples.target.to_numpy(dtype=float)
    if log:
        if (values <= 0).any():
            row = int((values <= 0).argmax())
            raise InputError(
                f"{samples.where(row)}: the target {values[row]:g} has no logarithm; leave out --log_target"
            )
        values = np.log(values)
    mean, deviation = float(values[train].mean()), float(values[train].std())
    if not deviation > 0:
        raise InputError(
            f"{samples.name}: every training row has the same target, {values[train][0]:g}; add other rows"
        )
    target = Target("regression", (str(samples.target.name),), (len(train),), len(train), mean, deviation, log)
    return target, torch.from_numpy(((values - mean) / deviation).astype(np.float32))
