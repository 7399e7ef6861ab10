"""The tasks, one file each: what a prediction is, what a wrong prediction costs, and how predictions are fused."""

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
        target: What the numbers of the target mean.
        class_weights: "none", or "balanced": all classes weigh the same in the loss, however many rows they have.

    Raises:
        InputError: Class weights are given for a task without classes.
    """
    return TASKS[target.task](target, class_weights)
