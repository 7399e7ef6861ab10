"""Base of the two methods of one modality: an encoder and a linear classifier."""

from __future__ import annotations

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import ALL_TASKS, Logits, Method


class Unimodal(Method):
    """Trains one encoder and a linear head on the loss of the task. `modalities` has one name."""

    tasks = ALL_TASKS
    several_processes = True

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        (self.modality,) = self.modalities
        self.head = self.task.head(self.width)

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under the modality's name."""
        return {self.modality: self.head(self.encoders[self.modality](batch[self.modality]))}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the loss of the task."""
        loss = self.task.loss(self(batch)[self.modality], batch["target"])
        self.descend(loss)
        self.log_losses({self.modality: loss}, batch)
