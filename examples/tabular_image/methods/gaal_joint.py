"""GAAL with a joint turn: a third voice sees both modalities at once and takes turns like a modality."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gaal_surgery import FreshFeatures

from ..data.module import Batch, TabularImageData
from ..errors import InputError
from ..options import Options
from .base import Logits
from .gaal import GAAL
from .settings import GAALJointSettings


class GAALJoint(GAAL):
    """Turns of table, image and joint. The joint turn trains a small network on the features of both encoders.

    A late fusion of image and table cannot express how image and table depend on one another. The joint voice can. By
    default the joint turn steps the joint network, a head of its own, and both encoders. With `gradient` "joint" the
    gradient of the joint turn stays out of the encoders, and image and table train as in GAAL, to the bit.

    The prediction is the fusion of three voices by `--fusion`. The product multiplies image and table alone, because
    the joint voice depends on both.

    `forward` takes a batch without a table or without a picture. The voice that is left then makes the prediction.
    Logits without "joint" are fused by weights that were fitted for image and table.
    """

    Settings = GAALJointSettings
    voices = ("image", "table", "joint")
    takes_image_alone = True

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        if self.settings.guided and self.settings.head == "own":
            raise InputError(
                "--gaal_joint.guided true needs the shared head, and the joint turn has a head of its own; "
                "give --gaal_joint.head shared or --gaal_joint.guided false"
            )
        self.joint = nn.Sequential(
            nn.Linear(2 * self.width, self.width),
            nn.BatchNorm1d(self.width),
            nn.ReLU(),
            nn.Dropout(self.settings.dropout),
            nn.Linear(self.width, self.width),
        )
        self.joint_head = self.head if self.settings.head == "shared" else self.task.head(self.width)
        self.pair = self.task.calibrated(self.modalities).requires_grad_(False)

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image", "table" and "joint", or under the one modality that the batch has."""
        features = {name: encoder(batch[name]) for name, encoder in self.encoders.items() if name in batch}
        logits = {name: self.head(values) for name, values in features.items()}
        if len(features) == 2:
            logits["joint"] = self.joint_head(self.joint(_both(features)))
        return logits

    def fractions(self) -> dict[str, float]:
        """Share of a batch, the most uncertain samples, that guides, by voice."""
        return super().fractions() | {"joint": self.settings.joint_fraction}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A round: turns of table, image and joint, each on its own loss.

        The joint network sees the features from the beginning of the round, so that no encoder runs again. With
        `gradient` "encoders" both encoders run once more for the joint turn.
        """
        optimizer, target, settings = self.optimizer, batch["target"], self.settings
        losses, inputs = {}, dict(batch)
        features = FreshFeatures(optimizer, {**self.encoders, "joint": self.joint}, inputs)
        inputs["joint"] = _both(features).detach()
        for turn in optimizer.turns("table", "image", "joint"):
            is_joint = turn.modality == "joint"
            if is_joint and settings.gradient == "encoders":
                own = self.joint(_both({name: encoder(batch[name]) for name, encoder in self.encoders.items()}))
            else:
                own = features[turn.modality]
            head = self.joint_head if is_joint else self.head
            losses[turn.modality] = loss = self.task.loss(head(own), target)
            self.manual_backward(loss)
            for guide in turn.guides:
                if settings.guided or not (is_joint or guide == "joint"):
                    optimizer.guide(guide, features[guide], target)
                else:
                    optimizer.guide(guide, inputs["joint"][:0], target[:0])  # an empty batch is no guide
            optimizer.step()
            optimizer.zero_grad()
            self.monitor.update(optimizer.stats)
        self.log_losses(losses, batch)

    def trainable(self) -> list[nn.Module]:
        """All modules but the fusions."""
        return [module for module in super().trainable() if module is not self.pair]

    def fit_fusions(self, logits: Logits, target: Tensor) -> None:
        """Fit the fusion of the three voices, and the fusion of image and table alone."""
        super().fit_fusions(logits, target)
        self.task.fit(self.pair, {name: logits[name] for name in self.modalities}, target)

    def fusions(self, logits: Logits) -> Logits:
        """The fusions of the three voices, or of image and table where the logits have no "joint"."""
        if "joint" in logits or not set(self.modalities) <= logits.keys():
            return super().fusions(logits)
        return self.fused_by(self.pair, logits)

    def predictions(self, logits: Logits) -> Logits:
        """All predictions (B, C) by name. A single voice is also the fused prediction."""
        alone = {"fused": next(iter(logits.values()))} if len(logits) == 1 else {}
        return super().predictions(alone | logits)


def _both(features: Mapping[str, Tensor]) -> Tensor:
    """Features (B, 2 width): of the image, then of the table."""
    return torch.cat([features["image"], features["table"]], dim=1)
