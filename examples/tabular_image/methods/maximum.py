"""Maximum (MF): one linear classifier on the larger of the modalities' features at each place, trained jointly."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import ALL_TASKS, Logits, Method
from .settings import MaximumSettings


class Maximum(Method):
    """Cross-entropy on z = W max(P u_I, u_T) + b, with the element-wise maximum.

    u_I and u_T are the features of image and table. P is linear, as in TIP's code (Du et al., ECCV 2024; siyi-wind/TIP,
    MultimodalModel.py). The commented lines of njustkmg/ICME26-GAAL have no P. Negative features of the table then
    never pass the maximum: u_I is a mean of outputs of ReLU, which are never negative, and u_T has negative values.

    Reports fused. Image and table cells are empty: the maximum needs both modalities.
    """

    Settings = MaximumSettings
    tasks = ALL_TASKS
    several_processes = True

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.projection = nn.Linear(self.width, self.width) if self.settings.projection == "linear" else nn.Identity()
        self.head = self.task.head(self.width)

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused"."""
        features = {modality: encoder(batch[modality]) for modality, encoder in self.encoders.items()}
        return {"fused": self.fuse(features["image"], features["table"])}

    def fuse(self, image: Tensor, table: Tensor) -> Tensor:
        """Logits (B, C) from features (B, width) of image and table."""
        logits: Tensor = self.head(torch.maximum(self.projection(image), table))
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the cross-entropy."""
        loss = self.task.loss(self(batch)["fused"], batch["target"])
        self.descend(loss)
        self.log_losses({"fused": loss}, batch)
