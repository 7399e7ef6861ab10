"""The image alone: an encoder and a linear classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method


class ImageOnly(Method):
    """Cross-entropy on a linear classifier of the image's features."""

    modalities = ("image",)

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Linear(self.width, self.classes)

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image"."""
        return {"image": self.head(self.encoders["image"](batch["image"]))}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the cross-entropy."""
        loss = F.cross_entropy(self(batch)["image"], batch["target"])
        self.descend(loss)
        self.log_losses({"image": loss}, batch)
