"""DAFT: the table scales and shifts the channels of the image's feature maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method
from .settings import DAFTSettings


class DAFT(Method):
    """Dynamic affine feature map transform of Pölsterl, Wolf and Wachinger (MICCAI 2021), in two dimensions.

    F are the image's feature maps (C channels), and x_T is the encoded table row (D columns), which has no encoder:

        (alpha, beta) = A2 ReLU(A1 [mean of F over positions; x_T]),    F'_c = alpha_c F_c + beta_c,
        output = ReLU(F + R(F')),    R = 1x1 to C / 4, BN, ReLU, 3x3, BN, 1x1 to C, BN

    A linear classifier takes the output's mean over positions and is trained with cross-entropy.

    This method follows TIP's code (siyi-wind/TIP, models/DAFT.py): the transform stands before the block, A1 and A2
    have biases, and in a ResNet the block replaces the last block of layer4. The original (ai-med/DAFT) transforms
    after the first convolution and has no biases. The other encoders have no residual block to replace. There the block
    follows the last maps.

    Reports fused. Image and table cells are empty, because every output depends on both modalities.
    """

    Settings = DAFTSettings
    several_processes = True
    modalities = ("image",)  # the table has no encoder and enters the block as it is

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        maps = self.encoders["image"].maps
        if hasattr(maps, "layer4"):
            maps.layer4 = maps.layer4[:-1]
        self.block = AffineBlock(self.width, data.table_width, self.settings.reduction)
        self.head = nn.Linear(self.width, self.outputs)

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused"."""
        maps = self.block(self.encoders["image"].maps(batch["image"]), batch["table"])
        return {"fused": self.head(maps.mean((2, 3)))}

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the cross-entropy."""
        loss = self.task.loss(self(batch)["fused"], batch["target"])
        self.descend(loss)
        self.log_losses({"fused": loss}, batch)


class AffineBlock(nn.Module):
    """A residual block whose residual branch sees maps that the table has scaled and shifted.

    Args:
        channels: number of channels C of the maps.
        table_width: number of encoded table columns D.
        reduction: the hidden layer has (C + D) / reduction units.

    Attributes:
        affine: the network from (B, C + D) to scales and shifts (B, 2 C).
        residual: the branch R.
    """

    def __init__(self, channels: int, table_width: int, reduction: int) -> None:
        super().__init__()
        joint, inner = channels + table_width, channels // 4
        hidden = max(1, joint // reduction)
        self.affine = nn.Sequential(nn.Linear(joint, hidden), nn.ReLU(), nn.Linear(hidden, 2 * channels))
        self.residual = nn.Sequential(
            nn.Conv2d(channels, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(),
            nn.Conv2d(inner, inner, 3, padding=1, bias=False),
            nn.BatchNorm2d(inner),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, maps: Tensor, table: Tensor) -> Tensor:
        """Maps (B, C, H, W) from maps (B, C, H, W) and encoded rows (B, D)."""
        joint = torch.cat([maps.mean((2, 3)), table], dim=1)
        scale, shift = self.affine(joint)[:, :, None, None].chunk(2, dim=1)
        return F.relu(maps + self.residual(scale * maps + shift))
