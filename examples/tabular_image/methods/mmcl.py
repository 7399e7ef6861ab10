"""MMCL: image and table encoders are pretrained to find the pairs of image and row; the image encoder is kept."""

from __future__ import annotations

from torch import nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method, Stage
from .contrastive import Corruption, contrastive_loss, projection, random_views, similarities
from .settings import MMCLSettings


class MMCL(Method):
    """Multimodal contrastive learning of Hager, Menten and Rueckert (CVPR 2023; paulhager/MMCL-Tabular-Imaging).

    Pretraining compares a random part of image i with table row j, of which some cells are redrawn. With heads h_m of
    two layers, the similarity is S_ij = cos(h_I(u_I,i), h_T(u_T,j)) / temperature, and with weight w

        L = w CE(S, I) + (1 - w) CE(S^T, I).

    Other rows of the same class count as negatives, which hurts where classes are few.

    Then a linear classifier of the image features is trained with cross-entropy, with the encoder trainable or frozen.
    Frozen is the default of the released code, after 500 epochs of pretraining. The short pretraining that a CPU allows
    is too little for a frozen encoder, as in TIP: on leaves100 (texture, seed 0) the frozen encoder was right on 0.57
    of the validation rows, and fine-tuning on 0.67.

    Reports image. Fused and table cells are empty, because there is no table at test time.
    """

    Settings = MMCLSettings

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.projections = nn.ModuleDict({modality: projection(self.width) for modality in self.modalities})
        # Standardised, because pretraining leaves features in arbitrary units (as in MAE's linear probe).
        self.head = nn.Sequential(nn.BatchNorm1d(self.width, affine=False), nn.Linear(self.width, self.outputs))
        self.corruption = Corruption(data.train_table, data.table_columns, self.settings.corruption)

    def stages(self) -> list[Stage]:
        """Pretraining of both encoders, and the classifier's training."""
        kept = [self.encoders["image"]] if self.settings.encoder == "trainable" else []
        return [
            Stage("pretraining", self.settings.pretraining_epochs, [self.encoders, self.projections]),
            Stage("classification", self.options.epochs, [*kept, self.head]),
        ]

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image"; the table is never looked at."""
        return {"image": self.head(self.encoders["image"](batch["image"]))}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the stage's loss."""
        if self.stage.name == "pretraining":
            views = {
                "image": random_views(batch["image"], self.settings.crop),
                "table": self.corruption(batch["table"]),
            }
            image, table = (self.projections[name](self.encoders[name](view)) for name, view in views.items())
            similarity = similarities(image, table, self.settings.temperature)
            losses = {"contrastive": contrastive_loss(similarity, self.settings.image_weight)}
        else:
            losses = {"image": self.task.loss(self(batch)["image"], batch["target"])}
        (loss,) = losses.values()
        self.descend(loss)
        self.log_losses(losses, batch)
