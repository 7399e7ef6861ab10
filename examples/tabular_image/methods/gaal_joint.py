"""GAAL with a joint turn: a third voice sees both modalities at once, and is one more modality to the library."""

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
    """Turns of table, image and joint, where the joint turn trains a small network on both encoders' features.

    A late fusion of image and table cannot express how the two depend on one another; the joint voice can. By default
    the joint turn steps the joint network, a head of its own, and both encoders. With its gradient kept out of the
    encoders, image and table train as in GAAL, to the bit. The prediction is the fusion of three voices by `--fusion`.
    The product has image and table alone, as the joint voice is not independent of them.

    A row without a table or a picture has the voices that are left: `forward` takes a batch that lacks one, and the
    prediction is the other's. Logits without "joint" are fused by weights fitted for the two.
    """

    Settings = GAALJointSettings
    voices = ("image", "table", "joint")
    takes_image_alone = True

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        if self.settings.guided and self.settings.head == "own":
            raise InputError(
                "guides look at the shared head, and the joint turn has one of its own; give --gaal_joint.head shared "
                "or --gaal_joint.guided false"
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
        """Logits (B, C) under "image", "table" and "joint", or of the one modality that the batch has."""
        features = {name: encoder(batch[name]) for name, encoder in self.encoders.items() if name in batch}
        logits = {name: self.head(values) for name, values in features.items()}
        if len(features) == 2:
            logits["joint"] = self.joint_head(self.joint(_both(features)))
        return logits

    def fractions(self) -> dict[str, float]:
        """Of each modality, the joint one included."""
        return super().fractions() | {"joint": self.settings.joint_fraction}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A round: turns of table, image and joint, each on its own loss.

        The joint network sees the features from the beginning of the round: no encoder runs again for it, unless its
        gradient reaches the encoders.
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
        """All modules but the two fusions."""
        return [module for module in super().trainable() if module is not self.pair]

    def fit_fusions(self, logits: Logits, target: Tensor) -> None:
        """Fit that of the three voices, and that of image and table alone."""
        super().fit_fusions(logits, target)
        self.task.fit(self.pair, {name: logits[name] for name in self.modalities}, target)

    def fusions(self, logits: Logits) -> Logits:
        """The fusions of the three voices, or of image and table where these are all."""
        if "joint" in logits or not set(self.modalities) <= logits.keys():
            return super().fusions(logits)
        return self.fused_by(self.pair, logits)

    def predictions(self, logits: Logits) -> Logits:
        """As of every method; a single voice is its own fusion."""
        alone = {"fused": next(iter(logits.values()))} if len(logits) == 1 else {}
        return super().predictions(alone | logits)


def _both(features: Mapping[str, Tensor]) -> Tensor:
    """(B, 2 width): image, then table."""
    return torch.cat([features["image"], features["table"]], dim=1)
