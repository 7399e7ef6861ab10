"""CHARMS: groups of the image's channels are paired with the table's columns and learn to predict them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import ot
import torch
import torch.nn.functional as F
from rtdl_revisiting_models import FTTransformer
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..options import Options
from .base import Logits, Method
from .settings import CHARMSSettings


class CHARMS(Method):
    """Channel-tabular alignment by optimal transport (Jiang et al., ICML 2024; code repository RyanJJP/CHARMS).

    u are the image's features, f is the image classifier, and g is an FT-Transformer on the table. Column i has a
    linear head h_i and channels a_i in {0, 1}^width:

        L = CE(f(u), y) + 0.6 CE(g(x_T), y) + 0.03 mean_num MSE(h_i(a_i * u), x_i) + 0.03 mean_cat CE(h_i(a_i * u), x_i)

    Between epochs `pair_channels` sets a from training rows. A column keeps the groups of channels whose similarities
    between rows are closest to the similarities of the column. The repository pairs every five epochs. Here `pairings`
    divide the training evenly, so that a short training pairs too.

    f is two linear layers without a nonlinearity, as in the repository. g shares nothing with the image. g learns a
    token for each column, and the pairing compares these tokens after g's last block, as in the repository. The
    repository patches `rtdl`, where CLS is the last token, to return all tokens but the last. In
    `rtdl_revisiting_models` CLS is the first token, and the last block attends for CLS alone. For the pairing the last
    block attends for every column.

    The repository pairs on all validation rows. Here training rows keep the validation clean, and at most 512 rows
    bound the cost.

    Reports the image, f. Fused and table cells are empty, because there is no table at test time.

    Attributes:
        channels: a, bool (columns, width).
    """

    Settings = CHARMSSettings
    modalities = ("image",)
    channels: Tensor

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        self.head = nn.Sequential(nn.Linear(self.width, self.width // 2), nn.Linear(self.width // 2, self.outputs))
        widths = [column.stop - column.start for column in data.table_columns]
        self.categories = [
            width for column, width in zip(data.table_columns, widths, strict=True) if column.categorical
        ]
        self.numbers = len(widths) - len(self.categories)  # the first columns of the encoded table
        self.table_model = FTTransformer(
            n_cont_features=self.numbers,
            cat_cardinalities=self.categories,
            d_out=self.outputs,
            n_blocks=2,
            d_block=8,
            attention_n_heads=8,
            attention_dropout=0.1,
            ffn_d_hidden=6,
            ffn_d_hidden_multiplier=None,
            ffn_dropout=0.2,
            residual_dropout=0.0,
        )
        # All heads in one layer, laid out as the encoded table.
        self.attribute_heads = nn.Linear(self.width, data.table_width)
        self.register_buffer("channels", torch.ones(len(widths), self.width, dtype=torch.bool))
        self.register_buffer("head_of", torch.arange(len(widths)).repeat_interleave(torch.tensor(widths)), False)

    def forward(self, batch: Batch) -> Logits:
        """Logits (B, C) under "image"; the table is never looked at."""
        return {"image": self.head(self.encoders["image"](batch["image"]))}

    def on_train_epoch_start(self) -> None:
        """Pair channels and columns before the epochs of `pairing_epochs`."""
        if self.stage_epoch in pairing_epochs(self.stage.epochs, self.settings.pairings):
            self.eval()
            self.pair(self.trainer.datamodule.train_dataloader())
        super().on_train_epoch_start()

    @torch.no_grad()
    def pair(self, batches: Iterable[Batch]) -> None:
        """Set `channels` from the first rows of some batches, by the current networks."""
        tables: list[Tensor] = []
        maps: list[Tensor] = []
        for batch in batches:
            tables.append(batch["table"].to(self.device, self.dtype))
            maps.append(self.encoders["image"].maps(batch["image"].to(self.device, self.dtype)))
            if sum(map(len, tables)) >= self.settings.rows:
                break
        rows = slice(self.settings.rows)
        compared = self.tokens(torch.cat(tables)[rows]), torch.cat(maps)[rows]
        if all(values.isfinite().all() for values in compared):  # else the training has diverged
            paired = pair_channels(*(values.cpu().numpy() for values in compared), self.settings.clusters)
            self.channels.copy_(torch.from_numpy(paired))

    def columns(self, table: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Numbers (B, numbers) and category codes (B, categories) of encoded rows; None without such columns."""
        numbers, one_hot = table.split([self.numbers, sum(self.categories)], dim=1)
        codes = [block.argmax(dim=1) for block in one_hot.split(self.categories, dim=1)] if self.categories else []
        return numbers if self.numbers else None, torch.stack(codes, dim=1) if codes else None

    def tokens(self, table: Tensor) -> Tensor:
        """The table model's token (B, columns, 8) of each column, after its blocks."""
        left: list[Tensor] = []
        last = self.table_model.backbone.blocks[-1]
        with (
            last["attention"].register_forward_pre_hook(lambda module, inputs: (inputs[1], inputs[1])),  # all attend
            last["output"].register_forward_hook(lambda module, inputs, tokens: left.append(tokens)),
        ):
            self.table_model(*self.columns(table))
        return left[0][:, 1:]  # the first one is CLS

    def attributes(self, features: Tensor) -> Tensor:
        """The heads' predictions (B, D) from features (B, width). Each head sees the channels of its column."""
        # Masking the weights of one layer gives each head its own masked features.
        weight = self.attribute_heads.weight * self.channels[self.head_of]
        return F.linear(features, weight, self.attribute_heads.bias)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The four losses by name. A kind of columns that the table lacks has no loss."""
        table, target = batch["table"], batch["target"]
        features = self.encoders["image"](batch["image"])
        losses = {
            "image": self.task.loss(self.head(features), target),
            "table": self.task.loss(self.table_model(*self.columns(table)), target),
        }
        layout = [self.numbers, *self.categories]
        predicted, blocks = self.attributes(features).split(layout, dim=1), table.split(layout, dim=1)
        if self.numbers:
            losses["numeric"] = F.mse_loss(predicted[0], blocks[0])
        if self.categories:
            pairs = zip(predicted[1:], blocks[1:], strict=True)
            losses["categorical"] = torch.stack([F.cross_entropy(logits, one_hot) for logits, one_hot in pairs]).mean()
        return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum of the losses."""
        weights = {name: getattr(self.settings, f"{name}_weight", 1.0) for name in losses}
        return torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on all losses."""
        losses = self.losses(batch)
        self.descend(self.total(losses))
        self.log_losses(losses, batch)


def pairing_epochs(epochs: int, pairings: int) -> set[int]:
    """The epochs, from 0, before which a training of `epochs` epochs pairs. The first epoch is never among them."""
    return {-(-epochs * number // (pairings + 1)) for number in range(1, pairings + 1)} - {epochs}


def pair_channels(tokens: np.ndarray, maps: np.ndarray, clusters: int) -> np.ndarray:
    """The channels that each column keeps: the channels of the groups that the transport plan connects with the column.

    A group is a cluster of channels by the channels' values over rows and positions. The group takes the values of the
    cluster's centre.

    Args:
        tokens: tokens (N, columns, E) of N rows.
        maps: feature maps (N, channels, H, W) of these rows.
        clusters: most groups; there are at most as many groups as different channels.

    Returns:
        Bool (columns, channels). Each column has at least one channel, and each channel at least one column.
    """
    rows, channels = maps.shape[:2]
    vectors = maps.swapaxes(0, 1).reshape(channels, -1).astype(np.float64)
    clusters = min(clusters, len(np.unique(vectors, axis=0)))
    # Several threads add in any order, and a resumed run would then differ in the last digit.
    with threadpool_limits(limits=1, user_api="openmp"):
        groups = KMeans(clusters, n_init="auto", random_state=0).fit(vectors)
    centres = groups.cluster_centers_.reshape(clusters, rows, -1)
    plan = transport_plan(similarity_cost(tokens.swapaxes(0, 1).astype(np.float64), centres))
    # A plan at a vertex of the polytope has multiples of 1 / (columns * clusters). Half of that unit is the border
    # between zero with rounding errors and a true entry.
    paired: np.ndarray = (plan > 0.5 / plan.size)[:, groups.labels_]
    return paired


def similarity_cost(columns: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Squared Frobenius distance between the Gram matrices X X^T / |X|_F^2 of columns and of groups.

    Args:
        columns: A matrices X (N, E) in one array (A, N, E).
        groups: J matrices (N, P) in one array (J, N, P).

    Returns:
        Array (A, J).
    """
    columns, groups = (matrices / np.maximum(_norm(matrices), np.finfo(float).tiny) for matrices in (columns, groups))
    # |X X^T - Y Y^T|^2 = |X^T X|^2 + |Y^T Y|^2 - 2 |X^T Y|^2 in Frobenius norms. No matrix (N, N) is needed.
    own = [_norm(matrices.swapaxes(1, 2) @ matrices)[:, 0, 0] ** 2 for matrices in (columns, groups)]
    shared = np.stack([(np.einsum("ane,np->aep", columns, group, optimize=True) ** 2).sum((1, 2)) for group in groups])
    return np.maximum(own[0][:, None] + own[1] - 2 * shared.T, 0)


def _norm(matrices: np.ndarray) -> np.ndarray:
    norm: np.ndarray = np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    return norm


def transport_plan(cost: np.ndarray) -> np.ndarray:
    """The cheapest transport plan (A, J) between uniform marginals for a cost (A, J), solved exactly."""
    columns, groups = cost.shape
    plan: np.ndarray = ot.emd(ot.unif(columns), ot.unif(groups), cost, numItermax=1_000_000)
    return plan
