"""The tasks, one file each: what a prediction is, what it costs to be wrong, and how predictions are fused."""

from __future__ import annotations

from ..data.targets import Target
from .base import Task
from .classification import Classification
from .multilabel import MultiLabel
from .regression import Regression

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multilabel": MultiLabel,
    "regression": Regression,
}

__all__ = ["TASKS", "Task", "build_task"]


def build_task(target: Target, class_weights: str = "none") -> Task:
    """The task of a target.

    Args:
        target: What its numbers mean.
        class_weights: "none", or "balanced": all classes weigh alike in the loss, however many rows they have.

    Raises:
        InputError: Class weights are asked for where there are no classes.
    """
    return TASKS[target.task](target, class_weights)
