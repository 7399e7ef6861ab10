"""Alternation without surgery: GAAL whose rule never intervenes, so that its conflicts are measured all the same."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .gaal import GAAL


def keep_gradient(gramian: Tensor) -> Tensor:
    """Weights 1, 0, ..., 0 for a Gramian (n, n)."""
    return torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)[0]


class Alternating(GAAL):
    """Each modality in turn steps its encoder and the shared head; guides are observed, never followed."""

    def rule(self) -> Callable[[Tensor], Tensor]:
        """The rule that keeps every gradient."""
        return keep_gradient
