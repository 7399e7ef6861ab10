"""Which fusion of the voices to take, by their loss on rows that the fusion has not seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from sklearn.model_selection import KFold
from torch import Tensor

from ..tasks import Task

FUSIONS = ("mean", "product", "calibrated")
_PARTS = 5


def fusion_losses(
    task: Task, fused: Mapping[str, Tensor], voices: Mapping[str, Tensor], target: Tensor
) -> dict[str, float]:
    """The loss of each fusion on validation rows, that of the calibrated one cross-validated.

    Mean and product have nothing fitted, and their loss is that of all rows. The calibrated fusion is fitted five times
    on four fifths of the rows, and its loss is that of the rest: rows are few, and it has been fitted to them.

    Args:
        task: has the loss, and fits the calibrated fusion.
        fused: outputs (N, C) of each fusion.
        voices: outputs (N, C) of each voice.
        target: (N,) or (N, L).
    """
    losses = {name: task.loss(outputs, target).item() for name, outputs in fused.items()}
    if len(target) < _PARTS:
        return losses
    twin = task.calibrated(list(voices)).to(fused["calibrated"]).requires_grad_(False)
    outputs = torch.empty_like(fused["calibrated"])
    for fitted, judged in KFold(_PARTS, shuffle=True, random_state=0).split(target.cpu()):
        task.fit(twin, {name: values[fitted] for name, values in voices.items()}, target[fitted])
        outputs[judged] = twin({name: values[judged] for name, values in voices.items()})
    return losses | {"calibrated": task.loss(outputs, target).item()}
