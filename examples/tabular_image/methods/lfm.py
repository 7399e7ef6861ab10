"""LFM: training first matches the two predictions, without labels, and shifts to classification."""

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

# alpha by epoch of 200. The authors fitted this polynomial to weights that they learned on CREMA-D:
# `getAlpha_Learnable_Fitted` in Crema_epoch.py of njustkmg/NeurIPS24-LFM. The digits are from FqWan24/TPAMI26-LFM.
_CURVE = Polynomial([2.04623704e-01, 3.35472727e-03, 1.22989557e-04, -2.92947416e-06, 2.23835486e-08, -5.39717505e-11])
_CURVE_EPOCHS = 200


class LFM(Method):
    """Learning the modality gap (Yang et al., NeurIPS 2024): cross-modal matching first, then classification.

    Code: njustkmg/NeurIPS24-LFM. Image (I) and table (T) have heads of their own with logits z_m, p_m = softmax(z_m).
    The means are z = (z_I + z_T) / 2 and q = (p_I + p_T) / 2.

        L = 2 [alpha_e CE(z, y) + (1 - alpha_e) A],    A = (KL(q || p_I) + KL(q || p_T)) / 2

    The code calls the matching loss A a Jensen-Shannon divergence, but A has the arguments of that divergence reversed.
    In epoch e, alpha_e is the authors' curve of 200 epochs (0.20 at the start, 0.54 half-way, 0.92 at the end),
    stretched to the length of the training. alpha_e is kept in [0.05, 0.95]: near epoch 180 the curve exceeds 1, which
    would drive the predictions apart.

    The paper's abstract promises contrastive learning. The contrastive loss of the paper could not be established. The
    released training uses A alone, and so does this method. The authors' curve was fitted to a learned schedule.
    Learning a schedule is not offered.

    Adam and AdamW divide a gradient by its own size. Under both optimizers the factor 2 is inert, and alpha_e acts.

    Reports image, table, and their fusion by `--fusion`. The authors fuse by the mean, z.
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
    """The weight of classification, alpha, in an epoch (counted from 0) of `epochs`."""
    return float(np.clip(_CURVE(_CURVE_EPOCHS * epoch / epochs), 0.05, 0.95))


def matching(image: Tensor, table: Tensor) -> Tensor:
    """The matching loss A of two logits (B, C), the mean over the batch."""
    logs = [image.log_softmax(dim=1), table.log_softmax(dim=1)]
    middle = torch.logaddexp(*logs) - math.log(2)
    return torch.stack([F.kl_div(log, middle, reduction="batchmean", log_target=True) for log in logs]).mean()
