"""MMPareto: an encoder follows the joint loss and a loss of its own, by Pareto weights where the gradients conflict."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchjd.aggregation import MGDAWeighting

from gaal_surgery import combine, gramian

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method
from .settings import MMParetoSettings

_min_norm = MGDAWeighting()


class MMPareto(Method):
    """Joint and unimodal losses whose gradients on an encoder are combined (Wei and Hu, ICML 2024).

    Code: GeWu-Lab/MMPareto_ICML2024. Head H takes the joined features, heads h_I and h_T take the features of image and
    table. For encoder m, a is the gradient of CE(H) and b the gradient of CE(h_m) on all parameters of the encoder:

        alpha = 1/2 if <a, b> >= 0, else clip((|b|^2 - <a, b>) / |a - b|^2, 0, 1)
        d = 2 alpha a + 2 (1 - alpha) b

    Each tensor j of the encoder gets gamma d_j max(1, |a_j + b_j| / |d_j|), or 0 where d_j is 0. In conflict d / 2 is
    the shortest vector between a and b, the two-gradient case of MGDA (Desideri, 2012). The heads follow the plain sum
    of the three losses.

    The released code counts <a, b> = 0 as a conflict. Here <a, b> = 0 is no conflict: otherwise a gradient of zeros
    would stop the encoder. Adam and AdamW divide a gradient by its own size. Under both optimizers gamma is inert and
    the rescaling nearly so, and only the direction counts.

    Reports fused (H), image (h_I) and table (h_T).
    """

    Settings = MMParetoSettings

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Linear(2 * self.width, self.outputs)
        self.heads = nn.ModuleDict({modality: nn.Linear(self.width, self.outputs) for modality in self.modalities})

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused", "image" and "table"."""
        features = {modality: encoder(batch[modality]) for modality, encoder in self.encoders.items()}
        unimodal = {modality: head(features[modality]) for modality, head in self.heads.items()}
        return {"fused": self.head(torch.cat(list(features.values()), dim=1)), **unimodal}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step, from two backward passes through the encoders."""
        losses = {name: self.task.loss(logits, batch["target"]) for name, logits in self(batch).items()}
        optimizer = self.optimizer
        optimizer.zero_grad()
        self.manual_backward(losses["fused"], retain_graph=True)
        joint = {modality: take_gradients(encoder) for modality, encoder in self.encoders.items()}
        # Each unimodal loss reaches one encoder, so one pass of the sum gives each encoder its own gradient.
        self.manual_backward(losses["image"] + losses["table"])
        for modality, encoder in self.encoders.items():
            integrated = self.integrate(joint[modality], [parameter.grad for parameter in encoder.parameters()])
            for parameter, gradient in zip(encoder.parameters(), integrated, strict=True):
                parameter.grad = gradient
        optimizer.step()
        self.log_losses(losses, batch)

    def integrate(self, joint: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """An encoder's gradient, one tensor a parameter, from the gradients of the joint loss and of its own loss."""
        direction = combine([joint, own], pareto_weights(gramian([joint, own])))
        plain = torch.stack([(a + b).norm() for a, b in zip(joint, own, strict=True)])
        lengths = torch.stack([tensor.norm() for tensor in direction])
        if self.settings.rescale == "encoder":
            plain, lengths = plain.norm().expand_as(plain), lengths.norm().expand_as(lengths)
        scales = self.settings.gamma * torch.where(lengths > 0, (plain / lengths).clamp(min=1), 0)
        return [scale * tensor for scale, tensor in zip(scales, direction, strict=True)]


def take_gradients(module: nn.Module) -> list[Tensor]:
    """A module's gradients, which are removed from the module."""
    gradients = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    return gradients


def pareto_weights(gramian: Tensor) -> Tensor:
    """2 alpha and 2 (1 - alpha), for the Gramian (2, 2) of two gradients."""
    if gramian[0, 1] >= 0:
        return torch.ones_like(gramian[0])
    return 2 * _min_norm(gramian)
