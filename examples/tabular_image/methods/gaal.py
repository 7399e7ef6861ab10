"""GAAL: modalities take turns; surgery aligns the shared head's step with the other modality's uncertain samples."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from gaal_surgery import HalfSpace
from gaal_surgery.surgery import RULES

from .alternating import Alternating, keep_gradient
from .settings import GAALSettings


class GAAL(Alternating):
    """Algorithm 1 of Huang and Yang (ICME 2026): alternation with surgery.

    Surgery removes the part of the head's gradient that would hurt the other modality, the guide.

    Reports image, table, and their fusion by `--fusion`. The paper fuses by the mean (Eq. 10).
    """

    Settings = GAALSettings

    def rule(self) -> Callable[[Tensor], Tensor]:
        """The rule of surgery."""
        if self.settings.rule == "halfspace":
            return HalfSpace(self.settings.margin, self.settings.relative)
        return keep_gradient if self.settings.rule == "none" else RULES[self.settings.rule]()
