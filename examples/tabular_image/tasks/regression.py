"""A number, and how sure the prediction of the number is."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
import torch.nn.functional as F
from scipy.stats import norm
from torch import Tensor, nn

from gaal_surgery import CalibratedGaussianFusion, fuse_gaussians, gaussian_entropy

from ..data.targets import Target
from ..metrics import measure_numbers
from .base import Figures, Task

_LOWEST, _HIGHEST = -10.0, 2.0  # log-variance of a standardised number
LEVEL = 0.9  # the probability that an interval holds the number


def bounded(outputs: Tensor) -> Tensor:
    """Keeps means and bounds log-variances to -10 to 2, so that no gradient vanishes (Chua et al., NeurIPS 2018).

    Args:
        outputs: (B, 2).
    """
    mean, log_variance = outputs.unbind(dim=1)
    log_variance = _HIGHEST - F.softplus(_HIGHEST - log_variance)
    return torch.stack([mean, _LOWEST + F.softplus(log_variance - _LOWEST)], dim=1)


class GaussianHead(nn.Linear):
    """A linear head with bounded log-variances, (B, width) to (B, 2)."""

    def forward(self, features: Tensor) -> Tensor:
        """Mean and log-variance."""
        return bounded(super().forward(features))


class Regression(Task):
    """Mean and log-variance (B, 2) of a Gaussian, and its negative log-likelihood (Nix and Weigend, ICNN 1994).

    The number is standardised on the training rows, and may be the logarithm of the user's number. Answers are in the
    user's units: medians, and intervals that hold the number with a probability of 90%.
    """

    name = "regression"
    figure = "r2"
    selections = ("loss",)

    def __init__(self, target: Target, class_weights: str = "none") -> None:
        super().__init__(target, class_weights)
        self.outputs = 2

    def head(self, width: int) -> nn.Module:
        """A linear head whose log-variances are bounded."""
        return GaussianHead(width, 2)

    def bounded(self, outputs: Tensor) -> Tensor:
        """Outputs (B, 2) with bounded log-variances."""
        return bounded(outputs)

    def loss(self, outputs: Tensor, target: Tensor) -> Tensor:
        """The negative log-likelihood without its constant. torch's own loss checks the variance, so a device waits."""
        mean, log_variance = outputs.unbind(dim=1)
        return 0.5 * (log_variance + (target.to(mean.dtype) - mean).square() * (-log_variance).exp()).mean()

    def uncertainty(self, outputs: Tensor) -> Tensor:
        """The entropy of the Gaussian."""
        return gaussian_entropy(outputs)

    def product(self, outputs: Sequence[Tensor]) -> Tensor:
        """The product of the Gaussians."""
        return fuse_gaussians(outputs)

    def calibrated(self, voices: Sequence[str]) -> CalibratedGaussianFusion:
        """A product of Gaussians whose precisions are weighted."""
        return CalibratedGaussianFusion(voices)

    def measure(self, outputs: Tensor, target: Tensor, *, brief: bool = False) -> Figures:
        """R^2, RMSE, MAE and the coverage of the 90% interval, in the units that were learned."""
        return measure_numbers(*self._gaussian(outputs), self._unscaled(target), LEVEL)

    def answers(self, outputs: Tensor) -> pd.Series:
        """The median."""
        return self._as_written(self._gaussian(outputs)[0])

    def details(self, outputs: Tensor) -> pd.DataFrame:
        """The ends of the 90% interval."""
        mean, deviation = self._gaussian(outputs)
        half = float(norm.ppf(0.5 + LEVEL / 2)) * deviation
        return pd.DataFrame({"low": self._as_written(mean - half), "high": self._as_written(mean + half)})

    def confidence(self, outputs: Tensor) -> pd.DataFrame:
        """The ends of the 90% interval."""
        return self.details(outputs)

    def truth(self, target: Tensor) -> pd.Series:
        """The number."""
        return self._as_written(self._unscaled(target))

    def _gaussian(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Means and deviations, float64 (N,), in the units that were learned."""
        mean, log_variance = outputs.double().unbind(dim=1)
        return self._unscaled(mean), self.target.deviation * (log_variance / 2).exp()

    def _unscaled(self, standardised: Tensor) -> Tensor:
        return self.target.mean + self.target.deviation * standardised.double()

    def _as_written(self, values: Tensor) -> pd.Series:
        """Numbers in the user's units, with the digits that float32 has."""
        numbers = (values.exp() if self.target.log else values).tolist()
        return pd.Series([float(f"{number:.7g}") for number in numbers], dtype=float)
