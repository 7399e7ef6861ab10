"""GAAL under Lightning's Trainer, by manual optimization: `python examples/trainers/with_lightning.py --help`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from trainers.problem import MODALITIES, Model, accuracy, fresh_features, rows

from gaal_surgery import GradientAlignedAlternator, HalfSpace


class Alternating(L.LightningModule):
    """The loop over turns, inside a training step."""

    def __init__(self, guidance: str, margin: float, batch: int, max_norm: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = Model()
        self.guidance, self.margin, self.batch, self.max_norm = guidance, margin, batch, max_norm

    def configure_optimizers(self) -> GradientAlignedAlternator:
        """Return the wrapper in place of the optimizer."""
        sgd = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        rule = HalfSpace(self.margin, relative=True)
        return GradientAlignedAlternator(sgd, shared=self.model.head, rule=rule)

    def training_step(self, batch: dict[str, Tensor], _: int) -> None:
        """One round of turns."""
        optimizer, labels = self.optimizers(), batch["labels"]
        features = fresh_features(optimizer, self.model, batch)
        for turn in optimizer.turns(*MODALITIES):
            own = features[turn.modality]
            self.manual_backward(F.cross_entropy(self.model(own), labels))
            if self.guidance == "fresh":
                for guide in turn.guides:
                    optimizer.guide(guide, features[guide], labels)
            optimizer.step()
            optimizer.zero_grad()
            if self.guidance == "cached":
                optimizer.guide(turn.modality, own, labels)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip here: in training_step, gradients are still scaled under 16-mixed."""
        self.clip_gradients(optimizer, self.max_norm, "norm")

    def train_dataloader(self) -> DataLoader:
        """Rows in an order that depends on the epoch alone, so that a resumed run repeats the order."""
        dataset = rows("train")
        sampler = DistributedSampler(dataset, self.trainer.world_size, self.trainer.global_rank)
        return DataLoader(dataset, self.batch, sampler=sampler)


def main(
    epochs: int = 20,
    guidance: Literal["fresh", "cached"] = "fresh",
    margin: float = 0.0,
    batch: int = 50,
    max_norm: float = 1.0,
    resume: Path | None = None,
    **trainer: Any,
) -> Model:
    """Train, then print the test accuracy.

    Args:
        epochs: the number of epochs, including those before a resume.
        guidance: "fresh" runs a guide's encoder on this batch, "cached" keeps the features of the guide's last turn.
        margin: HalfSpace's relative margin, a cosine.
        batch: rows in a step of one process.
        max_norm: the norm to which gradients are clipped.
        resume: a checkpoint that Lightning wrote.
        trainer: options of Lightning's Trainer.
    """
    L.seed_everything(0, verbose=False)
    task = Alternating(guidance, margin, batch, max_norm)
    engine = L.Trainer(max_epochs=epochs, logger=False, **trainer)
    engine.fit(task, ckpt_path=resume)
    if engine.is_global_zero:
        print(f"test accuracy {accuracy(task.model):.3f}")
    return task.model


if __name__ == "__main__":
    auto_cli(main)
