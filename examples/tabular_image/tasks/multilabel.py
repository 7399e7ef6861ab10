"""Several labels at once: a row may have each label or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from gaal_surgery import CalibratedLabelFusion, binary_entropy, fuse_logits

from ..data.targets import Target
from ..metrics import measure_labels
from .base import Figures, Task


class MultiLabel(Task):
    """A sigmoid and the binary cross-entropy on each of the logits (B, L), as if the labels were independent."""

    name = "multilabel"
    figure = "mean_average_precision"
    selections = ("loss",)
    log_odds: Tensor

    def __init__(self, target: Target, class_weights: str = "none") -> None:
        super().__init__(target, class_weights)
        # One more row with each label and one without: the odds stay finite if all training rows have a label, or none.
        shares = (torch.tensor(target.counts) + 1) / (target.rows + 2)
        self.register_buffer("log_odds", shares.logit(), persistent=False)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The mean over rows and labels."""
        return F.binary_cross_entropy_with_logits(outputs, target.to(outputs.dtype))

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """The sum of the labels' entropies."""
        return binary_entropy(outputs)

    def product(self, outputs: Sequence[Tensor]) -> Tensor:
        """The product of experts for each label, with the frequency of the label as the prior."""
        return fuse_logits(outputs, log_odds=self.log_odds)

    def calibrated(self, voices: Sequence[str]) -> CalibratedLabelFusion:
        """A weighted sum of the logits of each label."""
        return CalibratedLabelFusion(voices, self.outputs)

    def measure(self, outputs: Tensor, target: Tensor, *, brief: bool = False) -> Figures:
        """Macro F1, mean average precision, AUROC."""
        return measure_labels(outputs, target)

    def answers(self, outputs: Tensor) -> pd.Series:
        """The labels that are more probable than not, between semicolons."""
        return self.truth(outputs > 0)

    def details(self, outputs: Tensor) -> pd.DataFrame:
        """The probability of each label."""
        # In float64 first: the last bit of a float32 sigmoid depends on where a number lies in memory.
        return pd.DataFrame(
            outputs.double().sigmoid().float().numpy(), columns=pd.Index(self.target.names, dtype=object)
        )

    def confidence(self, outputs: Tensor) -> pd.DataFrame:
        """The probability that all labels are right, if they are independent."""
        return pd.DataFrame({"probability": F.logsigmoid(outputs.abs()).sum(dim=1).exp().numpy()})

    def truth(self, target: Tensor) -> pd.Series:
        """The labels, between semicolons."""
        names = np.array(self.target.names, dtype=object)
        return pd.Series(["; ".join(names[row]) for row in target.bool().numpy()], dtype=object)
