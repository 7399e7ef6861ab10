"""Alternation: modalities take turns without surgery; guides are measured and change no step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from gaal_surgery import ConflictMonitor, FreshFeatures, GradientAlignedAlternator

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import ALL_TASKS, Logits
from .monitored import Monitored
from .settings import AlternatingSettings


class Alternating(Monitored):
    """Each modality in turn steps its encoder and the shared linear head on its own cross-entropy.

    A *turn* is one such step. A *round* is one turn of each modality. A *guide* is the other modality, which the step
    should not hurt. Surgery, as in `GAAL`, changes the step for the guide's sake. Here the guide is only measured.

    This is the row "alternation only" of the paper's Table II. Reports image, table, and their fusion by `--fusion`.

    Attributes:
        monitor: cosines between the modalities' gradients on the head, and what surgery changed.
    """

    Settings = AlternatingSettings
    tasks = ALL_TASKS
    several_processes = True
    monitor: ConflictMonitor

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = self.task.head(self.width)
        self.monitor = ConflictMonitor()

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image" and "table"."""
        return {modality: self.head(encoder(batch[modality])) for modality, encoder in self.encoders.items()}

    def fractions(self) -> dict[str, float]:
        """Share of a batch, the most uncertain samples, that guides, by modality."""
        return {"image": self.settings.image_fraction, "table": self.settings.table_fraction}

    def rule(self) -> Callable[[Tensor], Tensor]:
        """The rule of surgery; here the rule that keeps every gradient."""
        return keep_gradient

    def build_optimizer(self, modules: Iterable[nn.Module]) -> torch.optim.Optimizer:
        """The optimizer of all parameters, wrapped for alternation and surgery."""
        settings = self.settings
        return GradientAlignedAlternator(
            super().build_optimizer(modules),
            self.head,
            guides="others",
            fraction=self.fractions(),
            loss_fn=self.task.loss,
            uncertainty=self.task.uncertainty if settings.uncertainty == "entropy" else random_scores,
            rule=self.rule(),
            align=settings.align,
            max_norm=settings.max_norm,
        )

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A round: each modality has a turn on its own loss."""
        optimizer, target = self.optimizer, batch["target"]
        losses = {}
        features = FreshFeatures(optimizer, self.encoders, batch)
        order = ("table", "image") if self.settings.order == "table_first" else ("image", "table")
        for turn in optimizer.turns(*order):
            own = features[turn.modality]
            losses[turn.modality] = loss = self.task.loss(self.head(own), target)
            self.manual_backward(loss)
            if self.settings.guidance == "fresh":
                for guide in turn.guides:
                    optimizer.guide(guide, features[guide], target)
            if self.settings.idle_moves:
                for parameter in self.encoders.parameters():
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            optimizer.step()
            optimizer.zero_grad()
            if self.settings.idle_moves:
                features = FreshFeatures(optimizer, self.encoders, batch)
            if self.settings.guidance == "cached":
                optimizer.guide(turn.modality, own, target)
            self.monitor.update(optimizer.stats)
        self.log_losses(losses, batch)


def keep_gradient(gramian: Tensor) -> Tensor:
    """Weights 1, 0, ..., 0 for a Gramian (n, n): the gradient stays, the guides add nothing."""
    return torch.eye(len(gramian), dtype=gramian.dtype, device=gramian.device)[0]


def random_scores(logits: Tensor) -> Tensor:
    """A random score (B,) for each row of logits (B, C)."""
    return torch.rand(len(logits), device=logits.device)
