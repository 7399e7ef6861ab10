"""The digits of quickstart.py as trainers take them: rows for a DataLoader, and a model with one forward."""

from __future__ import annotations

from functools import cache

import torch
from quickstart import MODALITIES, build, load
from torch import Tensor, nn
from torch.utils.data import default_collate

from gaal_surgery import fuse_logits

_load = cache(load)


def rows(split: str) -> list[dict[str, Tensor]]:
    """The samples of "train" or "test": the inputs by modality, and the class under "labels"."""
    inputs, labels = _load()[split]
    columns = {**inputs, "labels": labels}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(labels))]


class Model(nn.Module):
    """Encoders and their head behind one forward: DDP reduces, and trainers cast, only what goes through it."""

    def __init__(self) -> None:
        super().__init__()
        inputs, _ = _load()["train"]
        self.encoders = build(columns=inputs["table"].shape[1])
        self.head = self.encoders.pop("head")

    def forward(self, inputs: dict[str, Tensor], modality: str) -> tuple[Tensor, Tensor]:
        """Features and logits of one modality."""
        features = self.encoders[modality](inputs[modality])
        return features, self.head(features)


@torch.no_grad()
def accuracy(model: Model) -> float:
    """Test accuracy of the fused modalities."""
    batch = default_collate(rows("test"))
    inputs = {modality: batch[modality].to(model.head.weight) for modality in MODALITIES}
    prediction = fuse_logits({modality: model(inputs, modality)[1] for modality in MODALITIES}).argmax(dim=1)
    return (prediction.cpu() == batch["labels"]).float().mean().item()
