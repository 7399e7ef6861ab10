"""OGM-GE: the encoder of the leading modality learns more slowly, and noise makes up for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.module import Batch
from .base import Logits
from .concatenation import Concatenation
from .settings import OGMGESettings


class OGMGE(Concatenation):
    """On-the-fly gradient modulation with generalization enhancement (Peng et al., CVPR 2022).

    Code: GeWu-Lab/OGM-GE_CVPR2022. The model is `Concatenation`, and the loss is the cross-entropy of the logits z.
    With the slices z_m of the logits, image (I) and table (T) get the factors

        s_m = sum_i softmax(z_m)_{i, y_i},    rho_I = s_I / s_T,    rho_T = s_T / s_I,
        k_m = 1 - tanh(alpha rho_m) if rho_m > 1, else 1.

    A gradient g of encoder m becomes k_m g + xi, with noise xi ~ N(0, sigma^2) and sigma = std(g) + 1e-8. The standard
    deviation is unbiased, and of each tensor before the factor k_m. The head's gradient is not changed. By default the
    rule of BalanceBenchmark says which tensors of an encoder are modulated, because the rule of the released code
    spares an MLP.

    Adam and AdamW divide a gradient by its own size. Under both optimizers a steady k_m does nothing; only changes of
    k_m and the noise act. Use `--optimizer sgd`, as the authors do, to see the restraint.

    Reports fused (z), image (z_I) and table (z_T).
    """

    Settings = OGMGESettings
    tasks = ("classification",)  # s_m needs probabilities of the true class
    several_processes = False  # s_m sums over the rows of the whole batch

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the cross-entropy of the joint logits, modulated in the first epochs."""
        logits = self(batch)
        losses = {name: self.task.loss(values, batch["target"]) for name, values in logits.items()}
        optimizer = self.optimizer
        optimizer.zero_grad()
        self.manual_backward(losses["fused"])
        # The released code modulates epochs 0 to 50 of 100.
        if self.stage_epoch <= self.settings.share * self.stage.epochs:
            self.modulate(logits, batch["target"])
        optimizer.step()
        self.log_losses(losses, batch)

    @torch.no_grad()
    def modulate(self, logits: Logits, target: Tensor) -> None:
        """Scale the encoders' gradients and add the noise."""
        factors = modulation(leads(logits["image"], logits["table"], target), self.settings.alpha)
        for encoder, factor in zip(self.encoders.values(), factors, strict=True):
            for parameter in encoder.parameters():
                gradient = parameter.grad
                if gradient is None or not self.modulated(parameter):
                    continue
                # Unbiased, as in the released code; a tensor of one entry has no unbiased deviation.
                deviation = gradient.std(correction=min(1, gradient.numel() - 1)) + 1e-8
                gradient.mul_(factor)
                if self.settings.enhance:
                    gradient.add_(torch.randn_like(gradient) * deviation)

    def modulated(self, parameter: Tensor) -> bool:
        """Whether the gradient of this tensor is modulated."""
        return parameter.dim() == 4 if self.settings.tensors == "convolutions" else parameter.dim() != 1


def leads(image: Tensor, table: Tensor, target: Tensor) -> Tensor:
    """The ratios rho (2,) of image and table, from the logits (B, C) of the two slices."""
    true = torch.stack([(-F.cross_entropy(logits, target, reduction="none")).exp().sum() for logits in (image, table)])
    return true / true.flip(0)


def modulation(rho: Tensor, alpha: float) -> Tensor:
    """The factors k (2,). A rho of NaN, where every true class has probability 0, gives the factor 1."""
    return torch.where(rho > 1, 1 - torch.tanh(alpha * rho), 1.0)
