"""GAAL: modalities take turns, and the shared head's step is aligned with the other's most uncertain samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from gaal_surgery import ConflictMonitor, DualFloor, GradientAlignedAlternator, HalfSpace, Orthogonal

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method


class GAAL(Method):
    """Algorithm 1 of Huang and Yang (ICME 2026): image, then table, through one shared linear head.

    Attributes:
        monitor: cosines between the modalities' gradients on the head, and what surgery did about them.
    """

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Linear(self.width, self.classes)
        self.monitor = ConflictMonitor()

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image" and "table"."""
        return {modality: self.head(encoder(batch[modality])) for modality, encoder in self.encoders.items()}

    def rule(self) -> Callable[[Tensor], Tensor]:
        """The rule of surgery."""
        match self.options.rule:
            case "halfspace":
                return HalfSpace(self.options.margin, self.options.relative)
            case "dualfloor":
                return DualFloor()
            case "orthogonal":
                return Orthogonal()

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of all parameters, wrapped for alternation and surgery."""
        options = self.options
        return GradientAlignedAlternator(
            super().build_optimizer(),
            self.head,
            fraction={"image": options.image_fraction, "table": options.table_fraction},
            rule=self.rule(),
            align=options.align,
            max_norm=options.max_norm,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A round: each modality's turn on its own loss."""
        optimizer, target = self.optimizers(), batch["target"]
        losses = {}
        for turn in optimizer.turns(*self.modalities):
            features = self.encoders[turn.modality](batch[turn.modality])
            losses[turn.modality] = loss = F.cross_entropy(self.head(features), target)
            self.manual_backward(loss)
            if self.options.guidance == "fresh":
                for guide in turn.guides:
                    optimizer.guide(guide, self.idle_features(guide, batch), target)
            optimizer.step()
            optimizer.zero_grad()
            if self.options.guidance == "cached":
                optimizer.guide(turn.modality, features.detach(), target)
            self.monitor.update(optimizer.stats)
        self.log_losses(losses, batch)

    @torch.no_grad()
    def idle_features(self, modality: str, batch: Batch) -> Tensor:
        """Features (B, width) as in training, from an encoder that must not change outside its own turn."""
        encoder = self.encoders[modality]
        # Batch normalisation updates its running statistics in place: let it update copies.
        buffers = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        features: Tensor = functional_call(encoder, buffers, (batch[modality],))
        return features

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the monitor's history."""
        checkpoint["monitor"] = self.monitor.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the monitor's history."""
        self.monitor.load_state_dict(checkpoint["monitor"])
