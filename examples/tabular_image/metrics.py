"""How predictions are measured."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_auroc


def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Share of the rows, logits (N, C) and target (N,), whose class is the predicted one."""
    return multiclass_accuracy(logits, target, logits.shape[1], average="micro")


def measure(logits: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracy, balanced accuracy (mean recall) and AUROC (mean of one class against the rest).

    Classes without a row in `target` do not count in the means.

    Args:
        logits: (N, C).
        target: (N,).
    """
    classes = logits.shape[1]
    present = target.bincount(minlength=classes) > 0
    recall = multiclass_accuracy(logits, target, classes, average="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No positive samples")
        auroc = multiclass_auroc(logits.softmax(dim=1), target, classes, average="none")
    assert isinstance(auroc, Tensor)
    figures = {
        "accuracy": accuracy(logits, target),
        "balanced_accuracy": recall[present].mean(),
        "auroc": auroc[present].mean(),
    }
    return {name: round(torch.as_tensor(value).item(), 6) for name, value in figures.items()}
