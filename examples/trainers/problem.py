"""The digits of quickstart.py in the form that trainers take: rows for a DataLoader, a model with one forward."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
from quickstart import MODALITIES, build, load
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import default_collate

from gaal_surgery import FreshFeatures, fuse_logits

_load = cache(load)


def rows(split: str) -> list[dict[str, Tensor]]:
    """The samples of "train" or "test": the inputs by modality, and the class under "labels"."""
    inputs, labels = _load()[split]
    columns = {**inputs, "labels": labels}
    return [{name: column[row] for name, column in columns.items()} for row in range(len(labels))]


class Model(nn.Module):
    """Encoders and their head behind one forward.

    DDP reduces, and trainers cast, only what goes through forward. Forward is called
    once for features and once for the features' logits, so that features can serve
    several turns.
    """

    def __init__(self) -> None:
        super().__init__()
        inputs, _ = _load()["train"]
        self.encoders = build(columns=inputs["table"].shape[1])
        self.head = self.encoders.pop("head")

    def forward(self, given: Any, modality: str | None = None) -> Tensor:
        """With a modality, the features of a batch. Without one, the logits of features."""
        if modality is None:
            return self.head(given)
        return self.encoders[modality](given[modality])


def fresh_features(
    optimizer: Optimizer,
    model: Model,
    batch: dict[str, Tensor],
) -> FreshFeatures:
    """The features of a batch by modality. The model may be wrapped by a trainer."""
    encoders = {modality: partial(model, modality=modality) for modality in MODALITIES}
    return FreshFeatures(optimizer, encoders, dict.fromkeys(MODALITIES, batch))


@torch.no_grad()
def accuracy(model: Model) -> float:
    """Test accuracy of the fused modalities."""
    batch = default_collate(rows("test"))
    inputs = {modality: batch[modality].to(model.head.weight) for modality in MODALITIES}
    prediction = fuse_logits({modality: model(model(inputs, modality)) for modality in MODALITIES}).argmax(dim=1)
    return (prediction.cpu() == batch["labels"]).float().mean().item()
