"""Which samples guide the surgery, and their gradient: uncertainty scores, selection, the guide gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gaal_surgery.per_sample import (
    LossFn,
    as_input,
    evaluate,
    frozen,
    logit_gradient,
    pull_back,
    pulled_back_norms,
)

Uncertainty = Callable[[Tensor], Tensor]


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the predicted distribution, in nats: the uncertainty score of the paper (Eq. 6).

    Args:
        logits: ``(B, C)`` with ``C >= 2``.

    Returns:
        ``(B,)`` in [0, log C], float32 or wider.

    Raises:
        ValueError: the logits are not ``(B, C)``, or have a single column.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must be (B, C), not {tuple(logits.shape)}: pass another `uncertainty` for them")
    if logits.shape[1] == 1:
        raise ValueError(
            "logits have a single column, whose softmax entropy is always 0: for a binary head pass "
            "uncertainty=lambda logits: -logits.squeeze(1).abs()"
        )
    log_q = torch.log_softmax(logits, dim=1, dtype=torch.promote_types(logits.dtype, torch.float32))
    # entr(0) is 0: a class that is out of the question contributes nothing.
    scores: Tensor = torch.special.entr(log_q.exp()).sum(dim=1)
    return scores


def select_uncertain(scores: Tensor, fraction: float) -> Tensor:
    """Positions of the most uncertain samples (Eq. 7).

    Args:
        scores: ``(B,)``, higher is harder. NaN counts as hardest.
        fraction: lambda of the paper, the share to select, in (0, 1].

    Returns:
        ``(k,)`` int64 with ``k = max(1, floor(fraction * B))``, hardest first; ties keep the order of the batch.

    Raises:
        ValueError: ``scores`` is not a non-empty vector, or ``fraction`` is outside (0, 1].
    """
    check_fraction(fraction)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores must be (B,) with B >= 1, not {tuple(scores.shape)}: give one score a sample")
    count = max(1, math.floor(fraction * len(scores)))
    return torch.argsort(scores, descending=True, stable=True)[:count]


def guide_gradient(
    shared: nn.Module, features: Tensor, target: Tensor, loss_fn: LossFn, *, max_norm: float | None = None
) -> dict[str, Tensor]:
    """Mean gradient of the given samples on the shared module, the paper's g_p (Eq. 8), in one backward pass.

    The module runs in eval mode (running statistics, no dropout) and in its own precision, autocast or not. Nothing in
    it changes: no parameter, buffer or ``.grad``.

    Args:
        shared: module from features to logits.
        features: ``(k, ...)``, treated as constants.
        target: ``(k, ...)``.
        loss_fn: ``(logits, target) -> scalar``, mean-reduced.
        max_norm: clip each sample's gradient to this norm before the mean; None does not clip.

    Returns:
        By parameter name, the shape of the parameter. Frozen parameters are left out.

    Raises:
        TypeError: ``max_norm`` is not a number.
        ValueError: features and target differ in length, the module cannot take the features, the loss cannot take the
            target or is not a scalar, or ``max_norm`` is not positive.
    """
    check_max_norm(max_norm)
    with frozen(shared, features):
        features = as_input(shared, features, target)
        return _mean_gradient(shared, features, evaluate(shared, features), target, loss_fn, max_norm)


def uncertain_gradient(
    shared: nn.Module,
    features: Tensor,
    target: Tensor,
    loss_fn: LossFn,
    *,
    fraction: float,
    uncertainty: Uncertainty,
    max_norm: float | None,
) -> dict[str, Tensor]:
    """Eqs. 6-8 in a row: score the ``(B, ...)`` samples, select the most uncertain, return their guide gradient."""
    with frozen(shared, features):
        features = as_input(shared, features, target)
        logits = evaluate(shared, features)
        scores = uncertainty(logits)
        if scores.shape != features.shape[:1]:
            raise ValueError(
                f"uncertainty must return one score a sample, ({len(features)},), not {tuple(scores.shape)}"
            )
        chosen = select_uncertain(scores, fraction)
        return _mean_gradient(shared, features[chosen], logits[chosen], target[chosen], loss_fn, max_norm)


def check_fraction(fraction: float) -> None:
    """Raise unless ``fraction`` is a number in (0, 1]."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(f"fraction must be a number in (0, 1], not {type(fraction).__name__}")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], not {fraction}: it is the share of samples that guide")


def check_max_norm(max_norm: float | None) -> None:
    """Raise unless ``max_norm`` is None or positive."""
    if max_norm is None:
        return
    if isinstance(max_norm, bool) or not isinstance(max_norm, (int, float)):
        raise TypeError(f"max_norm must be a number or None, not {type(max_norm).__name__}")
    if not max_norm > 0:
        raise ValueError(f"max_norm must be positive, or None for no clipping, not {max_norm}")


def _mean_gradient(
    shared: nn.Module, features: Tensor, logits: Tensor, target: Tensor, loss_fn: LossFn, max_norm: float | None
) -> dict[str, Tensor]:
    cotangents = logit_gradient(logits, target, loss_fn)
    if max_norm is not None:
        # Clipping a sample's gradient scales its row: the mean of the clipped gradients is still one backward pass.
        norms = len(features) * pulled_back_norms(shared, features, cotangents)
        scale = (max_norm / norms).clamp(max=1).to(cotangents.dtype)
        cotangents = cotangents * scale.view(-1, *[1] * (cotangents.ndim - 1))
    return pull_back(shared, features, cotangents)
