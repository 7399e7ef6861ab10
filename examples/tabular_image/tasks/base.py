"""What a method, a report and a prediction ask of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import pandas as pd
from torch import Tensor, nn

from gaal_surgery import fuse_logits

from ..data.targets import Target
from ..errors import InputError

Figures = dict[str, float | None]


class Task(nn.Module):
    """A loss and an uncertainty score of a head's outputs (B, outputs), and what follows from the two.

    A task has no parameters. The buffers of a task go to the device with its method.

    Args:
        target: What the numbers of the target mean.
        class_weights: "none" or "balanced".

    Attributes:
        name: As in `--task`.
        figure: The measure that tables and curves show: more is better.
        selections: The measures that `--select` may name; the first is the default.
        outputs: Columns of a head.
    """

    name: ClassVar[str]
    figure: ClassVar[str]
    selections: ClassVar[tuple[str, ...]]

    def __init__(self, target: Target, class_weights: str = "none") -> None:
        super().__init__()
        if class_weights != "none" and self.name != "classification":
            raise InputError(
                f"--class_weights {class_weights} is for classes, and the task is {self.name}; "
                "leave out --class_weights"
            )
        self.target = target
        self.outputs = len(target.names)

    def head(self, width: int) -> nn.Module:
        """A linear head, (B, width) to (B, outputs)."""
        return nn.Linear(width, self.outputs)

    def bounded(self, outputs: Tensor) -> Tensor:
        """Outputs (B, outputs) of sums of linear functions, as `head` returns them."""
        return outputs

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The mean loss over the rows, a scalar. Guides have this loss too."""
        raise NotImplementedError

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """The uncertainty of each row, (B,); harder rows have higher values."""
        raise NotImplementedError

    def mean(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """The mean of the outputs of the voices."""
        return fuse_logits(outputs)

    def product(self, outputs: Sequence[Tensor]) -> Tensor:
        """The product of experts that are independent given the target."""
        raise NotImplementedError

    def calibrated(self, voices: Sequence[str]) -> nn.Module:
        """A fusion that `fit` fits."""
        raise NotImplementedError

    def fit(self, calibrated: nn.Module, outputs: Mapping[str, Tensor], target: Tensor) -> None:
        """Fits the fusion to held-out outputs (N, outputs) by voice."""
        calibrated.fit(outputs, target)

    def measure(self, outputs: Tensor, target: Tensor, *, brief: bool = False) -> Figures:
        """Figures by name; an undefined figure is None. `brief` leaves out figures that take long."""
        raise NotImplementedError

    def answers(self, outputs: Tensor) -> pd.Series:
        """What is predicted, (N,), as the user writes it."""
        raise NotImplementedError

    def details(self, outputs: Tensor) -> pd.DataFrame:
        """How sure the answer is, in full, N rows: all probabilities, or the interval."""
        raise NotImplementedError

    def confidence(self, outputs: Tensor) -> pd.DataFrame:
        """How sure the answer is, in few columns, N rows."""
        raise NotImplementedError

    def truth(self, target: Tensor) -> pd.Series:
        """The target, (N,), as the user writes it."""
        raise NotImplementedError
