"""LFM: training turns from matching the two predictions, without labels, to classification."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.polynomial import Polynomial
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method
from .settings import LFMSettings

# By epoch of 200, fitted by the authors to weights that they learned on CREMA-D: `getAlpha_Learnable_Fitted` in
# Crema_epoch.py of njustkmg/NeurIPS24-LFM, also in FqWan24/TPAMI26-LFM, where the digits were read.
_CURVE = Polynomial([2.04623704e-01, 3.35472727e-03, 1.22989557e-04, -2.92947416e-06, 2.23835486e-08, -5.39717505e-11])
_CURVE_EPOCHS = 200


class LFM(Method):
    """Learning the modality gap (Yang et al., NeurIPS 2024): cross-modal matching first, then classification.

    Code: njustkmg/NeurIPS24-LFM. Separate heads; z = (z_I + z_T) / 2, p_m = softmax(z_m), q = (p_I + p_T) / 2.

        L = 2 [alpha_e CE(z, y) + (1 - alpha_e) A],    A = (KL(q || p_I) + KL(q || p_T)) / 2,

    where A, called Jensen-Shannon in the code, has that divergence's arguments reversed. In epoch e, alpha_e is the
    authors' curve of 200 epochs (0.20 at the start, 0.54 half-way, 0.92 at the end), stretched to the length of
    training and kept in [0.05, 0.95]: near 180 it exceeds 1, where predictions would be driven apart.

    The paper's abstract promises contrastive learning. What its contrastive loss is could not be established, and the
    released training uses A alone, as here. Their curve is the fit of a learned schedule; learning one is not offered.

    Adam and AdamW divide a gradient by its own size: under them the factor 2 is inert, while alpha_e is not.

    Reports image, table, and their fusion by `--fusion` (the authors' is the mean, z).
    """

    Settings = LFMSettings

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.heads = nn.ModuleDict({modality: nn.Linear(self.width, self.outputs) for modality in self.modalities})

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image" and "table"."""
        return {modality: head(self.encoders[modality](batch[modality])) for modality, head in self.heads.items()}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the weighted sum."""
        logits, target = self(batch), batch["target"]
        mean = (logits["image"] + logits["table"]) / 2
        classification, match = self.task.loss(mean, target), matching(logits["image"], logits["table"])
        alpha = self.settings.alpha
        if alpha is None:
            alpha = curve(self.stage_epoch, self.stage.epochs)
        loss = 2 * (alpha * classification + (1 - alpha) * match)
        self.descend(loss)
        unimodal = {name: self.task.loss(values, target) for name, values in logits.items()}
        self.log_losses({"classification": classification, "matching": match, **unimodal}, batch)


def curve(epoch: int, epochs: int) -> float:
    """The weight of classification in an epoch, from 0, of so many."""
    return float(np.clip(_CURVE(_CURVE_EPOCHS * epoch / epochs), 0.05, 0.95))


def matching(image: Tensor, table: Tensor) -> Tensor:
    """A of two logits (B, C), the mean over the batch."""
    logs = [image.log_softmax(dim=1), table.log_softmax(dim=1)]
    middle = torch.logaddexp(*logs) - math.log(2)
    return torch.stack([F.kl_div(log, middle, reduction="batchmean", log_target=True) for log in logs]).mean()
