"""Shared by the methods that are pretrained on pairs: views of a pair, projections, and the contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.tables import TableColumn


class Corruption(nn.Module):
    """Redraws some cells of each row: a redrawn cell gets the value of its column in a random training row.

    A cell is a raw column, so that the block of a category stays one-hot. Each cell draws a training row of its own.

    Args:
        rows: float (N, D), the encoded training rows.
        columns: where the n raw columns stand in the encoded rows.
        share: share of the cells of a row that are redrawn, floor(share * n). A cell may draw the value that it had.
    """

    rows: Tensor
    column: Tensor

    def __init__(self, rows: Tensor, columns: Sequence[TableColumn], share: float) -> None:
        super().__init__()
        self.cells = len(columns)
        self.count = math.floor(share * self.cells)
        self.register_buffer("rows", rows, persistent=False)
        widths = torch.tensor([column.stop - column.start for column in columns])
        self.register_buffer("column", torch.arange(self.cells).repeat_interleave(widths), persistent=False)

    def forward(self, table: Tensor) -> Tensor:
        """Rows (B, D) with some cells redrawn, from rows (B, D)."""
        size, device = (len(table), self.cells), table.device
        redrawn = torch.rand(size, device=device).argsort(dim=1) < self.count
        donors = torch.randint(len(self.rows), size, device=device)
        drawn = self.rows[donors[:, self.column], torch.arange(table.shape[1], device=device)]
        return torch.where(redrawn[:, self.column], drawn, table)


def random_views(images: Tensor, area: float, share: float = 0.95) -> Tensor:
    """A random part of each image, resized to the full size. Half of the colour images are also mirrored.

    Each image draws its own part. Colours stay, because the images are normalised already. Grey images are not
    mirrored, see `TabularImageData`. All images are transformed at once: torchvision's transform, called for each
    image, takes longer than the rest of a step.

    Args:
        images: float (B, channels, S, S).
        area: the part has at least this share of the image's area.
        share: expected share of the images that are changed.
    """
    size, shape, across, down, flip, changed = torch.rand(6, len(images), device=images.device)
    size = area + (1 - area) * size
    ratio = torch.exp((2 * shape - 1) * math.log(4 / 3))  # width to height, as torchvision's RandomResizedCrop has it
    width, height = (size * ratio).sqrt().clamp(max=1), (size / ratio).sqrt().clamp(max=1)
    side = torch.where(flip < 0.5, -1.0, 1.0) if images.shape[1] == 3 else 1.0
    zero = torch.zeros_like(size)
    # Where each view looks, in the coordinates of affine_grid, which run from -1 to 1.
    rows = [side * width, zero, (1 - width) * (2 * across - 1), zero, height, (1 - height) * (2 * down - 1)]
    grid = F.affine_grid(torch.stack(rows, dim=1).view(-1, 2, 3), list(images.shape), align_corners=False)
    views = F.grid_sample(images, grid.to(images.dtype), padding_mode="border", align_corners=False)
    return torch.where((changed < share)[:, None, None, None], views, images)


def projection(width: int, features: int = 128) -> nn.Sequential:
    """Two linear layers to the space in which pairs are compared."""
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, features))


def similarities(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Cosines (B, B) of every row of `first` (B, features) with every row of `second`, divided by the temperature."""
    return F.normalize(first) @ F.normalize(second).T / temperature


def contrastive_loss(similarity: Tensor, weight: float = 0.5) -> Tensor:
    """InfoNCE of CLIP: how well each row finds its pair among all columns, and each column among all rows.

    weight * CE(S, I) + (1 - weight) * CE(S^T, I). The pair itself is in the denominator.

    Args:
        similarity: S (B, B), pairs on the diagonal.
        weight: weight of the term in which rows find columns.
    """
    pairs = torch.arange(len(similarity), device=similarity.device)
    return weight * F.cross_entropy(similarity, pairs) + (1 - weight) * F.cross_entropy(similarity.T, pairs)
