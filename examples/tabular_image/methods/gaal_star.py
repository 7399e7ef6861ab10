"""GAAL*: GAAL judged by the image prediction alone, like the methods that have no table at test time."""

from __future__ import annotations

from ..data.module import Batch
from .base import Logits
from .gaal import GAAL


class GAALStar(GAAL):
    """Trains as GAAL does, with both modalities. The image prediction selects the epoch and is reported.

    In the paper's Table I the image encoder of GAAL* starts from ImageNet weights, like the other image encoders of
    that block (inferred): `--image_encoder resnet50 --pretrained true`. Fused and table cells are empty, because there
    is no table at test time.
    """

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image"; the table is never looked at."""
        return {"image": self.head(self.encoders["image"](batch["image"]))}
