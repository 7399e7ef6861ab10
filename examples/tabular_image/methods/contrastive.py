"""What the methods that are pretrained on pairs share: views of a pair, projections, and the contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.tables import TableColumn


class Corruption(nn.Module):
    """Redraws some cells of each row from the training rows: the values of a cell's own column, each cell by itself.

    A cell is a raw column, so that a category's block stays one-hot.

    Args:
        rows: float (N, D), the encoded training rows.
        columns: where the n raw columns stand in them.
        share: of the cells of a row; floor(share * n) are redrawn, and some may draw what they had.
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
        """Rows (B, D) of rows (B, D)."""
        size, device = (len(table), self.cells), table.device
        redrawn = torch.rand(size, device=device).argsort(dim=1) < self.count
        donors = torch.randint(len(self.rows), size, device=device)
        drawn = self.rows[donors[:, self.column], torch.arange(table.shape[1], device=device)]
        return torch.where(redrawn[:, self.column], drawn, table)


def random_views(images: Tensor, area: float, share: float = 0.95) -> Tensor:
    """A random part of each image at the full size, each drawn by itself; colour images are also mirrored.

    Colours stay, as the images are normalised already. Grey ones are not mirrored, see `TabularImageData`. All are made
    at once: torchvision's transform, called for each image, takes longer than the rest of a step.

    Args:
        images: float (B, channels, S, S).
        area: the part has at least this share of the image's area.
        share: of the images that are changed.
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
    """Cosine over temperature of each of (B, features) with each of (B, features): (B, B)."""
    return F.normalize(first) @ F.normalize(second).T / temperature


def contrastive_loss(similarity: Tensor, weight: float = 0.5) -> Tensor:
    """InfoNCE of CLIP: how well each row finds its pair among all columns, and each column among all rows.

    weight * CE(S, I) + (1 - weight) * CE(S^T, I). The pair itself is in the denominator.

    Args:
        similarity: S (B, B), pairs on the diagonal.
        weight: of the rows' term.
    """
    pairs = torch.arange(len(similarity), device=similarity.device)
    return weight * F.cross_entropy(similarity, pairs) + (1 - weight) * F.cross_entropy(similarity.T, pairs)
