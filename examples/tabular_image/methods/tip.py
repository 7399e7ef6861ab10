"""TIP: image encoder, table transformer and cross-attention are pretrained together; then a classifier is trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..data.tables import TableColumn
from ..errors import InputError
from ..models.table import categories
from ..options import Options
from .base import Logits, Method, Stage
from .contrastive import Corruption, contrastive_loss, projection, random_views, similarities
from .settings import TIPSettings


class TIP(Method):
    """Tabular-image pretraining of Du et al. (ECCV 2024; siyi-wind/TIP).

    Pretraining minimises (ITC + ITM + MTR) / 3 on random crops of the images:

    - ITC, contrast: ½ [CE(S, I) + CE(S^T, I)] with S_ij = cos(g_I(u_I,i), g_T(CLS_T,j)) / temperature. CLS_T is from
      the table transformer on rows of which some cells are redrawn.
    - ITM, matching: cross-entropy of two classes, whether image and row belong together, on CLS_M of the multimodal
      transformer. Besides the B true pairs, each image and each row gets a wrong partner, drawn with probability
      ∝ softmax(S) + 1e-4.
    - MTR, reconstruction of hidden cells of clean rows from the multimodal tokens. The loss is the mean of two terms:
      the cross-entropy of the categorical cells over the categories of all columns, and the squared error of the
      numbers. A table with one kind of columns has one term: the released code divides 0 by 0 there.

    Then a linear classifier of CLS_M is trained with cross-entropy, with everything else trainable or frozen. Frozen is
    the paper's default, after 500 epochs of pretraining. The short pretraining that a CPU allows is too little for a
    frozen network. On leaves100 (1267 rows, 20 epochs, 32 features a token) the frozen network was right on 0.17 of the
    test rows (seed 0), and fine-tuning on 0.92 and 0.88 (seeds 0 and 1).

    By default a token has 128 features, and attention 8 heads; the paper has 512 and 8. Attention among the 64 columns
    of leaves100 makes TIP the slowest method: 128 features take about 5 times as long as 32, and 256 features about 13
    times.

    Reports fused. Image and table cells are empty, because CLS_M depends on both modalities. The ensemble of the
    released code is not implemented.
    """

    Settings = TIPSettings
    modalities = ("image",)  # the table has a transformer, not an encoder of `Method`

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        settings = self.settings
        width = settings.width
        if width % settings.heads:
            raise InputError(
                f"--tip.width {width} is not a multiple of --tip.heads {settings.heads}; change one of them"
            )
        self.table_encoder = TableTransformer(data.table_columns, width, settings.blocks, settings.heads)
        self.image_tokens = nn.Sequential(nn.Linear(self.width, width), nn.LayerNorm(width))
        # A decoder without a causal mask: self-attention, cross-attention from the table to the image, MLP.
        layer = nn.TransformerDecoderLayer(width, settings.heads, 4 * width, **_BLOCK)
        self.multimodal = nn.TransformerDecoder(layer, settings.blocks, nn.LayerNorm(width))
        self.image_projection, self.table_projection = projection(self.width), projection(width)
        self.matching = nn.Linear(width, 2)
        self.category = nn.Linear(width, max(1, self.table_encoder.vocabulary))  # torch warns of empty layers
        self.number = nn.Linear(width, 1)
        self.head = nn.Linear(width, self.outputs)
        self.corruption = Corruption(data.train_table, data.table_columns, settings.corruption)

    def stages(self) -> list[Stage]:
        """Pretraining of everything but the classifier, and the classifier's training."""
        network = [self.encoders, self.table_encoder, self.image_tokens, self.multimodal]
        losses = [self.image_projection, self.table_projection, self.matching, self.category, self.number]
        kept = network if self.settings.encoder == "trainable" else []
        return [
            Stage("pretraining", self.settings.pretraining_epochs, [*network, *losses]),
            Stage("classification", self.options.epochs, [*kept, self.head]),
        ]

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "fused"."""
        image = self.tokens(self.encoders["image"].maps(batch["image"]))
        return {"fused": self.head(self.multimodal(self.table_encoder(batch["table"]), image)[:, 0])}

    def tokens(self, maps: Tensor) -> Tensor:
        """Image tokens (B, H W, width) of feature maps (B, channels, H, W)."""
        tokens: Tensor = self.image_tokens(maps.flatten(2).transpose(1, 2))
        return tokens

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the stage's loss."""
        if self.stage.name == "pretraining":
            losses = self.pretraining_losses(batch)
        else:
            losses = {"fused": self.task.loss(self(batch)["fused"], batch["target"])}
        self.descend(torch.stack(list(losses.values())).mean())
        self.log_losses(losses, batch)

    def pretraining_losses(self, batch: Batch) -> dict[str, Tensor]:
        """The losses ITC, ITM and MTR by name."""
        maps = self.encoders["image"].maps(random_views(batch["image"], self.settings.crop))
        image, table = self.tokens(maps), self.table_encoder(self.corruption(batch["table"]))
        projected = self.image_projection(maps.mean((2, 3))), self.table_projection(table[:, 0])
        similarity = similarities(*projected, self.settings.temperature)
        return {
            "contrast": contrastive_loss(similarity),
            "matching": self.matching_loss(image, table, similarity.detach()),
            "reconstruction": self.reconstruction_loss(image, batch["table"]),
        }

    def matching_loss(self, image: Tensor, table: Tensor, similarity: Tensor) -> Tensor:
        """ITM of image and table tokens (B, ., width), paired row by row, with the similarity S (B, B)."""
        rows = torch.arange(len(image), device=image.device)
        images, tables = [rows], [rows]
        if len(rows) > 1:
            images += [rows, hard_negatives(similarity.T)]
            tables += [hard_negatives(similarity), rows]
        images, tables = torch.cat(images), torch.cat(tables)
        logits = self.matching(self.multimodal(table[tables], image[images])[:, 0])
        return F.cross_entropy(logits, (images == tables).long())

    def reconstruction_loss(self, image: Tensor, table: Tensor) -> Tensor:
        """MTR from image tokens (B, ., width) and encoded rows (B, D)."""
        encoder = self.table_encoder
        ids, numbers = encoder.cells(table)
        masked = random_mask(len(table), encoder.count, self.settings.masked, table.device)
        cells = self.multimodal(encoder(table, masked), image)[:, 1:]
        split = [ids.shape[1], numbers.shape[1]]
        (categorical, numeric), (masked_ids, masked_numbers) = cells.split(split, 1), masked.split(split, 1)
        errors = []
        if masked_ids.any():
            errors.append(F.cross_entropy(self.category(categorical[masked_ids]), ids[masked_ids]))
        if masked_numbers.any():
            errors.append(F.mse_loss(self.number(numeric[masked_numbers])[:, 0], numbers[masked_numbers]))
        return torch.stack(errors).mean()


# As in the paper's code: normalisation before each part, GELU, no dropout.
_BLOCK = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}


class TableTransformer(nn.Module):
    """A CLS token and a token for each of n cells, the categorical ones first: (B, D) to (B, 1 + n, width).

    The categories of all columns share one vocabulary, with one more entry a column for an unknown category. Numbers
    share one linear layer. A hidden cell is replaced by a learned token, and no other token attends to a hidden cell.

    Args:
        columns: where the n raw columns stand in the encoded table.
        width: number of features of a token.
        blocks: number of transformer blocks.
        heads: number of attention heads.

    Attributes:
        count: number of cells n.
        vocabulary: number of entries in the vocabulary.
    """

    def __init__(self, columns: Sequence[TableColumn], width: int, blocks: int, heads: int) -> None:
        super().__init__()
        self.count, self.heads = len(columns), heads
        self.categorical = [column for column in columns if column.categorical]
        self.numeric = [column.start for column in columns if not column.categorical]
        *self.offsets, self.vocabulary = accumulate(
            (column.stop - column.start + 1 for column in self.categorical), initial=0
        )
        self.categories = nn.Embedding(self.vocabulary, width)
        self.numbers = nn.Linear(1, width)
        self.special = nn.Embedding(2, width)  # CLS and the hidden cell
        self.columns = nn.Embedding(1 + self.count, width)
        for layer in (self.categories, self.numbers, self.special, self.columns):
            nn.init.normal_(layer.weight, std=0.02)  # equal sizes, because cell and column are summed
        nn.init.zeros_(self.numbers.bias)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, **_BLOCK)
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)

    def cells(self, table: Tensor) -> tuple[Tensor, Tensor]:
        """Places in the vocabulary of the categorical cells (B, .), and values of the numeric cells (B, .)."""
        ids = categories(table, self.categorical) + torch.tensor(self.offsets, dtype=torch.long, device=table.device)
        return ids, table[:, self.numeric]

    def forward(self, table: Tensor, masked: Tensor | None = None) -> Tensor:
        """Tokens (B, 1 + n, width).

        Args:
            table: float (B, D), the encoded rows.
            masked: bool (B, n), the cells to hide; categorical cells come first.
        """
        ids, numbers = self.cells(table)
        cells = torch.cat([self.categories(ids), self.numbers(numbers.unsqueeze(2))], dim=1)
        cls, hidden = self.special.weight
        if masked is not None:
            cells = torch.where(masked.unsqueeze(2), hidden, cells)
        tokens = torch.cat([cls.expand(len(table), 1, -1), cells], dim=1)
        blocked = None if masked is None else self._blocked(masked)
        encoded: Tensor = self.blocks(self.norm(tokens + self.columns.weight), mask=blocked)
        return encoded

    def _blocked(self, masked: Tensor) -> Tensor:
        """Which attention is blocked, bool (B heads, 1 + n, 1 + n): a hidden token is seen by itself alone."""
        hidden = F.pad(masked, (1, 0))
        itself = torch.eye(1 + self.count, dtype=torch.bool, device=masked.device)
        return (hidden.unsqueeze(1) & ~itself).repeat_interleave(self.heads, dim=0)


def hard_negatives(similarity: Tensor) -> Tensor:
    """A column j ≠ i for each row i of (B, B), with probability ∝ softmax_j + 1e-4."""
    # A diverging encoder gives NaN: any column will do then, because the check of the loss stops the run.
    weights = (similarity.softmax(dim=1).nan_to_num(0) + 1e-4).fill_diagonal_(0)
    return torch.multinomial(weights, 1).squeeze(1)


def random_mask(rows: int, cells: int, share: float, device: torch.device) -> Tensor:
    """Bool (rows, cells): in each row round(share * cells) random cells, at least one, are true."""
    count = max(1, round(share * cells))
    return torch.rand(rows, cells, device=device).argsort(dim=1) < count
