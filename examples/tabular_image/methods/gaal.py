"""GAAL: modalities take turns, and the shared head's step is aligned with the other's most uncertain samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from gaal_surgery import DualFloor, HalfSpace, Orthogonal

from ..options import Finite
from .alternating import Alternating, AlternatingSettings


@dataclass(frozen=True)
class GAALSettings(AlternatingSettings):
    """Turns, guides and surgery."""

    rule: Literal["halfspace", "dualfloor", "orthogonal"] = "halfspace"
    """Rule of surgery: halfspace is the paper's, dualfloor that of its released code."""
    margin: Finite = 0.0
    """Margin of halfspace, the least inner product with the guide."""
    relative: bool = False
    """The margin is a cosine."""


class GAAL(Alternating):
    """Algorithm 1 of Huang and Yang (ICME 2026): alternation whose head's step must not hurt the other modality.

    Reports image, table, and their fusion by `--fusion` (the paper's is the mean, Eq. 10).
    """

    Settings = GAALSettings

    def rule(self) -> Callable[[Tensor], Tensor]:
        """The rule of surgery."""
        match self.settings.rule:
            case "halfspace":
                return HalfSpace(self.settings.margin, self.settings.relative)
            case "dualfloor":
                return DualFloor()
            case "orthogonal":
                return Orthogonal()
        raise AssertionError(self.settings.rule)
