"""MLA: modalities take turns, and the shared head's step avoids the directions of the features of earlier turns."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gaal_surgery import entropy

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method
from .settings import MLASettings


class MLA(Method):
    """Multimodal learning with alternating unimodal adaptation (Zhang et al., CVPR 2024).

    Code: Cecile-hi/Multimodal-Learning-with-Alternating-Unimodal-Adaptation. Each modality in turn, image then table,
    steps its encoder and the shared linear head (W, b) on its own cross-entropy. The gradient G of W becomes G P. The
    projection P starts as the identity. Each turn, P absorbs the mean r of the turn's features over the batch, by
    recursive least squares:

        k = P r,    P <- P - k k^T / (beta + r^T k),    beta = 0.1^(1 + b / N) in batch b of N of an epoch.

    The bias is not projected, and P is never reset. With `projection` "code" a turn absorbs its own features before its
    step; the very first turn absorbs nothing. The released code divides by a matrix, where the rule has the scalar
    r^T k. This variant is not offered.

    A step of plain sgd along G P leaves the head's outputs for absorbed features as they are. Adam and AdamW divide
    each entry of G P by its own size. Under both optimizers the step follows G P only roughly, and the size of P
    (`unit_norm`) is inert.

    Reports image, table, and fused = sum_m w_m z_m. The weight w_m is proportional to exp(-H_m), with H_m the entropy
    of softmax(z_m), as in the paper; or the weights are fixed, as in the released code by default. This gate changes no
    step of the training. The benchmark searches the gate: on the benchmark's sets fixed weights were right on 0.2 to
    1.8 points more of the rows.

    Attributes:
        P: (width, width), symmetric. Without `unit_norm` the eigenvalues of P lie in [0, 1].
    """

    Settings = MLASettings
    P: Tensor

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Linear(self.width, self.outputs)
        self.register_buffer("P", torch.eye(self.width))

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused", "image" and "table"."""
        logits = {modality: self.head(encoder(batch[modality])) for modality, encoder in self.encoders.items()}
        return {"fused": self.fuse(torch.stack(list(logits.values()))), **logits}

    def fuse(self, logits: Tensor) -> Tensor:
        """The weighted sum (B, C) of image and table logits (2, B, C)."""
        if self.settings.gate == "entropy":
            weights = torch.stack([-entropy(values) for values in logits]).softmax(dim=0)
        else:
            weights = logits.new_tensor([[self.settings.image_weight], [1 - self.settings.image_weight]])
        return (weights[:, :, None] * logits).sum(dim=0)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """A turn of each modality. In a turn the other encoder has no gradient and does not move."""
        optimizer, projection = self.optimizer, self.settings.projection
        beta = 0.1 ** (1 + batch_idx / self.trainer.num_training_batches)
        losses = {}
        for modality, encoder in self.encoders.items():
            features = encoder(batch[modality])
            losses[modality] = loss = self.task.loss(self.head(features), batch["target"])
            optimizer.zero_grad()
            self.manual_backward(loss)
            if projection == "code" and self.global_step:
                self.absorb(features, beta)
            if projection != "none":
                self.project()
            optimizer.step()
            if projection == "paper":
                self.absorb(features, beta)
        self.log_losses(losses, batch)

    @torch.no_grad()
    def project(self) -> None:
        """G becomes G P."""
        with torch.autocast(self.P.device.type, enabled=False):
            self.head.weight.grad = self.head.weight.grad @ self.P

    @torch.no_grad()
    def absorb(self, features: Tensor, beta: float) -> None:
        """Shrink P along the mean of features (B, width)."""
        mean = features.to(self.P.dtype).mean(dim=0)
        with torch.autocast(self.P.device.type, enabled=False):
            k = self.P @ mean
            self.P -= torch.outer(k, k) / (beta + mean @ k)
        if self.settings.unit_norm:
            self.P /= self.P.norm()
