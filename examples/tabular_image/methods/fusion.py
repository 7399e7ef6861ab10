"""Which fusion of the voices to take, by their loss on rows that the fusion has not seen."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from sklearn.model_selection import KFold
from torch import Tensor

from gaal_surgery import CalibratedFusion

FUSIONS = ("mean", "product", "calibrated")
_PARTS = 5


def fusion_losses(
    calibrated: CalibratedFusion, fused: Mapping[str, Tensor], voices: Mapping[str, Tensor], target: Tensor
) -> dict[str, float]:
    """The cross-entropy of each fusion on validation rows, that of the calibrated one cross-validated.

    Mean and product have nothing fitted, and their loss is that of all rows. The calibrated fusion is fitted five times
    on four fifths of the rows, and its loss is that of the rest: rows are few, and it has been fitted to them.

    Args:
        calibrated: what to fit; left as it is.
        fused: logits (N, C) of each fusion.
        voices: logits (N, C) of each voice.
        target: (N,).
    """
    losses = {name: F.cross_entropy(logits, target).item() for name, logits in fused.items()}
    if len(target) < _PARTS:
        return losses
    twin = CalibratedFusion(calibrated.modalities, len(calibrated.bias)).to(calibrated.bias).requires_grad_(False)
    logits = torch.empty_like(fused["calibrated"])
    for fitted, judged in KFold(_PARTS, shuffle=True, random_state=0).split(target.cpu()):
        twin.fit({name: values[fitted] for name, values in voices.items()}, target[fitted])
        logits[judged] = twin({name: values[judged] for name, values in voices.items()})
    return losses | {"calibrated": F.cross_entropy(logits, target).item()}
