"""What all methods share: encoders, optimizer and schedule, fusion, and validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from gaal_surgery import CalibratedFusion, fuse_logits

from ..data.module import Batch, TabularImageData
from ..metrics import accuracy
from ..models import TableMLP, image_encoder
from ..options import Options

Logits = dict[str, Tensor]


class Method(L.LightningModule):
    """Base of all methods; a method is its heads, `forward` and `training_step`.

    Optimization is manual, as methods differ in who steps when. The encoders of one seed start alike in every method.

    Args:
        data: its `channels`, `table_width` and `class_counts` shape the networks.
        options: encoder, optimizer, schedule, fusion, and what the method itself reads.

    Attributes:
        modalities: those that the method trains and predicts from.
        encoders: an encoder by modality, each to (B, width).
        width: features of each encoder.
        classes: number of classes C.
    """

    modalities: ClassVar[tuple[str, ...]] = ("image", "table")
    log_prior: Tensor

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.options = options
        self.classes = len(data.class_counts)
        image = image_encoder(options.image_encoder, data.channels, options.pretrained and "image" in self.modalities)
        encoders = {"image": image, "table": TableMLP(data.table_width, image.width)}
        self.width: int = image.width
        self.encoders = nn.ModuleDict({modality: encoders[modality] for modality in self.modalities})
        self.register_buffer("log_prior", (data.class_counts / data.class_counts.sum()).log())
        # Fitted by itself, never by the optimizer.
        self.calibrated = CalibratedFusion(self.modalities, self.classes).requires_grad_(False)
        self._validation: list[dict[str, Any]] = []

    # For a method to write.

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) by the name of the prediction: "image", "table", and "fused" if the method has its own."""
        raise NotImplementedError

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Losses and optimizer steps of one batch."""
        raise NotImplementedError

    def build_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer of all trainable parameters."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        options = self.options
        settings = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
        match options.optimizer:
            case "sgd":
                return torch.optim.SGD(parameters, momentum=options.momentum, **settings)
            case "adam":
                return torch.optim.Adam(parameters, **settings)
            case "adamw":
                return torch.optim.AdamW(parameters, **settings)

    # For a method to use.

    def descend(self, loss: Tensor) -> None:
        """One plain optimizer step on a loss."""
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def log_losses(self, losses: Mapping[str, Tensor], batch: Batch) -> None:
        """Log training losses by name, as means over the epoch."""
        named = {f"train_loss_{name}": loss.detach() for name, loss in losses.items()}
        self.log_dict(named, on_step=False, on_epoch=True, batch_size=len(batch["target"]))

    # Predictions.

    def fusions(self, logits: Logits) -> Logits:
        """The three fusions (B, C) of image and table, by name; none where the method does not predict from both."""
        if not {"image", "table"} <= logits.keys():
            return {}
        unimodal = {modality: logits[modality] for modality in ("image", "table")}
        return {
            "mean": fuse_logits(unimodal),
            "product": fuse_logits(unimodal, log_prior=self.log_prior),
            "calibrated": self.calibrated(unimodal),
        }

    def predictions(self, logits: Logits) -> Logits:
        """All predictions (B, C) by name; the first is the one to select epochs by."""
        fusions = self.fusions(logits)
        fused = {} if "fused" in logits or not fusions else {"fused": fusions[self.options.fusion]}
        predictions = fused | logits
        order = [name for name in ("fused", "image", "table") if name in predictions]
        return {name: predictions[name] for name in order}

    def predict_step(self, batch: Batch, batch_idx: int = 0) -> dict[str, Any]:
        """Logits by name, with the batch's target and row."""
        # Out of mixed precision: metrics and the calibrated fusion work in the precision of the parameters.
        logits = {name: values.to(self.log_prior.dtype) for name, values in self(batch).items()}
        return {"logits": logits, "target": batch["target"], "row": batch["row"]}

    # Validation.

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the batch's predictions for the end of the epoch."""
        self._validation.append(self.predict_step(batch, batch_idx))

    def on_validation_epoch_end(self) -> None:
        """Fit the calibrated fusion; log loss and accuracy of the selecting prediction, and each accuracy."""
        outputs = collate(self._validation)
        self._validation.clear()
        logits, target = outputs["logits"], outputs["target"]
        unimodal = {name: values for name, values in logits.items() if name in self.modalities}
        if self.fusions(logits) and all(values.isfinite().all() for values in unimodal.values()):
            self.calibrated.fit(unimodal, target)
        predictions = self.predictions(logits)
        main = next(iter(predictions.values()))
        self.log("val_loss", F.cross_entropy(main, target))
        self.log("val_accuracy", accuracy(main, target), prog_bar=True)
        self.log_dict(
            {f"val_accuracy_{name}": accuracy(predictions[name], target) for name in unimodal if name in predictions}
        )

    # Optimization, as the Trainer wants it.

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[LRScheduler]]:
        """The optimizer and its schedule."""
        optimizer = self.build_optimizer()
        match self.options.schedule:
            case "cosine":
                return [optimizer], [CosineAnnealingLR(optimizer, self.options.epochs)]
            case "step":
                return [optimizer], [StepLR(optimizer, self.options.step_size)]
            case _:
                return [optimizer], []

    def on_train_epoch_end(self) -> None:
        """Step the schedule, which manual optimization leaves to the module."""
        for configured in self.trainer.lr_scheduler_configs:
            configured.scheduler.step()


def collate(outputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The outputs of `predict_step` for N rows in one: logits (N, C) by name, target (N,) and row (N,)."""
    return {
        "logits": {name: torch.cat([output["logits"][name] for output in outputs]) for name in outputs[0]["logits"]},
        "target": torch.cat([output["target"] for output in outputs]),
        "row": torch.cat([output["row"] for output in outputs]),
    }
