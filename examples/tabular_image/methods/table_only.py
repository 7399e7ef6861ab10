"""The table alone: an encoder and a linear classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method


class TableOnly(Method):
    """Cross-entropy on a linear classifier of the table's features."""

    modalities = ("table",)

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Linear(self.width, self.classes)

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "table"."""
        return {"table": self.head(self.encoders["table"](batch["table"]))}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the cross-entropy."""
        loss = F.cross_entropy(self(batch)["table"], batch["target"])
        self.descend(loss)
        self.log_losses({"table": loss}, batch)
