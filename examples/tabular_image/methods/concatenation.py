"""Concatenation (CF): one linear classifier on the features of both modalities, trained jointly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method


class Concatenation(Method):
    """Cross-entropy on z = W_I u_I + W_T u_T + b.

    The predictions of one modality are its slice of the head, z_m = W_m u_m + b / 2, so that z_I + z_T = z. They are
    measured and never trained.
    """

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Linear(2 * self.width, self.classes)

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused", "image" and "table"."""
        weights: tuple[Tensor, ...] = self.head.weight.split(self.width, dim=1)
        slices = {
            modality: F.linear(encoder(batch[modality]), weight, self.head.bias / 2)
            for (modality, encoder), weight in zip(self.encoders.items(), weights, strict=True)
        }
        return {"fused": torch.stack(list(slices.values())).sum(dim=0), **slices}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the cross-entropy of the joint logits."""
        losses = {name: F.cross_entropy(logits, batch["target"]) for name, logits in self(batch).items()}
        self.descend(losses["fused"])
        self.log_losses(losses, batch)
