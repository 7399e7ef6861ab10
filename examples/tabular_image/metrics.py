"""How predictions are measured."""

from __future__ import annotations

import math
import warnings
from typing import Any

from scipy.stats import norm
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_auroc,
    multilabel_auroc,
    multilabel_average_precision,
    multilabel_f1_score,
)
from torchmetrics.functional.regression import mean_absolute_error, mean_squared_error, r2_score


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the rows, logits (N, C) and target (N,), whose class is predicted."""
    return multiclass_accuracy(logits, target, logits.shape[1], average="micro")


def measure(logits: Tensor, target: Tensor, *, brief: bool = False) -> dict[str, float | None]:
    """Accuracy, balanced accuracy (mean recall) and AUROC (mean of one class against the rest).

    Classes without a row in `target` do not count in the means. An undefined figure is None. All figures are undefined
    without rows or with a logit that is NaN. The AUROC is also undefined where all rows have one class.

    Args:
        logits: (N, C).
        target: (N,).
        brief: Leave out the AUROC, which takes long to compute.
    """
    classes = logits.shape[1]
    present = target.bincount(minlength=classes) > 0
    if not present.any() or logits.isnan().any():
        return dict.fromkeys(("accuracy", "balanced_accuracy", "auroc"))
    recall = multiclass_accuracy(logits, target, classes, average="none")
    figures = {"accuracy": accuracy(logits, target), "balanced_accuracy": recall[present].mean()}
    if brief:
        return _rounded(figures)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No (positive|negative) samples")
        auroc = multiclass_auroc(logits.softmax(dim=1), target, classes, average="none")
    assert isinstance(auroc, Tensor)
    return _rounded(figures | {"auroc": auroc[present].mean() if present.sum() > 1 else None})


def measure_labels(logits: Tensor, target: Tensor) -> dict[str, float | None]:
    """Macro F1 at a probability of one half, mean average precision and AUROC: means over the labels.

    Labels that all rows have, or none, do not count in the means. All figures are None where no label counts or a logit
    is NaN.

    Args:
        logits: (N, L).
        target: (N, L) of 0 and 1.
    """
    positive = target.bool().sum(dim=0)
    counting = (positive > 0) & (positive < len(target))
    if not counting.any() or logits.isnan().any():
        return dict.fromkeys(("macro_f1", "mean_average_precision", "auroc"))
    probabilities, labels = logits.sigmoid(), target.long()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No (positive|negative) samples")
        each = {
            "macro_f1": multilabel_f1_score(probabilities, labels, logits.shape[1], average="none"),
            "mean_average_precision": multilabel_average_precision(
                probabilities, labels, logits.shape[1], average="none"
            ),
            "auroc": multilabel_auroc(probabilities, labels, logits.shape[1], average="none"),
        }
    return _rounded({name: values[counting].mean() for name, values in each.items()})


def measure_numbers(mean: Tensor, deviation: Tensor, target: Tensor, level: float) -> dict[str, float | None]:
    """R^2, RMSE, MAE, and the share of the targets inside the interval that should hold `level` of them.

    R^2 is None where all targets are equal or there are fewer than two. All figures are None without rows or where a
    prediction is NaN.

    Args:
        mean: Means of the predicted Gaussians, (N,).
        deviation: Standard deviations of the predicted Gaussians, (N,).
        target: (N,), in the units of the predictions.
        level: The probability of the interval, between 0 and 1.
    """
    if not len(target) or mean.isnan().any() or deviation.isnan().any():
        return dict.fromkeys(("r2", "rmse", "mae", "coverage"))
    inside = (target - mean).abs() <= float(norm.ppf(0.5 + level / 2)) * deviation
    return _rounded(
        {
            "r2": r2_score(mean, target) if len(target) > 1 and (target != target[0]).any() else None,
            "rmse": mean_squared_error(mean, target, squared=False),
            "mae": mean_absolute_error(mean, target),
            "coverage": inside.double().mean(),
        }
    )


def _rounded(figures: dict[str, Any]) -> dict[str, float | None]:
    return {name: None if value is None else round(value.item(), 6) for name, value in figures.items()}


def defined(figures: Any) -> Any:
    """Nested figures with None for every number that is not finite, as JSON knows finite numbers alone."""
    match figures:
        case dict():
            return {name: defined(value) for name, value in figures.items()}
        case list() | tuple():
            return [defined(value) for value in figures]
        case float():
            return figures if math.isfinite(figures) else None
    return figures
