"""MFH: a teacher that sees only the table columns that the image can explain teaches the image model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.module import Batch, TabularImageData
from ..data.tables import TableColumn
from ..options import Options
from .base import Stage
from .kd import KD, distillation
from .settings import MFHSettings


class MFH(KD):
    """Distillation of what both modalities know, after the modality focusing hypothesis (Xue et al., ICLR 2023).

    The form for tables is from Jiang et al. (UniReps 2023, PMLR 243), who remove columns. The ranking is from the code
    repository zihuixue/MFH, which removes channels of the teacher's features. g is the table model, f the image model.

        Stage "pair":     CE(g(x_T), y) + CE(f(x_I), y) + mean (g(x_T) - f(x_I))^2
        saliency of d:    mean over permutations of mean (g(x_T with column d permuted over the rows) - f(x_I))^2,
                          scaled to [0, 1]; high where g uses d and f has what g reads there
        Stage "teacher":  CE(g(x_T), y) of a new g that sees zeros in the columns of the lowest saliency
        Stage "student":  KL(softmax(g(x_T)) || softmax(f(x_I))) of a new f; no label

    r is the share of columns to remove. A categorical column is ranked, kept or removed with all its categories. With
    r = 0 there is nothing to rank: stage "pair" is left out, and the run equals a run of `kd` with weight and
    temperature 1. The divergence is the mean over the batch. The repository also divides by the number of classes,
    which almost stops the student where there are many classes.

    Reports the image, f. Fused and table cells are empty, because there is no table at test time.

    Attributes:
        pair: encoders and heads of stage "pair".
        saliency: the saliency of each column of the raw table, (columns,).
        kept: the encoded columns that the teacher sees, bool (D,).
    """

    Settings = MFHSettings
    several_processes = False  # saliency is measured on the rows of one loader
    saliency: Tensor
    kept: Tensor

    def __init__(self, data: TabularImageData, options: Options) -> None:
        super().__init__(data, options)
        # Copies draw no random numbers, so that the numbers drawn afterwards equal those of KD.
        self.pair = nn.ModuleDict(
            {
                "image": copy.deepcopy(nn.Sequential(self.encoders["image"], self.head)),
                "table": copy.deepcopy(nn.Sequential(self.encoders["table"], self.teacher_head[-1])),  # without dropout
            }
        )
        self.columns = data.table_columns
        self.register_buffer("saliency", torch.zeros(len(self.columns)))
        self.register_buffer("kept", torch.ones(data.table_width, dtype=torch.bool))

    def stages(self) -> list[Stage]:
        """Both models together, then the teacher, then the student."""
        settings = self.settings
        pair = Stage("pair", settings.pair_epochs, [self.pair])
        teacher = Stage("teacher", settings.teacher_epochs, [self.encoders["table"], self.teacher_head])
        student = Stage("student", self.options.epochs, [self.encoders["image"], self.head])
        return [pair, teacher, student] if settings.removed else [teacher, student]

    def begin_stage(self) -> None:
        """Choose the columns before the teacher learns from them."""
        if self.stage.name == "teacher" and self.settings.removed:
            self.choose_columns(self.trainer.datamodule.train_dataloader())

    @torch.no_grad()
    def choose_columns(self, batches: Iterable[Batch]) -> None:
        """Set `saliency` from the trained pair and the first rows of some batches. Then set `kept` by `saliency`."""
        self.pair.eval()
        tables: list[Tensor] = []
        logits: list[Tensor] = []
        for batch in batches:
            tables.append(batch["table"].to(self.device, self.dtype))
            logits.append(self.pair["image"](batch["image"].to(self.device, self.dtype)))
            if sum(map(len, tables)) >= self.settings.rows:
                break
        rows = slice(self.settings.rows)
        table, student = torch.cat(tables)[rows], torch.cat(logits)[rows]
        self.saliency.copy_(saliency(self.pair["table"], table, student, self.columns, self.settings.permutations))
        count = int(self.settings.removed * len(self.columns))
        self.kept.fill_(True)
        for position in self.saliency.argsort(stable=True)[:count].tolist():
            self.kept[self.columns[position].start : self.columns[position].stop] = False

    def teach(self, batch: Batch) -> Tensor:
        """The logits (B, C) of the teacher, which sees only the kept columns."""
        return super().teach(batch | {"table": batch["table"].masked_fill(~self.kept, 0)})

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One step on the losses of the stage."""
        match self.stage.name:
            case "pair":
                image, table = (self.pair[modality](batch[modality]) for modality in ("image", "table"))
                losses = {
                    "pair_image": self.task.loss(image, batch["target"]),
                    "pair_table": self.task.loss(table, batch["target"]),
                    "agreement": F.mse_loss(image, table),
                }
            case "teacher":
                losses = {"teacher": self.task.loss(self.teach(batch), batch["target"])}
            case _:
                losses = {"distillation": distillation(self(batch)["image"], self.teach(batch))}
        self.descend(torch.stack(list(losses.values())).sum())
        self.log_losses(losses, batch)


def saliency(
    teacher: Callable[[Tensor], Tensor],
    table: Tensor,
    student: Tensor,
    columns: Sequence[TableColumn],
    permutations: int,
) -> Tensor:
    """How far a teacher is from a student when a column is permuted, scaled to [0, 1] over the columns.

    Args:
        teacher: from rows (N, D) to logits (N, C).
        table: rows (N, D).
        student: the student's logits (N, C) for these rows.
        columns: the A columns to rank.
        permutations: number of permutations to average over.

    Returns:
        Tensor (A,). Zeros where all columns have the same distance.
    """
    distances = table.new_zeros(len(columns))
    for position, column in enumerate(columns):
        for _ in range(permutations):
            permuted = table.clone()
            permuted[:, column.start : column.stop] = table[torch.randperm(len(table)), column.start : column.stop]
            distances[position] += F.mse_loss(teacher(permuted), student) / permutations
    distances -= distances.min()
    return distances / distances.max().clamp_min(torch.finfo(distances.dtype).tiny)
