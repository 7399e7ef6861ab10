"""One class of several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaal_surgery import CalibratedFusion, entropy, fuse_logits

from ..data.targets import Target
from ..metrics import measure
from .base import Figures, Task


class Classification(Task):
    """Softmax and cross-entropy on logits (B, C).

    With balanced class weights a row weighs N / (C n_c), for n_c training rows of its class among N. Every class then
    weighs the same. The loss stays a mean over rows: its sum is divided by the number of rows, not by the sum of the
    weights. The product of experts then divides by a uniform prior, and the calibrated fusion is fitted with the
    weights.
    """

    name = "classification"
    figure = "accuracy"
    selections = ("accuracy", "balanced_accuracy", "loss")
    log_prior: Tensor
    weight: Tensor | None

    def __init__(self, target: Target, class_weights: str = "none") -> None:
        super().__init__(target, class_weights)
        counts = torch.tensor(target.counts)
        balanced = class_weights == "balanced"
        weight = counts.sum() / (len(counts) * counts.clamp(min=1)) if balanced else None
        self.register_buffer("weight", weight, persistent=False)
        shares = counts / counts.sum() if weight is None else torch.full((len(counts),), 1 / len(counts))
        self.register_buffer("log_prior", shares.log(), persistent=False)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The cross-entropy."""
        if self.weight is None:
            return F.cross_entropy(outputs, target)
        return (self.weight[target].to(outputs.dtype) * F.cross_entropy(outputs, target, reduction="none")).mean()

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """The entropy (Eq. 6)."""
        return entropy(outputs)

    def product(self, outputs: Sequence[Tensor]) -> Tensor:
        """The product of experts, with the frequencies of the classes as the prior."""
        return fuse_logits(outputs, log_prior=self.log_prior)

    def calibrated(self, voices: Sequence[str]) -> CalibratedFusion:
        """A weighted sum of the logits."""
        return CalibratedFusion(voices, self.outputs)

    def fit(self, calibrated: nn.Module, outputs: Mapping[str, Tensor], target: Tensor) -> None:
        """Fits the fusion with the class weights."""
        calibrated.fit(outputs, target, weight=self.weight)

    def measure(self, outputs: Tensor, target: Tensor, *, brief: bool = False) -> Figures:
        """Accuracy, balanced accuracy, AUROC."""
        return measure(outputs, target, brief=brief)

    def answers(self, outputs: Tensor) -> pd.Series:
        """The most probable class."""
        return self.truth(outputs.argmax(dim=1))

    def details(self, outputs: Tensor) -> pd.DataFrame:
        """The probability of each class."""
        # In float64 first: the last bit of a float32 softmax depends on where a number lies in memory.
        return pd.DataFrame(
            outputs.double().softmax(dim=1).float().numpy(), columns=pd.Index(self.target.names, dtype=object)
        )

    def confidence(self, outputs: Tensor) -> pd.DataFrame:
        """The probability of the most probable class."""
        return pd.DataFrame({"probability": outputs.softmax(dim=1).amax(dim=1).numpy()})

    def truth(self, target: Tensor) -> pd.Series:
        """The class."""
        return pd.Series(self.target.names, dtype=object).iloc[target.numpy()].reset_index(drop=True)
