"""The table encoder."""

from __future__ import annotations

from torch import Tensor, nn


class TableMLP(nn.Module):
    """Two linear layers with batch normalisation between them, (B, table_width) to (B, width).

    No activation at the end. Weights start as Kaiming-normal by fan-in, biases at zero.

    Args:
        table_width: Columns of the encoded table.
        width: Features.
    """

    def __init__(self, table_width: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.layers = nn.Sequential(
            nn.Linear(table_width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width)
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    def forward(self, table: Tensor) -> Tensor:
        """Features (B, width) of encoded rows (B, table_width)."""
        features: Tensor = self.layers(table)
        return features
