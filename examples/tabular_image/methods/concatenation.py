"""Concatenation (CF): one linear classifier on the features of both modalities, trained jointly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gaal_surgery import AlignmentStats, ConflictMonitor, gramian

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import ALL_TASKS, Logits
from .monitored import Monitored
from .settings import ConcatenationSettings


class Concatenation(Monitored):
    """Cross-entropy on z = W_I u_I + W_T u_T + b.

    u_I and u_T are the features of image and table. The prediction of modality m is the modality's slice of the head,
    z_m = W_m u_m + b / 2, so that z_I + z_T = z. The two slices are measured and never trained.

    Attributes:
        monitor: for each encoder (under "modality"), the gradient of CE(z) and the cosine of this gradient with the
            gradient of CE(z_m) (under "guide"). None where the settings do not ask for the measurement. With several
            processes the rows of the first process are measured. The monitor counts two steps a batch, like the
            monitor of alternation.
    """

    Settings = ConcatenationSettings
    tasks = ALL_TASKS
    several_processes = True

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Linear(2 * self.width, self.outputs)
        # OGM-GE shares this model and has other settings.
        if isinstance(self.settings, ConcatenationSettings) and self.settings.measure_conflict:
            self.monitor = ConflictMonitor()

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused", "image" and "table"."""
        weights: tuple[Tensor, ...] = self.head.weight.split(self.width, dim=1)
        slices = {
            modality: F.linear(encoder(batch[modality]), weight, self.head.bias / 2)
            for (modality, encoder), weight in zip(self.encoders.items(), weights, strict=True)
        }
        sums = {"fused": torch.stack(list(slices.values())).sum(dim=0), **slices}
        return {name: self.task.bounded(outputs) for name, outputs in sums.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the cross-entropy of the joint logits."""
        losses = {name: self.task.loss(logits, batch["target"]) for name, logits in self(batch).items()}
        if self.monitor is not None:
            self.measure(losses, self.monitor)
        self.descend(losses["fused"])
        self.log_losses(losses, batch)

    def measure(self, losses: dict[str, Tensor], monitor: ConflictMonitor) -> None:
        """Record, for each encoder, how the gradients of the joint loss and of the encoder's slice loss agree."""
        for modality, encoder in self.encoders.items():
            parameters = list(encoder.parameters())
            pair = [torch.autograd.grad(losses[name], parameters, retain_graph=True) for name in ("fused", modality)]
            products = gramian(pair)
            monitor.update(AlignmentStats(modality, (f"{modality} alone",), products, products.new_tensor([1, 0])))
