"""GAAL*: GAAL judged by its image prediction alone, as the methods that miss the table at test time are."""

from __future__ import annotations

from ..data.module import Batch
from .base import Logits
from .gaal import GAAL


class GAALStar(GAAL):
    """Trains as GAAL does, with both modalities, and selects and reports the image prediction.

    In the paper's Table I its image encoder starts from ImageNet weights, as those of that block do (inferred):
    `--image_encoder resnet50 --pretrained true`. Fused and table cells are empty, since no table is there at test time.
    """

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image"; the table is never looked at."""
        return {"image": self.head(self.encoders["image"](batch["image"]))}
