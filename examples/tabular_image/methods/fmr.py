"""FMR: the table's columns feed the output layer and are removed one after another, until the image stands alone."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method
from .settings import FMRSettings


class FMR(Method):
    """Fixed model reuse (Yang et al., AAAI 2017), as Jiang et al. (UniReps 2023, PMLR 243) state the method for tables.

    f is the image classifier on the image features u, and x the encoded table row (D,):

        L = CE(f + (m * x) V, y) + r / 2 * mean (x - u R)^2,    m in {0, 1}^D.

    At first all columns are kept (m = 1). Then, epoch by epoch, the kept columns with the smallest |V_d| are removed,
    until m = 0 and the first term of L is the loss of the image baseline. A removed column never returns. V starts at
    zero. The schedule, the averaging and r are our choices, because the sources do not give them. A column is one of
    the encoded table, so that the categories of a raw column are removed one by one. The training is one stage: the
    optimizer keeps its state when m reaches zero.

    Reports the image, f. Fused and table cells are empty, because there is no table at test time.

    Attributes:
        kept: m, bool (D,).
    """

    Settings = FMRSettings
    modalities = ("image",)
    kept: Tensor

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        # The head comes first, so that it draws the same initial weights as the head of method `image`.
        self.head = nn.Linear(self.width, self.outputs)
        self.wires = nn.Linear(data.table_width, self.outputs, bias=False)
        nn.init.zeros_(self.wires.weight)
        self.reconstruction = nn.Linear(self.width, data.table_width, bias=False)
        self.register_buffer("kept", torch.ones(data.table_width, dtype=torch.bool))

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image"; the table is never looked at."""
        return {"image": self.head(self.encoders["image"](batch["image"]))}

    def wired_logits(self, features: Tensor, table: Tensor) -> Tensor:
        """Logits (B, C) from the image's features and the columns that are kept."""
        logits: Tensor = self.head(features) + self.wires(table * self.kept)
        return logits

    @property
    def selecting(self) -> bool:
        """Whether the current epoch may be chosen for the test: only after all columns are removed."""
        return super().selecting and not self.kept.any()

    def on_train_epoch_start(self) -> None:
        """Remove the epoch's share of the columns."""
        super().on_train_epoch_start()
        epochs, settings = self.options.epochs, self.settings
        alone = min(round(epochs * (settings.joint + settings.knockdown)), epochs - 1)
        joint = min(round(epochs * settings.joint), alone)
        # Equal parts are removed at the start of each of the epochs joint, ..., alone; the last part empties the table.
        removed = (self.stage_epoch - joint + 1) / (alone - joint + 1)
        removed = min(max(removed, 0), 1)
        self.keep(round(len(self.kept) * (1 - removed)))

    def keep(self, count: int) -> None:
        """Keep at most `count` of the columns that are left: the columns with the largest norm in V."""
        norms = self.wires.weight.detach().norm(dim=0).masked_fill(~self.kept, -1)
        largest = torch.zeros_like(self.kept)
        largest[norms.topk(count).indices] = True
        self.kept &= largest

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the cross-entropy of both parts and the reconstruction."""
        features, table = self.encoders["image"](batch["image"]), batch["table"]
        losses = {
            "image": self.task.loss(self.wired_logits(features, table), batch["target"]),
            "reconstruction": F.mse_loss(self.reconstruction(features), table) / 2,
        }
        self.descend(losses["image"] + self.settings.reconstruction * losses["reconstruction"])
        self.log_losses(losses, batch)
