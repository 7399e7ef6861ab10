"""DI-MML: encoders learn apart and teach each other their best dimensions; then a head learns on frozen features."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method, Stage
from .settings import DIMMLSettings

_AT_ONCE = 64  # dimensions classified at a time, which bounds the memory


class DIMML(Method):
    """DI-MML (Fan et al., ACM MM 2024, arXiv 2407.19514; code fanyunfeng-bit/DI-MML).

    Stage "encoders" has heads h_I and h_T and a shared head h_S on features u_I of the image and u_T of the table. sg
    stops the gradient, and L_DUC is added from epoch E_0 on:

        L = CE(h_I(u_I)) + CE(h_T(u_T)) + lambda [CE(h_S(u_I)) + CE(h_S(u_T))] + L_DUC
        L_DUC = -mean_i log (exp(s_ii) / sum_j exp(s_ij)) + the same term with I and T swapped,
        s_ij = u_I(i) . sg u_T(j) / tau, a product over the dimensions S_T alone

    At E_0 every single dimension classifies the training rows by the nearest class mean. D_m are the dimensions of
    modality m that are more accurate than the average dimension of m. S_T is D_T without D_I, and S_I is D_I without
    D_T. The image learns from the table in S_T, and the table learns from the image in S_I. The training rows are
    augmented as in a training epoch.

    Stage "fusion" freezes the encoders and these heads, and trains a linear head H on [u_I, u_T] with cross-entropy.
    `--epochs` is the length of this stage. By default the encoders' stage has as many epochs, and it costs most of the
    time.

    Reports fused, image (h_I) and table (h_T). Fused is sum_k w_k z_k over the logits z_k of k in {h_I, h_T, H}, with
    w = softmax_k(max softmax(z_k) / tau_2). Image and table are equal in all epochs among which the best is chosen.
    """

    Settings = DIMMLSettings
    image_only: Tensor
    table_only: Tensor

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.heads = nn.ModuleDict({modality: nn.Linear(self.width, self.outputs) for modality in self.modalities})
        self.shared_head = nn.Linear(self.width, self.outputs)
        self.joint_head = nn.Linear(2 * self.width, self.outputs)
        self.register_buffer("image_only", torch.zeros(self.width, dtype=torch.bool))  # S_I
        self.register_buffer("table_only", torch.zeros(self.width, dtype=torch.bool))  # S_T

    def stages(self) -> list[Stage]:
        """The encoders with their heads, then the joint head."""
        epochs = self.settings.encoder_epochs or self.options.epochs
        return [
            Stage("encoders", epochs, [self.encoders, self.heads, self.shared_head]),
            Stage("fusion", self.options.epochs, [self.joint_head]),
        ]

    @property
    def contrast_epoch(self) -> int:
        """E_0: the epoch of the encoders' stage in which the contrast begins."""
        return round(self.settings.contrast_start * self.stages()[0].epochs)

    def on_train_epoch_start(self) -> None:
        """In epoch E_0, find the dimensions to contrast."""
        super().on_train_epoch_start()
        if self.stage.name == "encoders" and self.stage_epoch == self.contrast_epoch:
            self.find_dimensions()

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused", "image" and "table"."""
        features = self.features(batch)
        logits = {modality: head(features[modality]) for modality, head in self.heads.items()}
        voices = torch.stack([*logits.values(), self.joint_head(torch.cat(list(features.values()), dim=1))])
        weights = confidence_weights(voices, self.settings.confidence_temperature)
        return {"fused": (weights.unsqueeze(-1) * voices).sum(dim=0), **logits}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the losses of the stage."""
        features, target = self.features(batch), batch["target"]
        losses = {name: self.task.loss(head(features[name]), target) for name, head in self.heads.items()}
        if self.stage.name == "fusion":
            losses["fused"] = self.task.loss(self.joint_head(torch.cat(list(features.values()), dim=1)), target)
            self.descend(losses["fused"])
        else:
            loss = losses["image"] + losses["table"]
            shared = [self.task.loss(self.shared_head(values), target) for values in features.values()]
            losses["shared"] = torch.stack(shared).sum()
            loss = loss + self.settings.shared_weight * losses["shared"]
            if self.stage_epoch >= self.contrast_epoch:
                losses["contrast"] = self.contrast(features["image"], features["table"])
                loss = loss + losses["contrast"]
            self.descend(loss)
        self.log_losses(losses, batch)

    def features(self, batch: Batch) -> dict[str, Tensor]:
        """Features (B, width) by modality."""
        return {modality: encoder(batch[modality]) for modality, encoder in self.encoders.items()}

    def contrast(self, image: Tensor, table: Tensor) -> Tensor:
        """L_DUC of features (B, width). A direction with an empty set of dimensions adds the constant log B."""
        temperature = self.settings.temperature
        return contrast(image, table, self.table_only, temperature) + contrast(
            table, image, self.image_only, temperature
        )

    @torch.no_grad()
    def find_dimensions(self) -> None:
        """Set S_I and S_T by the accuracy of every dimension on the training rows."""
        features: dict[str, list[Tensor]] = {modality: [] for modality in self.modalities}
        targets = []
        self.encoders.eval()
        for batch in self.trainer.datamodule.train_dataloader():
            targets.append(batch["target"])
            for modality, encoder in self.encoders.items():
                features[modality].append(encoder(batch[modality].to(self.device, self.dtype)).cpu())
        self.encoders.train()
        accuracies = {
            name: accuracies_alone(torch.cat(values), torch.cat(targets)) for name, values in features.items()
        }
        better = {modality: accuracy > accuracy.mean() for modality, accuracy in accuracies.items()}
        self.image_only.copy_(better["image"] & ~better["table"])
        self.table_only.copy_(better["table"] & ~better["image"])


def contrast(learner: Tensor, other: Tensor, dimensions: Tensor, temperature: float) -> Tensor:
    """Cross-entropy, over the batch, of finding the other modality's features of the same row.

    Args:
        learner: features (B, D) that get the gradient.
        other: features (B, D) of the other modality, which get no gradient.
        dimensions: bool (D,), the dimensions that count.
        temperature: divides the inner products.
    """
    similarity = (learner * dimensions / temperature) @ other.detach().T
    return F.cross_entropy(similarity, torch.arange(len(learner), device=learner.device))


def confidence_weights(logits: Tensor, temperature: float) -> Tensor:
    """Weights (P, B) of P predictions (P, B, C), by the probability of the likeliest class. Each row sums to 1."""
    confidence = logits.softmax(dim=-1).amax(dim=-1)
    return (confidence / temperature).softmax(dim=0)


def accuracies_alone(features: Tensor, target: Tensor) -> Tensor:
    """Accuracy (D,) of the nearest class mean in each single dimension of features (N, D), for classes (N,)."""
    _, target, counts = target.unique(return_inverse=True, return_counts=True)  # a class without rows has no mean
    accuracies = []
    for chunk in features.split(_AT_ONCE, dim=1):
        means = chunk.new_zeros(len(counts), chunk.shape[1]).index_add_(0, target, chunk) / counts.unsqueeze(1)
        # The borders halfway between sorted means replace N x C x D distances by a search.
        means, order = means.T.sort(dim=1, stable=True)
        borders = (means[:, 1:] + means[:, :-1]) / 2
        nearest = order.gather(1, torch.searchsorted(borders.contiguous(), chunk.T.contiguous()))
        accuracies.append((nearest == target).double().mean(dim=1))
    return torch.cat(accuracies)
