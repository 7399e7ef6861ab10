"""ReconBoost: modalities take turns to boost each other, and a joint phase after every turn corrects their sum."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method, Stage
from .settings import ReconBoostSettings

_HIDDEN = 256


class ReconBoost(Method):
    """ReconBoost (Hua et al., ICML 2024; code huacong/ReconBoost).

    Both modalities share a head width -> 256 -> ReLU -> C. With logits z_I of the image and z_T of the table, the
    prediction is F = eta (z_I + z_T). eta is learnable and starts at 1.

    Stage "pretraining" minimises CE(z_I) + CE(z_T), here through the shared head. Without this stage the first turns
    would boost a random partner.

    Stage "boosting", of `--epochs`, consists of rounds. A round has two phases. In the own phase of modality m (image,
    table, image, ...) the encoder of m and the head train for E_1 epochs, and the other encoder is frozen, in eval
    mode. sg stops the gradient:

        L = mean_i (w_1 - w_2 q_i) CE_i(z_m),   q_i = sg softmax(eta z_other)_{y_i}

    In the joint phase all parts and eta train for E_2 epochs on CE(F). Epochs that do not fill a round lengthen the
    last joint phase, so that the stage always ends with a joint phase. A stage shorter than a round is one joint phase.

    L is C times the loss of the released code, which also averages over the classes. A step of sgd in the own phase is
    then C times as long. `divide_by_classes` takes the released loss.

    Reports fused (F), image (z_I) and table (z_T). The authors' unimodal figures are of linear probes.
    """

    Settings = ReconBoostSettings

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Sequential(nn.Linear(self.width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, self.outputs))
        self.rate = Rate()

    def stages(self) -> list[Stage]:
        """Pretraining, then the rounds."""
        return [
            Stage("pretraining", self.settings.pretraining_epochs, [self.encoders, self.head]),
            Stage("boosting", self.options.epochs, [self.encoders, self.head, self.rate]),
        ]

    @property
    def turn(self) -> str | None:
        """The modality whose own phase the epoch belongs to; None in the joint phase and in pretraining."""
        if self.stage.name == "pretraining":
            return None
        number, epoch = self.place
        return self.modalities[number % 2] if epoch < self.settings.turn_epochs else None

    @property
    def place(self) -> tuple[int, int]:
        """The round, and the epoch in the round, both from 0. The round is -1 in a stage shorter than a round."""
        length = self.settings.turn_epochs + self.settings.joint_epochs
        number = min(self.stage_epoch // length, self.stage.epochs // length - 1)
        return number, self.stage_epoch - number * length

    def other(self, modality: str) -> str:
        """The modality that is not this one."""
        return next(name for name in self.modalities if name != modality)

    def on_train_epoch_start(self) -> None:
        """Freeze the encoder that is idle in a modality's own phase."""
        super().on_train_epoch_start()
        if self.turn is not None:
            self.encoders[self.other(self.turn)].eval().requires_grad_(False)
        begins = self.stage.name == "boosting" and self.place[1] in (0, self.settings.turn_epochs)
        if self.settings.fresh_optimizer and begins:
            self.optimizer.state.clear()

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused", "image" and "table"."""
        logits = {modality: self.head(encoder(batch[modality])) for modality, encoder in self.encoders.items()}
        return {"fused": self.rate(logits["image"] + logits["table"]), **logits}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the loss of the phase."""
        logits, target = self(batch), batch["target"]
        losses = {name: self.task.loss(values, target) for name, values in logits.items()}
        if self.stage.name == "pretraining":
            self.descend(losses["image"] + losses["table"])
        elif self.turn is None:
            self.descend(losses["fused"])
        else:
            self.descend(self.turn_loss(logits[self.turn], logits[self.other(self.turn)].detach(), target))
        self.log_losses(losses, batch)

    def turn_loss(self, logits: Tensor, other: Tensor, target: Tensor) -> Tensor:
        """Loss of a modality's own phase, from its logits (B, C) and the other's logits, which get no gradient."""
        settings = self.settings
        known = self.rate(other).softmax(dim=1).detach().gather(1, target.unsqueeze(1)).squeeze(1)
        weights = settings.label_weight - settings.residual_weight * known
        loss = (weights * F.cross_entropy(logits, target, reduction="none")).mean()
        if settings.divide_by_classes:
            loss = loss / self.outputs
        if settings.memory:
            loss = loss + settings.memory * F.mse_loss(logits.softmax(dim=1), other.detach().softmax(dim=1))
        return loss


class Rate(nn.Module):
    """Multiplies by a learnable eta, at first 1."""

    def __init__(self) -> None:
        super().__init__()
        self.eta = nn.Parameter(torch.ones(()))

    def forward(self, values: Tensor) -> Tensor:
        """Values of any shape, times eta."""
        return self.eta * values
