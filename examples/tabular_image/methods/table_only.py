"""Table alone: an encoder and a linear classifier."""

from __future__ import annotations

from .unimodal import Unimodal


class TableOnly(Unimodal):
    """Predicts from the table; reports no fused prediction."""

    modalities = ("table",)
