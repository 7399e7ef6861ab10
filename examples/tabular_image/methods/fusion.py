"""Choosing a fusion of the voices by the loss on rows to which the fusion was not fitted."""

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
    """The loss of each fusion on validation rows. The loss of the calibrated fusion is cross-validated.

    Mean and product fit nothing, and their losses are taken on all rows. The calibrated fusion is fitted to these few
    rows, so that its loss on the same rows would be too low. Five times a copy of the calibrated fusion is fitted to
    four fifths of the rows and predicts the last fifth. With fewer than five rows the loss is not cross-validated.

    Args:
        task: computes the loss, and fits the calibrated fusion.
        fused: outputs (N, C) of each fusion.
        voices: outputs (N, C) of each voice.
        target: targets (N,), or (N, L) for L labels.

    Returns:
        The loss by the name of the fusion.
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
