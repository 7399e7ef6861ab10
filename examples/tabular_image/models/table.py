"""Table encoders, by name."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rtdl_revisiting_models import FTTransformer
from torch import Tensor, nn

from ..data.tables import TableColumn
from ..encoders import check_table_encoder, own_encoder
from .trial import checked_width


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


class TableFTTransformer(nn.Module):
    """FT-Transformer of Gorishniy et al. (NeurIPS 2021), (B, table_width) to (B, width).

    Each column becomes a token, and the token CLS is added. A cell whose category no training row has, and a cell of an
    absent table, is a category of its own. The network is rtdl_revisiting_models' preset of two blocks (128 features a
    token, 8 heads, dropout of its own). The default has three blocks of 192 features: attention among columns costs
    most, and small tables do not need the rest.

    Args:
        columns: Where the raw columns stand in the encoded table.
        width: Features.
    """

    def __init__(self, columns: Sequence[TableColumn], width: int) -> None:
        super().__init__()
        self.width = width
        self.numeric = [column.start for column in columns if not column.categorical]
        self.categorical = [column for column in columns if column.categorical]
        self.network = FTTransformer(
            n_cont_features=len(self.numeric),
            cat_cardinalities=[1 + column.stop - column.start for column in self.categorical],
            d_out=width,
            **FTTransformer.get_default_kwargs(n_blocks=2),
        )

    def forward(self, table: Tensor) -> Tensor:
        """Features (B, width) of encoded rows (B, table_width)."""
        features: Tensor = self.network(
            table[:, self.numeric] if self.numeric else None,
            categories(table, self.categorical) if self.categorical else None,
        )
        return features


def categories(table: Tensor, columns: Sequence[TableColumn]) -> Tensor:
    """The category of each cell of categorical columns, long (B, columns): 1 for the first one, 0 for an unknown one.

    Args:
        table: Encoded rows (B, D).
        columns: Where the columns stand in them.
    """
    found = torch.zeros(len(table), len(columns), dtype=torch.long, device=table.device)
    for place, column in enumerate(columns):
        block = table[:, column.start : column.stop]
        found[:, place] = torch.where(block.any(1), 1 + block.argmax(1), 0)
    return found


def table_encoder(name: str, columns: Sequence[TableColumn], table_width: int, width: int) -> nn.Module:
    """An encoder from (B, table_width) to (B, width).

    Args:
        name: "mlp", "ft_transformer", or the user's own "package.module:factory", whose factory is called with
            `table_width=` and `width=` and returns a module.
        columns: Where the raw columns stand in the encoded table.
        table_width: Columns of the encoded table.
        width: Number of features, as in the image encoder.

    Raises:
        InputError: The name is unknown, or the encoder does not make features (B, width).

    Example:
        >>> table_encoder("mlp", [], table_width=8, width=256)(torch.zeros(2, 8)).shape
        torch.Size([2, 256])
    """
    check_table_encoder(name)
    if name == "mlp":
        return TableMLP(table_width, width)
    if name == "ft_transformer":
        return TableFTTransformer(columns, width)
    network = own_encoder("table", name, table_width=table_width, width=width)
    checked_width("table", name, network, torch.zeros(2, table_width), width)
    return network
