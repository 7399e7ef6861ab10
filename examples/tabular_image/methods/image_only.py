"""Image alone: an encoder and a linear classifier."""

from __future__ import annotations

from .unimodal import Unimodal


class ImageOnly(Unimodal):
    """Predicts from the image; reports no fused prediction."""

    modalities = ("image",)
