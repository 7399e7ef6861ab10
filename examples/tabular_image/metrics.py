"""How predictions are measured."""

from __future__ import annotations

import math
import warnings
from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the rows, logits (N, C) and target (N,), whose class is the predicted one."""
    return multiclass_accuracy(logits, target, logits.shape[1], average="micro")


def measure(logits: Tensor, target: Tensor) -> dict[str, float | None]:
    """Accuracy, balanced accuracy (mean recall) and AUROC (mean of one class against the rest).

    Classes without a row in `target` do not count in the means. A figure that is not defined is None: all of them
    without rows or where a logit is no number, and the AUROC of rows of one class.

    Args:
        logits: (N, C).
        target: (N,).
    """
    classes = logits.shape[1]
    present = target.bincount(minlength=classes) > 0
    if not present.any() or logits.isnan().any():
        return dict.fromkeys(("accuracy", "balanced_accuracy", "auroc"))
    recall = multiclass_accuracy(logits, target, classes, average="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No (positive|negative) samples")
        auroc = multiclass_auroc(logits.softmax(dim=1), target, classes, average="none")
    assert isinstance(auroc, Tensor)
    figures = {
        "accuracy": accuracy(logits, target),
        "balanced_accuracy": recall[present].mean(),
        "auroc": auroc[present].mean() if present.sum() > 1 else None,
    }
    return {name: None if value is None else round(value.item(), 6) for name, value in figures.items()}


def defined(figures: Any) -> Any:
    """Nested figures with None for every number that is not finite, as JSON has no other word for them."""
    match figures:
        case dict():
            return {name: defined(value) for name, value in figures.items()}
        case list() | tuple():
            return [defined(value) for value in figures]
        case float():
            return figures if math.isfinite(figures) else None
    return figures
